"""A corpus made in memory, for tests and smoke presets: a domain is a Markov chain with its own sparse bigram table."""

from __future__ import annotations

import functools

import numpy as np

from experiments.data.corpus import Corpus, DomainInfo, Key, Stream
from experiments.data.shards import END_OF_DOCUMENT, SPLITS, array_sha256
from moe.config import require

VOCAB = 64
CONCENTRATION = 0.05  # of the Dirichlet rows: a handful of likely successors per token
SPLIT_TOKENS = {"train": 65_536, "validation": 16_896, "test": 16_896}
DOCUMENT_TOKENS = 192  # including the end-of-document token


@functools.lru_cache(maxsize=4)
def synthetic_corpus(seed: int = 0, num_domains: int = 8) -> Corpus:
    """`num_domains` chains over tokens 1..63; the same for the same seed. Optimal loss is a chain's entropy rate.

    Raises:
      ValueError: num_domains < 1.
    """
    require(num_domains >= 1, "num_domains", num_domains, "at least 1")
    streams: dict[Key, Stream] = {}
    info = []
    for d in range(num_domains):
        rng = np.random.default_rng([seed, d])
        name = f"chain-{d}"
        table = np.cumsum(rng.dirichlet(np.full(VOCAB - 1, CONCENTRATION), size=VOCAB - 1), axis=1)
        for split in SPLITS:
            streams[name, split] = _sample(rng, table, SPLIT_TOKENS[split] // DOCUMENT_TOKENS)
        parts = {split: streams[name, split] for split in SPLITS}
        info.append(DomainInfo(
            name, "none (generated)", "clear", f"seed {seed}", {s: len(v.tokens) for s, v in parts.items()},
            {s: len(v.offsets) - 1 for s, v in parts.items()},
            {s: (array_sha256(v.tokens), array_sha256(v.offsets)) for s, v in parts.items()}))
    return Corpus("synthetic", "none", VOCAB, tuple(info), streams)


def _sample(rng: np.random.Generator, table: np.ndarray, documents: int) -> Stream:
    """All documents of a split step by step together; table [63, 63] holds cumulative transition rows."""
    tokens = np.full((documents, DOCUMENT_TOKENS), END_OF_DOCUMENT, np.uint8)
    state = rng.integers(0, VOCAB - 1, documents)
    for t in range(DOCUMENT_TOKENS - 1):
        tokens[:, t] = state + 1
        draws = rng.random((documents, 1))
        state = np.minimum((table[state] < draws).sum(axis=1), VOCAB - 2)
    return Stream(tokens.reshape(-1), np.arange(documents + 1, dtype=np.int64) * DOCUMENT_TOKENS)
