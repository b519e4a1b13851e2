"""One arm at one seed: task adapters side by side as frozen experts, and what decides among them.

All arms of a seed share a folder with the base, the task adapters and their scores, each found again by what it is made
of: nothing is trained or scored twice, and what Ctrl-C left unfinished goes on where its checkpoint is.

Legend: B rows, L layers, E experts (one for each task that is used), k served.
"""

from __future__ import annotations

import functools
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.config import MeshConfig
from experiments.experiment import Study, StudyProgress, study_of
from experiments.finetune import (
    Base,
    FinetuneConfig,
    Penalty,
    Sites,
    balanced,
    everything,
    finetune,
    fingerprint,
    routers_only,
    split,
)
from experiments.lora_mixer.probing import Probe, mi_by_layer, probe, routing_metrics
from experiments.mixlora import study as sibling
from experiments.mixlora.worlds import Symbolic, World
from experiments.output import write_json
from experiments.overrides import with_overrides
from experiments.step import make_optimizer
from experiments.tasks.training import Batch
from experiments.train import loss_curve, read_lines
from moe.config import ModelConfig, require
from moe.lora.adapters import abstract_adapters, parameter_count, with_routers
from moe.lora.config import AdapterConfig, ExpertsConfig
from moe.lora.losses import Sign, proximal_loss, routing_specialization_loss
from moe.lora.peft import read_peft, stack_adapters
from parallel.mesh import make_mesh
from parallel.startup import is_primary

Method = Literal["router_only", "joint", "oracle", "uniform", "best_single", "rival"]
MIXED, PROBED = 10_000, 20_000  # added to the seed: rows that routers are trained on, and those they are looked at with
PROBES = 4


@dataclass(frozen=True)
class RouterLoss:
    """What is added to the task's loss while routers are trained (2507.00029, Eq. 5).

    Attributes:
      balance_weight: of E sum_i pbar_i fbar_i (1 if uniform), f of each token's likeliest expert. A soft mixture has
        every expert in its slots: f of the slots is 1 / E whatever the router does, and gives no gradient.
      entropy_weight, sign: of the tokens' entropy, and whether it is penalised (`as_claimed`) or rewarded.
      proximal_weight: of |experts - those they were|^2, where experts are trained with the routers.
    """

    balance_weight: float = 0.25
    entropy_weight: float = 0.1
    sign: Sign = "as_claimed"
    proximal_weight: float = 0.0


@dataclass(frozen=True)
class Trial:
    """An arm.

    Attributes:
      method: who decides among the experts (METHODS).
      loss, samples: of router training; so many distinct rows, passed over again and again.
      expert: the adapter of one task; of `folders` it has their rank and maps (`like_folders`), for what is made new.
      alone: how the adapter of a task is trained; `joint` and the rival take T times the steps for T tasks.
      routing: how routers are trained.
      served: k of the hard top-k (at most E).
      rival: a mixture that is trained on all tasks at once, of as many parameters as all experts and routers, also
        where `--set` changes those.
      folders: PEFT folders with the tasks' adapters, in the order of `world.tasks`; empty: they are trained here.
      margin: by how much a task's adapter must beat the commonest answer for the task to be used.
      first_seed, split: added to the seed, and what is scored: choices are made at a seed of their own, on validation.
    """

    method: Method = "router_only"
    loss: RouterLoss = field(default_factory=RouterLoss)
    samples: int = 2048
    expert: AdapterConfig = field(default_factory=lambda: AdapterConfig(8, 16.0, targets=("q", "k", "v", "o")))
    world: World = field(default_factory=Symbolic)
    alone: FinetuneConfig = field(default_factory=FinetuneConfig)
    routing: FinetuneConfig = field(default_factory=FinetuneConfig)
    served: int = 3
    rival: AdapterConfig | None = None
    folders: tuple[str, ...] = ()
    mesh: MeshConfig = field(default_factory=MeshConfig)
    margin: float = 0.05
    first_seed: int = 0
    split: str = "test"

    def __post_init__(self) -> None:
        size = self.routing.batch_size
        require(self.samples >= size and self.samples % size == 0, "samples", self.samples, f"a multiple of {size}")
        require(self.served >= 1, "served", self.served, "at least 1")
        require(self.method in METHODS, "method", self.method, f"one of {', '.join(METHODS)}")

    @property
    def steps(self) -> int:
        """Of the experts, and of the arm's own training."""
        experts = 0 if self.folders else self.alone.steps * len(self.world.tasks)
        whole = self.alone.steps * len(self.world.tasks)
        return experts + {"router_only": self.routing.steps, "joint": whole + self.routing.steps, "rival": whole}.get(
            self.method, 0
        )


