"""The one form of bad-input error, here too because kernels import nothing of the project."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def require(ok: bool, field: str, value: object, expected: str) -> None:
    """Raises a ValueError that names the field, the value and what was expected, unless `ok`."""
    if not ok:
        raise ValueError(f"{field} = {value!r}: expected {expected}")


def require_shape(field: str, array: Array, shape: tuple[int | None, ...], expected: str) -> None:
    """Checks rank and sizes; None accepts any size."""
    ok = len(array.shape) == len(shape) and all(want is None or want == got for want, got in zip(shape, array.shape))
    require(ok, f"{field}.shape", tuple(array.shape), expected)


def require_integer(field: str, array: Array) -> None:
    require(jnp.issubdtype(array.dtype, jnp.integer), f"{field}.dtype", array.dtype.name, "an integer type")


def require_float(field: str, array: Array) -> None:
    """Narrow types are for kernels that know their scales: a product would widen or saturate them in silence."""
    ok = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize >= 2
    require(ok, f"{field}.dtype", array.dtype.name, "a float type of at least 16 bits")


def require_choice(field: str, value: object, choices: tuple[object, ...]) -> None:
    require(value in choices, field, value, "one of " + ", ".join(map(repr, choices)))
