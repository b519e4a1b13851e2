"""What bad input says."""

from __future__ import annotations


def require(ok: bool, field: str, value: object, expected: str) -> None:
    """Raises ValueError "field = value: expected ..." unless `ok`."""
    if not ok:
        raise ValueError(f"{field} = {value!r}: expected {expected}")
