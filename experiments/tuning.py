"""Choosing a field of each arm before the claims are judged (`experiments.experiment.Tuning`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from experiments.config import RunConfig
from experiments.experiment import Preset, trained
from experiments.overrides import with_overrides
from moe.config import require

Results = Mapping[str, Mapping[str, float]]  # candidate -> its metrics; none of a run that was not finite


def candidates(preset: Preset) -> dict[str, RunConfig]:
    """Every value of every arm as a run of its own, `ARM@VALUE`."""
    if preset.tuning is None:
        return {}
    field, values, arms = preset.tuning.field, preset.tuning.values, trained(preset)
    return {
        candidate(arm, value): with_overrides(arms[arm], [f"{field}={value!r}"])
        for arm in arms
        for value in values.get(arm, ())
    }


def candidate(arm: str, value: float) -> str:
    return f"{arm}@{value:g}"


def scores(preset: Preset, results: Results) -> dict[str, dict[float, float]]:
    """The metric of every value, infinite where the run was not finite."""
    if preset.tuning is None:
        return {}
    metric, values = preset.tuning.metric, preset.tuning.values
    score = lambda arm, value: results[candidate(arm, value)].get(metric, math.inf)  # noqa: E731
    return {arm: {value: score(arm, value) for value in values[arm]} for arm in trained(preset) if arm in values}


def tuned(preset: Preset, results: Results) -> Preset:
    """The preset with the best value in each arm. ValueError if no run of an arm was finite."""
    arms = dict(preset.arms)
    for arm, found in scores(preset, results).items():
        assert preset.tuning is not None
        best = min(found, key=lambda value: found[value])
        require(math.isfinite(found[best]), f"{arm}: {preset.tuning.field}", list(found), "a value that trains")
        arms[arm] = with_overrides(arms[arm], [f"{preset.tuning.field}={best!r}"])
    return replace(preset, arms=arms)


def described_tuning(preset: Preset, results: Results) -> dict[str, Any]:
    """For `result.json`: the field, the metric, and by arm all that was tried, None where it was not finite."""
    if preset.tuning is None:
        return {}
    tried = {
        arm: {f"{value:g}": score if math.isfinite(score) else None for value, score in found.items()}
        for arm, found in scores(preset, results).items()
    }
    return {"field": preset.tuning.field, "metric": preset.tuning.metric, "arms": tried}


def tuning_rows(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and one row per arm of what `described_tuning` says: every value's metric, the chosen one marked."""
    values = sorted({value for tried in content["arms"].values() for value in tried}, key=float)

    def cell(tried: Mapping[str, float | None], value: str) -> str:
        if value not in tried:
            return "-"
        score = tried[value]
        if score is None:
            return "not finite"
        return f"{score:.4g}" + " chosen" * (score == min(s for s in tried.values() if s is not None))

    rows = [[arm, *(cell(tried, value) for value in values)] for arm, tried in content["arms"].items()]
    return [f"{content['metric']} at {content['field']} =", *values], rows
