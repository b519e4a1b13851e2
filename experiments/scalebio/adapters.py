"""ScaleBiO with LoRA in place of models: w and u are adapters of one frozen base, a cheaper variant, not the paper's.

Sources are shares of one packaged task's training questions, of which a part has a wrong option as its answer; the
validation split is right. A search weighs the sources by the adapters' losses on answers, then fresh adapters are
trained on questions in those proportions, and the test split is scored.

Legend: K sources, B rows, A answer tokens of a row at most.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array

from experiments.data.pipeline import Weighted, proportions
from experiments.experiment import Study, StudyProgress, study_of
from experiments.finetune import Base, FinetuneConfig, adapted, finetune, fingerprint, state_bytes
from experiments.mixlora.worlds import Packaged
from experiments.overrides import flatten
from experiments.scalebio.study import agreement
from experiments.step import make_optimizer
from experiments.stepping import stepped
from experiments.tasks.example import Example
from experiments.tasks.training import Batch, Tokenized, mixture, padded, source_row, tokenized
from experiments.weighted_loss import token_losses
from moe.config import require
from moe.lora.adapters import init_adapters
from moe.lora.config import AdapterConfig
from optim.bilevel import BilevelState, penalty_bilevel, weights_of
from optim.domain_weights import domain_sums
from parallel.checkpoint import Checkpoints

CYCLE = 4096  # rows after which the order of sources repeats


@dataclass(frozen=True)
class AdapterTrial:
    """An arm.

    Attributes:
      search_steps: of three passes; 0: uniform weights.
      levels: share of wrong answers of each source.
      tuning: of the fresh adapters; a search has their optimiser and batch.
      alpha, lam_rate: of the penalty method.
    """

    search_steps: int = 0
    levels: tuple[float, ...] = (0.0, 0.3, 0.6, 0.9)
    adapters: AdapterConfig = field(default_factory=lambda: AdapterConfig(8, 16.0))
    world: Packaged = field(default_factory=lambda: Packaged(tasks=("question-types",)))
    tuning: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(steps=100, batch_size=16))
    alpha: float = 100.0
    lam_rate: float = 0.03
    first_seed: int = 0

    def __post_init__(self) -> None:
        count = len(self.levels)
        require(count >= 2 and all(0 <= x <= 1 for x in self.levels), "levels", self.levels, "two shares or more")
        require(self.search_steps >= 0, "search_steps", self.search_steps, "0 or more")
        require(self.tuning.batch_size % count == 0, "tuning.batch_size", self.tuning.batch_size,
                f"a multiple of the {count} sources")  # fmt: skip
        require(len(self.world.tasks) == 1, "world.tasks", self.world.tasks, "one task, which is shared out")

    @property
    def steps(self) -> int:
        return 3 * self.search_steps + self.tuning.steps


def study(trial: AdapterTrial) -> Study:
    return study_of(trial, run, lambda trial: trial.steps, lambda trial: trial.world.check(), count)


def count(trial: AdapterTrial) -> dict[str, float | int]:
    """Of one copy of the adapters; a search has two, with the moments of both."""
    return dict(state_bytes(trial.world.config(), trial.adapters, trial.tuning.optimizer))


def mislabelled(examples: Sequence[Example], level: float, rng: np.random.Generator) -> list[Example]:
    """With probability `level`, each alone, another option as the answer. ValueError for answers that are written."""
    made = []
    for example in examples:
        require(isinstance(example.answer, int), "world.tasks", example.prompt[:40], "a task with options")
        wrong, others = rng.random() < level, len(example.options) - 1
        answer = (int(example.answer) + 1 + rng.integers(others)) % len(example.options)
        made.append(replace(example, answer=int(answer)) if wrong else example)
    return made


def sources_of(trial: AdapterTrial, seed: int) -> tuple[list[Tokenized], Tokenized]:
    """The K sources, disjoint shares of the training split, and the validation split."""
    from experiments.evaluation.text import open_words
    from experiments.initial import pretrained_config
    from experiments.tasks.catalogue import load_examples

    world, (task,) = trial.world, trial.world.tasks
    words = open_words(world.source, pretrained_config(world.source))
    examples = load_examples(task, "train")
    order = np.random.default_rng([seed, 0]).permutation(len(examples))
    shares = np.array_split(order, len(trial.levels))
    noisy = [
        mislabelled([examples[i] for i in share], level, np.random.default_rng([seed, 1, k]))
        for k, (share, level) in enumerate(zip(shares, trial.levels, strict=True))
    ]
    rows = [tokenized(f"{task}, wrong {level:.0%}", part, words, world.longest_row)
            for level, part in zip(trial.levels, noisy, strict=True)]  # fmt: skip
    return rows, tokenized(f"{task}, validation", load_examples(task, "validation"), words, world.longest_row)


@struct.dataclass
class AdapterSearch:
    """What a checkpoint holds: finished steps, both adapters with their moments and lam."""

    step: Array
    bilevel: BilevelState


def search(
    trial: AdapterTrial, base: Base, sources: Sequence[Tokenized], validation: Tokenized, seed: int, out: Path,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> np.ndarray:  # fmt: skip
    """Weights [K], found in `out` or on from the checkpoint there. Errors as `experiments.stepping.stepped`."""
    key, config = jax.random.key(seed), trial.tuning
    start = init_adapters(base.config, trial.adapters, base.params, jax.random.fold_in(key, 0))
    tx = make_optimizer(config.optimizer, max(1, trial.search_steps))
    step_fn = jax.jit(functools.partial(one_step, trial, base.config, tx, len(sources)), donate_argnums=2)
    mark = flatten(trial) | {"base": fingerprint(base.params), "seed": seed}
    with Checkpoints(out / "checkpoints", fingerprint=mark) as saved:
        init = method(trial, base.config, base.params, base.router_state, tx, len(sources)).init
        state = AdapterSearch(jnp.int32(0), init(start, len(sources)))
        if saved.latest() is not None:
            state = saved.restore(state)

        def one(state: AdapterSearch, step: int) -> tuple[AdapterSearch, dict[str, Array]]:
            rows = mixture(sources, seed, step, config.batch_size), mixture([validation], seed, step, config.batch_size)
            return step_fn(base.params, base.router_state, state, *rows)

        every = config.checkpoint_every
        state = stepped(state, one, trial.search_steps, saved, out, checkpoint_every=every, progress=progress)
    return np.asarray(weights_of(state.bilevel.lam))


def method(trial: AdapterTrial, config: Any, params: Any, router_state: Any, tx: Any, num_sources: int) -> Any:
    def nats(tree: Any, rows: Batch) -> Array:
        out = adapted(config, trial.adapters, params, router_state, tree, rows, None, None)
        return token_losses(out, rows.targets)

    def inner(tree: Any, rows: Batch) -> tuple[Array, Array]:
        return domain_sums(nats(tree, rows), rows.task, num_sources, rows.weights > 0)

    def outer(tree: Any, rows: Batch) -> tuple[Array, Array]:
        return jnp.sum(nats(tree, rows) * rows.weights), jnp.sum(rows.weights)

    lam_opt = optax.adam(trial.lam_rate)
    return penalty_bilevel(outer, inner, alpha=trial.alpha, w_opt=tx, u_opt=tx, lam_opt=lam_opt)


def one_step(
    trial: AdapterTrial, config: Any, tx: Any, num_sources: int, params: Any, router_state: Any, state: AdapterSearch,
    rows: Batch, validation: Batch,
) -> tuple[AdapterSearch, dict[str, Array]]:  # fmt: skip
    """The base is an argument: nothing differentiates it, and both adapters share it."""
    one_pass = lambda batch: jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], batch)  # noqa: E731
    made = method(trial, config, params, router_state, tx, num_sources)
    moved, metrics = made.step(state.bilevel, one_pass(rows), one_pass(validation))
    told = {"loss": metrics["outer_loss"], "gap": metrics["gap"], "grad_norm": metrics["grad_norm_w"]}
    return AdapterSearch(state.step + 1, moved), told


def weighted(sources: Sequence[Tokenized], weights: np.ndarray, seed: int, size: int) -> Callable[[int], Batch]:
    """step -> rows of that step, sources in proportion to their weights, every source's rows in its own order."""
    chosen = Weighted(proportions(weights, len(sources), "weights"), CYCLE)
    length, answers = (max(source.shape[i] for source in sources) for i in (0, 1))

    def at(step: int) -> Batch:
        places = [chosen[i] for i in range(step * size, (step + 1) * size)]
        rows = [source_row(sources[k], seed, n) for k, n in places]
        return padded(rows, np.array([k for k, _ in places]), length, answers)

    return at


