"""The two transposed products backward passes need, in the forms XLA:CPU hands to its matrix library without a copy."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The accumulation type of a compute type: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def dot_rt(a: Array, b: Array, *, accumulate: bool = False) -> Array:
    """a b^T without materialising the transpose: [m, k], [n, k] -> [m, n]; `accumulate` returns the wide type."""
    result = wide(a.dtype) if accumulate else None
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=result)


def dot_lt(a: Array, b: Array) -> Array:
    """a^T b in the wide type, the form weight gradients take: [m, k], [m, n] -> [k, n]."""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=wide(a.dtype))
