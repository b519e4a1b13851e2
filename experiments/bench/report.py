"""What every benchmark writes and shows: provenance, an atomic JSON file, a table."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from json import dumps
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from experiments.bench.worktree import git
from moe.config import require


def check_output(path: Path) -> None:
    """Raises ValueError unless a file can be written at `path`; creates nothing."""
    require(not path.is_dir(), "json", str(path), "a file, not a directory")
    parent = path.absolute().parent
    writable = parent.is_dir() and os.access(parent, os.W_OK)
    require(writable, "json", str(path), "a file in an existing, writable directory")


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Writes the whole file or nothing: a temporary file beside it takes its name at the end."""
    handle, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(dumps(result, indent=1) + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def processor() -> str:
    """The processor's model as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def provenance() -> dict[str, Any]:
    """Date, commit (with a mark for uncommitted changes) and hardware; no machine paths, no host name."""
    commit = git("rev-parse", "HEAD") or "unknown"
    dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit + ("+changes" if dirty else ""),
        "hardware": {"processor": processor(), "cores": cores, "system": platform.system()},
    }  # fmt: skip


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), console=console, transient=True,
    )  # fmt: skip


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first column is text and whose others are numbers, right-aligned."""
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*row)
    return made
