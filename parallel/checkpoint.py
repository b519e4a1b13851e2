"""Checkpoints of any pytree: asynchronous, all or nothing, strict, restorable on another mesh or process count.

Orbax writes and reads the arrays (TensorStore, OCDBT) and commits a step by renaming its directory. Added here: leaves
are stored flat by path beside a manifest of dtypes, shapes and checksums, because Orbax casts a wrong dtype in silence
and storage does not notice every damaged byte; a marker file says whose directory this is and for which run.

    DIR/switchyard.json             marker: format and the run's fingerprint
    DIR/120/                        a complete step
    DIR/140.orbax-checkpoint-tmp/   a save under way, or what a killed one left (removed at the next start)
    DIR/.deleting-100/              a step on its way out (the same)
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from parallel.intact import checksum, damaged_file, list_files, write_atomically
from parallel.leaves import as_array, describe, flatten, rebuild, target
from parallel.startup import barrier, is_primary

FORMAT = 1
MARKER = "switchyard.json"
LOCK = ".switchyard.lock"
OURS = (MARKER, MARKER + ".tmp", LOCK)
# Orbax stores no array without elements, so those are only in the manifest, and no tree without arrays.
NOTHING = {"nothing": np.zeros((), np.uint8)}
LEFTOVER = re.compile(r"\d+\.orbax-checkpoint-tmp.*|\.deleting-\d+")

# What fails is raised here, once; the tracebacks that background threads and abandoned tasks print only hide it.
logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname or record.levelno != logging.ERROR)
logging.getLogger("asyncio").addFilter(lambda record: "tensorstore" not in str(record.exc_info) + record.getMessage())


class CheckpointError(ValueError):
    """A checkpoint directory that cannot be used as asked: names the directory, what was found, what was expected."""


class Checkpoints:
    """The checkpoints of one run, in one directory. Every process of the run makes the same calls.

    Args:
      directory: holds only these checkpoints; made if missing.
      keep: complete steps kept; older ones are removed after a newer one is complete.
      fingerprint: flat dict of JSON values that must be equal for a run to continue here; None checks nothing.
      read_only: creates, locks and removes nothing; `save` is refused. For reading while another run writes.

    Raises:
      CheckpointError: the directory is foreign, damaged, of another run, in use, or cannot be written. Nothing in it
        is touched then.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, keep: int = 2, fingerprint: dict[str, Any] | None = None,
        read_only: bool = False,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep = {keep}: expected at least 1")
        self.directory = Path(directory).absolute()
        self.keep, self.read_only = keep, read_only
        self._pending: tuple[int, Any] | None = None
        self._lock: Any = None
        self._fingerprint = None if fingerprint is None else json.loads(json.dumps(fingerprint))  # tuples become lists
        found = self._inspect()
        if read_only:
            if not found:
                self._refuse("nothing there", "an existing checkpoint directory")
            return
        barrier("checkpoints/inspected")  # nobody writes before everybody has looked
        try:
            if is_primary():
                self._take_over(found)
        finally:
            barrier("checkpoints/ready")
        if not is_primary() and not self._inspect():
            self._refuse("process 0's marker is not visible here", "a file system shared by all processes")

    def save(self, step: int, tree: Any) -> None:
        """Starts saving `tree` as `step` and returns once its values are safe: donating them next is fine.

        Waits for the save before this one. Leaves are JAX arrays (PRNG keys too), NumPy arrays or Python numbers.

        Raises:
          CheckpointError: the save before this one failed, or this one could not start.
          ValueError: `step` is not newer than every complete step, or a leaf cannot be stored.
        """
        self.wait()
        newest = self.latest()
        if self.read_only:
            self._refuse("opened read-only", "read_only=False in order to save")
        if step < 0 or (newest is not None and step <= newest):
            raise ValueError(f"step = {step}: expected 0 or more, and more than the newest complete step {newest}")
        leaves = flatten(tree)
        if not leaves:
            raise ValueError("tree: expected at least one leaf to save")
        manifest: Any = {path: [describe(leaf), value] for (path, leaf), value in zip(leaves.items(), checksum(leaves))}
        arrays = {path: as_array(leaf) for path, leaf in leaves.items() if np.size(leaf)} or NOTHING
        try:
            with _context():
                response = ocp.save_async(self._path(step), arrays, custom_metadata={"leaves": manifest})
        except Exception as error:
            self._failed(step, error)
        self._pending = (step, response)
        if is_primary():
            response.on_complete(lambda _: list_files(Path(self._path(step))))  # in the background, once it is complete

    def wait(self) -> None:
        """Returns once no save is under way.

        Raises:
          CheckpointError: the save failed; steps that were complete before are still there.
        """
        if self._pending is None:
            return
        step, response = self._pending
        try:
            response.result()
        except Exception as error:
            self._pending = None
            self._failed(step, error)
        self._pending = None  # only now: a Ctrl-C while waiting must not lose sight of the save
        try:
            for old in self.steps()[: -self.keep] if is_primary() else ():
                self._remove(old)
        finally:
            barrier("checkpoints/pruned")  # all processes see the same steps

    def steps(self) -> list[int]:
        """Complete steps, oldest first. A directory under this name is complete: it got the name by a rename."""
        names = os.listdir(self.directory) if self.directory.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal())

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def restore(self, abstract_tree: Any, step: int | None = None) -> Any:
        """Reads a step into the structure of `abstract_tree`.

        Args:
          abstract_tree: leaves are `jax.ShapeDtypeStruct` with the wanted sharding (on any mesh; without one, the first
            local device), or examples: JAX arrays, NumPy arrays, Python numbers.
          step: a complete step; the newest by default.

        Raises:
          CheckpointError: no such step, it is damaged, or its leaves differ from `abstract_tree` (all are named).
        """
        self.wait()
        step = self.latest() if step is None else step
        if step is None or step not in self.steps():
            self._refuse(f"complete steps {self.steps()}", "a complete step" if step is None else f"step {step}")
        wanted = flatten(abstract_tree)
        if wrong := damaged_file(Path(self._path(step))):
            self._damaged(step, wrong)
        manifest = self._manifest(step)
        self._check(step, {path: spec for path, (spec, _) in manifest.items()}, wanted)
        targets = {path: target(leaf) for path, leaf in wanted.items() if np.size(leaf)} or NOTHING
        try:
            arrays = ocp.load(self._path(step), targets)
        except Exception as error:
            self._damaged(step, _first_line(error), error)
        leaves = {path: rebuild(arrays.get(path), leaf) for path, leaf in wanted.items()}
        for path, value in zip(leaves, checksum(leaves)):
            if value != manifest[path][1]:
                self._damaged(step, f"leaf {path!r} has checksum {value}, saved was {manifest[path][1]}")
        return jax.tree.unflatten(jax.tree.structure(abstract_tree), list(leaves.values()))

    def close(self) -> None:
        """Waits for a save under way and gives the directory free. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as lost:
            if error is None:
                raise
            error.add_note(f"and while that was raised: {lost}")  # the first error stays the one that is seen

    def _path(self, step: int) -> str:
        return str(self.directory / str(step))

    def _inspect(self) -> bool:
        """Looks at the directory without changing it; True if it holds our marker."""
        if not self.directory.exists():
            return False
        if not self.directory.is_dir():
            self._refuse("a file", "a directory")
        names = sorted(os.listdir(self.directory))
        if MARKER not in names:
            foreign = [name for name in names if name not in OURS]
            if foreign:
                self._refuse(f"{_some(foreign)} and no {MARKER}", "an empty directory or one made by this program")
            return False
        self._check_marker()
        for name in names:
            if name.isdecimal() and not (self.directory / name).is_dir():
                self._refuse(f"a file named {name!r}", "a directory with the checkpoint of that step")
        return True

    def _check_marker(self) -> None:
        try:
            marker = json.loads((self.directory / MARKER).read_text())
            stored, form = marker["fingerprint"], marker["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._refuse(f"an unreadable {MARKER} ({_first_line(error)})", "the marker this program wrote", error)
        if form != FORMAT:
            self._refuse(f"checkpoint format {form!r}", f"format {FORMAT}")
        if self._fingerprint is None or stored is None or stored == self._fingerprint:
            return
        differ = _some(_differences(stored, self._fingerprint))
        self._refuse(f"checkpoints of another run ({differ})", "the same settings, or another directory")

    def _take_over(self, found: bool) -> None:
        """Process 0: makes and locks the directory, writes the marker, removes what killed saves left behind."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.directory / LOCK, "w")  # noqa: SIM115 (held until close)
            # A POSIX record lock: it ends with this process however it dies, and forked workers do not inherit it.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not found:
                write_atomically(self.directory / MARKER, {"format": FORMAT, "fingerprint": self._fingerprint})
            for path in self.directory.iterdir():
                if LEFTOVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
        except BlockingIOError as error:
            self._refuse("another running process that writes here", "one run per directory", error)
        except OSError as error:
            self._refuse(_first_line(error), "a directory that can be written", error)

    def _manifest(self, step: int) -> dict[str, tuple[str, int]]:
        try:
            return _read_manifest(self._path(step))
        except Exception as error:
            self._damaged(step, f"no manifest in _CHECKPOINT_METADATA ({_first_line(error)})", error)

    def _check(self, step: int, stored: dict[str, str], wanted: dict[str, Any]) -> None:
        expected = {path: describe(leaf) for path, leaf in wanted.items()}
        wrong = [f"leaf {path!r}: stored {stored.get(path, 'nothing')}, expected {expected.get(path, 'nothing')}"
                 for path in expected | stored if stored.get(path) != expected.get(path)]
        if wrong:
            raise CheckpointError(f"checkpoint = {self._path(step)!r}: {_some(wrong, '; ')}")

    def _remove(self, step: int) -> None:
        """The rename comes first: a step that is half deleted must not look complete."""
        doomed = self.directory / f".deleting-{step}"
        try:
            os.rename(self._path(step), doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            self._refuse(f"step {step}, which cannot be removed ({error})", "a directory that can be written", error)

    def _refuse(self, found: str, expected: str, cause: BaseException | None = None) -> NoReturn:
        where = f"checkpoint directory = {str(self.directory)!r}"
        raise CheckpointError(f"{where}: found {found}; expected {expected}") from cause

    def _failed(self, step: int, error: Exception) -> NoReturn:
        self._refuse(f"that saving step {step} failed ({_first_line(error)}), newest complete step {self.latest()}",
                     "a writable directory with room for another step", error)

    def _damaged(self, step: int, reason: str, cause: Exception | None = None) -> NoReturn:
        older = max((s for s in self.steps() if s < step and self._readable(s)), default=None)
        hint = f"step {older} is complete: move {step}/ away to go on from it" if older is not None else "no older one"
        self._refuse(f"step {step} damaged: {reason}", f"an intact step ({hint})", cause)

    def _readable(self, step: int) -> bool:
        try:
            return bool(_read_manifest(self._path(step))) and damaged_file(Path(self._path(step))) is None
        except Exception:
            return False


def _context() -> ocp.Context:
    context = ocp.Context()
    context.array.saving.use_ocdbt = True
    context.atomicity.mode = ocp.options.AtomicityMode.ATOMIC_RENAME
    # Made in the background, a directory that cannot be made is noticed by a five-minute timeout only.
    context.asynchronous.create_directories_asynchronously = False
    return context


def _read_manifest(path: str) -> dict[str, tuple[str, int]]:
    """dtype[shape] and checksum by leaf. The file is read directly: Orbax's reader opens all arrays besides."""
    metadata = json.loads(Path(path, "_CHECKPOINT_METADATA").read_text())
    return {leaf: (spec, value) for leaf, (spec, value) in metadata["custom_metadata"]["leaves"].items()}


def _differences(stored: dict[str, Any], now: dict[str, Any]) -> list[str]:
    pairs = {name: [repr(d[name]) if name in d else "nothing" for d in (stored, now)] for name in sorted(stored | now)}
    return [f"{name}: {before} stored, {after} now" for name, (before, after) in pairs.items() if before != after]


def _some(items: list[str], separator: str = ", ", most: int = 8) -> str:
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join(items[:most] + more)


def _first_line(error: BaseException) -> str:
    """What went wrong, without the specification of the whole array that TensorStore appends."""
    text = str(error).partition(" [tensorstore_spec")[0].strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if len(line) <= 240 else line[:240] + " ..."
