"""One arm at one seed: a search for weights, then a fresh model that is trained on the mixture they make."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType
from scipy.stats import kendalltau

from experiments import recipes
from experiments.config import DataConfig, RunConfig
from experiments.data.corpus import Corpus, open_corpus
from experiments.dry_run import dry_run
from experiments.experiment import Study, StudyProgress, study_of
from experiments.output import write_json
from experiments.overrides import flatten
from experiments.scalebio.problem import Method, Problem
from experiments.scalebio.search import begin, search
from experiments.train import check as check_run
from experiments.train import fit
from moe.config import require
from moe.routing import from_spec
from moe.transformer import abstract_params
from optim.sharding import bytes_per_device
from parallel.mesh import AXES, make_mesh
from parallel.sharding import tree_shardings
from parallel.startup import is_primary

WEIGHTS = "weights.json"
COUNTED_SOURCES = 4  # where the data is not asked for


@dataclass(frozen=True)
class Trial:
    """An arm.

    Attributes:
      method: a call of `experiments.scalebio.methods`.
      run: the fresh model, its data and training; the search has the same model, batch and rates.
      budget: of the search, in forward-backward passes over one batch.
      target: a domain of `run.data` that is validation and test, and no source; empty: held-out splits of all of them.
      longer: the fresh model has the budget as further steps, for an arm without a search: a step is one pass.
      first_seed: added to the seed: choices are made at a seed of their own.
    """

    method: str = "uniform"
    run: RunConfig = field(default_factory=recipes.cpu)
    budget: float = 900.0
    target: str = ""
    longer: bool = False
    first_seed: int = 0

    def corpora(self) -> tuple[Corpus, Corpus]:
        """What is trained on, what is validated on."""
        whole = open_corpus(self.run.data)
        if not self.target:
            return whole, whole
        require(self.target in whole.domains, "target", self.target, f"one of {', '.join(whole.domains)}")
        others = tuple(name for name in whole.domains if name != self.target)
        pick = lambda names: open_corpus(replace(self.run.data, domains=names))  # noqa: E731
        return pick(others), pick((self.target,))

    def made(self, tokens: Sequence[int]) -> Method:
        """The search, of sources with so many tokens."""
        problem = Problem(self.run, tuple(tokens), self.budget)
        return from_spec(self.method, "experiments.scalebio.methods:{}", "method", problem=problem)

    @property
    def steps(self) -> int:
        """Of the search, in passes, and of the fresh model."""
        searched = self.method.partition("(")[0] not in ("uniform", "proportional", "only")
        return int(self.budget) * searched + self.fresh_steps

    @property
    def fresh_steps(self) -> int:
        return self.run.steps + int(self.budget) * self.longer


def study(trial: Trial) -> Study:
    return study_of(trial, run, lambda trial: trial.steps, check, count)


def check(trial: Trial) -> None:
    """ValueError for a corpus that is not there, splits that are too short, a method or batch that does not fit."""
    require(trial.budget > 0, "budget", trial.budget, "passes above 0")
    sources, _ = trial.corpora()
    check_run(trial.run, open_corpus(trial.run.data))
    size, many = trial.run.batch_size, len(sources.domains)
    require(size % many == 0, "run.batch_size", size, f"a multiple of the {many} sources")
    abstract_search(trial, trial.made(tokens_of(sources)), many)


def tokens_of(corpus: Corpus) -> list[int]:
    return [info.tokens["train"] for info in corpus.info]


def abstract_search(trial: Trial, method: Method, num_sources: int) -> Any:
    """Shapes of the first state. ValueError for options that do not fit the model."""
    begun = functools.partial(begin, method, num_sources, max(1, method.steps))
    return jax.eval_shape(begun, abstract_params(trial.run.model))


def count(trial: Trial) -> dict[str, float | int]:
    """Of the fresh model's step, and what the search's models and optimisers take; the data is not asked for."""
    counted, mesh = dry_run(trial.run), trial.run.mesh
    method = trial.made([1] * COUNTED_SOURCES)
    if method.steps == 0:
        return counted
    state = abstract_search(trial, method, COUNTED_SOURCES)
    axes = AbstractMesh((mesh.data, mesh.fsdp, mesh.expert), AXES, axis_types=(AxisType.Auto,) * 3)
    held = bytes_per_device(state, tree_shardings(state, axes))  # type: ignore[arg-type]
    return counted | {"search_steps": method.steps, "search_state_bytes_per_device": held}


def run(trial: Trial, seed: int, out: Path, progress: StudyProgress) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics: `val_ce` and `test_ce` of the fresh model (nats per token of held-out text), `passes` of search and
    training together (forward-backward, over one batch); where it is known how clean sources are, `p_clean` and
    `kendall_tau` of weight and cleanliness. Series: the path of the weights, and loss by domain."""
    seed += trial.first_seed
    base = replace(trial.run, seed=seed)
    sources, validation = trial.corpora()
    method = trial.made(tokens_of(sources))
    found = searched(trial, base, method, sources, validation, out / "search", progress)
    weights = np.asarray(found["weights"])
    before = trial.steps - trial.fresh_steps
    fresh = replace(base, data=mixture(trial, sources, weights), steps=trial.fresh_steps)
    told = lambda step, _, m: progress(before + step, f"fresh model: loss {m['loss']:.3f}")  # noqa: E731
    result = fit(fresh, out / "fresh", progress=told)
    metrics = {name: result.metrics[name] for name in ("val_ce", "test_ce")}
    if trial.target:
        at = result.series["domains"].index(trial.target)
        metrics = {"val_ce": result.series["domain_val_ce"][at], "test_ce": result.series["domain_ce"][at]}
    metrics["passes"] = method.steps * method.passes + fresh.steps
    clean = [cleanliness(name) for name in sources.domains]
    if all(np.isfinite(clean)):
        metrics |= {"p_clean": float(weights[np.argmax(clean)]), "kendall_tau": agreement(weights, clean)}
    series = {"domains": list(sources.domains), "weights": weights.round(5).tolist()}
    series |= {"sources_hash": sources.content_hash, "validation_hash": validation.content_hash}
    return metrics, series | {name: found[name] for name in ("path_steps", "path")}


