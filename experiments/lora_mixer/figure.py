"""The picture of LoRA-Mixer: how much of the labels' gain routers find, and what their experts know of the task."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.figures import dots, new_figure, save, styled

SERVED = (("soft_accuracy", "s", "all experts, soft"), ("top1_accuracy", "x", "top 1"))


@styled
def draw(content: dict[str, Any], path: Path) -> None:
    """`content` is result.json. Accuracy, share of the oracle's gain, I(task; expert) and entropy by arm; the former by
    task, the latter by layer."""
    arms, series = content["arms"], content["series"]
    names = list(arms)
    colours = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(names)}
    fig = new_figure(16, 6.0 + 0.55 * len(names))
    halves: Any = fig.subfigures(2, 1, height_ratios=[1, 0.8])
    accuracy_ax, share_ax, mi_ax, entropy_ax = halves[0].subplots(1, 4, width_ratios=[1.5, 1, 1, 1])
    served(accuracy_ax, arms, names, colours)
    columns(share_ax, arms, "share_of_oracle", names, colours)
    share_ax.axvline(0.9, color="black", linewidth=1, linestyle=":")
    share_ax.set_xlim(-0.15, 1.15)
    share_ax.set_xlabel("(acc - uniform) / (oracle - uniform)")
    share_ax.set_title(f"share of the oracle's gain\n{shown(arms)}", fontsize=11)
    routed = [name for name in names if "domain_expert_mi" in arms[name]]
    experts = max(arms[name]["tasks_used"]["mean"] for name in names)
    columns(mi_ax, arms, "domain_expert_mi", routed, colours)
    mi_ax.set_xlabel("nats; dotted: log E")
    mi_ax.set_title("I(task; expert)")
    columns(entropy_ax, arms, "router_entropy", routed, colours)
    entropy_ax.set_xlabel("nats; dotted: log E")
    entropy_ax.set_title("entropy of a token")
    for ax in (mi_ax, entropy_ax):
        ax.axvline(math.log(experts), color="black", linewidth=1, linestyle=":")
    task_ax, layer_ax = halves[1].subplots(1, 2, width_ratios=[1.6, 1])
    by_task(task_ax, series, names, colours)
    by_layer(layer_ax, series, routed, colours)
    save(fig, path)


def shown(arms: dict[str, Any]) -> str:
    """Which sign of the entropy shows the claim, by the means of the arms that ran."""
    signs = [name for name in ("as_claimed", "as_printed") if name in arms]
    right = [name for name in signs if arms[name]["share_of_oracle"]["mean"] >= 0.9]
    return f"0.9 reached by: {', '.join(right) or 'neither sign'}" if signs else ""


def columns(ax: Any, arms: dict[str, Any], key: str, names: list[str], colours: dict[str, Any]) -> None:
    """One metric by arm, seeds as dots."""
    dots(ax, names, [arms[name][key]["values"] for name in names], [colours[name] for name in names])
    ax.tick_params(axis="y", labelsize=9)
    ax.locator_params(axis="x", nbins=5)


def served(ax: Any, arms: dict[str, Any], names: list[str], colours: dict[str, Any]) -> None:
    """As served, every seed a dot; soft and top-1 means beside it."""
    columns(ax, arms, "mean_accuracy", names, colours)
    for key, marker, label in SERVED:
        held = [i for i, name in enumerate(names) if key in arms[name]]
        ax.plot([arms[names[i]][key]["mean"] for i in held], [i + 0.3 for i in held], marker, color="black",
                markersize=5, label=label)  # fmt: skip
    ax.set_xlim(0, 1.02)
    ax.set_xlabel("share of right answers")
    ax.set_title("mean accuracy as served (dots)")
    ax.legend(fontsize=9, loc="lower right")


def by_task(ax: Any, series: dict[str, Any], names: list[str], colours: dict[str, Any]) -> None:
    """Right answers by task and arm, every seed a dot; tasks of two models one after the other."""
    tasks = list(dict.fromkeys(task for name in names for task in series[name][0]["tasks"]))
    dropped = {task for name in names for run in series[name] for task in run["dropped"]}
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        for run in series[name]:
            values = dict(zip(run["tasks"], run["by_task"]))
            held = [j for j, task in enumerate(tasks) if values.get(task) is not None]
            place = [j + width * (i - (len(names) - 1) / 2) for j in held]
            ax.plot(place, [values[tasks[j]] for j in held], "o", color=colours[name], markersize=5)
    for name in names:
        ax.plot([], [], "o", color=colours[name], label=name)
    ax.set_xticks(range(len(tasks)), [f"{task}\n(dropped)" if task in dropped else task for task in tasks])
    ax.set_ylim(-0.03, 1.05)
    ax.set_ylabel("right answers")
    ax.set_title("by task, every seed")
    ax.legend(fontsize=9, ncols=1 + len(names) // 12, loc="center left", bbox_to_anchor=(1.0, 0.5))


def by_layer(ax: Any, series: dict[str, Any], names: list[str], colours: dict[str, Any]) -> None:
    """I(task; expert) over depth, mean over seeds."""
    for name in names:
        values = np.mean([run["mi_by_layer"] for run in series[name]], axis=0)
        ax.plot(np.linspace(0, 1, len(values)), values, "o-", color=colours[name], markersize=4)
    ax.set_xlabel("layer, first to last")
    ax.set_ylabel("nats")
    ax.set_title("I(task; expert) by layer")
