"""Where metrics go: a JSON-lines file always, TensorBoard, Weights & Biases or Trackio beside it when asked.

A sink has two methods, `log(step, metrics)` and `close()`; nothing else is assumed of one. A run that was killed goes
on from its checkpoint and logs the steps after it again: the JSON lines and TensorBoard drop the first copy, W&B the
second, Trackio shows both (their metrics are equal, times aside). After Ctrl-C nothing is logged twice.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from moe.config import require

Metrics = dict[str, float]


class Logger(Protocol):
    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object per step, `{"step": n, ...}`, flushed line by line so that a killed run keeps what it wrote."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    @classmethod
    def resume(cls, path: Path, step: int) -> Self:
        """Opens `path` to go on after `step`: later lines and a torn last one are removed, earlier ones kept byte for
        byte. The file is replaced in one rename, so being killed here loses nothing either."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_bytes(_lines_up_to(path.read_bytes(), step))
            os.replace(temporary, path)
        return cls(path)

    def log(self, step: int, metrics: Metrics) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines_up_to(content: bytes, step: int) -> bytes:
    kept = []
    for line in content.splitlines(keepends=True):
        try:
            at = json.loads(line)["step"]
        except (ValueError, TypeError, LookupError):
            break  # torn: nothing after it can be trusted
        if not line.endswith(b"\n") or at > step:
            break
        kept.append(line)
    return b"".join(kept)


class TensorBoard:
    """Scalars in `out/tensorboard`; on resume later events of the same steps are purged."""

    def __init__(self, out: Path, start: int) -> None:
        writer = _load("tensorboardX", "tensorboard").SummaryWriter
        self._writer = writer(str(out / "tensorboard"), purge_step=start + 1)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """One W&B run per output directory (its id is kept there, so a resumed run goes on); WANDB_MODE is honoured."""

    def __init__(self, out: Path, start: int) -> None:
        wandb = _load("wandb", "wandb")
        run_id = _kept_id(out / "wandb-id")
        self._run = wandb.init(project="switchyard", id=run_id, resume="allow", dir=str(out))

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Trackio's local dashboard, one run per output directory."""

    def __init__(self, out: Path, start: int) -> None:
        self._trackio = _load("trackio", "trackio")
        self._trackio.init(project="switchyard", name=_kept_id(out / "trackio-id"), resume="allow")

    def log(self, step: int, metrics: Metrics) -> None:
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


SINKS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def make_loggers(names: Sequence[str], out: Path, start: int) -> list[Logger]:
    """The named sinks, going on after step `start`.

    Raises:
      ValueError: an unknown name, or a package that is not installed (it names the extra).
    """
    for name in names:
        require(name in SINKS, "log", name, f"one of {', '.join(SINKS)}")
    return [SINKS[name](out, start) for name in names]


def check_loggers(names: Sequence[str]) -> None:
    """Raises what `make_loggers` would, before anything is compiled or written."""
    for name in names:
        require(name in SINKS, "log", name, f"one of {', '.join(SINKS)}")
        _load({"tensorboard": "tensorboardX"}.get(name, name), name)


def _load(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"log = {name!r}: expected the package {module}, see the extra: pip install -e '.[logging]'"
        ) from error


def _kept_id(path: Path) -> str:
    if not path.exists() or not path.read_text():  # empty: killed between the two halves of writing it
        path.write_text(os.urandom(8).hex())
    return path.read_text()
