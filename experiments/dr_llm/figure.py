"""The picture of Dr.LLM: accuracy against block executions, and what routers decide in each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.figures import new_figure, save, styled

BOUNDS = ("upper_bound", "uct_bound", "released_bound")
COLOURS = {
    "full": "black", "router": "#4c78a8", "router_embedding": "#e45756", "router_one_edit": "#9ecae9",
    "upper_bound": "#54a24b", "uct_bound": "#88d27a", "released_bound": "#b5cf6b", "shuffled": "#f58518",
    "random": "#eeca3b", "static": "#9d755d", "shortgpt": "#b279a2", "early_exit": "#72b7b2",
}  # fmt: skip
MARKS = {"full": "s", "router": "*", "router_one_edit": "*", "router_embedding": "P", **dict.fromkeys(BOUNDS, "^")}


@styled
def draw(content: dict[str, Any], path: Path) -> None:
    """`content` is result.json. Every seed is a mark, the line is a knob or a number of skipped blocks."""
    arms, series = content["arms"], content["series"]
    short = {name: name if name in COLOURS else name.partition("_")[2] for name in arms}  # without the model's name
    colours = {name: COLOURS[short[name]] for name in arms}
    fig = new_figure(15, 9.5)
    top, bottom = fig.subfigures(2, 1, height_ratios=[1.5, 1])  # pyright: ignore
    plane, close = top.subplots(1, 2)
    trade(plane, arms, series, short, colours, curves=True)
    plane.set_title("accuracy against depth; lines: knob or blocks left out")
    trade(close, arms, series, short, colours, curves=False)
    methods = [value for name in arms if short[name] not in BOUNDS for value in arms[name]["fraction"]["values"]]
    margin = max(0.01, 0.15 * (max(methods) - min(methods)))
    close.set_xlim(min(methods) - margin, max(methods) + margin)
    close.set_title("closer: without lines, bounds only where they fit")
    plane.legend(fontsize=9, ncols=2)
    layers, others = bottom.subplots(1, 2)
    decisions(layers, series, {short[name]: name for name in arms})
    unseen(others, arms, {short[name]: name for name in arms})
    save(fig, path)


def trade(ax: Any, arms: dict[str, Any], series: Any, short: Any, colours: Any, curves: bool) -> None:
    """(fraction of executions, accuracy) of each seed."""
    for name, metrics in arms.items():
        x, y = metrics["fraction"]["values"], metrics["accuracy"]["values"]
        ax.plot(x, y, MARKS.get(short[name], "o"), color=colours[name], label=short[name], markersize=9, alpha=0.85)
        for run in series[name] if curves else ():
            if points := run.get("curve"):
                ax.plot(*np.array(points).T, "-", color=colours[name], alpha=0.5, linewidth=1.5)
    ax.set_xlabel("share of the block executions at full depth")
    ax.set_ylabel("right answers (test split)")


def decisions(ax: Any, series: Any, named: dict[str, str]) -> None:
    """Shares of skip and repeat in each layer: what routers were taught (lines) and decide (bars), mean over seeds."""
    if "router" not in named:
        ax.set_axis_off()
        return
    runs = series[named["router"]]
    for label, colour, offset, text in ((0, "#4c78a8", -0.2, "skip"), (2, "#f58518", 0.2, "repeat")):
        of = lambda key: np.mean([np.array(run[key])[:, label] for run in runs], axis=0)  # noqa: B023, E731
        place = np.arange(len(of("taught")))
        ax.bar(place + offset, of("decisions"), width=0.4, color=colour, alpha=0.5, label=f"{text}: decided on test")
        ax.plot(place, of("taught"), "o-", color=colour, label=f"{text}: taught")
    ax.set_xticks(place)
    ax.set_xlabel("layer")
    ax.set_ylabel("share of questions")
    ax.set_title("routers on the residual stream")
    ax.legend(fontsize=9)


def unseen(ax: Any, arms: dict[str, Any], named: dict[str, str]) -> None:
    """Change of accuracy on tasks routers have not seen, in points, every seed a mark."""
    found = [(policy, named[policy]) for policy in ("router", "router_embedding") if policy in named]
    tasks = [key for _, name in found[:1] for key in arms[name] if key.startswith("change_")]
    if not tasks:
        ax.set_axis_off()
        return
    for i, (policy, name) in enumerate(found):
        for j, task in enumerate(tasks):
            values = 100.0 * np.array(arms[name][task]["values"])
            place = j + 0.16 * (i - 0.5)
            style = {"color": COLOURS[policy], "markersize": 9, "label": policy if j == 0 else None}
            ax.plot([place] * len(values), values, MARKS[policy], **style)
    ax.axhline(0.0, color="black", linewidth=1)
    ax.axhline(-0.85, color="black", linewidth=1, linestyle=":")
    ax.set_xticks(range(len(tasks)), [task.removeprefix("change_") for task in tasks])
    ax.set_xlim(-0.5, len(tasks) - 0.5)
    ax.set_ylabel("points against full depth")
    ax.set_title("tasks routers have not seen; dotted: the paper's mean")
    ax.legend(fontsize=9)
