"""The picture of alf-lb's theory: three promises about a bias, and how each step rule keeps them."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.figures import new_figure, save, styled

GAP_FLOOR = 1e-7  # relative; what has reached the optimum up to rounding is drawn here


@styled
def draw(series: dict[str, dict[str, list[float]]], path: Path) -> None:
    """`series` is `theory.study`'s, of one seed. Dual gap and load deviation by step, regret by batch."""
    palette = plt.get_cmap("tab10")
    fig = new_figure(16, 5.4)
    gap_ax, load_ax, regret_ax = fig.subplots(1, 3)
    for i, (name, run) in enumerate(series.items()):
        look = {"color": palette(i), "linewidth": 2}
        gap_ax.loglog(run["steps"], np.maximum(run["dual_gap"], GAP_FLOOR), **look)
        load_ax.plot(run["steps"], run["max_deviation"], **look)
        regret_ax.plot(run["batches"], run["regret"], label=name, **look)
    bound = next(iter(series.values()))["deviation_bound"][0]
    load_ax.axhline(bound, color="black", linestyle="--", linewidth=1.5)
    load_ax.text(1.2, bound, f"E - 1 = {bound:.0f}", va="bottom")
    for ax in (load_ax, regret_ax):
        ax.set_xscale("log")
    load_ax.set_yscale("symlog", linthresh=1)
    load_ax.set_ylim(bottom=-0.1)  # so that a line at 0 is seen
    regret_ax.set_yscale("log")
    for ax, x, y, title in (
        (gap_ax, "step", f"(dual - LP optimum) / optimum, cut at {GAP_FLOOR:g}", "one batch: duality gap"),
        (load_ax, "step", "largest |load - target|, tokens", "one batch: balance"),
        (regret_ax, "batch", "cumulative regret per token", "fresh batches: regret"),
    ):
        ax.set_xlabel(x)
        ax.set_ylabel(y)
        ax.set_title(title)
    fig.legend(loc="outside lower center", ncols=len(series), fontsize=13)
    save(fig, path)