class Mixture(NamedTuple):
    """Adapters that decide for themselves. `trained` parameters and `seen` rows are of what the experts, which all arms
    share, do not include; `folder` holds scores."""

    adapters: AdapterConfig
    tree: Any
    folder: Path
    trained: int
    seen: int


def study(trial: Trial) -> Study:
    return study_of(like_folders(trial), run, lambda trial: trial.steps, check, count, overridden)


def overridden(trial: Trial, settings: Sequence[str]) -> Trial:
    """With `--set` settings; a rival whose rank is not among them stays as large as all experts."""
    made = like_folders(with_overrides(trial, settings))
    if made.rival is None or trial.rival is None or made.rival.rank != trial.rival.rank:
        return made
    return replace(made, rival=as_large(made.rival, made))


def as_large(rival: AdapterConfig, trial: Trial) -> AdapterConfig:
    """With the rank at which it is closest to the size of all experts and their routers."""
    config = trial.world.config()
    return sibling.matched(rival, config, parameter_count(config, soft(trial.expert, len(trial.world.tasks))))


def like_folders(trial: Trial) -> Trial:
    """`expert` with the rank and the maps that the folders' adapters have side by side; `check` says what is wrong with
    them."""
    if not trial.folders:
        return trial
    try:
        side_by_side, _ = stack_adapters(given(trial))
    except ValueError:
        return trial
    rank, one = side_by_side.rank, trial.expert
    expert = replace(one, rank=rank, alpha=one.alpha / one.rank * rank, targets=side_by_side.targets)
    return replace(trial, expert=expert)


def given(trial: Trial) -> list[tuple[AdapterConfig, Any]]:
    """The adapters of the folders, in the order of the tasks."""
    return [read_peft(Path(folder), trial.world.config()) for folder in trial.folders]


