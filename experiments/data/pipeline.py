"""Token streams to batches: one domain per sequence, any element from its index alone (DESIGN contracts 7, 8).

Legend: S predicted tokens per sequence, B sequences, N held-out sequences.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

import grain
import numpy as np

from experiments.data.corpus import Corpus, Stream
from moe.config import require

Sample = dict[str, np.ndarray]
MIN_SHUFFLE = 1_024  # elements; grain's index shuffle walks cycles and is 100 times slower on fewer than about 500
CYCLE = 64  # shuffle runs after which the order of weighted domains repeats
PREFETCH = 2  # batches made ahead


def num_windows(stream: Stream, seq_len: int) -> int:
    """Whole windows of S + 1 tokens; neighbours share one token, so each token but the first is predicted once."""
    return (len(stream.tokens) - 1) // seq_len


def window(stream: Stream, index: int, seq_len: int) -> Sample:
    """int32 [S + 1] each: tokens, segment_ids (1, 2, ... by document), positions (from 0 in each document)."""
    begin = index * seq_len
    where = np.arange(begin, begin + seq_len + 1)
    document = np.searchsorted(stream.offsets, where, side="right")
    positions = where - np.maximum(stream.offsets[document - 1], begin)
    return {
        "tokens": np.asarray(stream.tokens[begin : begin + seq_len + 1], np.int32),
        "segment_ids": (document - document[0] + 1).astype(np.int32),
        "positions": positions.astype(np.int32),
    }


class Windows:
    """Random access to the windows of one domain, as grain wants its sources."""

    def __init__(self, stream: Stream, seq_len: int, domain: int):
        self.stream, self.seq_len, self.domain = stream, seq_len, domain

    def __len__(self) -> int:
        return num_windows(self.stream, self.seq_len)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        return window(self.stream, int(index), self.seq_len) | {"domain": np.array(self.domain, np.int32)}


def check_fits(corpus: Corpus, split: str, seq_len: int) -> None:
    """Raises ValueError, with both numbers, if a domain's split is shorter than one window."""
    require(seq_len >= 1, "data.seq_len", seq_len, "at least 1")
    for name in corpus.domains:
        tokens = len(corpus.stream(name, split).tokens)
        require(tokens > seq_len, "data.seq_len", seq_len,
                f"at most {tokens - 1}: a window takes seq_len + 1 = {seq_len + 1} tokens, and split {split!r} of "
                f"domain {name!r} has {tokens}")


