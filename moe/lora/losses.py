"""Losses of the adapters' routers, from the statistics their sites tell.

Each is a sum over tokens divided by the valid tokens of the pass; under accumulation every pass stands for itself.
Legend: L layers, B sequences, E experts, k active, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from moe.config import require
from moe.losses import RoutingStats, balance_loss, selection_frequency

Sign = Literal["as_claimed", "as_printed"]
Count = Literal["slots", "argmax"]


def mixlora_balance(stats: RoutingStats, num_experts: int) -> Array:
    """E sum_i F_i P_i as MoE-PEFT computes it: F_i the mean over tokens of the slots that chose i (they sum to k, so
    uniform routing gives k), P_i the mean probability, both over the tokens of *all layers together*.

    2404.15159, Eq. 8 (its text has F of the argmax: `count = "argmax"` of `balance`). Over layers together opposite
    imbalances cancel; `balance` takes each layer for itself.
    """
    tokens = jnp.maximum(jnp.sum(stats.tokens), 1.0)
    share = jax.lax.stop_gradient(jnp.sum(stats.counts, axis=(0, 1)) / tokens)
    return num_experts * jnp.sum(share * jnp.sum(stats.prob_sums, axis=(0, 1)) / tokens)


def balance(sites: Mapping[str, RoutingStats], top_k: int, count: Count = "slots") -> Array:
    """The balance loss of this repository (uniform routing gives 1), each layer for itself, mean over layers and sites.

    `count`: what an expert's share is taken of, all k slots, or the likeliest expert alone (MixLoRA's text).
    """
    require(bool(sites), "adapter_stats", {}, "a router")
    return jnp.mean(jnp.stack([_balance(stats, top_k, count) for stats in sites.values()]))


def _balance(stats: RoutingStats, top_k: int, count: Count) -> Array:
    total, counts, k = jnp.sum(stats.tokens[0]), stats.counts, top_k
    if count == "argmax":  # the first slot, which softmax and top-p routers give the likeliest
        first, num_experts = stats.indices[..., 0], stats.counts.shape[-1]
        counts, k = jnp.sum(jax.nn.one_hot(first, num_experts), axis=2), 1
    frequency = selection_frequency(counts.sum(axis=1), stats.tokens.sum(axis=1), k)
    return balance_loss(frequency[:, None], stats.prob_sums.sum(axis=1, keepdims=True), total)


def routing_specialization_loss(
    sites: Mapping[str, RoutingStats],
    balance_weight: float,
    entropy_weight: float,
    *,
    top_k: int,
    sign: Sign = "as_claimed",
    count: Count = "argmax",
) -> Array:
    """LoRA-Mixer's loss: balanced over all tokens, and per token

        w_b E sum_i pbar_i fbar_i - w_e mean_x H(p(x))     as_printed: this sign makes every token's choice uniform
        w_b E sum_i pbar_i fbar_i + w_e mean_x H(p(x))     as_claimed: lower entropy, the specialisation the text wants

    2507.00029, Eq. 5 (from third-party notes), with the factor E it lacks: at uniform routing the first term is w_b.
    Mean over layers and sites. `count` is fbar's, see `balance`: with all experts mixed every token's slots are all of
    them, so that only the likeliest expert says anything; the notes have both.

    Raises:
      ValueError: a negative weight (the sign is chosen by name), an unknown sign, no router.
    """
    for name, value in (("balance_weight", balance_weight), ("entropy_weight", entropy_weight)):
        require(value >= 0, name, value, "0 or more; the sign of the entropy is chosen by name")
    require(sign in ("as_claimed", "as_printed"), "sign", sign, "as_claimed or as_printed")
    factor = entropy_weight if sign == "as_claimed" else -entropy_weight
    entropies = [jnp.sum(one.entropy_sums) / jnp.maximum(jnp.sum(one.tokens), 1.0) for one in sites.values()]
    return balance_weight * balance(sites, top_k, count) + factor * sum(entropies, jnp.float32(0)) / len(sites)


def proximal_loss(adapters: Any, anchor: Any) -> Array:
    """|theta - anchor|^2 over all leaves: LoRA-Mixer's preservation of experts, before its weight beta.

    Raises:
      ValueError: no anchor, or one of another structure.
    """
    require(anchor is not None, "anchor", None, "the experts as they were")
    same = jax.tree.structure(adapters) == jax.tree.structure(anchor)
    require(same, "anchor", str(jax.tree.structure(anchor)), f"the structure {jax.tree.structure(adapters)}")
    squares = jax.tree.map(lambda x, y: jnp.sum(jnp.square(x - y)), adapters, anchor)
    return jnp.sum(jnp.stack(jax.tree.leaves(squares)))


def router_losses(sites: Mapping[str, RoutingStats]) -> Array:
    """The routers' own terms (a top-p router's entropy), per token, mean over layers and sites."""
    sums = [jnp.sum(term) / jnp.maximum(jnp.sum(one.tokens), 1.0)
            for one in sites.values() for term in one.router_losses.values()]  # fmt: skip
    return sum(sums, jnp.float32(0)) / max(len(sites), 1)
