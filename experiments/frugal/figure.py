"""The picture of FRUGAL: what a byte of optimiser state buys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.figures import curves, new_figure, save, styled


@styled
def draw(content: dict[str, Any], path: Path) -> None:
    """`content` is result.json. Left: test loss against bytes of state per parameter, every seed a dot, and the front
    of those that nothing beats in both. Middle: training loss. Right: what was tried, the chosen value filled."""
    arms, series = content["arms"], content["series"]
    order = [*range(0, 20, 2), *range(1, 20, 2)]  # dark ones first: neighbours of this map are shades of one colour
    colours = {name: plt.get_cmap("tab20")(order[i % 20]) for i, name in enumerate(arms)}
    tried = content.get("tuning")
    fig = new_figure(19 if tried else 13, 6.5)
    axes: Any = fig.subplots(1, 3 if tried else 2)
    pareto(axes[0], arms, colours)
    if min(len(runs[0].get("loss_steps", ())) for runs in series.values()) > 1:
        curves(axes[1], series, "loss", colours)
    axes[1].set_ylabel("training loss (nats per token)")
    axes[1].set_title("median over seeds")
    low, high = loss_range(series)
    axes[1].set_ylim(low, high)
    if tried:
        grid(axes[2], tried, colours)
    fig.legend(*axes[1].get_legend_handles_labels(), loc="outside right center")
    save(fig, path)


def pareto(ax: Any, arms: dict[str, Any], colours: dict[str, Any]) -> None:
    at = {name: (of["state_bytes_per_parameter"]["mean"], of["test_ce"]["mean"]) for name, of in arms.items()}
    for name, (size, loss) in at.items():
        ax.plot([size] * len(arms[name]["test_ce"]["values"]), arms[name]["test_ce"]["values"], "o",
                color=colours[name], markersize=5, alpha=0.6)  # fmt: skip
        ax.plot(size, loss, "_", color=colours[name], markersize=18, markeredgewidth=2)
    best = lambda size, loss: not any(s <= size and c < loss for s, c in at.values())  # noqa: E731
    front = sorted(point for point in at.values() if best(*point))
    ax.step(*zip(*front, strict=True), where="post", color="black", linewidth=1, linestyle=":")
    labels(ax, at, [value for of in arms.values() for value in of["test_ce"]["values"]])
    ax.set_xlabel("optimiser state, bytes per parameter")
    ax.set_ylabel("test CE (nats per token)")
    ax.set_title("lower left is better; dotted: the front")


def labels(ax: Any, at: dict[str, tuple[float, float]], losses: list[float]) -> None:
    """Names beside the points, from the lowest loss up, moved so that none covers another; limits around all losses."""
    sizes = [size for size, _ in at.values()]
    height, width = (max(losses) - min(losses) or 1.0) / 22, (max(sizes) - min(sizes) or 1.0)
    ax.set_xlim(min(sizes) - 0.05 * width, max(sizes) + 0.28 * width)
    placed: list[tuple[float, float]] = []
    for name, (size, loss) in sorted(at.items(), key=lambda item: item[1][1]):
        y = loss
        while any(abs(x - size) < 0.3 * width and abs(y - other) < height for x, other in placed):
            y += height / 4
        placed.append((size, y))
        ax.annotate(name, (size, loss), (size + 0.035 * width, y), textcoords="data", va="center", fontsize=11)
    ax.set_ylim(min(losses) - 2 * height, max(*(y for _, y in placed), *losses) + 2 * height)


def loss_range(series: dict[str, Any]) -> tuple[float, float]:
    """From a little below the lowest loss to the median arm's at a twentieth of the run."""
    runs = [run["loss"] for of in series.values() for run in of if run.get("loss")]
    low = min(min(run) for run in runs)
    high = float(np.median([run[len(run) // 20] for run in runs]))
    return low - 0.05 * (high - low), high


def grid(ax: Any, tried: dict[str, Any], colours: dict[str, Any]) -> None:
    for name, scores in tried["arms"].items():
        points = [(float(value), score) for value, score in scores.items() if score is not None]
        ax.plot(*zip(*points, strict=True), "o-", color=colours[name], markerfacecolor="white", markersize=6)
        ax.plot(*min(points, key=lambda point: point[1]), "o", color=colours[name], markersize=8)
    ax.set_xscale("log")
    ax.set_xlabel(tried["field"])
    ax.set_ylabel("validation CE (nats per token)")
    ax.set_title("tuning, a seed of its own; filled: chosen")
