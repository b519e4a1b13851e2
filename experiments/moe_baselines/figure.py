"""The picture of moe-baselines: every arm's loss beside its balance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.figures import dots, new_figure, save, styled


@styled
def draw(content: dict[str, Any], path: Path) -> None:
    """`content` is result.json. Left: validation loss, best first. Right: max violation of the same arms."""
    arms = content["arms"]
    names = sorted(arms, key=lambda name: arms[name]["val_ce"]["mean"])
    colours = [plt.get_cmap("tab20")(i % 20) for i in range(len(names))]
    fig = new_figure(13, 2 + 0.36 * len(names))
    ce_ax, load_ax = fig.subplots(1, 2)
    values = [arms[name]["val_ce"]["values"] for name in names]
    dots(ce_ax, names, values, colours)
    flat = [v for row in values for v in row]
    ce_ax.set_xlim(min(flat) - 0.03, max(flat) + 0.03)
    if "dense" in arms:
        ce_ax.axvline(arms["dense"]["val_ce"]["mean"], color="black", linewidth=1, linestyle=":")
    ce_ax.set_xlabel("validation cross-entropy (nats per byte)")
    ce_ax.set_title("best first; dotted: dense")
    loads = [arms[name].get("max_violation", {}).get("values", [np.nan]) for name in names]
    dots(load_ax, ["" for _ in names], loads, colours)
    load_ax.axvline(0.3, color="black", linewidth=1, linestyle=":")
    load_ax.set_xlabel("max violation, counts pooled over the test split")
    load_ax.set_title("balance; dotted: 0.3")
    save(fig, path)
