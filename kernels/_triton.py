"""The one door to Triton: calls of device kernels from JAX, under either jax-triton and in the NumPy interpreter.

Neither triton nor jax_triton is imported before a kernel is called: machines without a GPU need neither. jax-triton
0.3 and 0.4 differ in the name of one argument (`out_shape`, `out_type`); both put output pointers after all inputs.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
from jax import Array

from kernels.checks import require

OLDEST, DEFAULT_CAPABILITY = 80, 90
MULTIPROCESSORS = {80: 108, 90: 132}  # of A100, H100
_target: ContextVar[int | None] = ContextVar("target", default=None)


def interpreting() -> bool:
    """Whether this process runs kernels in Triton's interpreter: TRITON_INTERPRET=1, from its start."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available() -> bool:
    """Whether triton and jax_triton are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("triton", "jax_triton"))


@contextmanager
def target(capability: int) -> Iterator[None]:
    """Kernels traced inside are compiled for this compute capability, 80 or 90 say, on a machine without a GPU too.

    A function that `jax.jit` has traced before keeps what it was traced for: give it a new one, or clear its caches.

    Raises:
      ValueError: below 80.
    """
    require_capability(capability)
    token = _target.set(capability)
    try:
        yield
    finally:
        _target.reset(token)


def capability() -> int:
    """The compute capability kernels are compiled for: `target`'s, that of the GPU here, else 90.

    Raises:
      ValueError: a GPU below 80.
    """
    chosen = _target.get()
    if chosen is None and jax.default_backend() == "gpu":
        chosen = round(10 * float(jax.devices()[0].compute_capability))
        require_capability(chosen)
    return chosen or DEFAULT_CAPABILITY


def multiprocessors() -> int:
    """Of the GPU kernels are compiled for; a few in the interpreter, where programs come one after another."""
    if interpreting():
        return 3
    if _target.get() is None and jax.default_backend() == "gpu":
        return jax.devices()[0].core_count
    return MULTIPROCESSORS[90 if capability() >= 90 else 80]


def require_capability(capability: int) -> None:
    require(capability >= OLDEST, "compute capability", capability, f"at least {OLDEST} (A100); use ragged_dot below")


def installed(name: str) -> str:
    """A package's version, or an empty string."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def require_versions(jax_version: str, jax_triton_version: str) -> None:
    """ValueError for pairs of which the second is missing or known not to work, with what to install."""
    require(bool(jax_triton_version), "jax-triton", None, "an installed package; pip install 'switchyard[gpu]'")
    numbers = lambda text: tuple(int(part) for part in text.split(".")[:2])  # noqa: E731
    new_jax, new_triton = numbers(jax_version) >= (0, 12), numbers(jax_triton_version) >= (0, 4)
    old_rule = new_jax and numbers(jax_triton_version) < (0, 5)  # its dead-code rule has two arguments, JAX gives three
    require(not old_rule, "jax, jax-triton", (jax_version, jax_triton_version), "jax below 0.12 with this jax-triton")
    too_new = new_triton and numbers(jax_version) < (0, 11)
    require(not too_new, "jax, jax-triton", (jax_version, jax_triton_version), "jax-triton 0.3 with this jax")


def on_gpu(gpu: Callable[..., Any], cpu: Callable[..., Any], *args: Any) -> Any:
    """`gpu(*args)`, which calls kernels, where the program is lowered for CUDA, and `cpu(*args)` on CPU.

    Without Triton a machine of CPUs compiles the latter alone, and one with a GPU is told what it lacks.
    """
    if interpreting():
        return gpu(*args)
    if not available() and jax.default_backend() == "cpu":
        return jax.lax.platform_dependent(*args, cpu=cpu)

    def checked(*args: Any) -> Any:
        require_versions(jax.__version__, installed("jax-triton"))  # before a module of kernels is imported
        return gpu(*args)

    return jax.lax.platform_dependent(*args, cpu=cpu, cuda=checked)


def call(
    kernel: Any,
    *arrays: Array,
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int] | tuple[int, int] | tuple[int, int, int],
    num_warps: int = 4,
    num_stages: int = 3,
    **constants: Any,
) -> tuple[Array, ...]:
    """Runs a kernel whose parameters are pointers to arrays and outputs, in this order, then constants.

    What a kernel does not write is undefined. No derivatives and no batches: `jax.custom_vjp` belongs around it.

    Args:
      kernel: a `triton.jit` function.
      outputs: shapes and dtypes.
      grid: numbers of programs, up to three.
      constants: its `tl.constexpr` parameters, every number among them, so that the compiler knows what divides what.

    Raises:
      ValueError: versions that do not work together; a kernel that was made for the interpreter, or not for it.
    """
    if interpreting():
        from kernels.rig.interpreter import interpret

        return interpret(kernel, arrays, outputs, grid, constants)
    require_versions(jax.__version__, installed("jax-triton"))
    import jax_triton
    import triton

    require(isinstance(kernel, triton.JITFunction), "kernel", type(kernel).__name__,
            "a triton.JITFunction; was TRITON_INTERPRET set when its module was imported?")  # fmt: skip
    out = "out_type" if hasattr(jax_triton, "TensorDescriptor") else "out_shape"
    shapes = {out: tuple(outputs)}
    made = jax_triton.triton_call(
        *arrays, kernel=kernel, grid=grid, num_warps=num_warps, num_stages=num_stages,
        compute_capability=capability(), **shapes, **constants,
    )  # fmt: skip
    return tuple(made)
