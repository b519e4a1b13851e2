"""The commands around one model and one cluster: `train` and `check-cluster`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.config import RunConfig
from experiments.data.corpus import open_corpus
from experiments.logs import check_loggers
from experiments.output import contents, probe
from experiments.progress import Bar
from experiments.train import check, fit
from moe.config import require
from parallel.startup import barrier, check_cluster, is_primary


def train_one(
    config: RunConfig, out: Path, *, steps: int | None, loggers: Sequence[str], profile: tuple[int, int] | None
) -> None:
    """`fit` with a progress bar and a closing table; ValueError for an `out` that is not ours or not writable."""
    require(steps is None or steps >= 1, "steps", steps, "at least 1")
    check_loggers(loggers)
    check(config, open_corpus(config.data))
    names = contents(out) or []
    ours = not names or "checkpoints" in names
    require(ours, "--out", str(out), f"an empty directory or one of an earlier `train`; it holds {names[:5]}")
    barrier("train/inspected")
    if is_primary():
        probe(out)
    barrier("train/prepared")
    console = Console()
    with Bar("train", steps or config.steps, 0, console, shown=is_primary()) as bar:
        show = lambda step, _, m: bar.update(step, f"step {step} loss {m['loss']:.3f}")  # noqa: E731
        result = fit(config, out, steps=steps, progress=show, loggers=loggers, profile=profile)
    if is_primary():
        table = Table(title=str(out.name))
        table.add_column("metric")
        table.add_column("value", justify="right")
        for name, value in result.metrics.items():
            table.add_row(name, f"{value:.5g}")
        console.print(table)


def print_cluster() -> None:
    """Rank, host and devices of every process, one collective's bandwidth, and who is missing (then exit code 2)."""
    found = check_cluster()
    if not is_primary():
        return
    table = Table(title=f"coordinator: {found.coordinator or 'none, a single process'}")
    for column in ("rank", "host", "devices"):
        table.add_column(column, overflow="fold")
    for process in found.processes:
        table.add_row(str(process.rank), process.host, ", ".join(process.devices))
    console = Console()
    console.print(table)
    if found.all_reduce_gbps is not None:
        console.print(f"all-reduce of {found.all_reduce_bytes / 2**20:.0f} MiB: {found.all_reduce_gbps:.2f} GB/s")
    if found.missing:
        print(
            f"error: missing ranks = {list(found.missing)}: expected every rank to answer", file=sys.stderr, flush=True
        )
        os._exit(2)  # an ordinary exit would wait for the missing ones
