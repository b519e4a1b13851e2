"""Claims with sizes fixed beforehand, and the rule that judges them.

Arms are paired by seed (same initial weights, same data order). A claim `holds` if every paired seed has the claimed
sign and the mean reaches the stated size; it `does not hold` if no seed has the sign; else it is `inconclusive`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from moe.config import require

Verdict = Literal["holds", "inconclusive", "does not hold"]
Kind = Literal["ratio", "difference", "margin", "value"]
Direction = Literal["higher", "lower"]


@dataclass(frozen=True)
class Claim:
    """`metric` of `arm` against that of `baseline`, or against a number.

    Attributes:
      text: the claim in words.
      metric: key of an arm's metrics.
      arm, baseline: names of arms; no baseline for a `value`.
      kind: `ratio` compares arm / baseline with 1, `difference` compares arm - baseline with 0; `margin` compares
        arm - baseline with `size`, `value` the metric itself.
      direction: `higher` or `lower`.
      size: what the mean must reach; a ratio or difference is given in the claimed direction (a difference of 0.02 with
        `lower` means arm - baseline <= -0.02; a ratio of 3 with `lower` means arm / baseline <= 1 / 3).
      paper: the paper's own number, as text.
    """

    text: str
    metric: str
    arm: str
    baseline: str | None
    kind: Kind
    direction: Direction
    size: float
    paper: str

    def __post_init__(self) -> None:
        if self.kind == "value":
            require(self.baseline is None, "claim.baseline", self.baseline, "None for a value")
            return
        require(self.baseline is not None, "claim.baseline", None, f"an arm for a {self.kind}")
        if self.kind == "margin":
            return
        least = 1.0 if self.kind == "ratio" else 0.0
        require(self.size >= least, "claim.size", self.size, f"at least {least} for a {self.kind}")

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms it speaks of."""
        return (self.arm,) if self.baseline is None else (self.arm, self.baseline)


@dataclass(frozen=True)
class Judged:
    """A claim beside what was measured: per-seed `values` (ratios or differences), their mean and deviation."""

    claim: Claim
    values: tuple[float, ...]
    mean: float
    std: float
    verdict: Verdict


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for one value)."""
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
    return mean, spread


def judge(claim: Claim, arms: Mapping[str, Mapping[str, Sequence[float]]]) -> Judged:
    """Applies the rule to `arms[arm][metric] = values in seed order`. A seed with a non-finite value fails.

    Raises:
      ValueError: if an arm or metric is missing, or the two arms have different numbers of seeds.
    """
    for name in claim.arms:
        require(name in arms, "claim.arm", name, f"one of the arms that ran: {', '.join(arms)}")
        require(
            claim.metric in arms[name], "claim.metric", claim.metric, f"a metric of {name}: {', '.join(arms[name])}"
        )
    ours, theirs = (arms[name][claim.metric] for name in (claim.arm, claim.arms[-1]))
    require(len(ours) == len(theirs) > 0, "seeds", (len(ours), len(theirs)), "as many of the arm as of its baseline")
    values = tuple(_compare(claim.kind, a, b) for a, b in zip(ours, theirs))
    neutral = {"ratio": 1.0, "difference": 0.0}.get(claim.kind, claim.size)
    signs = [math.isfinite(v) and _beyond(claim, v, neutral, strict=True) for v in values]
    mean, std = mean_std(values)
    if all(signs) and _beyond(claim, mean, _threshold(claim), strict=False):
        verdict: Verdict = "holds"
    else:
        verdict = "inconclusive" if any(signs) else "does not hold"
    return Judged(claim, values, mean, std, verdict)


def overall(judged: Sequence[Judged]) -> Verdict:
    """The experiment's verdict: holds if all do; does not hold if one does not; else inconclusive."""
    verdicts = {j.verdict for j in judged}
    if verdicts == {"holds"}:
        return "holds"
    return "does not hold" if "does not hold" in verdicts else "inconclusive"


def stated(claim: Claim) -> str:
    """The size with its sign, as a table shows it: `>= 3x`, `<= -0.0159`."""
    sign = ">=" if claim.direction == "higher" else "<="
    return f"{sign} {_threshold(claim):.4g}" + ("x" if claim.kind == "ratio" else "")


def compared(claim: Claim) -> str:
    """What is compared, as a table shows it: `global / micro`."""
    return {"ratio": " / ", "difference": " - ", "margin": " - ", "value": ""}[claim.kind].join(claim.arms)


def _compare(kind: Kind, ours: float, theirs: float) -> float:
    if kind == "value":
        return ours
    if kind in ("difference", "margin"):
        return ours - theirs
    return ours / theirs if theirs else math.nan


def _threshold(claim: Claim) -> float:
    if claim.kind == "ratio":
        return claim.size if claim.direction == "higher" else 1.0 / claim.size
    if claim.kind == "difference" and claim.direction == "lower":
        return 0.0 - claim.size  # -0.0 would show
    return claim.size


def _beyond(claim: Claim, value: float, bound: float, *, strict: bool) -> bool:
    if claim.direction == "higher":
        return value > bound if strict else value >= bound
    return value < bound if strict else value <= bound