def shuffle_window(num_domains: int) -> int:
    """The multiple of the number of domains from MIN_SHUFFLE up."""
    return -(-MIN_SHUFFLE // num_domains) * num_domains


def proportions(weights: Sequence[float] | np.ndarray, count: int, field: str = "data.weights") -> np.ndarray:
    """Weights as float64 [count] of sum 1. ValueError unless they are `count` finite ones, none negative, not all 0."""
    given = np.asarray(weights, np.float64)
    require(given.shape == (count,), field, given.tolist(), f"{count} numbers, one for each domain")
    valid = bool(np.all(np.isfinite(given)) and np.all(given >= 0) and np.any(given > 0))
    require(valid, field, given.tolist(), "finite numbers, 0 or more and not all 0")
    given = given / given.max()  # so that no sum overflows
    return given / given.sum()


class Weighted(grain.transforms.DatasetSelectionMap):
    """Index i -> domain and index within it: domain d has p[d] of every stretch of indices, to an element or two.

    p [D] is rounded to 1 / `cycle`. (`MapDataset.mix` rounds to hundredths of the least, and takes no 0.)
    """

    def __init__(self, p: np.ndarray, cycle: int):
        quotas = np.floor(p * cycle).astype(np.int64)
        remainders = np.argsort(quotas - p * cycle, kind="stable")  # the largest first
        quotas[remainders[: cycle - quotas.sum()]] += 1
        domains = np.repeat(np.arange(len(p)), quotas)
        ranks = np.concatenate([np.arange(quota) for quota in quotas])
        order = np.argsort((ranks + 0.5) / quotas[domains], kind="stable")
        self.quotas, self.domains, self.ranks = quotas, domains[order], ranks[order]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        cycle, at = divmod(index, len(self.domains))
        domain = int(self.domains[at])
        return domain, cycle * int(self.quotas[domain]) + int(self.ranks[at])


def seeds_of(corpus: Corpus, seed: int) -> list[int]:
    """Of the order of domains, then of each domain's windows."""
    words = np.random.SeedSequence(seed).generate_state(len(corpus.domains) + 1)
    return [int(word) for word in words >> 2]  # grain adds to them, below 2^32


def domain_datasets(corpus: Corpus, split: str, seq_len: int, seed: int) -> list[grain.MapDataset]:
    """An endless dataset of each domain, elements as of `make_dataset`: all windows once, shuffled, before any comes
    again, in another order. ValueError as `check_fits`."""
    check_fits(corpus, split, seq_len)
    return [
        grain.MapDataset.source(Windows(corpus.stream(name, split), seq_len, d)).shuffle(of_domain).repeat()
        for d, (name, of_domain) in enumerate(zip(corpus.domains, seeds_of(corpus, seed)[1:]))
    ]


def make_dataset(corpus: Corpus, split: str, seq_len: int, seed: int,
                 weights: Sequence[float] = ()) -> grain.MapDataset:
    """Endless dataset; element i is a function of (seed, i) only.

    Elements: tokens, segment_ids, positions int32 [S + 1], domain int32 (index into `corpus.domains`). Within each run
    of `shuffle_window(num_domains)` elements domains come in equal numbers, or in proportion to `weights` to an element
    or two, and in shuffled order; a domain's windows all come once, shuffled, before any comes again, in another order
    (but for the reach of one such run). Equal weights are the same as none.

    Raises:
      ValueError: a domain's split is shorter than one window (gives both numbers); weights that are no proportions.
    """
    parts = domain_datasets(corpus, split, seq_len, seed)
    run = shuffle_window(len(parts))
    if len(weights):
        chosen = Weighted(proportions(weights, len(parts)), CYCLE * run)
        mixed = grain.MapDataset.select_from_datasets(parts, chosen)
    else:
        mixed = grain.MapDataset.mix(parts)
    return grain.experimental.WindowShuffleMapDataset(mixed, window_size=run, seed=seeds_of(corpus, seed)[0])


def stack(samples: list[Sample]) -> Sample:
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def rows_of(batch_size: int, process_index: int, process_count: int) -> range:
    """Rows of a batch that process p reads, the p-th of `process_count` equal runs of them; ValueError as `batch_at`.
    """
    require(process_count >= 1 and batch_size % process_count == 0, "batch_size", batch_size,
            f"divisible by the {process_count} processes")
    require(0 <= process_index < process_count, "process_index", process_index, f"0 to {process_count - 1}")
    local = batch_size // process_count
    return range(process_index * local, (process_index + 1) * local)


def batch_at(dataset: grain.MapDataset, start: int, batch_size: int, process_index: int = 0,
             process_count: int = 1) -> Sample:
    """Samples start .. start + B - 1, stacked; process p gets the p-th of `process_count` equal runs of them.

    Raises:
      ValueError: B is not divisible by the number of processes, or p is not one of them.
    """
    return stack([cast(Sample, dataset[start + row]) for row in rows_of(batch_size, process_index, process_count)])


def batches(dataset: grain.MapDataset, start: int, batch_size: int, process_index: int = 0,
            process_count: int = 1) -> Generator[Sample, None, None]:
    """`batch_at` for start, start + B, start + 2B, ... without end; a thread makes the next ones meanwhile.

    Close the generator (or let it go) to stop the thread.
    """
    waiting: collections.deque[Future[Sample]] = collections.deque()
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        try:
            while True:
                while len(waiting) <= PREFETCH:
                    waiting.append(pool.submit(batch_at, dataset, start, batch_size, process_index, process_count))
                    start += batch_size
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def eval_sequences(corpus: Corpus, split: str, seq_len: int, tokens_per_domain: int) -> Sample:
    """The same held-out windows every time, the same number n for each domain, spread over its whole split.

    n = tokens_per_domain // S, or as many as the shortest domain has if that is fewer.

    Returns:
      tokens, segment_ids, positions int32 [N, S + 1], domain int32 [N]; N = n * num_domains, domain by domain.

    Raises:
      ValueError: tokens_per_domain < S, or a domain's split is shorter than one window.
    """
    check_fits(corpus, split, seq_len)
    require(tokens_per_domain >= seq_len, "eval_tokens_per_domain", tokens_per_domain,
            f"at least seq_len = {seq_len}, one window")
    streams = [corpus.stream(name, split) for name in corpus.domains]
    counts = [num_windows(stream, seq_len) for stream in streams]
    n = min(tokens_per_domain // seq_len, *counts)
    samples = [window(stream, i * count // n, seq_len) | {"domain": np.array(d, np.int32)}
               for d, (stream, count) in enumerate(zip(streams, counts)) for i in range(n)]
    return stack(samples)
