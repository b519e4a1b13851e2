"""Leaves of a checkpoint: their paths, how they are described, stored and rebuilt."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path, such as `params/layers/0/kernel`, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: a leaf is not an array or a number, or two leaves have the same path.
    """
    leaves: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic, bool, int, float, complex)):
            raise ValueError(f"leaf {path!r} = {type(leaf).__name__}: expected an array or a number")
        array = as_array(leaf)
        if isinstance(array, np.ndarray) and array.dtype.kind not in "biufcV":  # V: bfloat16 and the like
            raise ValueError(f"leaf {path!r} = {leaf!r}: expected numbers of at most 64 bits")
        if path in leaves:
            raise ValueError(f"leaf {path!r}: expected one leaf of this path, found two")
        leaves[path] = leaf
    return leaves


def as_array(leaf: Any) -> Any:
    """Arrays of devices as they are, host values as NumPy arrays."""
    return leaf if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) else np.asarray(leaf)


def describe(leaf: Any) -> str:
    """dtype and shape, such as `float32[8, 4]`, as arrays on devices really have them (64 bits need jax_enable_x64)."""
    array = as_array(leaf)
    on_host_or_key = isinstance(array, np.ndarray) or jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    dtype = array.dtype if on_host_or_key else jax.dtypes.canonicalize_dtype(array.dtype)
    return f"{dtype}{list(array.shape)}"


def rebuild(value: Any, example: Any) -> Any:
    """The array `value`, as it was read, in the form of `example`. None stands for an array without elements."""
    if value is None:
        host = np.zeros(example.shape, example.dtype)
        return host if isinstance(example, np.ndarray) else jax.device_put(host, _placement(example))
    if isinstance(example, np.generic):
        return np.asarray(value)[()]
    return type(example)(value.item()) if isinstance(example, (bool, int, float, complex)) else value


def target(leaf: Any) -> Any:
    """What Orbax is asked to read: shape, dtype and place."""
    array = as_array(leaf)
    if isinstance(array, np.ndarray):
        return np.broadcast_to(np.zeros((), array.dtype), array.shape)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=_placement(array))


def _placement(leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    return SingleDeviceSharding(jax.local_devices()[0]) if sharding is None else sharding
