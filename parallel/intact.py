"""Is what is read what was written? Checksums of leaves, and the sizes of a step's files.

The checksum is the last word: it is of the values, so it also sees what storage lets through (TensorStore checks its
indices, not its array data). The list of files comes first: it names a cut or missing file plainly.
"""

from __future__ import annotations

import functools
import json
import os
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FILES = "switchyard-files.json"
_SMALL = 1 << 20  # bytes; files up to this size are listed with a CRC-32
_CHUNK = 1 << 20  # words summed at a time on the host


def write_atomically(path: Path, value: Any) -> None:
    """Writes JSON so that `path` holds all of it or is as it was."""
    draft = path.with_name(path.name + ".tmp")
    with open(draft, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def list_files(step: Path) -> None:
    """Writes the list of a complete step's files into it. A step without one (killed just then) is complete too."""
    try:
        write_atomically(step / FILES, {str(p.relative_to(step)): _state(p) for p in step.rglob("*") if p.is_file()})
    except OSError:
        return  # the list only makes messages plainer


def damaged_file(step: Path) -> str | None:
    """What is wrong with the first file that is not as listed, if any."""
    try:
        listed = json.loads((step / FILES).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"{FILES} is unreadable ({error})"
    for name, state in listed.items():
        if not (step / name).is_file():
            return f"file {name} is missing"
        if (found := _state(step / name)) != state:
            return f"file {name} has [bytes, CRC-32] = {found}, it was saved with {state}"
    return None


def _state(path: Path) -> list[int]:
    size = path.stat().st_size
    return [size, zlib.crc32(path.read_bytes()) if size <= _SMALL else 0]


def checksum(leaves: dict[str, Any]) -> list[int]:
    """sum_i (2 i + 1) w_i mod 2^32 over the words w of each leaf, in row-major order.

    Every weight is odd, so any one changed word shows; the weights differ, so do swapped ones. A sum has no order: the
    value is the same on every mesh. Words are the elements' own bits, up to 32; longer elements are two or four words.
    """
    values = [_host_checksum(x) if _on_host(x) else _device_checksum(x) for x in leaves.values()]
    return [int(value) for value in jax.device_get(values)]


def _on_host(leaf: Any) -> bool:
    """Also arrays of this process' own CPU devices: no copy, and nothing to compile."""
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices())


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
