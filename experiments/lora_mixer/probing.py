"""What routers say of each task: I(task; expert), entropy and balance, before anything is served.

Legend: L layers, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.finetune import Base, adapted
from experiments.tasks.training import Batch
from moe.config import ModelConfig
from moe.lora.config import AdapterConfig
from moe.metrics import max_violation, mutual_information


class Probe(NamedTuple):
    """What routers say of one task's rows, by site: sums of probabilities [L, E], tokens whose likeliest expert it is
    [L, E], sums of entropies [L], and tokens."""

    probs: dict[str, np.ndarray]
    first: dict[str, np.ndarray]
    entropy: dict[str, np.ndarray]
    tokens: Any


def probe(base: Base, adapters: AdapterConfig, tree: Any, batch: Batch) -> Probe:
    return jax.device_get(_probe(base.config, adapters, base.params, base.router_state, tree, batch))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _probe(
    config: ModelConfig, adapters: AdapterConfig, params: Any, router_state: Any, tree: Any, batch: Batch
) -> Probe:
    sites = adapted(config, adapters, params, router_state, tree, batch, None, None).adapter_stats
    of = lambda get: {site: get(stats) for site, stats in sites.items()}  # noqa: E731
    first = lambda stats: jnp.sum(jax.nn.one_hot(stats.indices[..., 0], stats.counts.shape[-1]), axis=(1, 2))  # noqa: E731
    return Probe(  # `indices` are in falling order of probability
        of(lambda stats: jnp.sum(stats.prob_sums, axis=1)), of(first),
        of(lambda stats: jnp.sum(stats.entropy_sums, axis=1)), jnp.sum(next(iter(sites.values())).tokens[0]),
    )  # type: ignore[arg-type]  # fmt: skip


def by_site(probes: Mapping[str, Probe], name: Literal["probs", "first"]) -> dict[str, np.ndarray]:
    """[L, tasks, E] of every site, each task with weight 1."""
    joint = lambda site: np.stack([getattr(one, name)[site] / one.tokens for one in probes.values()], axis=1)  # noqa: E731
    return {site: joint(site) for site in next(iter(probes.values())).probs}


def routing_metrics(probes: Mapping[str, Probe]) -> dict[str, float]:
    """Means over layers and sites. MaxVio is of the likeliest experts: 0 if each is the likeliest equally often."""
    average = lambda found: float(np.mean([np.mean(np.asarray(one)) for one in found]))  # noqa: E731
    probs, first = by_site(probes, "probs").values(), by_site(probes, "first").values()
    entropies = [values / one.tokens for one in probes.values() for values in one.entropy.values()]
    return {
        "domain_expert_mi": average(mutual_information(jnp.asarray(joint)) for joint in probs),
        "top1_mi": average(mutual_information(jnp.asarray(joint)) for joint in first),
        "router_entropy": average(entropies),
        "max_violation": average(max_violation(jnp.asarray(joint.sum(axis=1))) for joint in first),
    }


def mi_by_layer(probes: Mapping[str, Probe]) -> list[float]:
    """`domain_expert_mi` of each layer, mean over sites."""
    layers = [mutual_information(jnp.asarray(joint)) for joint in by_site(probes, "probs").values()]
    return [round(float(value), 5) for value in np.mean(np.asarray(layers), axis=0)]
