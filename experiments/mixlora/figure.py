"""The picture of MixLoRA: what learning all tasks at once costs each method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.figures import dots, new_figure, save, styled

ALONE, TOGETHER = "#4c78a8", "#f58518"


@styled
def draw(content: dict[str, Any], path: Path) -> None:
    """`content` is result.json. Accuracy alone and together, the drop, accuracy by task, and balance."""
    arms, series = content["arms"], content["series"]
    names = list(arms)
    colours = {name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(names)}
    fig = new_figure(14, 4.2 + 0.5 * len(names))
    halves: Any = fig.subfigures(2, 1)
    pair_ax, drop_ax, load_ax = halves[0].subplots(1, 3, width_ratios=[1.4, 1, 0.8])
    pairs(pair_ax, arms, names)
    values = lambda key, among: [arms[name][key]["values"] for name in among]  # noqa: E731
    paired = [name for name in names if "multi_task_drop" in arms[name]]
    dots(drop_ax, paired, values("multi_task_drop", paired), [colours[name] for name in paired])
    drop_ax.axvline(0.0, color="black", linewidth=1)
    drop_ax.locator_params(axis="x", nbins=5)
    drop_ax.set_xlabel("alone minus together")
    drop_ax.set_title("multi-task drop; left is better")
    routed = [name for name in names if "max_violation" in arms[name]]
    dots(load_ax, routed, values("max_violation", routed), [colours[name] for name in routed])
    load_ax.locator_params(axis="x", nbins=5)
    load_ax.set_xlabel("max violation, all tasks")
    load_ax.set_title("balance of experts")
    by_task(halves[1], series, names)
    save(fig, path)


def pairs(ax: Any, arms: dict[str, Any], names: list[str]) -> None:
    """Two bars for each method, every seed a dot."""
    for i, name in enumerate(names):
        for offset, key, colour in ((-0.2, "single_accuracy", ALONE), (0.2, "multi_accuracy", TOGETHER)):
            if key not in arms[name]:
                continue
            seeds = arms[name][key]["values"]
            ax.barh(i + offset, np.mean(seeds), height=0.36, color=colour, alpha=0.4)
            ax.plot(seeds, [i + offset] * len(seeds), "o", color=colour, markersize=5)
    labels = [f"{name}\n{arms[name]['trainable_parameters']['mean']:,.0f}" for name in names]
    ax.set_yticks(range(len(names)), labels)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.02)
    ax.set_xlabel("share of right answers")
    ax.set_title("blue: one task alone; orange: all together")


def by_task(part: Any, series: dict[str, Any], names: list[str]) -> None:
    """The same for each task, in one panel per set of tasks; a task that was dropped is named."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        groups.setdefault(tuple(series[name][0]["tasks"]), []).append(name)
    axes = np.atleast_1d(part.subplots(1, len(groups), width_ratios=[len(g) * len(t) for t, g in groups.items()]))
    for ax, (tasks, members) in zip(axes, groups.items(), strict=True):
        width = 0.8 / len(members)
        for i, name in enumerate(members):
            place = np.arange(len(tasks)) + width * (i - (len(members) - 1) / 2)
            for key, colour in (("single", ALONE), ("multi", TOGETHER)):
                for run in series[name]:
                    ax.plot(place, [np.nan if v is None else v for v in run[key]], "o", color=colour, markersize=5)
            for x in place:
                ax.annotate(name, (x, 0.02), rotation=90, fontsize=8, ha="center", va="bottom", color="grey")
        dropped = {task for name in members for run in series[name] for task in run["dropped"]}
        ax.set_xticks(range(len(tasks)), [f"{task} (dropped)" if task in dropped else task for task in tasks])
        ax.set_xlim(-0.5, len(tasks) - 0.5)
        ax.set_ylim(0, 1.05)
        ax.set_ylabel("right answers")
        ax.set_title("by task, every seed")
