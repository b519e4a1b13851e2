"""One policy at one seed: which blocks a test question runs, and what comes of it.

All policies of a seed share a folder with the base, the searched questions and the routers. What is there is read, so
that nothing is computed twice and what Ctrl-C left goes on with the piece that is missing; policies of one process
share it in memory too.

Legend: N questions, L layers.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from experiments.dr_llm.arithmetic import Arithmetic
from experiments.dr_llm.packaged import Packaged
from experiments.dr_llm.quiz import Examiner, Quiz, evaluator
from experiments.dr_llm.routers import RouterTraining, decided, quality, train_routers
from experiments.dr_llm.supervision import Found, SearchConfig, Supervision, searched, supervision
from experiments.experiment import Study, StudyProgress, study_of
from experiments.finetune import Base, fingerprint
from moe.config import ModelConfig, require
from moe.depth.paths import Path as Blocks
from moe.depth.paths import count_executions, labels_of
from moe.depth.policy import NEUTRAL
from moe.depth.router import DepthConfig, Reads, init_routers, load_routers, save_routers
from moe.depth.static import block_influence, early_exit, least_influence, majority_path, random_skip, shuffled_labels
from moe.transformer import abstract_params

World = Arithmetic | Packaged
Policy = Literal[
    "full", "upper_bound", "uct_bound", "released_bound", "router", "router_embedding", "shuffled", "random", "static",
    "shortgpt", "early_exit",
]  # fmt: skip
POLICIES: tuple[Policy, ...] = get_args(Policy)
BOUNDS: dict[str, str] = {"upper_bound": "", "uct_bound": "uct", "released_bound": "released"}
READS: dict[str, Reads] = {"router": "residual", "router_embedding": "embedding"}
SHARES = {"full": 40, "router": 30, "upper_bound": 15, "uct_bound": 6, "released_bound": 6}  # of the time, about


@dataclass(frozen=True)
class Trial:
    """A policy on a world.

    Attributes:
      search: for supervision, and for the upper bound on test questions.
      depth, training: of the routers; `depth.reads` is the policy's.
      knobs: settings of the routers for the curve of accuracy against executions.
      skips: blocks that static policies leave out of every question, for their curves.
    """

    policy: Policy
    world: World = field(default_factory=Arithmetic)
    search: SearchConfig = field(default_factory=SearchConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)
    training: RouterTraining = field(default_factory=RouterTraining)
    knobs: tuple[float, ...] = (-0.8, -0.65, -0.25, 0.0)
    skips: tuple[int, ...] = (1, 2, 3)

    def __post_init__(self) -> None:
        require(self.policy in POLICIES, "policy", self.policy, f"one of {', '.join(POLICIES)}")
        teaches = self.search.kind != "released"
        require(teaches, "search.kind", self.search.kind, "exhaustive or uct: released paths may have no labels")
        layers = self.world.config().num_layers
        require(all(0 <= skip <= layers for skip in self.skips), "skips", self.skips, f"0 to {layers} blocks")
        require(all(-1.0 <= knob <= 1.0 for knob in self.knobs), "knobs", self.knobs, "numbers from -1 to 1")


def study(trial: Trial) -> Study:
    return study_of(trial, run, lambda trial: SHARES.get(trial.policy, 2), check, count)


def check(trial: Trial) -> None:
    """ValueError for what the world lacks, or more than one process: each would write the pieces that are shared."""
    require(jax.process_count() == 1, "processes", jax.process_count(), "one, for dr-llm")
    trial.world.check()


def run(trial: Trial, seed: int, out: Path, progress: StudyProgress) -> tuple[dict[str, float], dict[str, Any]]:
    """Accuracies are shares of 1. `executions` counts as the paper does, over all generated tokens; `fraction` is of
    the executions at full depth, `saved_fraction` the rest and `saved_layers_paper` the same as the paper's count."""
    at = place(replace(trial, policy="full"), seed, out.parent / f"shared-seed{seed}")
    most = SHARES.get(trial.policy, 2)
    at.tell = lambda share, note: progress(min(most, int(most * share)), note)
    if trial.policy in BOUNDS:
        return bound(at, BOUNDS[trial.policy])
    metrics, series = outcome(at, labels_for(at, trial.policy), "test")
    if trial.policy == "full":
        majority = at.quiz("test").majority
        metrics |= {"majority": majority, "over_majority": metrics["accuracy"] - majority}
        full = {name: at.accuracy(at.full(name), name) for name in at.others}
        metrics |= {f"accuracy_{name}": full.get(name, math.nan) for name in trial.world.others}
        used, shares = at.passing
        known = {name: list(found) for name, found in shares.items()}
        dropped = [name for name in shares if name not in (*used, *at.others)]
        return metrics, series | {"used": list(used), "dropped": dropped, "accuracy_and_majority": known}
    if trial.policy in READS:
        more, curve = routed(at, READS[trial.policy])
        return metrics | more, series | curve
    return metrics, series | {"curve": static_curve(at, trial.policy)}