def mixture(trial: Trial, sources: Corpus, weights: np.ndarray) -> DataConfig:
    """The sources in the proportions of the weights; none of the target, which is there to be scored."""
    of = dict(zip(sources.domains, map(float, weights), strict=True))
    names = open_corpus(trial.run.data).domains
    return replace(trial.run.data, domains=names, weights=tuple(of.get(name, 0.0) for name in names))


def cleanliness(name: str) -> float:
    """Share of a noised source's text that is as it was, by its name; not a number for other sources."""
    noise = re.fullmatch(r"noise-([\d.]+)", name)
    return 1.0 if name == "clean" else 1 - float(noise[1]) / 100 if noise else math.nan


def agreement(weights: np.ndarray, clean: Sequence[float]) -> float:
    """Kendall's tau-b; 0 where all weights are equal."""
    tau: Any = kendalltau(weights, clean)[0]
    return float(tau) if np.isfinite(tau) else 0.0


def searched(
    trial: Trial, base: RunConfig, method: Method, sources: Corpus, validation: Corpus, out: Path,
    progress: StudyProgress,
) -> dict[str, Any]:  # fmt: skip
    """The weights and their path, from `out` if they are there. ValueError if those are of something else."""
    if method.steps == 0:
        return {"weights": method.weights(()).tolist(), "path_steps": [], "path": []}
    mark = flatten(replace(base, checkpoint_every=0, mesh=type(base.mesh)()))
    mark |= {"method": trial.method, "budget": trial.budget, "target": trial.target}
    mark |= {"sources": sources.content_hash, "validation": validation.content_hash}
    mark = json.loads(json.dumps(mark))
    if (out / WEIGHTS).is_file():
        found = json.loads((out / WEIGHTS).read_text())
        differs = [name for name in mark if found["mark"].get(name) != mark[name]]
        require(not differs, str(out), differs, "a search of the same settings and data, or another directory")
        return found
    mesh = make_mesh(base.mesh.data, base.mesh.fsdp, base.mesh.expert)
    shown = lambda m: ", ".join(f"{name} {value:.3f}" for name, value in m.items())  # noqa: E731
    done = lambda step, m: progress(int(step * method.passes), f"search: {shown(m)}")  # noqa: E731
    weights, at, path = search(method, base, sources, validation, mesh, out, mark, done)
    found = {"weights": weights.tolist(), "path_steps": at, "path": path.round(4).tolist(), "mark": mark}
    if is_primary():
        write_json(out / WEIGHTS, found)
    return found
