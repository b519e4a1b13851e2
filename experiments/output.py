"""The directory a run writes to: looked at before anything is compiled, tried before anything is trained."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROBE_BYTES = 2**20


def contents(out: Path) -> list[str] | None:
    """The names in `out`, None if it does not exist; ValueError if it is no directory or cannot be read."""
    try:
        return sorted(os.listdir(out))
    except FileNotFoundError:
        return None
    except OSError as error:
        expected = "a directory, or a path where one can be made"
        raise ValueError(f"--out = {str(out)!r}: expected {expected} ({error.strerror})") from error


def probe(out: Path) -> None:
    """Makes `out`; ValueError if that fails or a megabyte cannot be written there, and then nothing is left behind."""
    trial = out / ".probe"
    missing = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with trial.open("wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        trial.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            trial.unlink(missing_ok=True)
            for path in missing:
                path.rmdir()
        reason = error.strerror or str(error)
        raise ValueError(f"--out = {str(out)!r}: expected a writable directory with free space ({reason})") from error


def write_json(path: Path, value: Any) -> None:
    """Atomically, so that neither a reader nor the next start meets half a file. Rows of numbers stay on one line."""
    text = re.sub(r"\[\n[^\[\]{}\"]*\]", _one_line, json.dumps(value, indent=1))
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text + "\n")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def stopwatch(path: Path) -> Iterator[None]:
    """Adds the seconds spent inside to those in `path`, also when the block is interrupted."""
    began = time.time()
    try:
        yield
    finally:
        write_json(path, {"wall_seconds": elapsed(path) + time.time() - began})


def elapsed(path: Path) -> float:
    return json.loads(path.read_text())["wall_seconds"] if path.exists() else 0.0


def _one_line(row: re.Match[str]) -> str:
    return re.sub(r"\n\s*", " ", row[0]).replace("[ ", "[").replace(" ]", "]")
