"""What is fine-tuned and on what: a small model pretrained here with conflicting tasks on digits, or a released model
with packaged tasks."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import OptimizerConfig, RunConfig
from experiments.experiment import StudyProgress
from experiments.finetune import AdaptedScorer, Base, answered, released, released_config
from experiments.initial import pretrained_config
from experiments.overrides import flatten
from experiments.step import compile_step, init_state, make_optimizer
from experiments.stepping import stepped
from experiments.tasks import symbolic
from experiments.tasks.training import Batch, Tokenized, mixture, tokenized
from moe.config import ModelConfig, require
from moe.lora.config import AdapterConfig
from parallel.checkpoint import Checkpoints
from parallel.mesh import make_mesh


class Score(NamedTuple):
    """Share of right answers, and how often each expert was chosen, [L, E] by site."""

    accuracy: float
    counts: dict[str, np.ndarray]


@dataclass(frozen=True)
class Symbolic:
    """`experiments.tasks.symbolic`, and a model pretrained on its other maps.

    Attributes:
      digits: n, of a question.
      pretraining, pretraining_steps, pretraining_batch: of the base.
      test_rows: rows of each task and split that are scored.
    """

    tasks: tuple[str, ...] = tuple(symbolic.TASKS)
    digits: int = 6
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            vocab_size=symbolic.VOCAB, hidden=64, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=16, ffn_dim=176,
            moe=None, tie_embeddings=True, init_std=0.1, unroll=0,
        )
    )
    pretraining: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=3e-3, warmup_steps=50, weight_decay=0.01)
    )
    pretraining_steps: int = 1000
    pretraining_batch: int = 48
    test_rows: int = 512

    def check(self) -> None:
        for task in self.tasks:
            require(task in symbolic.TASKS, "world.tasks", task, f"some of {', '.join(symbolic.TASKS)}")

    def config(self) -> ModelConfig:
        return self.model

    def base(self, seed: int, folder: Path, progress: StudyProgress) -> Base:
        """The pretrained model of a seed, made in `folder` unless it is there. KeyboardInterrupt once it is saved."""
        run = RunConfig(model=self.model, optimizer=self.pretraining, batch_size=self.pretraining_batch,
                        steps=self.pretraining_steps, seed=seed)  # fmt: skip
        mesh, tx = make_mesh(), make_optimizer(run.optimizer, run.steps)
        mark = flatten(replace(run, checkpoint_every=0)) | {"digits": self.digits}
        with jax.set_mesh(mesh), Checkpoints(folder / "checkpoints", fingerprint=mark) as saved:
            state = jax.jit(functools.partial(init_state, run, tx))()
            if saved.latest() is not None:
                state = saved.restore(state)
            one = compile_step(run, tx, mesh)
            told = lambda step, m: None if step % 50 else progress(0, f"base step {step} loss {m['loss']:.3f}")  # noqa: E731
            run_step = lambda state, step: one(state, self.text(seed, step))  # noqa: E731
            state = stepped(state, run_step, run.steps, saved, folder, progress=told)
        return Base(self.model, state.params, state.router_state)

    def text(self, seed: int, step: int) -> dict[str, jax.Array]:
        """What one step of pretraining reads, [1, B, S + 1]."""
        size = self.pretraining_batch
        rows = symbolic.batch("train", seed, list(symbolic.PRETRAINING), size * step, size, self.digits, whole=True)
        tokens = jnp.asarray(np.concatenate([rows.tokens, rows.targets[:, -1:]], axis=1)[None])
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1], dtype=jnp.int32)[None, None], tokens.shape)
        return {"tokens": tokens, "segment_ids": (tokens != symbolic.PAD).astype(jnp.int32), "positions": positions}

    def batches(self, names: Sequence[str], seed: int, size: int, split: str = "train") -> Callable[[int], Batch]:
        return lambda step: symbolic.batch(split, seed, names, size * step, size, self.digits)

    def scored(self, base: Base, adapters: AdapterConfig | None, tree: Any, task: str, split: str, seed: int) -> Score:
        """Exact matches. The questions of every seed are others."""
        rows = symbolic.batch(split, seed, [task], 0, self.test_rows, self.digits)
        found = answered(base, adapters, tree, rows, min(256, self.test_rows))
        return Score(float(found.right.mean()), {site: c.sum(axis=0) for site, c in found.counts.items()})

    def majority(self, task: str, split: str, seed: int) -> float:
        """Share of the commonest answer."""
        rows = symbolic.batch(split, seed, [task], 0, self.test_rows, self.digits)
        return Counter(map(tuple, rows.targets.tolist())).most_common(1)[0][1] / self.test_rows

    def longest(self) -> tuple[int, int]:
        """(S, A)"""
        return 2 * self.digits + 2, self.digits + 1


@dataclass(frozen=True)
class Packaged:
    """A released model and tasks of `experiments.tasks.catalogue` that have options, which are scored.

    Attributes:
      source: a name or a directory, as `generate --model` takes it; empty: none yet.
      model: its shape, for counting where the source is not there.
      dtype: of the frozen parameters and the arithmetic.
      longest_row: examples of more tokens are left out.
      test_rows: the most examples of each task and split that are scored.
    """

    tasks: tuple[str, ...] = ("question-types", "sentiment-film", "sarcasm")
    source: str = "smollm2"
    dtype: str = "float32"
    model: ModelConfig = field(default_factory=ModelConfig)
    longest_row: int = 64
    test_rows: int = 128
    test_batch: int = 16

    def check(self) -> None:
        from experiments.data import DataError
        from experiments.evaluation.text import open_words
        from experiments.tasks.catalogue import TASKS, missing, named

        for task in named(self.tasks):
            require(TASKS[task].check is None, "world.tasks", task, "a task with options")
        require(bool(self.source), "world.source", self.source, "a model: --set world.source=DIRECTORY")
        open_words(self.source, pretrained_config(self.source))
        if text := missing(self.tasks):
            raise DataError(text)

    def config(self) -> ModelConfig:
        return released_config(self.source, self.dtype, absent=self.model)  # `check` says what is missing

    def base(self, seed: int, folder: Path, progress: StudyProgress) -> Base:
        del seed, folder
        progress(0, f"reading {Path(self.source).name}")
        return released(self.source, self.dtype)

    def batches(self, names: Sequence[str], seed: int, size: int, split: str = "train") -> Callable[[int], Batch]:
        tasks = [_tokenized(self.source, name, self.longest_row, split) for name in names]
        return lambda step: mixture(tasks, seed, step, size)

    def scored(self, base: Base, adapters: AdapterConfig | None, tree: Any, task: str, split: str, seed: int) -> Score:
        """The likeliest option, of the same examples at every seed."""
        del seed
        unit = _unit(self.source, task, split, self.test_rows)
        scorer = AdaptedScorer(base, adapters, tree, self.test_batch)
        result, _ = unit.run(scorer, lambda tokens: None)
        return Score(result["accuracy"]["share"], scorer.counts)

    def majority(self, task: str, split: str, seed: int) -> float:
        unit = _unit(self.source, task, split, self.test_rows)
        return Counter(example.answer for example in unit.examples).most_common(1)[0][1] / len(unit.examples)

    def longest(self) -> tuple[int, int]:
        """(S, A), A a guess."""
        return self.longest_row, 8


World = Symbolic | Packaged


@functools.lru_cache(maxsize=16)
def _tokenized(source: str, task: str, longest: int, split: str) -> Tokenized:
    from experiments.evaluation.text import open_words
    from experiments.tasks.catalogue import load_examples

    return tokenized(task, load_examples(task, split), open_words(source, pretrained_config(source)), longest)


@functools.lru_cache(maxsize=32)
def _unit(source: str, task: str, split: str, rows: int) -> Any:
    from experiments.evaluation.text import open_words
    from experiments.evaluation.units import task_unit
    from experiments.tasks.catalogue import load_examples

    def no_generator() -> Any:
        raise AssertionError("options are scored")

    config, examples = pretrained_config(source), load_examples(task, split)[:rows]
    return task_unit(task, examples, open_words(source, config), False, config.context, no_generator)
