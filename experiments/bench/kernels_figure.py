"""The figure of `bench kernels`: how fast each implementation is beside one dense product of equal FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.bench.roofline import PRODUCTS
from experiments.figures import new_figure, save, styled

LOOKS = {
    "triton": ("#0072B2", "o", "triton"),
    "blocks": ("#0072B2", "o", "blocks"),
    "ragged_dot": ("#D55E00", "s", "ragged_dot"),
    "capacity": ("#009E73", "^", "capacity 1.25\n(hollow: drops rows)"),
    "tokamax": ("#CC79A7", "D", "tokamax"),
}
OFFSET = 0.17  # between implementations of one load


@styled
def draw(result: dict[str, Any], path: Path) -> None:
    """A panel per operation, a line per shape and load; the sixth panel is the legend."""
    lines = list(dict.fromkeys((row["shape"], row["load"]) for row in result["rows"]))
    present = [name for name in LOOKS if any(row["implementation"] == name for row in result["rows"])]
    figure = new_figure(15, 2.2 + 0.75 * len(lines))
    panels = figure.subplots(2, 3, sharex=True, sharey=True).flat
    for ax, operation in zip(panels, PRODUCTS):
        for place, name in enumerate(present):
            colour, marker, words = LOOKS[name]
            of = [row for row in result["rows"] if (row["operation"], row["implementation"]) == (operation, name)]
            at = [lines.index((row["shape"], row["load"])) + OFFSET * (place - (len(present) - 1) / 2) for row in of]
            ax.plot([row["of_dense"] for row in of], at, marker, color=colour, markersize=8, label=words)
            hollow = [(row["of_dense"], y) for row, y in zip(of, at) if row["dropped"]]
            ax.plot([x for x, _ in hollow], [y for _, y in hollow], marker, color="white", markersize=4)
        for y in range(1, len(lines)):
            if lines[y][0] != lines[y - 1][0]:
                ax.axhline(y - 0.5, color="0.8", linewidth=1)
        ax.axvline(1.0, color="0.3", linewidth=1, linestyle="--")
        ax.set_title(operation, fontsize=16)
        ax.tick_params(labelsize=14, labelbottom=True)
    legend, first = figure.axes[len(PRODUCTS)], figure.axes[0]
    first.set_yticks(range(len(lines)), [f"{shape}, {load}" for shape, load in lines])
    first.set_ylim(max(1, len(lines)) - 0.5, -0.5)
    first.set_xlim(left=0.0)
    legend.axis("off")
    legend.legend(*first.get_legend_handles_labels(), loc="center", fontsize=17, title_fontsize=15,
                  title=f"{result['device']}\ndashed: the dense product\nfurther right is faster")  # fmt: skip
    for ax in figure.axes[2:5]:
        ax.set_xlabel("speed / dense product's speed", fontsize=15)
    save(figure, path)
