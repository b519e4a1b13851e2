"""Triton kernels compiled for cards that are not here, and the gates that what comes out must pass.

No GPU and no driver is needed: Triton's wheel brings the assemblers (`ptxas`), which say registers, stack and spills.
What fails a gate would run slowly or not at all: spilled registers, more of them or more shared memory than the card
has, products that no tensor core computes, and `wgmma` of which the assembler says that it runs one at a time.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kernels import _triton
from kernels.checks import require
from kernels.rig.entries import Configuration

ROOT = Path(__file__).parents[2]
MOST_REGISTERS = 255  # of a thread
REGISTERS = 65_536  # of a multiprocessor
MOST_SHARED = {80: 166_912, 90: 232_448}  # bytes of a program: A100, H100
WGMMA_ROWS = 64  # of a tile, below which there is no `wgmma`
ONE_AT_A_TIME = re.compile(r"wgmma\.mma_async instructions are serialized.*")


@dataclass(frozen=True)
class Report:
    """What came out of one configuration; all zero with an `error` of the compiler.

    Attributes:
      registers: of a thread.
      stack, spill_stores, spill_loads, shared: bytes; the first three of a thread, `shared` of a program.
      wgmma, mma: `wgmma.mma_async` and `mma.sync` in the PTX.
      serialized: what the assembler says where it runs `wgmma` one at a time, else empty.
      seconds: until the PTX was assembled; next to nothing where Triton's cache has it.
    """

    configuration: Configuration
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    wgmma: int = 0
    mma: int = 0
    serialized: str = ""
    seconds: float = 0.0
    error: str = ""


def compile_configuration(configuration: Configuration, kernel: Any = None) -> Report:
    """Compiles and measures one configuration; an error of the compiler is part of the report.

    Args:
      kernel: a `triton.jit` function in place of the entry's.

    Raises:
      ValueError: no triton; a process whose kernels are made for the interpreter; an entry that does not list the
        kernel's parameters.
    """
    require_compiler()
    kernel = configuration.entry.load() if kernel is None else kernel
    given = sorted([*configuration.pointers(), *configuration.constants()])
    field = f"parameters of {configuration.entry.name}"
    require(given == sorted(kernel.arg_names), field, given, f"the kernel's, {sorted(kernel.arg_names)}")
    start = time.perf_counter()
    try:
        with cached():
            found = inspected(kernel, configuration)
    except Exception as error:  # whatever the compiler raises is what the gate is to report
        found = Report(configuration, error=f"{type(error).__name__}: {str(error).strip() or repr(error)}")
    return replace(found, seconds=round(time.perf_counter() - start, 3))


def require_compiler() -> None:
    where = "an installed package; pip install 'switchyard[gpu]', or PYTHONPATH=.venv/kernels after make test"
    require(bool(_triton.installed("triton")), "triton", None, where)
    require(not _triton.interpreting(), "TRITON_INTERPRET", "1", "unset: what is interpreted cannot be compiled")


@contextmanager
def cached() -> Iterator[None]:
    """Triton's cache beside JAX's in the checkout, not in the user's home, unless the environment names one."""
    from triton.knobs import cache

    with cache.scope():
        if (ROOT / "pyproject.toml").exists() and not os.environ.get("TRITON_CACHE_DIR"):
            cache.dir = str(ROOT / ".cache" / "triton")
        yield


def inspected(kernel: Any, configuration: Configuration) -> Report:
    """Pointers are aligned to 16 bytes, as all of JAX's arrays are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, pointers, (warps, stages) = kernel.arg_names, configuration.pointers(), configuration.warps_stages
    source = ASTSource(
        fn=kernel, constexprs=configuration.constants(),
        signature={name: f"*{pointers[name]}" if name in pointers else "constexpr" for name in names},
        attrs={(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in pointers},
    )  # fmt: skip
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}  # the last as jax-triton has it
    compiled = triton.compile(source, target=GPUTarget("cuda", configuration.capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    return Report(
        configuration, shared=compiled.metadata.shared, wgmma=ptx.count("wgmma.mma_async"), mma=ptx.count("mma.sync"),
        **resources(assembled(ptx, configuration.capability)),
    )  # fmt: skip


def assembled(ptx: str, capability: int) -> str:
    """What Triton's assembler for this capability says of a PTX module, which Triton itself does not keep.

    Raises:
      RuntimeError: it does not take the module.
    """
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        words = [get_ptxas(capability).path, "-v", "--regAllocOptLevel=2", "-lineinfo"]  # Triton's own options
        words += [f"--gpu-name={sm_arch_from_capability(capability)}", str(source), "-o", str(source) + ".cubin"]
        done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas: {done.stderr.strip()}")
    return done.stderr


def resources(said: str) -> dict[str, Any]:
    """Registers, stack, spills and serialisation from what `ptxas -v` says of a module's one kernel.

    Raises:
      RuntimeError: it does not say them.
    """
    registers = re.search(r"Used (\d+) registers", said)
    memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    if registers is None or memory is None:
        raise RuntimeError(f"ptxas -v does not tell registers and spills: {said.strip()!r}")
    serialized = ONE_AT_A_TIME.search(said)
    return {
        "registers": int(registers[1]), "stack": int(memory[1]), "spill_stores": int(memory[2]),
        "spill_loads": int(memory[3]), "serialized": serialized[0] if serialized else "",
    }  # fmt: skip


def failures(report: Report) -> list[str]:
    """The gates this report does not pass, each with its value and its bound; none is good."""
    if report.error:
        return [f"compiler: {report.error}"]
    warps, _ = report.configuration.warps_stages
    bounds = [
        ("stack", report.stack, 0), ("spill stores", report.spill_stores, 0), ("spill loads", report.spill_loads, 0),
        ("registers", report.registers, MOST_REGISTERS),
        ("registers of a program", report.registers * 32 * warps, REGISTERS),
        ("shared bytes", report.shared, MOST_SHARED[report.configuration.capability]),
    ]  # fmt: skip
    found = [f"{gate}: {value}, at most {bound}" for gate, value, bound in bounds if value > bound]
    counts = {"wgmma": report.wgmma, "mma.sync": report.mma}
    wanted = instruction(report.configuration)
    found += [f"{gate}: {count}, at least 1" for gate, count in counts.items() if gate == wanted and not count]
    found += [f"{gate}: {count}, none" for gate, count in counts.items() if gate != wanted and count]
    return found + [f"wgmma: {report.serialized}"] * bool(report.serialized)


def instruction(configuration: Configuration) -> str | None:
    """What multiplies on the tensor cores there: `wgmma`, for whole warp groups' rows on Hopper, else `mma.sync`."""
    if not configuration.tensor_cores:
        return None
    rows = configuration.tile.BM if configuration.tile else 0
    return "wgmma" if configuration.capability >= 90 and rows >= WGMMA_ROWS else "mma.sync"
