"""The picture of alf-lb's training: how loads and loss move, and where they end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments.figures import curves, dots, new_figure, save, styled


@styled
def draw(content: dict[str, Any], path: Path) -> None:
    """`content` is result.json: max violation and loss over steps, end values of both, one colour per arm."""
    series, arms = content["series"], content["arms"]
    names = list(arms)
    colours = {name: plt.get_cmap("tab10")(i) for i, name in enumerate(names)}
    fig = new_figure(13, 8)
    (load_ax, loss_ax), (end_ax, ce_ax) = fig.subplots(2, 2)
    curves(load_ax, series, "max_violation", colours)
    load_ax.set_yscale("log")
    load_ax.set_ylabel("max violation of a training batch")
    load_ax.axhline(0.3, color="black", linewidth=1, linestyle=":")
    load_ax.set_title("median over seeds, mean over layers")
    curves(loss_ax, series, "loss", colours)
    low = min(min(run["loss"]) for runs in series.values() for run in runs)
    loss_ax.set_ylim(low - 0.05, max(run["loss"][len(run["loss"]) // 5] for runs in series.values() for run in runs))
    loss_ax.set_ylabel("training loss (nats per byte)")
    loss_ax.legend()
    palette = [colours[name] for name in names]
    dots(end_ax, names, [arms[name]["max_violation"]["values"] for name in names], palette)
    end_ax.set_xlabel("max violation, counts pooled over the test split")
    end_ax.axvline(0.3, color="black", linewidth=1, linestyle=":")
    values = [arms[name]["val_ce"]["values"] for name in names]
    dots(ce_ax, names, values, palette)
    flat = [v for row in values for v in row]
    ce_ax.set_xlim(min(flat) - 0.02, max(flat) + 0.02)
    ce_ax.set_xlabel("validation cross-entropy (nats per byte)")
    save(fig, path)
