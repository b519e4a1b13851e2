"""Shares of counts with their uncertainty."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

Z95 = 1.959963984540054


def wilson(hits: int, count: int, z: float = Z95) -> tuple[float, float]:
    """The binomial interval of a share, hits / count (Wilson 1927): where the normal test at z does not reject."""
    if count == 0:
        return 0.0, 1.0
    share, shrink = hits / count, 1 + z * z / count
    centre = (share + z * z / (2 * count)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def majority(answers: Sequence[int | str]) -> int:
    """How often the commonest answer is right: no constant answer does better on these examples."""
    return max(Counter(answers).values(), default=0)


def share(hits: int, count: int) -> dict[str, object]:
    """For a result file: the share and its 95% interval."""
    return {"share": round(hits / count, 6) if count else None, "interval": [round(x, 6) for x in wilson(hits, count)]}
