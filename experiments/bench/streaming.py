"""What a token has to read when it is decoded, and how fast this machine reads."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.peak import seconds_of
from moe.config import ModelConfig
from moe.generate import Weights, empty_caches

STREAM_BYTES = 2**29  # far beyond any cache


def weight_bytes(config: ModelConfig, weights: Weights) -> int:
    """Bytes of weights that one token cannot do without: every layer, of experts the chosen ones, the head, one row of
    the embedding."""
    chosen = config.moe.top_k / config.moe.num_experts if config.moe else 1.0
    total = weights.head.nbytes + weights.embedding.nbytes // config.vocab_size
    for path, leaf in jax.tree_util.tree_leaves_with_path((weights.final_norm, weights.layers)):
        in_experts = any(getattr(key, "key", None) == "experts" for key in path)
        total += round(leaf.nbytes * (chosen if in_experts else 1.0))
    return total


def cache_bytes(config: ModelConfig, positions: float) -> int:
    """Bytes of keys and values that attention over so many positions reads; a window ends it earlier."""
    windows = config.windows or (0,) * config.num_layers
    caches = jax.eval_shape(partial(empty_caches, config, 1, 1))
    of_layer = (sum(leaf.size * leaf.dtype.itemsize for leaf in cache) for cache in caches)
    return round(sum(n * min(positions, window or positions) for n, window in zip(of_layer, windows, strict=True)))


class StreamMeter:
    """The pace at which this machine reads memory that is in no cache: the fastest of three ways to reduce an array."""

    def __init__(self, size: int = STREAM_BYTES) -> None:
        flat = np.ones(size // 4, np.float32)
        threads = os.cpu_count() or 1
        shares, rows = np.array_split(flat, threads), jnp.asarray(flat.reshape(-1, 4096))
        wide = rows.reshape(4096, -1)
        pool, one = ThreadPoolExecutor(threads), jnp.ones(4096)
        sums, product = jax.jit(lambda a: a.sum(axis=1)), jax.jit(lambda v, a: v @ a)
        self.bytes = size
        self.ways: dict[str, Callable[[], Any]] = {
            "NumPy sum, a thread per core": lambda: list(pool.map(np.sum, shares)),
            "XLA row sums": lambda: sums(rows),
            "XLA vector-matrix product": lambda: product(one, wide),
        }
        self.best = dict.fromkeys(self.ways, 0.0)
        for way in self.ways.values():
            way()

    def probe(self) -> dict[str, float]:
        """One more sample of each way; bytes per second of the fastest sample of each so far."""
        for name, way in self.ways.items():
            self.best[name] = max(self.best[name], self.bytes / seconds_of(way))
        return self.best