def labels_for(at: Place, policy: str) -> np.ndarray:
    """A policy's labels [N, L] of the test questions. Static ones leave out as many blocks as the routers, on average
    over the questions; none where routers run more than all."""
    if policy == "full":
        return at.full("test")
    if policy in READS:
        return at.labels(READS[policy], NEUTRAL, "test")
    if policy == "static":
        return at.same(majority_path(at.taught.labels))
    of_router = at.labels("residual", NEUTRAL, "test")
    if policy == "shuffled":
        return shuffled_labels(of_router, at.seed)
    count, layers = of_router.shape
    total = max(0, count * layers - int(of_router.sum()))
    skips = np.full(count, total // count)
    skips[np.random.default_rng([at.seed, 1]).permutation(count)[: total % count]] += 1
    return at.skipping(policy, skips)


def bound(at: Place, kind: str) -> tuple[dict[str, float], dict[str, Any]]:
    """What search finds on test questions. It compares with gold answers: an upper bound, not a method."""
    found = at.found("test", kind)
    counted = count_executions(found.lengths.tolist(), at.quiz("test").written.tolist(), at.layers)
    metrics = {
        **counts_of(counted, float(found.any.mean())),
        "fixed": float(np.mean(found.any & ~found.default)),
        "evaluations": float(found.evaluations.mean()),
    }
    return metrics, {}


def outcome(at: Place, labels: np.ndarray, name: str) -> tuple[dict[str, float], dict[str, Any]]:
    counted = count_executions(labels.sum(axis=1).tolist(), at.quiz(name).written.tolist(), at.layers)
    of_layer = [[float(np.mean(labels[:, layer] == one)) for one in range(3)] for layer in range(at.layers)]
    return counts_of(counted, at.accuracy(labels, name)), {"decisions": np.round(of_layer, 4).tolist()}


def counts_of(counted: Any, accuracy: float) -> dict[str, float]:
    return {
        "accuracy": accuracy, "executions": counted.per_query, "fraction": counted.fraction,
        "saved_layers_paper": counted.full_per_query - counted.per_query, "saved_fraction": 1.0 - counted.fraction,
    }  # fmt: skip


def routed(at: Place, reads: Reads) -> tuple[dict[str, float], dict[str, Any]]:
    """What is told of routers alone: supervision, quality on held-out labels, tasks they have not seen, their knob.
    A task that is dropped has NaN, and so has the mean where all are."""
    taught, unseen = at.taught, supervision(at.found("test"))
    classes = taught.class_counts
    metrics = {
        "gap_to_bound": float(at.found("test").any.mean()) - at.accuracy(at.labels(reads, NEUTRAL, "test"), "test"),
        "taught_questions": float(len(taught.questions)),
        "taught_fixed_share": float(taught.fixed.mean()),
        **{f"labels_{name}": float(n) for name, n in zip(("skip", "execute", "repeat"), classes)},
        **quality(at.base, at.depth(reads), at.routers(reads), at.quiz("test"), unseen, at.trial.world.size),
    }
    changes = {}
    for name in at.others:
        changes[name] = at.accuracy(at.labels(reads, NEUTRAL, name), name) - at.accuracy(at.full(name), name)
    metrics |= {f"change_{name}": changes.get(name, math.nan) for name in at.trial.world.others}
    metrics["other_tasks_change"] = float(np.mean(list(changes.values()))) if changes else math.nan
    curve = [at.point(at.labels(reads, knob, "test")) for knob in sorted({*at.trial.knobs, NEUTRAL})]
    of_layer = [[float(np.mean(taught.labels[:, layer] == one)) for one in range(3)] for layer in range(at.layers)]
    return metrics, {"curve": curve, "knobs": sorted({*at.trial.knobs, NEUTRAL}),
                     "taught": np.round(of_layer, 4).tolist()}  # fmt: skip


def static_curve(at: Place, policy: str) -> list[list[float]]:
    """(fraction of executions, accuracy) with equally many blocks left out of every question."""
    if policy not in ("random", "shortgpt", "early_exit"):
        return []
    return [at.point(at.skipping(policy, np.full(len(at.quiz("test")), skip))) for skip in at.trial.skips]


class Place:
    """What policies of a seed share; each piece is made when it is first asked for. `tell(share, note)` is told."""

    def __init__(self, trial: Trial, seed: int, shared: Path) -> None:
        self.trial, self.seed, self.shared = trial, seed, shared
        self.layers = trial.world.config().num_layers
        self.tell: Callable[[float, str], None] = lambda share, note: None
        self._held: dict[tuple[Any, ...], Any] = {}

    def _kept(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._held:
            self._held[key] = make()
        return self._held[key]

    @functools.cached_property
    def base(self) -> Base:
        world = self.trial.world
        told = lambda step, note: self.tell(step / max(world.steps, 1), note)  # noqa: E731
        return world.base(self.seed, self.shared / self._name("base", world), told)

    @functools.cached_property
    def model(self) -> tuple[ModelConfig, int]:
        """Which model the base is: where it lies, another may lie later."""
        return self.base.config, fingerprint({"params": self.base.params, "router_state": self.base.router_state})

    @functools.cached_property
    def passing(self) -> tuple[tuple[str, ...], dict[str, tuple[float, float]]]:
        """The tasks that are used, and (accuracy, share of the commonest answer) on validation splits."""
        world = self.trial.world
        return world.passing(self.base, self.seed) if isinstance(world, Arithmetic) else world.passing()

    @functools.cached_property
    def others(self) -> tuple[str, ...]:
        """Tasks that routers have not seen, without those that the base does not know."""
        world, shares = self.trial.world, self.passing[1]
        return tuple(name for name in world.others if shares[name][0] - shares[name][1] >= world.margin)

    def quiz(self, name: str) -> Quiz:
        return self._kept(("quiz", name), lambda: self.trial.world.quiz(name, self.seed))

    def examiner(self, name: str) -> Examiner:
        world = self.trial.world
        return self._kept(
            ("examiner", name), lambda: Examiner(self.base, self.quiz(name), world.size, world.mixed)
        )

    def full(self, name: str) -> np.ndarray:
        return np.ones((len(self.quiz(name)), self.layers), np.int32)

    def same(self, path: Blocks) -> np.ndarray:
        """The labels of one path for all test questions."""
        return np.broadcast_to(labels_of(path, self.layers), (len(self.quiz("test")), self.layers))

    def accuracy(self, labels: np.ndarray, name: str) -> float:
        key = "accuracy", name, labels.tobytes()
        return self._kept(key, lambda: float(self.examiner(name).right(labels).mean()))

    def point(self, labels: np.ndarray) -> list[float]:
        metrics = outcome(self, labels, "test")[0]
        return [round(metrics["fraction"], 5), round(metrics["accuracy"], 5)]

    def found(self, name: str, kind: str = "") -> Found:
        """The search of `search` or `test` questions; `kind` in place of the trial's, by its budget and any edits."""
        search = self.trial.search
        if kind:
            search = replace(search, kind=kind, max_edits=0)
        return self._kept(("found", name, kind), lambda: self._searched(name, search))

    def _searched(self, name: str, search: SearchConfig) -> Found:
        count = len(self.quiz(name))
        folder = self._name(f"{search.kind}-{name}", self.model, self.trial.world, search)
        seed = self.trial.world.search_seed(self.seed)
        told = lambda done: self.tell(done / count, f"{search.kind} search: {done} of {count} {name} questions")  # noqa: E731
        where = self.shared.parent / f"shared-seed{seed}" / folder
        examiner = self.examiner(name)
        return searched(search, self.layers, count, seed, where, functools.partial(evaluator, examiner), told)

    @functools.cached_property
    def taught(self) -> Supervision:
        return supervision(self.found("search"))

    def depth(self, reads: Reads) -> DepthConfig:
        return replace(self.trial.depth, reads=reads)

    def routers(self, reads: Reads) -> Any:
        return self._kept(("routers", reads), lambda: self._routers(self.depth(reads)))

    def _routers(self, depth: DepthConfig) -> Any:
        trial = self.trial
        parts = self.model, trial.world, trial.search, trial.training, depth
        folder = self.shared / self._name(f"routers-{depth.reads}", *parts)
        if not folder.exists():
            taught = self.taught
            self.tell(0.9, f"routers on {depth.reads}: {len(taught.questions)} questions")
            inputs = self.base, depth, trial.training, self.quiz("search"), taught
            staged = folder.with_suffix(".tmp")
            staged.mkdir(parents=True, exist_ok=True)
            save_routers(staged, depth, train_routers(*inputs, trial.world.size, self.seed))
            staged.rename(folder)
        return load_routers(folder, hidden=self.base.config.hidden, num_layers=self.layers)[1]

    def labels(self, reads: Reads, knob: float, name: str) -> np.ndarray:
        make = lambda: decided(self.base, self.depth(reads), self.routers(reads), knob, self.quiz(name),  # noqa: E731
                               self.trial.world.size)  # fmt: skip
        return self._kept(("labels", reads, knob, name), make)

    def skipping(self, policy: str, skips: np.ndarray) -> np.ndarray:
        """Labels of the test questions with `skips` [N] blocks left out, the same blocks of as many except `random`."""
        paths: dict[str, Callable[[int, int], Blocks]] = {
            "random": lambda row, skip: random_skip(self.layers, skip, self.seed * 1_000_003 + row),
            "shortgpt": lambda row, skip: least_influence(self.influence, skip),
            "early_exit": lambda row, skip: early_exit(self.layers, self.layers - skip),
        }
        rows = [labels_of(paths[policy](row, skip), self.layers) for row, skip in enumerate(skips.tolist())]
        return np.array(rows, np.int32)

    @functools.cached_property
    def influence(self) -> np.ndarray:
        """ShortGPT's, on the prompts that were searched."""
        quiz, base = self.quiz("search"), self.base
        rows = slice(0, 4 * self.trial.world.size)
        return block_influence(*base, quiz.prompts[rows], quiz.lengths[rows])

    def _name(self, what: str, *parts: Any) -> str:
        """A folder by everything that its content is a function of, but for the seed."""
        return f"{what}-{zlib.crc32(repr(parts).encode()):08x}"


@functools.lru_cache(maxsize=1)
def place(trial: Trial, seed: int, shared: Path) -> Place:
    return Place(trial, seed, shared)


def count(trial: Trial) -> dict[str, float | int]:
    """For `--dry-run`: sizes on shapes alone, and the work of searching."""
    world, config = trial.world, trial.world.config()
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    key = jax.eval_shape(lambda: jax.random.key(0))
    routers = jax.eval_shape(lambda key: init_routers(trial.depth, config.hidden, config.num_layers, key), key)
    frozen, each = size(abstract_params(config)), trial.search.most_evaluations(config.num_layers)
    evaluations = each * (world.search_questions + world.test_questions)
    return {
        "frozen_parameters": frozen, "router_parameters": size(routers), "paths_per_question": each,
        "search_evaluations": evaluations, "search_flops": 2 * frozen * evaluations * world.longest,
    }  # fmt: skip
