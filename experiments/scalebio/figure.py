"""The picture of ScaleBiO: how weights move, where methods end, and what a fresh model makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.figures import new_figure, save, styled

SCORES = {
    "test_ce": "test CE of a fresh model (nats per token)",
    "mean_accuracy": "right answers of fresh adapters (test)",
}


@styled
def draw(content: dict[str, Any], path: Path) -> None:
    """`content` is result.json. With fresh models: the first searching arm's weights over its steps, every seed a line,
    where they are known; the weights of all arms; test loss, every seed a dot. Without (quadratics): the validation
    loss over steps."""
    arms, series = content["arms"], content["series"]
    score = next((name for name in SCORES if any(name in of for of in arms.values())), "")
    if not score:
        return losses(series, path)
    searched = [name for name, runs in series.items() if runs[0]["path"]]
    shown = "scalebio" if "scalebio" in searched else next(iter(searched or series))
    domains = series[shown][0]["domains"]
    colours = [plt.get_cmap("viridis")(x) for x in np.linspace(0.0, 0.9, len(domains))]
    fig = new_figure(16 if searched else 11, 6)
    axes: Any = fig.subplots(1, 3 if searched else 2, width_ratios=[1, 1.1, 1] if searched else [1.1, 1])
    ends(axes[-2], series, domains, colours)
    if searched:
        paths(axes[0], shown, series[shown], colours)
    else:
        axes[-2].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=11)
    fresh(axes[-1], arms, score)
    save(fig, path)
    return None


def paths(ax: Any, arm: str, runs: list[dict[str, Any]], colours: list[Any]) -> None:
    for seed, run in enumerate(runs):
        for k, name in enumerate(run["domains"]):
            label = name if seed == 0 else None
            ax.plot(run["path_steps"], np.array(run["path"])[:, k], color=colours[k], label=label, linewidth=1.5)
    ax.set_ylim(0, 1)
    ax.set_xlabel(f"steps of the search ({arm})")
    ax.set_ylabel("weight of a source; every line a seed")
    ax.legend()


def ends(ax: Any, series: dict[str, Any], domains: list[str], colours: list[Any]) -> None:
    """Mean weights stacked, one bar for each arm."""
    names = [name for name, runs in series.items() if runs[0]["domains"] == domains]
    rows = np.arange(len(names))[::-1]
    mean = np.array([np.mean([run["weights"] for run in series[name]], axis=0) for name in names])
    left = np.zeros(len(names))
    for k, name in enumerate(domains):
        ax.barh(rows, mean[:, k], left=left, color=colours[k], height=0.7, label=name)
        left += mean[:, k]
    ax.set_yticks(rows, names)
    ax.set_xlim(0, 1)
    ax.set_xlabel("weights at the end, mean over seeds")


def fresh(ax: Any, arms: dict[str, Any], score: str) -> None:
    rows = np.arange(len(arms))[::-1]
    for row, of in zip(rows, arms.values(), strict=True):
        values = of[score]["values"]
        ax.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.6, markersize=6)
        ax.plot(np.mean(values), row, "|", color="black", markersize=16, markeredgewidth=2)
    labels = [f"{name} ({of['passes']['mean']:,.0f})" for name, of in arms.items()]
    ax.set_yticks(rows, labels)
    ax.set_ylim(-0.6, len(arms) - 0.4)
    ax.set_xlabel(f"{SCORES[score]};\nin brackets: passes, search and training")


def losses(series: dict[str, Any], path: Path) -> None:
    fig = new_figure(8, 5)
    ax: Any = fig.subplots()
    for i, (name, runs) in enumerate((name, runs) for name, runs in series.items() if "loss" in runs[0]):
        for seed, run in enumerate(runs):
            ax.plot(run["path_steps"], np.maximum(run["loss"], 1e-12), color=f"C{i}", label=None if seed else name)
    ax.set_yscale("log")
    ax.set_xlabel("steps; every line a seed")
    ax.set_ylabel("validation loss of w*(lam); the best is 0")
    ax.legend()
    save(fig, path)
