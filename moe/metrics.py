"""Routing metrics, always on. All are means over MoE layers unless they say otherwise.

Legend: L MoE layers, B sequences, G groups, E experts.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from moe.losses import RoutingStats, group_sum


def max_violation(counts: Array) -> Array:
    """MaxVio = max_i c_i / mean(c) - 1, [..., E] -> [...]; 0 is balance, E/k - 1 the worst (2408.15664, Eq. 4)."""
    mean = jnp.maximum(jnp.mean(counts, axis=-1), 1e-9)
    return jnp.max(counts, axis=-1) / mean - 1.0


def pass_metrics(stats: RoutingStats, group: int) -> dict[str, Array]:
    """What one forward pass can tell; the train step averages these over its accumulation passes. `group` is the number
    of sequences of a micro-batch."""
    tokens = jnp.maximum(stats.tokens.sum(), 1.0)
    return {
        "router_entropy": stats.entropy_sums.sum() / tokens,
        "top_score": stats.top_score_sums.sum() / tokens,
        "max_violation_sequence": jnp.mean(max_violation(stats.counts)),
        "max_violation_microbatch": jnp.mean(max_violation(group_sum(stats.counts, group))),
    }


def step_metrics(counts: Array, dropped: Array) -> dict[str, Array]:
    """From the counts [L, E] and dropped assignments of a whole optimiser step.

    `dead_experts` is the number over all layers; `load_pX` are percentiles of expert load over the balanced load.
    """
    load = counts / jnp.maximum(jnp.mean(counts, axis=-1, keepdims=True), 1e-9)
    p5, p50, p95 = jnp.percentile(load, jnp.array([5.0, 50.0, 95.0]))
    return {
        "max_violation": jnp.mean(max_violation(counts)),
        "dead_experts": jnp.sum(counts == 0, dtype=jnp.float32),
        "drop_rate": dropped / jnp.maximum(jnp.sum(counts), 1.0),
        "load_p5": p5,
        "load_p50": p50,
        "load_p95": p95,
    }


def mutual_information(counts: Array) -> Array:
    """I(domain; expert) in nats from joint counts [..., domains, E]; callers give every domain equal tokens."""
    joint = counts / jnp.maximum(jnp.sum(counts, axis=(-2, -1), keepdims=True), 1e-9)
    rows = jnp.sum(joint, axis=-1, keepdims=True)
    columns = jnp.sum(joint, axis=-2, keepdims=True)
    ratio = jnp.where(joint > 0, joint / jnp.maximum(rows * columns, 1e-30), 1.0)
    return jnp.sum(joint * jnp.log(ratio), axis=(-2, -1))
