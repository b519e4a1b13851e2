"""The arrays of `result.json` that figures draw, cut to the size a committed file may have."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from moe.config import require

LIMIT = 200_000
Series = dict[str, list[dict[str, Any]]]  # arm -> one dict of arrays per seed, as `experiments.train` makes them
NOT_CURVES = ("domains", "domain_val_ce", "domain_ce", "domain_expert", "layer_mi")


def within_limit(series: Series, limit: int = LIMIT) -> Series:
    """`series` within `limit` bytes of JSON. The least needed goes first: points of curves down to about 50, heat maps
    of later seeds, heat maps of all layers but the busiest, then more points.

    Raises:
      ValueError: if that is not enough.
    """
    cuts: list[Callable[[Series], Series]] = [halve_curves, halve_curves, maps_of_first_seed, maps_of_busiest_layer]
    for cut in [*cuts, *[halve_curves] * 4]:
        if size(series) <= limit:
            return series
        series = cut(series)
    require(size(series) <= limit, "series", size(series), f"at most {limit} bytes once everything is thinned")
    return series


def size(series: Series) -> int:
    return len(json.dumps(series))


def halve_curves(series: Series) -> Series:
    """Every second point, the last one kept, of what is as long as `loss_steps`; short curves stay."""

    def thinned(run: dict[str, Any]) -> dict[str, Any]:
        points = len(run.get("loss_steps", ()))
        curve = lambda key, value: key not in NOT_CURVES and isinstance(value, list) and len(value) == points  # noqa: E731
        return {key: value[::-2][::-1] if points >= 8 and curve(key, value) else value for key, value in run.items()}

    return {arm: [thinned(run) for run in runs] for arm, runs in series.items()}


def maps_of_first_seed(series: Series) -> Series:
    """Figures show the maps of seed 0: `domain_expert` is left out of the others."""
    without = lambda run: {key: value for key, value in run.items() if key != "domain_expert"}  # noqa: E731
    return {arm: [*runs[:1], *(without(run) for run in runs[1:])] for arm, runs in series.items()}


def maps_of_busiest_layer(series: Series) -> Series:
    """`domain_expert[layer]` of every other layer becomes None, so that the index still says which layer it is."""
    if not any("layer_mi" in run for runs in series.values() for run in runs):
        return series
    busiest = busiest_layer(series)

    def only(run: dict[str, Any]) -> dict[str, Any]:
        maps = run.get("domain_expert")
        return (
            run if maps is None else run | {"domain_expert": [m if i == busiest else None for i, m in enumerate(maps)]}
        )

    return {arm: [only(run) for run in runs] for arm, runs in series.items()}


def busiest_layer(series: Series) -> int:
    """The layer with the highest I(domain; expert), averaged over all arms and seeds that have experts."""
    layers = [run["layer_mi"] for runs in series.values() for run in runs if "layer_mi" in run]
    totals = [sum(values) for values in zip(*layers)]
    return totals.index(max(totals))
