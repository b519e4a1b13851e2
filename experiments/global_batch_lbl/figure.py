"""The picture of global-batch-lbl: what each arm's experts are used for, and what it does to the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.figures import curves, dots, heat_map, new_figure, save, styled
from experiments.series import busiest_layer


@styled
def draw(content: dict[str, Any], path: Path) -> None:
    """`content` is result.json. Top: heat maps of up to four arms. Bottom: loss, I(domain; expert), CE differences."""
    series, arms = content["series"], content["arms"]
    names = list(series)
    palette = plt.get_cmap("tab10" if len(names) <= 10 else "tab20")
    colours = {name: palette(i) for i, name in enumerate(names)}
    mapped = heat_arms(names)
    fig = new_figure(14, 9.5 if len(names) <= 4 else 12)
    halves: Any = fig.subfigures(2, 1, height_ratios=[1, 1] if len(names) <= 4 else [2, 3])
    top, bottom = halves

    layer = busiest_layer(series)
    axes = top.subplots(1, len(mapped), squeeze=False)[0]
    shares = {name: np.asarray(series[name][0]["domain_expert"][layer]) for name in mapped}
    peak = max(share.max() for share in shares.values())
    for i, (ax, name) in enumerate(zip(axes, mapped)):
        mi = series[name][0]["layer_mi"][layer]
        image = heat_map(ax, shares[name], series[name][0]["domains"], peak, f"{name}\nI = {mi:.3f} nats", i == 0)
    bar = top.colorbar(image, ax=axes, location="right", shrink=0.9)
    bar.set_label("share of a domain's\nassignments")
    top.suptitle(f"Which experts each domain uses (layer {layer + 1}, seed 0, test split)")

    loss_ax, mi_ax, ce_ax = bottom.subplots(1, 3, width_ratios=[1.2, 1, 1])
    curves(loss_ax, series, "loss", colours)
    low = min(min(run["loss"]) for runs in series.values() for run in runs)
    first = [run["loss"][len(run["loss"]) // 5] for runs in series.values() for run in runs]
    loss_ax.set_ylim(low - 0.05, max(first) + 0.1)
    loss_ax.set_ylabel("training loss (nats per byte)")
    loss_ax.legend(fontsize=12 if len(names) <= 4 else 9)
    loss_ax.set_title("median over seeds")
    rows = [arms[name]["domain_expert_mi"]["values"] for name in names]
    dots(mi_ax, names, rows, [colours[name] for name in names])
    mi_ax.set_xlabel("I(domain; expert), nats")
    mi_ax.set_title("specialisation (test split)")
    paired = {name: against_micro(arms, name) for name in names if partner(name, names)}
    dots(ce_ax, list(paired), list(paired.values()), [colours[name] for name in paired])
    ce_ax.axvline(0.0, color="black", linewidth=1)
    ce_ax.set_xlabel("validation CE minus micro's, nats")
    ce_ax.set_title("paired by seed; left is better")
    save(fig, path)


def heat_arms(names: list[str]) -> list[str]:
    """At most four arms side by side: all of a small preset, else three scopes at the larger weight and the control."""
    if len(names) <= 4:
        return names
    wanted = ("micro_w0.1", "shuffle_micro_w0.1", "global_w0.1", "no_balance")
    return [name for name in wanted if name in names] or names[:4]


def partner(name: str, names: list[str]) -> str | None:
    """The micro arm at the same balance weight; None for the micro arm itself and where there is none."""
    base, weight, _ = name.partition("_w0")
    found = "micro" + name[len(base) :] if weight else ("micro" if "micro" in names else "micro_w0.1")
    return found if found in names and found != name else None


def against_micro(arms: dict[str, Any], name: str) -> list[float]:
    other = partner(name, list(arms))
    assert other is not None
    return [a - b for a, b in zip(arms[name]["val_ce"]["values"], arms[other]["val_ce"]["values"])]
