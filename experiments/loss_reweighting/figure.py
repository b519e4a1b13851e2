"""The picture of loss-based reweighting: what is left of a gain once every method has its own rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.figures import curves, new_figure, save, styled

COLOURS = {
    "uniform": "black", "lin_upper": "tab:blue", "quadratic": "tab:green", "extremes": "tab:red",
    "lin_upper_r1": "tab:purple", "focal": "tab:brown", "ohem": "tab:olive", "lin_upper_tokens": "tab:cyan",
}  # fmt: skip
STYLES = {"noisy_": "--", "moe_": ":"}  # of worlds, by the prefix of an arm; a method's colour is the same in all


@styled
def draw(content: dict[str, Any], path: Path) -> None:
    """`content` is result.json. Left: test loss, each method at its best rate and (hollow) at one for all, every seed a
    dot. Middle: validation loss over the rates that were tried. Right: training loss without weights."""
    arms, tried = content["arms"], content.get("tuning")
    fig = new_figure(17 if tried else 12, 6)
    axes: Any = fig.subplots(1, 3 if tried else 2)
    losses(axes[0], arms)
    if tried:
        grid(axes[1], tried)
    tuned = {name: runs for name, runs in content["series"].items() if not name.endswith("_same")}
    if min(len(runs[0].get("loss_steps", ())) for runs in tuned.values()) > 1:
        curves(axes[-1], tuned, "loss", {name: colour(name) for name in tuned})
        for line in axes[-1].lines:
            line.set_linestyle(style(str(line.get_label())))
        axes[-1].legend(fontsize=10, ncols=1 + (len(tuned) > 6))
    axes[-1].set_ylabel("unweighted training loss (nats per token)")
    axes[-1].set_title("median over seeds")
    save(fig, path)


def colour(name: str) -> str:
    for prefix in STYLES:
        name = name.removeprefix(prefix)
    return COLOURS.get(name.removesuffix("_same"), "tab:gray")


def style(name: str) -> str:
    return next((STYLES[prefix] for prefix in STYLES if name.startswith(prefix)), "-")


def losses(ax: Any, arms: dict[str, Any]) -> None:
    names = [name for name in arms if not name.endswith("_same")]
    for i, name in enumerate(names):
        row = len(names) - 1 - i
        for arm, offset, fill in ((name, 0.12, colour(name)), (f"{name}_same", -0.18, "none")):
            if arm in arms:
                values = arms[arm]["test_ce"]["values"]
                ax.scatter(values, [row + offset] * len(values), facecolors=fill, edgecolors=colour(name), s=45)
                ax.plot(np.mean(values), row + offset, "|", color=colour(name), markersize=16)
    ax.set_yticks(range(len(names)), names[::-1])
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set_xlabel("test CE, unweighted (nats per token)")
    ax.set_title("filled: its best rate; hollow: one for all")


def grid(ax: Any, tried: dict[str, Any]) -> None:
    for name, found in tried["arms"].items():
        known = [(float(rate), value) for rate, value in found.items() if value is not None]
        ax.plot(*zip(*known, strict=True), "o", linestyle=style(name), color=colour(name))
    ax.set_xscale("log")
    rates = sorted({float(rate) for found in tried["arms"].values() for rate in found})
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ax.minorticks_off()
    ax.set_xlabel("learning rate")
    ax.set_ylabel("validation CE at the seed of the choice")
    ax.set_title("what was tried")
