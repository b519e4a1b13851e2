"""One progress bar with the time left: rich on a terminal, a line every fifteen seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET_SECONDS = 15.0


class Bar:
    """Counts `total` units of work, some perhaps done before (`done`).

    The time left rests on the pace since the first update: what was compiled or restored before that says nothing.
    """

    def __init__(
        self, title: str, total: int, done: int = 0, console: Console | None = None, shown: bool = True
    ) -> None:
        self.console = console or Console()
        self.title, self.total, self.done, self.shown = title, total, done, shown
        self._first: tuple[int, float] | None = None
        self._last = -QUIET_SECONDS
        self._rich: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        if self.shown and self.console.is_terminal:
            columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%")]
            times = [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True)]
            self._rich = Progress(*columns, *times, console=self.console)
            self._task = self._rich.add_task(self.title, total=self.total, completed=self.done)
            self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()

    def update(self, done: int, note: str = "") -> None:
        """`done` units of the total are finished; `note` says what is going on."""
        self.done = done
        self._first = self._first or (done, time.monotonic())
        text = f"{self.title} {note}".strip()
        if self._rich is not None:
            self._rich.update(self._task, completed=done, description=text)
        elif self.shown and (time.monotonic() - self._last >= QUIET_SECONDS or done == self.total):
            self._last = time.monotonic()
            print(f"{text}: {100 * done / self.total:.0f}%, {self.left()} left", flush=True)

    def left(self) -> str:
        """Time left at the pace since the first update, as m:ss; `?` before the second."""
        if self._first is None or self.done <= self._first[0]:
            return "?" if self.done < self.total else "0:00"
        pace = (time.monotonic() - self._first[1]) / (self.done - self._first[0])
        seconds = int(pace * (self.total - self.done))
        return f"{seconds // 60}:{seconds % 60:02d}"
