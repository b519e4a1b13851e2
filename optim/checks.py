"""What bad input says."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax import Array


def require(ok: bool, field: str, value: object, expected: str) -> None:
    """Raises ValueError "field = value: expected ..." unless `ok`."""
    if not ok:
        raise ValueError(f"{field} = {value!r}: expected {expected}")


def require_schedule(update_gap: Any, seed: Any) -> None:
    """ValueError unless these are whole numbers, the first at least 1; or traced, as injected hyperparameters are."""
    whole = lambda value: isinstance(value, int | np.integer) and not isinstance(value, bool)  # noqa: E731
    every = isinstance(update_gap, Array) or (whole(update_gap) and update_gap >= 1)
    require(every, "update_gap", update_gap, "a whole number, at least 1")
    require(isinstance(seed, Array) or whole(seed), "seed", seed, "a whole number: draws are a function of it")
