"""What every benchmark writes and shows: how busy the machine was, whether the file can be written, a table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from moe.config import require


def check_output(path: Path) -> None:
    """Raises ValueError unless a file can be written at `path`; creates nothing."""
    require(not path.is_dir(), "json", str(path), "a file, not a directory")
    parent = path.absolute().parent
    writable = parent.is_dir() and os.access(parent, os.W_OK)
    require(writable, "json", str(path), "a file in an existing, writable directory")


def load_before(console: Console) -> float:
    """The one-minute load average, with a warning where other programs would be timed as well."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > 0.25 * cores:
        console.print(f"[yellow]load average {load:.1f} on {cores} cores: figures mean little now[/yellow]")
    return round(load, 2)


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
