"""Figures about a corpus: how compressible each domain is, and how distinct from the others."""

from __future__ import annotations

import lzma
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments.data.corpus import Corpus

SAMPLE_BYTES = 64_000
PRIMER_BYTES = 256_000


class Distinctness(NamedTuple):
    """Bits per byte of a held-out sample under LZMA: alone, after the best other domain's training text, after its own.

    A domain is distinct if `own` is the least.
    """

    alone: float
    other: float
    other_name: str
    own: float


def byte_entropy(text: bytes) -> float:
    """Entropy of the byte histogram, bits per byte."""
    counts = np.bincount(np.frombuffer(text, np.uint8), minlength=256)
    p = counts[counts > 0] / max(1, len(text))
    return float(-(p * np.log2(p)).sum())


def text_sample(corpus: Corpus, domain: str, split: str, limit: int) -> bytes:
    """About `limit` bytes of a split: sixteen runs spread over it, so that no single document decides."""
    tokens = corpus.stream(domain, split).tokens
    bytes_per_token = max(1.0, len(corpus.text(tokens[:4_096])) / max(1, min(4_096, len(tokens))))
    run = min(len(tokens) // 16, int(limit / bytes_per_token) // 16)
    starts = [i * len(tokens) // 16 for i in range(16)]
    return corpus.text(np.concatenate([tokens[s : s + run] for s in starts]))[:limit]


def distinctness(corpus: Corpus, advance: Callable[[], None] = lambda: None) -> dict[str, Distinctness]:
    """For each domain; LZMA learns from up to 256 kB of a primer and compresses up to 64 kB of the test split.

    Args:
      advance: called after each primer, `len(corpus.domains)` times.
    """
    samples = {name: text_sample(corpus, name, "test", SAMPLE_BYTES) for name in corpus.domains}
    primed: dict[str, dict[str, float]] = {name: {} for name in corpus.domains}
    for primer_name in corpus.domains:
        primer = text_sample(corpus, primer_name, "train", PRIMER_BYTES)
        base = _compressed(primer)
        for name, text in samples.items():
            primed[name][primer_name] = 8 * (_compressed(primer + text) - base) / len(text)
        advance()
    out = {}
    for name, text in samples.items():
        others = {n: bits for n, bits in primed[name].items() if n != name}
        best = min(others, key=others.__getitem__) if others else ""
        out[name] = Distinctness(8 * _compressed(text) / len(text), others.get(best, float("nan")), best,
                                 primed[name][name])
    return out


def _compressed(data: bytes) -> int:
    return len(lzma.compress(data, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}]))
