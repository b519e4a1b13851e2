"""Triton kernels on a CPU, in Triton's own interpreter over NumPy memory: numbers, not speed.

Set TRITON_INTERPRET=1 before anything imports triton, in a process of its own: a kernel made so cannot be compiled.
Every buffer lies between guard bands: of not-a-numbers, so that a read past an end shows in the result, and looked at
afterwards, so that a write past an end raises. Outputs begin as not-a-numbers too. The interpreter computes bfloat16 on
its bits and rounds to it by truncation, so bfloat16 is refused here: float16 takes the same paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels.checks import require

GUARD = 8192  # elements on each side
UNREAD = -1  # what guards of integers hold: as an index it leads to the guard of what is indexed
UNWRITTEN = -(2**30)
DTYPES = {
    "float32": "fp32", "float16": "fp16", "int8": "i8", "uint8": "u8", "int32": "i32", "int64": "i64", "bool": "i1",
}  # fmt: skip


class Buffer:
    """An array between its guards, with the little of a tensor that the interpreter asks for."""

    def __init__(self, array: np.ndarray, name: str):
        floating = np.issubdtype(array.dtype, np.floating)
        fill = np.nan if floating else array.dtype.type(UNREAD if np.issubdtype(array.dtype, np.signedinteger) else 0)
        self.name, self.dtype = name, DTYPES[array.dtype.name]
        self.memory = np.full(array.size + 2 * GUARD, fill, array.dtype)
        self.array = self.memory[GUARD : GUARD + array.size].reshape(array.shape)
        self.array[...] = array
        self.before = self.memory.copy()

    def check(self, *, read_only: bool) -> None:
        """RuntimeError where a guard, or an input, was written."""
        changed = self.memory.view(np.uint8) != self.before.view(np.uint8)
        if not read_only:
            inner = slice(GUARD * self.memory.itemsize, (GUARD + self.array.size) * self.memory.itemsize)
            changed[inner] = False
        if changed.any():
            at = int(np.flatnonzero(changed)[0]) // self.memory.itemsize - GUARD
            raise RuntimeError(f"{self.name} was written at element {at}, of {self.array.size}")

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> Buffer:
        return self

    def cpu(self) -> Buffer:
        return self

    def copy_(self, other: Buffer) -> None:
        """Nothing: the interpreter has worked in place."""

    def new_empty(self, size: int, device: str) -> Buffer:
        return self

    def set_(self, *of_the_same: Any) -> None:
        """Nothing: there is but one view."""

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)


def interpret(
    kernel: Any, arrays: Sequence[Array], outputs: Sequence[jax.ShapeDtypeStruct], grid: tuple[int, ...],
    constants: Mapping[str, Any],
) -> tuple[Array, ...]:  # fmt: skip
    """`kernels._triton.call`, here.

    Raises:
      ValueError: a dtype the interpreter does not compute right.
      RuntimeError: a write outside of a buffer, or to an input (JAX wraps it in an error of its own).
    """
    for array in (*arrays, *outputs):
        name = jnp.dtype(array.dtype).name
        require(name in DTYPES, "dtype", name, f"one of {', '.join(DTYPES)} in the interpreter")
    names = kernel.arg_names if hasattr(kernel, "arg_names") else [str(i) for i in range(len(arrays) + len(outputs))]

    def run(*values: Any) -> tuple[np.ndarray, ...]:
        read = [Buffer(np.asarray(value), name) for value, name in zip(values, names)]
        made = [Buffer(unwritten(shape), name) for shape, name in zip(outputs, names[len(read) :])]
        kernel[grid](*read, *made, **constants)
        for buffer in read:
            buffer.check(read_only=True)
        for buffer in made:
            buffer.check(read_only=False)
        return tuple(buffer.array for buffer in made)

    return tuple(jax.pure_callback(run, tuple(outputs), *arrays))


def unwritten(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    dtype = np.dtype(shape.dtype)
    value = np.nan if np.issubdtype(dtype, np.floating) else UNWRITTEN if dtype.itemsize >= 4 else 0
    return np.full(shape.shape, value, dtype)
