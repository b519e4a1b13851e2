"""The table and the figure of an evaluation, from its result alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

from experiments.figures import new_figure, save, styled

ACCURACY, PER_BYTE, MAJORITY, BITS = "#1f5a96", "#7fb0dd", "#c9c9c9", "#b5622c"


def print_tables(result: dict[str, Any], console: Console) -> None:
    """Bits per byte and tasks, as far as there are any."""
    domains, tasks = _by_kind(result)
    if domains:
        table = _table(f"{result['model']}: bits per byte, {result['split']} split, windows of {result['window']}",
                       ("domain", ">bits/byte", ">bytes", ">tokens", ">bytes/token"))
        for row in domains.values():
            table.add_row(row["domain"], f"{row['bits_per_byte']:.3f}", f"{row['bytes']:,}", f"{row['tokens']:,}",
                          f"{row['bytes'] / row['tokens']:.2f}")
        console.print(table)
    if tasks:
        chat = ", chat template" if result["chat"] else ""
        cut = any(row["too_long"] for row in tasks.values())
        table = _table(f"{result['model']}: tasks, {result['split']} split{chat}",
                       ("task", ">n", *[">too\nlong"] * cut, ">accuracy (95%)", ">per\nbyte", ">majority",
                        "against\nmajority"))
        for name, row in tasks.items():
            low, high = row["accuracy"]["interval"]
            per_byte = f"{row['accuracy_per_byte']['share']:.3f}" if "accuracy_per_byte" in row else "-"
            table.add_row(name, f"{row['examples']:,}", *[str(row["too_long"])] * cut,
                          f"{row['accuracy']['share']:.3f} ({low:.2f}-{high:.2f})", per_byte,
                          f"{row['majority']['share']:.3f}", verdict(row))
        console.print(table)


def verdict(row: dict[str, Any]) -> str:
    """Whether the accuracy's interval lies above, below or around the majority rate."""
    low, high = row["accuracy"]["interval"]
    constant = row["majority"]["share"]
    return "above" if low > constant else "below" if high < constant else "unclear"


@styled
def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy beside the majority rate for each task, bits per byte for each domain."""
    domains, tasks = _by_kind(result)
    parts = [(draw_part, rows) for draw_part, rows in ((_draw_tasks, tasks), (_draw_domains, domains)) if rows]
    tallest = max(len(rows) * (1.5 if part is _draw_tasks else 1) for part, rows in parts)
    figure = new_figure(6.5 * len(parts), 1.8 + 0.36 * tallest)
    axes = figure.subplots(1, len(parts), squeeze=False)[0]
    for ax, (part, rows) in zip(axes, parts):
        part(ax, rows)
    if tasks:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    limit = "" if result["limit"] is None else f", at most {result['limit']} examples or windows each"
    figure.suptitle(f"{result['model']}, {result['split']} split{limit}")
    save(figure, path)


def _draw_tasks(ax: Axes, tasks: dict[str, dict[str, Any]]) -> None:
    rows = list(tasks.values())
    place = np.arange(len(rows))
    accuracy = np.array([row["accuracy"]["share"] for row in rows])
    low, high = np.array([row["accuracy"]["interval"] for row in rows]).T
    ax.barh(place - 0.2, accuracy, 0.38, color=ACCURACY, label="accuracy")
    ax.errorbar(accuracy, place - 0.2, xerr=[accuracy - low, high - accuracy], fmt="none", ecolor="black", capsize=3)
    ax.barh(place + 0.2, [row["majority"]["share"] for row in rows], 0.38, color=MAJORITY, label="majority class")
    scored = [(i, row["accuracy_per_byte"]["share"]) for i, row in enumerate(rows) if "accuracy_per_byte" in row]
    if scored:
        at, shares = np.array(scored).T
        ax.plot(shares, at - 0.2, "D", color=PER_BYTE, markeredgecolor="black", markersize=6, label="accuracy per byte")
    ax.set_yticks(place, [f"{name} ({row['examples']})" for name, row in tasks.items()])
    ax.set_xlim(0, 1)
    ax.invert_yaxis()
    ax.set_xlabel("share of the examples (their number in brackets)\nwith 95% interval")


def _draw_domains(ax: Axes, domains: dict[str, dict[str, Any]]) -> None:
    rows = sorted(domains.values(), key=lambda row: row["bits_per_byte"])
    values = [row["bits_per_byte"] for row in rows]
    bars = ax.barh([row["domain"] for row in rows], values, 0.6, color=BITS)
    ax.bar_label(bars, [f"{value:.2f}" for value in values], padding=4)
    ax.set_xlim(0, 1.15 * max(values))
    ax.invert_yaxis()
    ax.set_xlabel("bits per byte of held-out text")


def _by_kind(result: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    rows = result["results"]
    return ({name: row for name, row in rows.items() if row["kind"] == "bpb"},
            {name: row for name, row in rows.items() if row["kind"] != "bpb"})


def _table(title: str, columns: tuple[str, ...]) -> Table:
    """A leading `>` aligns a column right."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    return table
