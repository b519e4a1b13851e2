"""The picture of upcycling: what more parameters bring a trained dense model, per token and per operation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.figures import dots, new_figure, save, smooth, styled
from experiments.series import Series


@styled
def draw(content: dict[str, Any], path: Path) -> None:
    """`content` is result.json. Top: training loss over tokens and over arithmetic. Bottom: validation loss and test
    loss by domain, both minus the dense arm's, and balance."""
    arms, series = content["arms"], content["series"]
    names = list(series)
    colours = {name: plt.get_cmap("tab10")(i) for i, name in enumerate(names)}
    fig = new_figure(14, 9.5)
    halves: Any = fig.subfigures(2, 1)
    top, bottom = halves

    tokens_ax, flops_ax = top.subplots(1, 2, sharey=True)
    configs = content["provenance"]["config"]
    per_step = {name: configs[name]["batch_size"] * configs[name]["data.seq_len"] for name in names}
    loss_over(tokens_ax, series, per_step, colours)
    tokens_ax.set_xlabel("tokens after the parent's")
    tokens_ax.set_ylabel("training loss (nats per token)")
    tokens_ax.legend()
    flops = {name: per_step[name] * arms[name]["flops_per_token"]["mean"] for name in names}
    loss_over(flops_ax, series, flops, colours)
    flops_ax.set_xlabel("FLOPs after the parent's")
    flops_ax.set_title("the same, by arithmetic")
    tokens_ax.set_title("median over seeds")

    others = [name for name in names if name != "dense"]
    if "dense" not in names or not others:  # nothing to compare with
        save(fig, path)
        return
    ce_ax, domain_ax, load_ax = bottom.subplots(1, 3, width_ratios=[1, 1.3, 1])
    differences = [paired(arms[name]["val_ce"]["values"], arms["dense"]["val_ce"]["values"]) for name in others]
    dots(ce_ax, others, differences, [colours[name] for name in others])
    ce_ax.axvline(0.0, color="black", linewidth=1)
    ce_ax.locator_params(axis="x", nbins=5)
    ce_ax.set_xlabel("validation CE minus dense's, nats")
    ce_ax.set_title("paired by seed; left is better")
    by_domain(domain_ax, series, others, colours)
    routed = [name for name in names if "max_violation" in arms[name]]
    values = [arms[name]["max_violation"]["values"] for name in routed]
    dots(load_ax, routed, values, [colours[name] for name in routed])
    load_ax.axvline(0.3, color="black", linewidth=1, linestyle=":")
    load_ax.set_xlabel("max violation (test split)")
    load_ax.set_title("balance; dotted: the bound claimed")
    save(fig, path)


def loss_over(ax: Any, series: Series, unit: dict[str, float], colours: dict[str, Any]) -> None:
    """Median over seeds of the training loss, smoothed over 6% of the shortest run, against step times `unit`."""
    window = 0.06 * min(runs[0]["loss_steps"][-1] for runs in series.values())
    for name, runs in series.items():
        steps = np.asarray(runs[0]["loss_steps"], float)
        median = np.median([run["loss"] for run in runs], axis=0)
        ax.plot(unit[name] * steps, smooth(median, steps, window), label=name, color=colours[name])


def by_domain(ax: Any, series: Series, names: list[str], colours: dict[str, Any]) -> None:
    """Test loss minus the dense arm's for every domain, mean over seeds; one row of marks per domain."""
    domains = series["dense"][0]["domains"]
    mean = {name: np.mean([run["domain_ce"] for run in runs], axis=0) for name, runs in series.items()}
    for i, name in enumerate(names):
        height = np.arange(len(domains)) + 0.15 * (i - (len(names) - 1) / 2)
        ax.plot(mean[name] - mean["dense"], height, "o", color=colours[name], label=name)
    ax.axvline(0.0, color="black", linewidth=1)
    ax.set_yticks(range(len(domains)), domains)
    ax.invert_yaxis()
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel("test CE minus dense's, nats")
    ax.set_title("by domain, mean over seeds")


def paired(ours: list[float], theirs: list[float]) -> list[float]:
    return [a - b for a, b in zip(ours, theirs)]
