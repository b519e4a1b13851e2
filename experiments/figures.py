"""Shared matplotlib helpers: readable at half size, no display needed, the same bytes for the same data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE: Any = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "switchyard",
}


def new_figure(width: float, height: float) -> Figure:
    with mpl.rc_context(STYLE):
        return plt.figure(figsize=(width, height), dpi=100, layout="constrained")


def styled(draw: Any) -> Any:
    """Decorator: runs a drawing function under the shared style."""

    def inner(*args: Any, **kwargs: Any) -> Any:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inner


def save(figure: Figure, path: Path) -> None:
    """PNG without a date in its metadata, so that equal data give equal files."""
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def smooth(values: np.ndarray, steps: np.ndarray, window: float) -> np.ndarray:
    """Centred mean over `window` steps, one-sided at the ends.

    A point of a thinned curve is the mean of the steps since the point before it, and not all hold equally many: each
    weighs what it stands for, so that a change of spacing shows neither as a jump nor as noise.
    """
    spans = np.diff(steps, prepend=0.0)
    weights = (np.abs(steps[:, None] - steps[None, :]) <= window / 2) * spans
    return weights @ values / weights.sum(axis=1)


def curves(
    ax: Axes, arms: dict[str, list[dict[str, Any]]], key: str, colours: dict[str, Any], window: float = 0.06
) -> None:
    """Median over seeds of `key` against `loss_steps`, one line per arm, smoothed over a `window` share of the run."""
    for arm, runs in arms.items():
        steps = np.asarray(runs[0]["loss_steps"], float)
        median = np.median([run[key] for run in runs], axis=0)
        ax.plot(steps, smooth(median, steps, window * steps[-1]), label=arm, color=colours[arm])
    ax.set_xlabel("optimiser step")


def heat_map(ax: Axes, share: np.ndarray, rows: Sequence[str], top: float, title: str, labelled: bool) -> Any:
    """Domains x experts, share of a domain's assignments; experts ordered by the domain that uses them most."""
    order = np.lexsort((-share.max(axis=0), share.argmax(axis=0)))
    image = ax.imshow(share[:, order], aspect="auto", cmap="viridis", vmin=0.0, vmax=top, interpolation="nearest")
    ax.set_yticks(range(len(rows)), rows if labelled else [""] * len(rows))
    ax.set_xticks([])
    ax.set_xlabel(f"{share.shape[1]} experts, sorted")
    ax.set_title(title)
    return image


def dots(ax: Axes, labels: Sequence[str], values: Sequence[Sequence[float]], colours: Sequence[Any]) -> None:
    """One row per label: every seed a dot, the mean a bar."""
    for i, (seeds, colour) in enumerate(zip(values, colours)):
        ax.barh(i, float(np.mean(seeds)), color=colour, alpha=0.35, height=0.6)
        ax.plot(seeds, [i] * len(seeds), "o", color=colour, markersize=6)
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
