"""The picture: the loss of every arm, and what the claim is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments.figures import curves, dots, new_figure, save, styled


@styled
def draw(content: dict[str, Any], path: Path) -> None:
    """`content` is result.json: `series[arm][seed]` holds curves, `arms[arm][metric]["values"]` one number per seed."""
    series, arms = content["series"], content["arms"]
    colours = {name: plt.get_cmap("tab10")(i) for i, name in enumerate(series)}
    fig = new_figure(10, 4)
    loss_ax, score_ax = fig.subplots(1, 2)
    curves(loss_ax, series, "loss", colours)
    loss_ax.set_ylabel("training loss (nats per token)")
    loss_ax.legend()
    dots(score_ax, list(arms), [arms[name]["top_score"]["values"] for name in arms], list(colours.values()))
    score_ax.set_xlabel("probability of the first choice (test split)")
    save(fig, path)