def run(trial: AdapterTrial, seed: int, out: Path, progress: StudyProgress) -> tuple[dict[str, float], dict[str, Any]]:
    """`accuracy` of fresh adapters on the test split, `val_accuracy`; with a search `p_clean`, `kendall_tau`."""
    seed, (task,) = seed + trial.first_seed, trial.world.tasks
    base = trial.world.base(seed, out / "base", progress)
    sources, validation = sources_of(trial, seed)
    weights = np.full(len(sources), 1 / len(sources))
    if trial.search_steps:
        told = lambda step, m: progress(3 * step, f"search: loss {m['loss']:.3f}")  # noqa: E731
        weights = search(trial, base, sources, validation, seed, out / "search", told)
    key = jax.random.key(seed)
    rows = weighted(sources, weights, seed, trial.tuning.batch_size)
    told = lambda step, m: progress(3 * trial.search_steps + step, f"adapters: loss {m['loss']:.3f}")  # noqa: E731
    tree = finetune(base, trial.adapters, rows, trial.tuning, key, out / "fresh", progress=told)
    scored = functools.partial(trial.world.scored, base, trial.adapters, tree, task, seed=seed)
    clean = [1 - level for level in trial.levels]
    metrics = {
        "mean_accuracy": scored(split="test").accuracy,
        "majority": trial.world.majority(task, "test", seed),
        "p_clean": float(weights[int(np.argmax(clean))]),
        "kendall_tau": agreement(weights, clean),
        "passes": 3.0 * trial.search_steps + trial.tuning.steps,
    }
    return metrics, {"domains": [source.name for source in sources], "weights": weights.round(5).tolist(), "path": []}
