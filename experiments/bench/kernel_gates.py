"""`bench kernel-gates`: compiles every Triton kernel for A100 and H100, on any machine, and holds it to its gates.

Nothing is timed: registers, spills, shared memory and products on tensor cores are facts of what the compiler made.
What passes may still be slow; what fails is, or does not start. The gates are those of `kernels.rig.compiled`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.bench import report
from experiments.output import write_json
from experiments.provenance import provenance
from kernels import _triton
from kernels.rig.compiled import MOST_SHARED, Report, compile_configuration, failures, require_compiler
from kernels.rig.entries import Configuration, configurations
from moe.config import require

Row = dict[str, Any]


def main(
    json: Path, *, chosen: Sequence[Configuration] | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Compiles, prints a table, writes the result to `json` and returns it.

    Args:
      json: result file, written whole at the end, whether or not all gates are passed.
      chosen: configurations; all of the rig by default.

    Raises:
      ValueError: no triton, or a file that cannot be written, before anything is compiled; a gate that is not passed,
        after the file is written.
    """
    report.check_output(json)
    require_compiler()
    chosen, console = configurations() if chosen is None else chosen, console or Console()
    start = time.perf_counter()
    rows: list[Row] = []
    with report.progress_bar(console) as bar:
        task = bar.add_task("", total=len(chosen))
        for configuration in chosen:
            bar.update(task, description=f"{configuration.entry.name}, sm_{configuration.capability}")
            rows.append(described(compile_configuration(configuration)))
            bar.advance(task)
    seconds = time.perf_counter() - start
    result = {
        "benchmark": "kernel-gates", "configurations": len(rows), "failed": sum(bool(row["failures"]) for row in rows),
        "seconds": round(seconds, 1), "triton": _triton.installed("triton"),
        "most_shared": {str(capability): most for capability, most in MOST_SHARED.items()},
        "reports": rows, "provenance": provenance(),
    }  # fmt: skip
    write_json(json, result)
    console.print(shown(rows, seconds))
    console.print(f"written to {json}")
    failed = [f"{of.name}: {'; '.join(row['failures'])}" for of, row in zip(chosen, rows) if row["failures"]]
    require(not failed, "configurations that fail a gate", len(failed), "0\n" + "\n".join(failed))
    return result


def described(made: Report) -> Row:
    """A flat record: the configuration, the figures, the gates that are not passed."""
    of = made.configuration
    warps, stages = of.warps_stages
    asked = {
        "kernel": of.entry.name, "launch": of.launch, "data": of.data, "tile": of.tile_text,
        "capability": of.capability, "warps": warps, "stages": stages,
    }  # fmt: skip
    figures = {field.name: getattr(made, field.name) for field in fields(made) if field.name != "configuration"}
    return {**asked, **figures, "failures": failures(made)}


def shown(rows: Sequence[Row], seconds: float) -> Table:
    """One line of less than 80 columns each; data is bfloat16 unless named."""
    columns = ["kernel, launch", "tile", "warps x\nstages", "sm", "regs", "spills", "KiB", "wgmma", "mma", "gates"]
    cells = [
        [" ".join([row["kernel"].removesuffix("_kernel"), row["launch"], *([row["data"]] * (row["data"] != "bf16"))]),
         row["tile"], f"{row['warps']}x{row['stages']}", str(row["capability"]), str(row["registers"]),
         str(row["spill_stores"] + row["spill_loads"]), f"{row['shared'] / 1024:.1f}", str(row["wgmma"]),
         str(row["mma"]), "FAIL" if row["failures"] else "pass"]
        for row in rows
    ]  # fmt: skip
    made = report.table(f"{len(rows)} configurations compiled in {seconds:.0f} s", columns, cells)
    made.box, made.show_edge, made.padding = SIMPLE_HEAD, False, 0
    return made
