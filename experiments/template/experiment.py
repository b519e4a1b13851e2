"""One line: what is asked.

Paper:     authors; identifier. (This one is no paper: it shows the parts an experiment is made of.)
Claim:     a router whose softmax is taken at a temperature below 1 is more decided than the plain one.
Command:   python -m experiments run template --preset smoke
Time:      seconds.
Result:    none is committed; a copy puts its result.json under results/PRESET.json.

Protocol, fixed beforehand: same initial weights and data order per seed, arms differ in the router alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments import recipes
from experiments.claims import Claim
from experiments.config import RunConfig
from experiments.experiment import Experiment, Preset

ROUTERS = {"plain": "softmax_topk", "sharp": "experiments.template.router:make"}
CLAIM = Claim(
    "the sharp router's first choice gets more of the probability",
    metric="top_score",
    arm="sharp",
    baseline="plain",
    kind="ratio",
    direction="higher",
    size=1.05,
    paper="none",
)


def with_router(config: RunConfig, router: str) -> RunConfig:
    assert config.model.moe is not None
    return replace(config, model=replace(config.model, moe=replace(config.model.moe, router=router)))


def arms(base: RunConfig) -> dict[str, RunConfig]:
    return {name: with_router(base, router) for name, router in ROUTERS.items()}


def smoke() -> Preset:
    """Seconds, on text made in memory."""
    return Preset(arms(recipes.smoke()), seeds=1, claims=(CLAIM,))


def cpu() -> Preset:
    """Minutes, on the packaged corpus."""
    return Preset(arms(recipes.cpu()), seeds=2, claims=(CLAIM,))


def figure(content: dict[str, Any], path: Path) -> None:
    """Loss over steps, and the claimed metric per seed."""
    from experiments.template.figure import draw

    draw(content, path)


EXPERIMENT = Experiment(
    name="template",
    title="A folder to copy",
    paper="no paper",
    presets={"smoke": smoke, "cpu": cpu},
    figure=figure,
)
