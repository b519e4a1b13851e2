"""Which tile a Triton kernel takes: a table in `tiles.json`, by kernel, compute capability and rows per group.

Every entry says where it comes from: `measured on CARD`, by `bench tune-tiles`, or `estimated`, which is a guess
that compiles without spills. Rows per group come in classes: `few` up to 32, `some` up to 256, `many`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax.numpy as jnp

from kernels import _triton
from kernels.checks import require, require_choice

TABLE = Path(__file__).parent / "tiles.json"
CLASSES = {"few": 32, "some": 256, "many": None}  # the most rows per group of each


@dataclass(frozen=True)
class Tile:
    """BM x BN of the result, BK of the contracted side at a time; warps of a program, stages of its loads' pipeline."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    source: str = "estimated"

    def __post_init__(self) -> None:
        for name in ("BM", "BN", "BK"):
            size = getattr(self, name)
            require(size >= 16 and size & (size - 1) == 0, name, size, "a power of two, at least 16")
        require_choice("warps", self.warps, (1, 2, 4, 8, 16))
        require(self.stages >= 1, "stages", self.stages, "at least 1")

    def programs(self, multiprocessors: int) -> int:
        """Of a persistent kernel: eight warps or more on each multiprocessor, so that one's loads hide another's."""
        return multiprocessors * max(1, 8 // self.warps)


WIDE = Tile(32, 32, 32, 4, 2)  # float32, whose products use no tensor cores: for tests, not for speed
_chosen: ContextVar[Tile | None] = ContextVar("tile", default=None)


@contextmanager
def using(tile: Tile) -> Iterator[None]:
    """All kernels traced inside take this tile: for the tuner, and for the interpreter, which wants small ones."""
    token = _chosen.set(tile)
    try:
        yield
    finally:
        _chosen.reset(token)


@cache
def table() -> dict[str, dict[str, dict[str, Tile]]]:
    """Kernel, capability (80 or 90) and class to a tile."""
    read = json.loads(TABLE.read_text())
    return {
        kernel: {
            capability: {name: Tile(*entry["tile"], source=entry["source"]) for name, entry in classes.items()}
            for capability, classes in capabilities.items()
        }
        for kernel, capabilities in read.items()
    }


def class_of(rows_per_group: int) -> str:
    """`few`, `some` or `many`."""
    return next(name for name, most in CLASSES.items() if most is None or rows_per_group <= most)


def tile_for(kernel: str, dtype: jnp.dtype, rows_per_group: int) -> Tile:
    """The table's, or that of `using`. ValueError for a kernel without entries."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    require_choice("kernel", kernel, tuple(table()))
    if jnp.dtype(dtype).itemsize > 2:
        return WIDE
    capability = "90" if _triton.capability() >= 90 else "80"
    return table()[kernel][capability][class_of(rows_per_group)]
