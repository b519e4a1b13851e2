"""Searched questions, kept in a folder chunk by chunk, and the labels that routers are taught.

As in Dr.LLM (2510.12773): a question is kept if the full path is wrong and a searched path is right, or if the full
path is right and a shorter one is too; its labels are those of the shortest correct path. The mix of both is what the
search finds; the released code forces 30% of the first.

Legend: N questions, n kept, L layers.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from moe.config import require
from moe.depth.paths import neighbourhood
from moe.depth.search import Evaluate, EvaluateAll, Search, SearchResult, exhaustive, released_chain, search_all, uct

Kind = Literal["exhaustive", "uct", "released"]
__all__ = ["Evaluate", "Found", "SearchConfig", "Supervision", "searched", "supervision"]


@dataclass(frozen=True)
class SearchConfig:
    """Attributes:
    kind: `exhaustive` enumeration, the paper's tree search, or the chain that the released code runs.
    max_edits: the furthest paths of the first two; 0 is no bound, for `uct` alone.
    budget: paths tried beside the full one; simulations of the chain.
    chunk: questions searched in step and kept together; Ctrl-C loses one chunk at most.
    """

    kind: Kind = "exhaustive"
    max_edits: int = 2
    budget: int = 50
    chunk: int = 256

    def __post_init__(self) -> None:
        require(self.kind in get_args(Kind), "search.kind", self.kind, f"one of {', '.join(get_args(Kind))}")
        for name in ("budget", "chunk"):
            require(getattr(self, name) >= 1, f"search.{name}", getattr(self, name), "at least 1")
        least = 1 if self.kind == "exhaustive" else 0
        require(self.max_edits >= least, "search.max_edits", self.max_edits, f"at least {least} for {self.kind}")

    def steps(self, num_layers: int, seed: int) -> Search:
        if self.kind == "exhaustive":
            return exhaustive(num_layers, self.max_edits)
        if self.kind == "released":
            return released_chain(num_layers, budget=self.budget, seed=seed)
        return uct(num_layers, budget=self.budget, seed=seed, max_edits=self.max_edits or None)

    def most_evaluations(self, num_layers: int) -> int:
        """Of one question."""
        return len(neighbourhood(num_layers, self.max_edits)) if self.kind == "exhaustive" else self.budget + 1


@dataclass(frozen=True)
class Found:
    """What searching N questions found.

    Attributes:
      default: [N] bool, the full path is right.
      any: [N] bool, some path is right.
      counts: [N, L] int32, how often each block runs on the shortest correct path; ones where there is none.
      evaluations: [N] int32, paths evaluated.
    """

    default: np.ndarray
    any: np.ndarray
    counts: np.ndarray
    evaluations: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """[N], blocks on the path that is taken."""
        return self.counts.sum(axis=1)


def searched(
    config: SearchConfig,
    num_layers: int,
    questions: int,
    seed: int,
    folder: Path,
    evaluate: Callable[[int], EvaluateAll],
    progress: Callable[[int], None] = lambda done: None,
) -> Found:
    """Searches questions, going on with the first chunk that is not in `folder`.

    Args:
      seed: question i draws with seed * 1,000,003 + i.
      evaluate: first question of a chunk -> rewards of (question of the chunk, path) pairs.
      progress: told how many questions are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for first in range(0, questions, config.chunk):
        path = folder / f"{first:06d}.npz"
        if not path.exists():
            rows = range(first, min(questions, first + config.chunk))
            searches = [config.steps(num_layers, seed * 1_000_003 + row) for row in rows]
            _write(path, _found(search_all(searches, evaluate(first)), num_layers))
        with np.load(path) as held:
            parts.append(Found(**held))
        progress(min(questions, first + config.chunk))
    fields = [one.name for one in dataclasses.fields(Found)]
    return Found(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def _found(results: list[SearchResult], num_layers: int) -> Found:
    count = lambda path: np.bincount(np.array(path, int), minlength=num_layers)  # noqa: E731
    ones = np.ones(num_layers, int)
    return Found(
        np.array([result.default_correct for result in results]),
        np.array([result.best is not None for result in results]),
        np.stack([ones if result.best is None else count(result.best) for result in results]).astype(np.int32),
        np.array([len(result.rewards) for result in results], np.int32),
    )


def _write(path: Path, found: Found) -> None:
    """Whole or not at all."""
    staged = path.with_suffix(".tmp")
    with staged.open("wb") as file:
        np.savez(file, **vars(found))
    os.replace(staged, path)


@dataclass(frozen=True)
class Supervision:
    """Labels of the kept questions.

    Attributes:
      questions: [n] int.
      labels: [n, L] int32, of 0, 1, 2.
      fixed: [n] bool: the full path is wrong there.
    """

    questions: np.ndarray
    labels: np.ndarray
    fixed: np.ndarray = field(repr=False)

    @property
    def class_counts(self) -> np.ndarray:
        """[3], labels of each class."""
        return np.bincount(self.labels.ravel(), minlength=3)


def supervision(found: Found) -> Supervision:
    """The kept questions; see above.

    Raises:
      ValueError: none is kept.
    """
    layers = found.counts.shape[1]
    fixed = ~found.default & found.any
    kept = np.flatnonzero(fixed | (found.default & (found.lengths < layers)))
    require(len(kept) > 0, "searched questions kept", 0, f"at least one of {len(found.default)}")
    require(int(found.counts[kept].max()) <= 2, "counts", found.counts[kept].max(), "labels: no block more than twice")
    return Supervision(kept, found.counts[kept], fixed[kept])
