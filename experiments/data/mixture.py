"""Samples of several sources in proportions that may change while they are drawn, as a search for weights wants it.

Legend: K sources, B sequences of a batch over all processes, S predicted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

import grain
import numpy as np

from experiments.data.pipeline import Sample, proportions, rows_of, stack
from moe.config import require

Draw = Literal["independent", "stratified"]


def independent(p: np.ndarray, key: np.ndarray, start: int, size: int) -> np.ndarray:
    """int64 [size], sources of samples start, start + 1, ... under proportions p [K].

    Sample n's is the first k of p[0] + ... + p[k] > u, u uniform by (key, n): what p moves by, that share of samples
    moves at most from each source to its neighbours.
    """
    words = np.random.Philox(key=key, counter=start).random_raw(4 * size)[::4]  # a block of four for each n
    return inverse_cdf(p, (words >> np.uint64(11)) * 2.0**-53)


def stratified(p: np.ndarray, key: np.ndarray, start: int, size: int) -> np.ndarray:
    """As `independent`, but of these samples each source has floor(size p[k]) or one more: the points are one apart,
    shifted by one uniform and shuffled, both by (key, start) (systematic sampling)."""
    rng = np.random.Generator(np.random.Philox(key=key, counter=start << 64))  # far from the blocks of another start
    points = (rng.random() + np.arange(size)) / size
    return rng.permutation(inverse_cdf(p, np.minimum(points, np.nextafter(1.0, 0.0))))


def inverse_cdf(p: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points [n] in [0, 1) to sources [n]; none to a source of weight 0."""
    bounds = np.cumsum(p)
    return np.searchsorted(bounds / bounds[-1], points, side="right")


DRAWS: dict[str, Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]] = {
    "independent": independent, "stratified": stratified}


class Mixture(grain.DatasetIterator[Sample]):
    """Endless batches of the sources: tokens, segment_ids, positions int32 [B / processes, S + 1] and domain int32, the
    source's index; `set_weights` holds from the next batch on.

    A sample's window is the next one of its source, whichever process reads it. What comes is a function of the seed
    and of the weights set at each batch; all processes must set the same.

    Args:
      sources: endless datasets of one domain each, `pipeline.domain_datasets`.
      weights: [K], proportions once divided by their sum; None for equal ones.
      draw: `independent`, a draw for each sample; `stratified`, in every batch floor(B p[k]) of source k or one more.

    Raises:
      ValueError: no or empty sources, weights that are no proportions, an unknown draw, a batch that is smaller than
        the number of sources (stratified) or that does not divide by the processes.
    """

    def __init__(self, sources: Sequence[grain.MapDataset], batch_size: int, seed: int,
                 weights: Sequence[float] | np.ndarray | None = None, draw: Draw = "independent",
                 process_index: int = 0, process_count: int = 1):
        super().__init__()
        require(len(sources) >= 1, "sources", len(sources), "at least one")
        for k, source in enumerate(sources):
            require(len(source) > 0, f"sources[{k}]", len(source), "samples, at least one")
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        require(draw in get_args(Draw), "draw", draw, f"one of {', '.join(get_args(Draw))}")
        require(draw == "independent" or batch_size >= len(sources), "batch_size", batch_size,
                f"at least the {len(sources)} sources, for stratified draws")
        self.sources, self.batch_size, self.draw = tuple(sources), batch_size, draw
        self.rows = rows_of(batch_size, process_index, process_count)
        self.key = np.random.SeedSequence(seed, spawn_key=(1,)).generate_state(2, np.uint64)
        self.position, self.counters = 0, np.zeros(len(sources), np.int64)
        self.set_weights(np.ones(len(sources)) if weights is None else weights)

    def set_weights(self, weights: Sequence[float] | np.ndarray) -> None:
        """Numbers [K], 0 or more and not all 0; ValueError for others, which changes nothing."""
        self.p = proportions(weights, len(self.sources), "weights")
        self.weights = np.asarray(weights, np.float64).tolist()  # as given: p of p may differ in the last bit

    def __next__(self) -> Sample:
        self._assert_not_closed()
        chosen = DRAWS[self.draw](self.p, self.key, self.position, self.batch_size)
        is_of = chosen[:, None] == np.arange(len(self.sources))[None]  # [B, K]
        nth = self.counters[chosen] + np.cumsum(is_of, axis=0)[np.arange(self.batch_size), chosen] - 1
        read = [cast(Sample, self.sources[chosen[row]][int(nth[row])]) for row in self.rows]
        self.position += self.batch_size
        self.counters = self.counters + is_of.sum(axis=0)
        return stack(read) | {"domain": chosen[self.rows.start : self.rows.stop].astype(np.int32)}

    def get_state(self) -> dict[str, Any]:
        """`position`, samples drawn; `counters` [K], of each source; `weights` [K]. JSON-able, the same on every
        process."""
        return {"position": self.position, "counters": self.counters.tolist(), "weights": list(self.weights)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called. ValueError for a state of other sources, or no state at all."""
        require(set(state) == set(self.get_state()), "state", sorted(state), ", ".join(self.get_state()))
        position, counters = int(state["position"]), np.array(state["counters"], np.int64)
        require(counters.shape == self.counters.shape, "state: counters", counters.tolist(),
                f"{len(self.sources)} numbers, one for each source")
        require(bool(np.all(counters >= 0) and counters.sum() == position), "state: counters", counters.tolist(),
                f"numbers of samples that add up to position = {position}")
        self.set_weights(state["weights"])
        self.position, self.counters = position, counters

    def __str__(self) -> str:
        return f"Mixture({len(self.sources)} sources, {self.draw})"
