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
        if not _on_device(leaf) and np.asarray(leaf).dtype.kind not in "biufcV":  # V: bfloat16 and other small floats
            raise ValueError(f"leaf {path!r} = {leaf!r}: expected numbers of at most 64 bits")
        if path in leaves:
            raise ValueError(f"leaf {path!r}: expected one leaf of this path, found two")
        leaves[path] = leaf
    return leaves


def describe(leaf: Any) -> str:
    """dtype and shape, such as `float32[8, 4]`, as arrays on devices really have them (64 bits need jax_enable_x64)."""
    if not _on_device(leaf):
        leaf = np.asarray(leaf)
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    dtype = leaf.dtype if is_key or not _on_device(leaf) else jax.dtypes.canonicalize_dtype(leaf.dtype)
    return f"{dtype}{list(leaf.shape)}"


def like(value: Any, example: Any = None) -> Any:
    """`value` as what `example` is; without an example, host values are copied. None stands for no elements."""
    if example is None:
        return value if _on_device(value) else np.array(value)
    if value is None:
        host = np.zeros(example.shape, example.dtype)
        return jax.device_put(host, _placement(example)) if _on_device(example) else host
    if isinstance(example, np.generic):
        return np.asarray(value)[()]
    return type(example)(value.item()) if isinstance(example, (bool, int, float, complex)) else value


def target(leaf: Any) -> Any:
    """What Orbax is asked to read: shape, dtype and place."""
    if _on_device(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_placement(leaf))
    host = np.asarray(leaf)
    return np.broadcast_to(np.zeros((), host.dtype), host.shape)


def _on_device(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))


def _placement(leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    return SingleDeviceSharding(jax.local_devices()[0]) if sharding is None else sharding
