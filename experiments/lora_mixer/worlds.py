"""The digits of experiments/mixlora, each task in an alphabet of its own: as tasks of text differ in their words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.finetune import Base, answered
from experiments.mixlora.worlds import Score, Symbolic
from experiments.tasks import symbolic
from experiments.tasks.training import Batch
from moe.config import ModelConfig
from moe.lora.config import AdapterConfig

ALPHABETS = list(symbolic.TASKS)


@dataclass(frozen=True)
class Alphabets(Symbolic):
    """Every digit of a row says which alphabet it is of, and every task has one. The model was pretrained on its other
    maps in all four alphabets alike, so that it knows them and nothing of what is to be done in which."""

    model: ModelConfig = field(
        default_factory=lambda: replace(Symbolic().model, vocab_size=symbolic.VOCAB + symbolic.BASE * 3)
    )

    def text(self, seed: int, step: int) -> dict[str, jax.Array]:
        made = super().text(seed, step)
        samples = self.pretraining_batch * step + np.arange(self.pretraining_batch)
        which = samples // len(symbolic.PRETRAINING) % len(ALPHABETS)  # each map in each alphabet
        return made | {"tokens": jnp.asarray(written(np.asarray(made["tokens"][0]), which)[None])}

    def batches(self, names: Sequence[str], seed: int, size: int, split: str = "train") -> Callable[[int], Batch]:
        plain = super().batches(names, seed, size, split)
        return lambda step: own_alphabets(plain(step), names)

    def scored(self, base: Base, adapters: AdapterConfig | None, tree: Any, task: str, split: str, seed: int) -> Score:
        rows = own_alphabets(symbolic.batch(split, seed, [task], 0, self.test_rows, self.digits), [task])
        found = answered(base, adapters, tree, rows, min(256, self.test_rows))
        return Score(float(found.right.mean()), {site: c.sum(axis=0) for site, c in found.counts.items()})


def written(tokens: np.ndarray, alphabets: np.ndarray) -> np.ndarray:
    """Tokens [B, ...] with the digits of row b in the alphabet of that number; signs stay."""
    return np.where(tokens >= symbolic.ZERO, tokens + symbolic.BASE * alphabets[:, None], tokens).astype(np.int32)


def own_alphabets(rows: Batch, names: Sequence[str]) -> Batch:
    """Rows of `symbolic.batch` of these tasks, questions and answers in the alphabet of the row's task."""
    which = np.array([ALPHABETS.index(name) for name in names])[rows.task]
    return rows._replace(tokens=written(rows.tokens, which), targets=written(rows.targets, which))
