"""One method at one seed: adapters for each task alone and for all together, beside one base.

All methods of a seed share a folder with the base and all adapters, each found again by what it is made of: nothing is
trained twice, and what Ctrl-C left unfinished goes on where its checkpoint is.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import MeshConfig
from experiments.experiment import Study, StudyProgress, study_of
from experiments.finetune import (
    AdapterState,
    Base,
    FinetuneConfig,
    adapter_step,
    balanced,
    finetune,
    no_penalty,
    state_bytes,
)
from experiments.mixlora.worlds import Score, Symbolic, World
from experiments.overrides import with_overrides
from experiments.step import make_optimizer
from experiments.tasks.training import Batch
from experiments.train import loss_curve, read_lines
from moe.config import ModelConfig, require
from moe.lora.adapters import abstract_adapters, parameter_count
from moe.lora.config import AdapterConfig
from moe.metrics import max_violation
from moe.transformer import abstract_params, init_router_state
from parallel.mesh import make_mesh


@dataclass(frozen=True)
class Trial:
    """A method on a world.

    Attributes:
      adapters, balance_weight: the method; the weight is of each layer's balance loss (uniform routing gives 1).
      reference: what a task must be learnt by, alone, to be used (`passing`).
      equal_to: whose number of parameters both have, in whole ranks, also where `--set` changes the model; None: ranks
        are as they are.
      tuning: how adapters are trained; `steps` are those of one task: T tasks together have T times as many.
      margin: by how much the reference, or the base, must beat the commonest answer.
      alone: adapters of single tasks too; without them there is nothing to say about a drop.
      first_seed, split: added to the seed, and what is scored: choices are made at a seed of their own, on the
        validation split.
    """

    adapters: AdapterConfig
    reference: AdapterConfig
    balance_weight: float = 0.0
    world: World = field(default_factory=Symbolic)
    tuning: FinetuneConfig = field(default_factory=FinetuneConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    margin: float = 0.05
    alone: bool = True
    first_seed: int = 0
    split: str = "test"
    equal_to: AdapterConfig | None = None

    @property
    def steps(self) -> int:
        """Of the reference on single tasks, of the method on them, and on all together."""
        return (2 + self.alone) * self.tuning.steps * len(self.world.tasks)


def study(trial: Trial) -> Study:
    return study_of(trial, run, lambda trial: trial.steps, check, count, overridden)


def overridden(trial: Trial, settings: Sequence[str]) -> Trial:
    """With `--set` settings; ranks that are not among them are those of the new model's equal sizes."""
    made = with_overrides(trial, settings)
    if made.equal_to is None:
        return made
    config, names = made.world.config(), ("adapters", "reference")
    size = parameter_count(config, made.equal_to)
    kept = {name: getattr(made, name) for name in names if getattr(made, name).rank == getattr(trial, name).rank}
    return replace(made, **{name: matched(adapters, config, size) for name, adapters in kept.items()})


@functools.cache
def matched(adapters: AdapterConfig, config: ModelConfig, size: int) -> AdapterConfig:
    """With the rank at which their number of parameters, linear in it, is closest to `size`; alpha / rank stays."""
    with_rank = lambda rank: replace(adapters, rank=rank, alpha=adapters.alpha / adapters.rank * rank)  # noqa: E731
    one, two = (parameter_count(config, with_rank(rank)) for rank in (1, 2))
    return with_rank(max(1, 1 + round((size - one) / (two - one))))


def check(trial: Trial) -> None:
    """ValueError for a world that is not there, or adapters that do not fit it."""
    trial.world.check()
    for adapters in (trial.adapters, trial.reference):
        abstract_adapters(trial.world.config(), adapters)


def run(trial: Trial, seed: int, out: Path, progress: StudyProgress) -> tuple[dict[str, float], dict[str, Any]]:
    """Accuracies are of `trial.split`, in shares of 1; `multi_task_drop` is single less multi."""
    seed, world = seed + trial.first_seed, trial.world
    shared = out.parent / f"shared-seed{seed}"
    base = world.base(seed, shared / "base", progress)
    at = Place(trial, base, shared, seed, progress)
    used, validation = at.passing()
    single = {task: at.scored([task], [task], trial.split)[task] for task in used if trial.alone}
    multi = at.scored(used, used, trial.split)
    accuracy = lambda scores: float(np.mean([score.accuracy for score in scores.values()]))  # noqa: E731
    metrics = {
        "multi_accuracy": accuracy(multi),
        "trainable_parameters": float(parameter_count(world.config(), trial.adapters)),
        "tasks_used": float(len(used)),
    }
    if trial.alone:
        metrics |= {"single_accuracy": accuracy(single), "multi_task_drop": accuracy(single) - accuracy(multi)}
    if trial.adapters.experts is not None:
        metrics["max_violation"] = pooled_violation(list(multi.values()))
    shares = lambda scores: [round(scores[task].accuracy, 4) if task in scores else None for task in world.tasks]  # noqa: E731
    series = {
        "tasks": list(world.tasks), "dropped": [task for task in world.tasks if task not in used],
        "single": shares(single), "multi": shares(multi), "validation": validation,
    }  # fmt: skip
    return metrics, series | loss_curve(read_lines(at.folder(used) / "metrics.jsonl"), 50)


