"""Workers that time one step on command, so that several programs can be interleaved round by round.

Each worker is a process that reads one command per line on stdin and answers one JSON object per line on stdout; its
first line announces it. Between commands it blocks in `readline`, so an idle worker costs nothing. End of input ends
it: no worker outlives the process that asked.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from json import JSONDecodeError, dumps, loads
from pathlib import Path
from typing import Any, TextIO

from moe.config import require


class WorkerError(RuntimeError):
    """A worker died or answered with an error; the message ends with what it last wrote to stderr."""


def open_channel() -> TextIO:
    """A private stream to the asker. Call it before heavy imports: what libraries print then goes to stderr."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return channel


def serve(channel: TextIO, hello: Mapping[str, Any], commands: Mapping[str, Callable[[], Mapping[str, Any]]]) -> None:
    """Announces `hello`, then answers commands until stdin ends; a failing command answers `{"error": ...}`."""
    channel.write(dumps(dict(hello)) + "\n")
    for line in sys.stdin:
        name = line.strip()
        try:
            answer = dict(commands[name]()) if name in commands else {"error": f"unknown command {name!r}"}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        channel.write(dumps(answer) + "\n")


def check_peer(python: Path | None) -> None:
    """ValueError unless it is None or an interpreter that can import torch and transformers."""
    if python is None:
        return
    runs = python.is_file() and os.access(python, os.X_OK)
    require(runs, "peer_python", str(python), "an executable Python interpreter")
    look = "from importlib.util import find_spec as f; raise SystemExit(not (f('torch') and f('transformers')))"
    has_both = subprocess.run([str(python), "-c", look], capture_output=True, check=False).returncode == 0
    require(has_both, "peer_python", str(python), "an interpreter that has torch and transformers")


class Worker:
    """The asker's end of one worker process.

    Args:
      name: used in messages.
      command: argument vector; the process starts in `cwd` with `env`.
    """

    def __init__(
        self, name: str, command: Sequence[str], cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+", prefix=f"bench-{name}-")  # noqa: SIM115
        # A session of its own: Ctrl-C reaches only the asker, which then ends its workers in order.
        self._process = subprocess.Popen(
            command, cwd=cwd, env=env, text=True, bufsize=1, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip

    def hello(self) -> dict[str, Any]:
        """Waits for the announcement."""
        return self._read("start")

    def ask(self, command: str) -> dict[str, Any]:
        """Sends one command and waits for its answer; raises WorkerError when the worker fails."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure(command, "it has ended") from None
        return self._read(command)

    def _read(self, command: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise self._failure(command, f"it ended with exit status {self._process.returncode}")
        try:
            answer = loads(line)
        except JSONDecodeError:
            raise self._failure(command, f"it answered {line.strip()!r}, expected one JSON object") from None
        if "error" in answer:
            raise self._failure(command, answer["error"])
        return answer

    def _failure(self, command: str, reason: str) -> WorkerError:
        self._errors.seek(0)
        tail = "".join(self._errors.readlines()[-8:]).strip()
        return WorkerError(f"worker {self.name} failed at {command!r}: {reason}" + (f"\n{tail}" if tail else ""))

    def close(self) -> None:
        """Ends the process: politely by end of input, after two seconds by a kill."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=2)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def start_in_tree(workers: dict[str, Worker], name: str, arguments: Sequence[str], source: Path) -> dict[str, Any]:
    """Adds to `workers` this Python started in a source tree, with that tree's modules; returns its announcement.

    Args:
      arguments: of the interpreter; the program announces the tree it imported as `source`.

    Raises:
      WorkerError: it failed, or imported another tree.
    """
    env = os.environ | {"PYTHONPATH": str(source)}
    workers[name] = Worker(name, [sys.executable, *arguments], cwd=source, env=env)
    hello = workers[name].hello()
    if Path(hello.pop("source")) != source.resolve():
        raise WorkerError(f"worker {name} imported another source tree than its own")
    return hello


@contextmanager
def closing_all(workers: Mapping[str, Worker]) -> Iterator[None]:
    """Ends every worker in the mapping at the end, whatever happened; it may grow inside the block."""
    try:
        yield
    finally:
        for worker in workers.values():
            worker.close()


def interleave(
    workers: Mapping[str, Worker], rounds: int, command: str = "run", after: Callable[[int], None] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Asks every worker once per round and collects the answers in order.

    The order turns by one place each round, so no worker always follows the same other one (caches, clock speed).
    `after(round)` is called at the end of each round, to show progress or to probe something else.
    """
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    names = list(workers)
    for index in range(rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            answers[name].append(workers[name].ask(command))
        if after is not None:
            after(index)
    return answers
