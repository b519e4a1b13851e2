"""Leaves of a checkpoint: their paths, how they are described, stored and rebuilt, and a checksum of their values."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import SingleDeviceSharding

_CHUNK = 1 << 20  # words summed at a time on the host


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


def checksum(leaves: dict[str, Any]) -> list[int]:
    """sum_i (2 i + 1) w_i mod 2^32 over the words w of each leaf, in row-major order.

    Every weight is odd, so any one changed word shows; the weights differ, so do swapped ones. A sum has no order: the
    value is the same on every mesh. Words are the elements' own bits, up to 32; longer elements are two or four words.
    """
    values = [_host_checksum(x) if _on_host(x) else _device_checksum(x) for x in leaves.values()]
    return [int(value) for value in jax.device_get(values)]


def _on_device(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))


def _on_host(leaf: Any) -> bool:
    """Also arrays of this process' own CPU devices: no copy, and nothing to compile."""
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices())


def _placement(leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    return SingleDeviceSharding(jax.local_devices()[0]) if sharding is None else sharding


def _host_checksum(leaf: Any) -> np.uint32:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    host = np.ascontiguousarray(leaf).reshape(-1)
    words = host.view(f"u{min(host.dtype.itemsize, 4)}")
    odd = _odd_numbers()
    total = 0
    for start in range(0, words.size, _CHUNK):
        chunk = words[start : start + _CHUNK].astype(np.uint32, copy=False)
        total += int(np.dot(chunk, odd[: chunk.size])) + 2 * start * int(chunk.sum(dtype=np.uint32))
    return np.uint32(total % 2**32)


@functools.cache
def _odd_numbers() -> np.ndarray:
    return np.arange(1, 2 * _CHUNK, 2, dtype=np.uint32)


@jax.jit
def _device_checksum(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}").astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * np.uint32(size % 2**32) + lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)