@dataclass
class Place:
    """A trial at one seed, in a folder that it shares with others; `done` steps are finished."""

    trial: Trial
    base: Base
    shared: Path
    seed: int
    progress: StudyProgress
    done: int = 0

    def passing(self) -> tuple[list[str], dict[str, list[float]]]:
        """The tasks that can be learnt at all: on the validation split the base, or the reference trained on this task
        alone, beats the commonest answer by the margin. And those numbers, task by task.

        Raises:
          ValueError: there is none.
        """
        world, used = self.trial.world, []
        found: dict[str, list[float]] = {"majority": [], "base": [], "reference": []}
        alone = replace(self, trial=replace(self.trial, adapters=self.trial.reference, balance_weight=0.0))
        for task in world.tasks:
            majority = world.majority(task, "validation", self.seed)
            before = world.scored(self.base, None, None, task, "validation", self.seed).accuracy
            after = alone.scored([task], [task], "validation")[task].accuracy
            self.done = alone.done
            if max(before, after) - majority >= self.trial.margin:
                used.append(task)
            for name, value in (("majority", majority), ("base", before), ("reference", after)):
                found[name].append(round(value, 4))
        require(bool(used), "world.tasks", found, f"one that is learnt: {self.trial.margin} above the commonest answer")
        return used, found

    def folder(self, names: Sequence[str]) -> Path:
        """By everything that the adapters are a function of, but for the base and the seed."""
        trial = self.trial
        parts = (trial.adapters, trial.balance_weight, trial.tuning, trial.world)
        return self.shared / f"{zlib.crc32(repr(parts).encode()):08x}-{'+'.join(names)}"

    def scored(self, names: Sequence[str], tasks: Sequence[str], split: str) -> dict[str, Score]:
        """Scores on `tasks` of the adapters that are trained on `names` together."""
        trial, began = self.trial, self.done
        told = lambda step, m: self.progress(began + step, f"{' + '.join(names)}: loss {m['loss']:.3f}")  # noqa: E731
        tuning = replace(trial.tuning, steps=trial.tuning.steps * len(names))
        experts = trial.adapters.experts
        penalty = no_penalty if experts is None else balanced(trial.balance_weight, experts.top_k)
        mesh = make_mesh(trial.mesh.data, trial.mesh.fsdp, trial.mesh.expert)
        batches = trial.world.batches(names, self.seed, tuning.batch_size)
        key = jax.random.key(self.seed)
        tree = finetune(self.base, trial.adapters, batches, tuning, key, self.folder(names), penalty=penalty, mesh=mesh,
                        progress=told)  # fmt: skip
        self.done += tuning.steps
        return {task: trial.world.scored(self.base, trial.adapters, tree, task, split, self.seed) for task in tasks}


def pooled_violation(scores: Sequence[Score]) -> float:
    """MaxVio of the counts of all tasks together, mean over layers and sites."""
    sites = scores[0].counts
    return float(np.mean([max_violation(jnp.asarray(sum(s.counts[site] for s in scores))).mean() for site in sites]))


def count(trial: Trial) -> dict[str, float | int]:
    """Lowers one step on shapes alone and counts."""
    config, adapters, tuning = trial.world.config(), trial.adapters, trial.tuning
    params, tree = abstract_params(config), abstract_adapters(config, adapters)
    tx = make_optimizer(tuning.optimizer, tuning.steps)
    length, answers = trial.world.longest()
    rows = lambda width, dtype: jax.ShapeDtypeStruct((tuning.batch_size, width), dtype)  # noqa: E731
    batch = Batch(rows(length, jnp.int32), rows(length, jnp.int32), rows(answers, jnp.int32), rows(answers, jnp.int32),
                  rows(answers, jnp.float32), jax.ShapeDtypeStruct((tuning.batch_size,), jnp.int32))  # fmt: skip
    experts = adapters.experts
    penalty = no_penalty if experts is None else balanced(trial.balance_weight, experts.top_k)
    step = functools.partial(adapter_step, config=config, adapters=adapters, tx=tx, hard=tuning.hard, penalty=penalty)
    state = jax.eval_shape(lambda tree: AdapterState(jnp.int32(0), tree, tx.init(tree)), tree)
    nothing = jax.tree.map(lambda leaf: None, tree)
    key = jax.eval_shape(lambda: jax.random.key(0))
    inputs = params, jax.eval_shape(lambda: init_router_state(config)), nothing, key, state, batch
    jax.jit(step).trace(*inputs).lower(lowering_platforms=("cpu",))
    frozen = sum(leaf.size for leaf in jax.tree.leaves(params))
    trainable = parameter_count(config, adapters)
    width = jnp.dtype(getattr(trial.world, "dtype", "float32")).itemsize
    return {
        "frozen_parameters": frozen, "trainable_parameters": trainable, "frozen_bytes": width * frozen,
        **state_bytes(config, adapters, tuning.optimizer), "tokens_per_step": tuning.batch_size * length,
        "steps": trial.steps,
    }  # fmt: skip