def check(trial: Trial) -> None:
    """ValueError for a world that is not there, folders that do not fit it, or adapters that do not."""
    world = trial.world
    world.check()
    number = len(world.tasks)
    require(number >= 2, "world.tasks", world.tasks, "two or more, to decide among")
    require(len(trial.folders) in (0, number), "folders", trial.folders, f"none, or one for each of {world.tasks}")
    if trial.folders:
        found = given(trial)
        stack_adapters(found)
        for folder, (_, tree) in zip(trial.folders, found):
            moved = any(np.any(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if path[-1].key == "b")
            require(moved, "folders", folder, "a trained adapter: B is zero everywhere")
    for name in ("balance_weight", "entropy_weight", "proximal_weight"):
        require(getattr(trial.loss, name) >= 0, f"loss.{name}", getattr(trial.loss, name), "0 or more")
    require((trial.rival is not None) == (trial.method == "rival"), "rival", trial.rival, "one for method = 'rival'")
    abstract_adapters(world.config(), trial.rival or soft(trial.expert, number))


def soft(adapters: AdapterConfig, num_experts: int) -> AdapterConfig:
    """All experts at each map, as LoRA-Mixer is trained: q, k and v with one router, o with another."""
    return replace(adapters, experts=ExpertsConfig(num_experts, num_experts, targets=adapters.targets, routing="input"))


def hard(adapters: AdapterConfig, k: int) -> AdapterConfig:
    """The same parameters, k of them active with weights that sum to 1: as it is served."""
    assert adapters.experts is not None
    return replace(adapters, experts=replace(adapters.experts, top_k=min(k, adapters.experts.num_experts)))


def experts_only(name: str) -> bool:
    """Routers stay as they are: the labels decide."""
    return not routers_only(name)


def nothing(name: str) -> bool:
    """No training of the arm's own."""
    return False


@functools.lru_cache
def routed(loss: RouterLoss, num_experts: int) -> Penalty:
    """`loss` without its last term."""
    weights = loss.balance_weight, loss.entropy_weight
    return lambda adapters, sites: routing_specialization_loss(sites, *weights, top_k=num_experts, sign=loss.sign)


def anchored(loss: RouterLoss, num_experts: int, start: Any) -> Penalty:
    """`loss`, its anchor the experts of `start`."""
    anchor = split(start, experts_only)[0]

    def penalty(adapters: Any, sites: Sites) -> Array:
        moved = proximal_loss(split(adapters, experts_only)[0], anchor)
        return routed(loss, num_experts)(adapters, sites) + loss.proximal_weight * moved

    return penalty


def run(trial: Trial, seed: int, out: Path, progress: StudyProgress) -> tuple[dict[str, float], dict[str, Any]]:
    """Accuracies are of `trial.split`, in shares of 1. `share_of_oracle` is (accuracy - uniform) / (oracle - uniform),
    `domain_expert_mi` is I(task; expert) in nats where a token's expert is drawn from the router's probabilities,
    `top1_mi` where it is the likeliest; both are means over layers and routers."""
    seed = seed + trial.first_seed
    shared = out.parent / f"shared-seed{seed}"
    folder = shared / f"{zlib.crc32(repr(trial.world).encode()):08x}-base"
    at = Place(trial, trial.world.base(seed, folder, progress), shared, seed, progress)
    found, validation = at.passing()
    used = list(found)
    oracle = {task: at.accuracy(*expert, task, trial.split) for task, expert in found.items()}
    even = at.by_task(uniform(at, found), used)
    metrics, by_task, more = METHODS[trial.method](at, found)
    gain = mean(oracle) - mean(even)
    share = (mean(by_task) - mean(even)) / gain if gain > 0 else math.nan
    metrics = {"mean_accuracy": mean(by_task), "share_of_oracle": share} | metrics | {"tasks_used": float(len(used))}
    listed = lambda scores: [round(scores[task], 4) if task in scores else None for task in trial.world.tasks]  # noqa: E731
    series = {
        "tasks": list(trial.world.tasks), "dropped": [task for task in trial.world.tasks if task not in used],
        "by_task": listed(by_task), "oracle": listed(oracle), "uniform": listed(even), "validation": validation,
    }  # fmt: skip
    return metrics, series | more


def mean(scores: Mapping[str, float]) -> float:
    return float(np.mean(list(scores.values())))


Experts = dict[str, tuple[AdapterConfig, Any, Path]]  # by task: the adapter, its tree, the folder of its scores
Outcome = tuple[dict[str, float], dict[str, float], dict[str, Any]]  # metrics, accuracy by task, series


@dataclass
class Place:
    """A trial at one seed, in a folder that it shares with others; `done` steps are finished."""

    trial: Trial
    base: Base
    shared: Path
    seed: int
    progress: StudyProgress
    done: int = 0

    def folder(self, what: str, *parts: Any) -> Path:
        """By everything that a piece is a function of, but for the seed: of models and adapters that were read, by what
        they hold."""
        trial = self.trial
        key = (trial.expert, trial.alone, trial.world, trial.folders, *self.contents, *parts)
        return self.shared / f"{zlib.crc32(repr(key).encode()):08x}-{what}"

    @functools.cached_property
    def contents(self) -> tuple[int, ...]:
        return fingerprint(self.base.params), *(fingerprint(tree) for _, tree in self.given)

    @functools.cached_property
    def given(self) -> list[tuple[AdapterConfig, Any]]:
        return given(self.trial)

    def train(
        self, what: str, folder: Path, adapters: AdapterConfig, batches: Callable[[int], Batch], config: FinetuneConfig,
        **more: Any,
    ) -> Any:
        began, mesh = self.done, self.trial.mesh
        told = lambda step, m: self.progress(began + step, f"{what}: loss {m['loss']:.3f}")  # noqa: E731
        tree = finetune(self.base, adapters, batches, config, jax.random.key(self.seed), folder, progress=told,
                        mesh=make_mesh(mesh.data, mesh.fsdp, mesh.expert), **more)  # fmt: skip
        self.done += config.steps
        return tree

    def expert(self, task: str) -> tuple[AdapterConfig, Any, Path]:
        trial, folder = self.trial, self.folder(task)
        if trial.folders:
            return (*self.given[trial.world.tasks.index(task)], folder)
        batches = trial.world.batches([task], self.seed, trial.alone.batch_size)
        return trial.expert, self.train(task, folder, trial.expert, batches, trial.alone), folder

    def passing(self) -> tuple[Experts, dict[str, list[float]]]:
        """The experts of the tasks that are learnt: alone, on the validation split, they beat the commonest answer by
        the margin. And those numbers, task by task.

        Raises:
          ValueError: there are not two.
        """
        world, used = self.trial.world, {}
        found: dict[str, list[float]] = {"majority": [], "expert": []}
        for task in world.tasks:
            expert = self.expert(task)
            majority = world.majority(task, "validation", self.seed)
            accuracy = self.accuracy(*expert, task, "validation")
            if accuracy - majority >= self.trial.margin:
                used[task] = expert
            found["majority"].append(round(majority, 4))
            found["expert"].append(round(accuracy, 4))
        wanted = f"two that are learnt: {self.trial.margin} above the commonest answer"
        require(len(used) >= 2, "world.tasks", dict(zip(world.tasks, zip(*found.values()))), wanted)
        return used, found

    def accuracy(self, adapters: AdapterConfig, tree: Any, folder: Path, task: str, split: str) -> float:
        """Share of right answers, kept in the piece's folder."""
        active = "" if adapters.experts is None else f"-top{adapters.experts.top_k}"
        path = folder / f"{split}-{task}{active}.json"
        if not path.exists():
            self.progress(self.done, f"scoring {task}{active}")
            score = self.trial.world.scored(self.base, adapters, tree, task, split, self.seed)
            if is_primary():
                folder.mkdir(parents=True, exist_ok=True)
                write_json(path, {"accuracy": score.accuracy})
            return score.accuracy
        return float(json.loads(path.read_text())["accuracy"])

    def by_task(self, mixture: Mixture, tasks: Sequence[str]) -> dict[str, float]:
        one = mixture.adapters, mixture.tree, mixture.folder
        return {task: self.accuracy(*one, task, self.trial.split) for task in tasks}

    def probed(self, mixture: Mixture, tasks: Sequence[str]) -> dict[str, Probe]:
        """Of rows of the validation split, which no expert and no router was trained on."""
        size = self.trial.routing.batch_size
        found = {}
        for task in tasks:
            batches = self.trial.world.batches([task], self.seed + PROBED, size, "validation")
            parts = [probe(self.base, mixture.adapters, mixture.tree, batches(step)) for step in range(PROBES)]
            found[task] = jax.tree.map(lambda *leaves: sum(leaves), *parts)
        return found

    def rows(self, tasks: Sequence[str]) -> Callable[[int], Batch]:
        """The small mixed sample, again and again."""
        size = self.trial.routing.batch_size
        batches = self.trial.world.batches(tasks, self.seed + MIXED, size)
        return lambda step: batches(step % (self.trial.samples // size))


def stacked(at: Place, experts: Experts) -> tuple[AdapterConfig, Any]:
    """The experts as they are, beside fresh routers."""
    config, tree = stack_adapters([(adapters, tree) for adapters, tree, _ in experts.values()])
    adapters = soft(config, len(experts))
    return adapters, with_routers(at.base.config, adapters, tree, at.base.params, jax.random.key(at.seed))


def named(experts: Experts) -> str:
    return "+".join(experts)


def uniform(at: Place, experts: Experts) -> Mixture:
    """All experts with weight 1 / E: routers of zeros."""
    adapters, tree = stacked(at, experts)
    chosen, others = split(tree, routers_only)
    even = jax.tree.map(lambda a, b: jnp.zeros_like(a) if b is None else b, chosen, others, is_leaf=lambda x: x is None)
    return Mixture(adapters, even, at.folder(f"uniform-{named(experts)}"), 0, 0)


def router_only(at: Place, experts: Experts) -> Mixture:
    """Paradigm of the plug: experts are frozen, routers learn from rows that say nothing of their task."""
    trial, number = at.trial, len(experts)
    adapters, start = stacked(at, experts)
    folder = at.folder(f"routers-{named(experts)}", trial.loss, trial.samples, trial.routing)
    tree = at.train("routers", folder, adapters, at.rows(list(experts)), trial.routing, start=start,
                    trainable=routers_only, penalty=routed(trial.loss, number))  # fmt: skip
    trained = router_parameters(at.base.config, adapters)
    return Mixture(adapters, tree, folder, trained, trial.routing.steps * trial.routing.batch_size)


def joint(at: Place, experts: Experts) -> Mixture:
    """The paper's other paradigm: each row to the expert of its task, then routers and experts together, soft."""
    trial, tasks = at.trial, list(experts)
    adapters = soft(trial.expert, len(tasks))
    labelled = replace(trial.alone, steps=trial.alone.steps * len(tasks), hard=True)
    first = at.train("joint, by label", at.folder(f"labelled-{named(experts)}"), adapters,
                     trial.world.batches(tasks, at.seed, labelled.batch_size), labelled,
                     trainable=experts_only)  # fmt: skip
    folder = at.folder(f"joint-{named(experts)}", trial.loss, trial.samples, trial.routing)
    tree = at.train("joint, soft", folder, adapters, at.rows(tasks), trial.routing, start=first,
                    penalty=anchored(trial.loss, len(tasks), first))  # fmt: skip
    seen = labelled.steps * labelled.batch_size + trial.routing.steps * trial.routing.batch_size
    return Mixture(adapters, tree, folder, parameter_count(at.base.config, adapters), seen)


def router_parameters(config: ModelConfig, adapters: AdapterConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(split(abstract_adapters(config, adapters), routers_only)[0]))


def by_routers(make: Callable[[Place, Experts], Mixture]) -> Callable[[Place, Experts], Outcome]:
    """An arm whose routers decide: as served, and what that costs against the soft mixture that was trained."""

    def outcome(at: Place, experts: Experts) -> Outcome:
        made, tasks = make(at, experts), list(experts)
        scores = {k: at.by_task(made._replace(adapters=hard(made.adapters, k)), tasks)
                  for k in dict.fromkeys((len(tasks), min(at.trial.served, len(tasks)), 1))}  # fmt: skip
        dense, served, one = (scores[k] for k in (len(tasks), min(at.trial.served, len(tasks)), 1))
        probes = at.probed(made, tasks)
        metrics = {
            "soft_accuracy": mean(dense), "top1_accuracy": mean(one), "soft_minus_topk": mean(dense) - mean(served),
            "soft_minus_top1": mean(dense) - mean(one), **routing_metrics(probes), **sizes(made),
        }  # fmt: skip
        joined = {task: (dense[task], served[task], one[task]) for task in tasks}
        series = {"soft_topk_top1": {task: [round(x, 4) for x in three] for task, three in joined.items()}}
        curve = loss_curve(read_lines(made.folder / "metrics.jsonl"), 50)
        return metrics, served, series | {"mi_by_layer": mi_by_layer(probes)} | curve

    return outcome


def sizes(mixture: Mixture) -> dict[str, float]:
    return {"trainable_parameters": float(mixture.trained), "samples_seen": float(mixture.seen)}


NOTHING = {"trainable_parameters": 0.0, "samples_seen": 0.0}


def by_label(at: Place, experts: Experts) -> Outcome:
    """Each task by its own expert: a one-hot mixture is that adapter."""
    return NOTHING, {task: at.accuracy(*expert, task, at.trial.split) for task, expert in experts.items()}, {}


def by_none(at: Place, experts: Experts) -> Outcome:
    return NOTHING, at.by_task(uniform(at, experts), list(experts)), {}


def by_best(at: Place, experts: Experts) -> Outcome:
    """One expert for all tasks, the one with the highest mean on the very split that is reported: in its favour."""
    scores = {name: {task: at.accuracy(*expert, task, at.trial.split) for task in experts}
              for name, expert in experts.items()}  # fmt: skip
    best = max(scores, key=lambda name: mean(scores[name]))
    return NOTHING, scores[best], {"best": best}


def by_rival(at: Place, experts: Experts) -> Outcome:
    """Another mixture, trained whole on the examples that the experts were trained on, in as many steps."""
    trial, tasks, rival = at.trial, list(experts), at.trial.rival
    assert rival is not None
    assert rival.experts is not None
    config = replace(trial.alone, steps=trial.alone.steps * len(tasks))
    folder = at.folder(f"rival-{named(experts)}", rival)
    tree = at.train("rival", folder, rival, trial.world.batches(tasks, at.seed, config.batch_size), config,
                    penalty=balanced(RIVAL_BALANCE, rival.experts.top_k))  # fmt: skip
    made = Mixture(rival, tree, folder, parameter_count(at.base.config, rival), config.steps * config.batch_size)
    probes = at.probed(made, tasks)
    curve = loss_curve(read_lines(folder / "metrics.jsonl"), 50)
    return routing_metrics(probes) | sizes(made), at.by_task(made, tasks), {"mi_by_layer": mi_by_layer(probes)} | curve


RIVAL_BALANCE = 1e-2
METHODS: Mapping[str, Callable[[Place, Experts], Outcome]] = {
    "router_only": by_routers(router_only), "joint": by_routers(joint), "oracle": by_label, "uniform": by_none,
    "best_single": by_best, "rival": by_rival,
}  # fmt: skip


def count(trial: Trial) -> dict[str, float | int]:
    """Lowers one step of all experts on shapes alone, and counts; trained are those the method trains."""
    config, number = trial.world.config(), len(trial.world.tasks)
    adapters = trial.rival or soft(trial.expert, number)
    counts = lowered(sibling.Trial(adapters, trial.expert, world=trial.world, tuning=trial.routing))
    tx = make_optimizer(trial.routing.optimizer, 1)
    chosen = {"router_only": routers_only, "joint": everything, "rival": everything}.get(trial.method, nothing)
    trained = split(abstract_adapters(config, adapters), chosen)[0]
    moments = jax.eval_shape(tx.init, trained) if jax.tree.leaves(trained) else None
    size = lambda leaves, unit: sum(leaf.size * unit(leaf) for leaf in jax.tree.leaves(leaves))  # noqa: E731
    return {
        **counts,
        "trainable_parameters": size(trained, lambda leaf: 1),
        "moment_bytes": size(moments, lambda leaf: leaf.dtype.itemsize),
        "steps": trial.steps,
    }  # fmt: skip


lowered = functools.lru_cache(maxsize=8)(sibling.count)  # arms differ in what they train, and hardly in what they run
