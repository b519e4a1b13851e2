"""`python -m experiments convert` and `logits`: what stands between the command line and `moe.pretrained.model`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from numpy.lib import format as npy

from experiments.progress import Bar
from moe.config import ModelConfig, require
from moe.pretrained.checkpoint import open_checkpoint
from moe.pretrained.model import Pretrained, convert, load
from moe.transformer import Transformer
from parallel.mesh import BATCH, make_mesh


def convert_model(source: str | Path, target: Path, family: str | None = None) -> tuple[str, ...]:
    """Converts with a progress bar; prints and returns what the user must know. Arguments and errors: `convert`."""
    begin = time.perf_counter()
    with progress_bar("convert") as progress:
        notes = convert(source, target, to=family, progress=progress)
    size = sum(path.stat().st_size for path in Path(target).iterdir())
    print(f"{target}: {size / 1e6:,.1f} MB in {time.perf_counter() - begin:.1f} s")
    for note in notes:
        print(f"note: {note}")
    return notes


def write_logits(model: str | Path, tokens: Path, out: Path, batch_size: int = 8) -> None:
    """Writes a model's logits for tokens, float32 [B, S, V], to `out`; over all devices if there are several.

    Args:
      model: as `moe.pretrained.model.load` takes it.
      tokens: an .npy file of whole numbers, [B, S], or [S] for B = 1.
      out: an .npy file; one that is there is replaced once all is written.
      batch_size: rows of one pass; more if there are more devices.

    Raises:
      ValueError: no such model or file; tokens that are no whole numbers, outside of the vocabulary, or more than the
        model's context; before anything is compiled or written.
    """
    out = Path(out)
    require(batch_size >= 1, "batch_size", batch_size, "at least 1")
    require(out.suffix == ".npy", "out", str(out), "a name that ends in .npy")
    require(not out.is_dir(), "out", str(out), "a file, not a folder")
    inside = next((path for path in out.parents if path.exists()), out.parent)
    require(inside.is_dir(), "out", str(out), f"a file in a folder; {inside} is none")
    rows = read_tokens(Path(tokens), open_checkpoint(model).config)
    mesh = make_mesh(fsdp=jax.device_count()) if jax.device_count() > 1 else None
    with progress_bar("read") as progress:
        loaded = load(model, mesh=mesh, progress=progress)
    for note in loaded.notes:
        print(f"note: {note}")
    with replaced(out) as path, progress_bar("logits") as progress, open(path, "wb") as file:
        shape = (*rows.shape, loaded.config.vocab_size)
        npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        done = 0
        for part in logits_of(loaded, rows, batch_size, mesh):
            file.write(part.astype("<f4", copy=False).data)
            done += len(part)
            progress(done, len(rows))


def read_tokens(path: Path, config: ModelConfig) -> np.ndarray:
    """Tokens [B, S] int32 of a file; see `write_logits` for the errors."""
    require(path.is_file(), "tokens", str(path), "an existing .npy file")
    try:
        rows = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"tokens = {str(path)!r}: expected a whole .npy file of numbers ({error})") from None
    require(isinstance(rows, np.ndarray), "tokens", str(path), "an .npy file, not an archive")
    require(np.issubdtype(rows.dtype, np.integer), "tokens dtype", str(rows.dtype), "whole numbers")
    require(rows.ndim in (1, 2) and rows.size > 0, "tokens shape", rows.shape, "[B, S] or [S], not empty")
    rows = np.atleast_2d(rows)
    fits = config.context == 0 or rows.shape[1] <= config.context
    require(fits, "tokens length", rows.shape[1], f"at most the model's context of {config.context}")
    for end in (rows.min(), rows.max()):
        require(0 <= end < config.vocab_size, "tokens", int(end), f"ids from 0 to {config.vocab_size - 1}")
    return rows.astype(np.int32)


def logits_of(model: Pretrained, rows: np.ndarray, batch_size: int, mesh: Any = None) -> Iterator[np.ndarray]:
    """Logits [b, S, V] float32 of `batch_size` rows [B, S] after the other."""
    devices = 1 if mesh is None else mesh.size
    size = -(-min(batch_size, len(rows)) // devices) * devices
    net = Transformer(model.config)

    @jax.jit
    def forward(params: Any, router_state: Any, tokens: Any, segment_ids: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        out: Any = net.apply({"params": params}, tokens, segment_ids, positions, router_state, None)
        return jnp.einsum("bsd,vd->bsv", out.hidden, out.head, preferred_element_type=jnp.float32)

    with (
        jax.default_matmul_precision("float32"),  # a GPU would round factors to 10 bits
        contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh),
    ):
        for begin in range(0, len(rows), size):
            part = rows[begin : begin + size]
            padding = ((0, size - len(part)), (0, 0))  # one shape is compiled
            batch = [np.pad(part, padding), np.pad(np.ones_like(part), padding)]
            if mesh is not None:
                batch = [jax.device_put(array, NamedSharding(mesh, BATCH)) for array in batch]
            yield np.asarray(forward(model.params, model.router_state, *batch))[: len(part)]


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that learns its total with the first (done, total)."""
    with contextlib.ExitStack() as stack:
        bars: list[Bar] = []

        def update(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(Bar(title, total)))
            bars[0].update(done)

        yield update


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` at the end, or is gone after an error."""
    made = [folder for folder in path.parents if not folder.exists()]
    staged = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield staged
        os.replace(staged, path)
    except BaseException:  # KeyboardInterrupt too
        staged.unlink(missing_ok=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
