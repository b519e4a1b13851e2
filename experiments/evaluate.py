"""Held-out cross-entropy, routing by domain, and balance: every domain with equal tokens.

Legend: L MoE layers, D domains, N sequences, S positions, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.config import RunConfig
from experiments.data.corpus import Corpus
from experiments.data.pipeline import eval_sequences
from experiments.step import TrainState, forward, targets_of
from experiments.weighted_loss import token_losses
from moe.metrics import max_violation, mutual_information
from parallel.mesh import BATCH


def sequence_sums(params: Any, batch: dict[str, Array], router_state: Any, *, config: RunConfig) -> dict[str, Array]:
    """Per-sequence sums over one batch of leaves [N, S + 1]; every output leads with N."""
    out = forward(config, params, batch, router_state, key=None)
    targets, weights = targets_of(batch)
    sums = {"nll": jnp.sum(token_losses(out, targets) * weights, axis=1), "targets": weights.sum(axis=1)}
    if out.stats is not None:
        tokens_n = jnp.maximum(out.stats.tokens[0], 1.0)
        sums |= {
            "counts": out.stats.counts.swapaxes(0, 1),
            "sequence_violation": max_violation(out.stats.counts).mean(axis=0),
            "top_score": out.stats.top_score_sums.mean(axis=0) / tokens_n,
        }
    return sums


def collect(
    run: Callable[..., dict[str, Array]], size: int, state: TrainState, mesh: Mesh, data: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """`run` (the compiled `sequence_sums`) over all N held-out sequences, `size` at a time, the last batch padded."""
    sharding = NamedSharding(mesh, BATCH)
    total, parts = data["domain"].shape[0], []
    for start in range(0, total, size):
        padded = {}
        for name in ("tokens", "segment_ids", "positions"):
            rows = data[name][start : start + size]
            rows = np.pad(rows, ((0, size - len(rows)), (0, 0)))
            padded[name] = jax.make_array_from_callback(rows.shape, sharding, lambda index, rows=rows: rows[index])
        sums = jax.device_get(run(state.params, padded, state.router_state))
        parts.append(jax.tree.map(lambda x: x[: min(size, total - start)], sums))  # noqa: B023
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def pooled_violation(counts: np.ndarray) -> float:
    """MaxVio of counts [N, L, E] pooled over all sequences, mean over layers."""
    return float(np.mean(max_violation(jnp.asarray(counts.sum(axis=0)))))


def evaluate(config: RunConfig, state: TrainState, corpus: Corpus, mesh: Mesh) -> tuple[dict[str, float], dict]:
    """Metrics of the trained model on the validation and test splits.

    Returns:
      metrics: `val_ce`, `test_ce` (nats per token), and for MoE `val_max_violation` and from the test split:
        `domain_expert_mi` (mean over layers of I(domain; expert), nats), `max_violation` (counts pooled over the split)
        and `max_violation_sequence`, `top_score`.
      series: `domains`, `domain_val_ce` and (of test) `domain_ce` [D], `domain_expert` [L][D][E] (share of a domain's
        assignments), `layer_mi` [L].
    """
    metrics: dict[str, float] = {}
    sums: dict[str, np.ndarray] = {}
    domain = np.zeros(0, np.int64)
    by_domain = lambda x: np.stack([x[domain == d].sum(axis=0) for d in range(len(corpus.domains))])  # noqa: E731
    series: dict[str, Any] = {"domains": list(corpus.domains)}
    size = config.batch_size // config.accumulation  # of a training pass: it is known to fit
    run = jax.jit(functools.partial(sequence_sums, config=config), out_shardings=NamedSharding(mesh, P()))
    for split, name, by in (("validation", "val_ce", "domain_val_ce"), ("test", "test_ce", "domain_ce")):
        data = eval_sequences(corpus, split, config.data.seq_len, config.eval_tokens_per_domain)
        sums, domain = collect(run, size, state, mesh, data), data["domain"]
        metrics[name] = float(sums["nll"].sum() / sums["targets"].sum())
        series[by] = (by_domain(sums["nll"]) / by_domain(sums["targets"])).round(5).tolist()
        if split == "validation" and "counts" in sums:
            metrics["val_max_violation"] = pooled_violation(sums["counts"])
    if "counts" in sums:
        counts = by_domain(sums["counts"]).swapaxes(0, 1)  # [L, D, E]
        layer_mi = np.asarray(mutual_information(jnp.asarray(counts)))
        metrics |= {
            "domain_expert_mi": float(layer_mi.mean()),
            "max_violation": pooled_violation(sums["counts"]),
            "max_violation_sequence": float(sums["sequence_violation"].mean()),
            "top_score": float(sums["top_score"].mean()),
        }
        share = counts / counts.sum(axis=-1, keepdims=True)
        series |= {"domain_expert": share.round(4).tolist(), "layer_mi": layer_mi.round(5).tolist()}
    return metrics, series
