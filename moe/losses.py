"""Router losses as pure functions of per-sequence routing statistics.

The layer returns statistics per *sequence*; every balance scope is a grouping of them, so the layer does not know the
scope and no mean over a batch axis is taken by accident (under jit a plain mean is global, under scan it is not).

    L = E sum_i f_i P_i,   f_i = c_i / (k |B|),   P_i = mean over B of probs_i           (Switch 2101.03961, with 1/k)

Normalised by k: uniform routing gives exactly 1 for every k, collapse on one expert with k = 1 gives E. Libraries that
do not divide by k (HF Mixtral family, MaxText) give k times this value. Gradient flows through P only; f is a count.
Everything is a sum over tokens divided once by the global token count, so unequal groups weigh by their tokens.

Legend: L MoE layers, B sequences, G groups (one f each), S positions, E experts, D groups of experts (devices),
K (static) and k experts per token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from moe.config import BalanceScope, require
from moe.routing import RouterOutput, expert_counts


@struct.dataclass
class RoutingStats:
    """What one MoE layer tells about its routing, per sequence; stacked over layers it has a leading [L].

    Attributes:
      counts: [B, E] float32, valid assignments before a token policy drops any; no gradient.
      balance_counts: [B, E] float32, those the balance loss sees: `counts`, unless the router counts other choices.
      prob_sums: [B, E] float32, sum of `probs` over valid tokens; carries the balance gradient.
      tokens: [B] float32, valid tokens.
      z_sums: [B] float32, sum over valid tokens of logsumexp(logits)^2 (ST-MoE 2202.08906, Eq. 5).
      entropy_sums: [B] float32, sum over valid tokens of the entropy of `probs`, in nats; carries its gradient.
      top_score_sums: [B] float32, sum over valid tokens of the chosen probabilities' sum.
      dropped: [B] float32, assignments of valid tokens that a token policy dropped.
      router_losses: the router's own terms, sums over tokens.
      indices: [B, S, K] int32 with E for invalid assignments (shuffle scope, domain analysis).
      observed: what the router's `update` wants, summed over tokens; any pytree.
    """

    counts: Array
    balance_counts: Array
    prob_sums: Array
    tokens: Array
    z_sums: Array
    entropy_sums: Array
    top_score_sums: Array
    dropped: Array
    router_losses: dict[str, Array]
    indices: Array
    observed: Any = None


def routing_stats(
    routing: RouterOutput, token_valid: Array, router_losses: dict[str, Array], kept: Array
) -> RoutingStats:
    """Statistics of one layer.

    Args:
      routing: the router's decision on T = B * S tokens, padding already dropped.
      token_valid: [B, S] bool.
      router_losses: the router's own terms.
      kept: [T, K] bool, `routing.valid` after the token policy (capacity); equal to it when dropless.
    """
    b, s = token_valid.shape
    per_sequence = lambda x: x.reshape(b, s, *x.shape[1:])  # noqa: E731
    mask = token_valid.astype(jnp.float32)
    valid = per_sequence(routing.valid)
    indices = per_sequence(routing.indices)
    probs, num_experts = per_sequence(routing.probs), routing.probs.shape[-1]
    z = jax.nn.logsumexp(per_sequence(routing.logits), axis=-1)
    entropy = -jnp.sum(probs * jnp.log(jnp.maximum(probs, 1e-30)), axis=-1)
    chosen = jnp.sum(jnp.take_along_axis(jax.lax.stop_gradient(probs), indices, axis=-1) * valid, axis=-1)
    counts = balance_counts = jax.lax.stop_gradient(expert_counts(indices, valid, num_experts))
    if routing.balance_indices is not None:
        balance_counts = expert_counts(per_sequence(routing.balance_indices), token_valid[..., None], num_experts)
    return RoutingStats(
        counts=counts,
        balance_counts=balance_counts,
        prob_sums=jnp.einsum("bs,bse->be", mask, probs),
        tokens=jnp.sum(mask, axis=1),
        z_sums=jnp.sum(jnp.square(z) * mask, axis=1),
        entropy_sums=jnp.sum(entropy * mask, axis=1),
        top_score_sums=jnp.sum(chosen * mask, axis=1),
        dropped=jnp.sum(valid & ~per_sequence(kept), axis=(1, 2), dtype=jnp.float32),
        router_losses=router_losses,
        indices=jnp.where(valid, indices, num_experts),
        observed=jax.lax.stop_gradient(routing.observed),
    )


def group_sum(x: Array, group_size: int) -> Array:
    """Sums consecutive groups of `group_size` sequences: [L, B, ...] -> [L, B / group_size, ...]."""
    layers, b, *rest = x.shape
    require(b % group_size == 0, "balance.micro_batch_size", group_size, f"a divisor of {b} sequences")
    return x.reshape(layers, b // group_size, group_size, *rest).sum(axis=2)


def selection_frequency(counts: Array, tokens: Array, top_k: int) -> Array:
    """f = c / (k * tokens): counts [..., E], tokens [...] -> [..., E]; zero where there is no token."""
    return jax.lax.stop_gradient(counts / (top_k * jnp.maximum(tokens, 1.0)[..., None]))


def balance_loss(frequency: Array, prob_sums: Array, total_tokens: Array | float) -> Array:
    """E sum_g f_g . (sum of probs)_g / total_tokens, mean over layers.

    Args:
      frequency: [L, G, E] float32 (or [L, 1, E]: one f for every group); treated as a constant.
      prob_sums: [L, G, E] float32.
      total_tokens: valid tokens of the whole optimiser step; zero tokens give a loss of zero, never NaN.

    Returns:
      Scalar, 1 for uniform routing. Source: global-batch balance study 2501.11873, Eqs. 2-6.
    """
    require(
        frequency.shape[-1] == prob_sums.shape[-1], "frequency", frequency.shape, f"last axis {prob_sums.shape[-1]}"
    )
    require(
        frequency.dtype == jnp.float32 or frequency.dtype == jnp.float64, "frequency.dtype", frequency.dtype, "float32"
    )
    num_layers, _, num_experts = prob_sums.shape
    product = jnp.sum(jax.lax.stop_gradient(frequency) * prob_sums)
    return num_experts * product / (num_layers * jnp.maximum(total_tokens, 1.0))


def shuffled_frequency(indices: Array, keys: Array, sample_tokens: int, num_experts: int, top_k: int) -> Array:
    """f from a random sample of the whole batch for every micro-batch: tells "more tokens" from "more diverse tokens".

    Args:
      indices: [L, N, K] int32 selection of all N tokens of the optimiser step, E for invalid.
      keys: [G] PRNG keys, one per micro-batch.
      sample_tokens: tokens drawn without replacement (as many as one micro-batch has); valid tokens are drawn first.

    Returns:
      [L, G, E] float32. Source: 2501.11873, section "shuffle" ablation.
    """
    valid = indices[0, :, 0] < num_experts
    one_hot = jnp.sum(jax.nn.one_hot(indices, num_experts), axis=2)  # invalid is E: a row of zeros

    def sample(key: Array) -> tuple[Array, Array]:
        rank = jnp.where(valid, jax.random.uniform(key, valid.shape), -1.0)
        chosen = jax.lax.top_k(rank, sample_tokens)[1]
        return one_hot[:, chosen].sum(axis=1), jnp.sum(valid[chosen], dtype=jnp.float32)

    counts, tokens = jax.lax.map(sample, keys)
    return selection_frequency(counts.swapaxes(0, 1), tokens[None, :], top_k)


@struct.dataclass
class BalancePrior:
    """Counts of what was seen before this forward pass: the buffer of 2501.11873, Algorithm 1. Starts at zero with
    every optimiser step (scope `ema` keeps one across steps); counts *and* token totals, so unequal micro-batches stay
    right."""

    counts: Array  # [L, E]
    tokens: Array  # [L]

    @classmethod
    def zeros(cls, num_layers: int, num_experts: int) -> BalancePrior:
        return cls(jnp.zeros((num_layers, num_experts)), jnp.zeros((num_layers,)))

    def add(self, stats: RoutingStats) -> BalancePrior:
        return BalancePrior(self.counts + stats.balance_counts.sum(axis=1), self.tokens + stats.tokens.sum(axis=1))

    def decayed(self, decay: float, step: BalancePrior) -> BalancePrior:
        """decay * self + step: f of scope `ema`, once per optimiser step. Its ratio needs no bias correction."""
        return jax.tree.map(lambda old, new: decay * old + new, self, step)


def scoped_balance_loss(
    stats: RoutingStats,
    scope: BalanceScope,
    *,
    top_k: int,
    total_tokens: Array | float,
    group_size: int = 1,
    prior: BalancePrior | None = None,
    frequency: Array | None = None,
) -> Array:
    """This forward pass' share of the balance loss: summed over the accumulation steps it is the loss of the step.

    Args:
      stats: stacked over layers, [L, B, ...].
      scope: `sequence`, `microbatch` and `device` (f of `group_size` consecutive sequences: a micro-batch, or what one
        device holds of this pass), `global_prefix` (f of all tokens up to and including this pass; needs `prior`),
        `global_exact` (f of all tokens of the step: of this pass alone when there is one, else given as `frequency`
        [L, 1, E]), `ema` (`frequency` [L, 1, E] of the steps before), `shuffle_micro` (`frequency` [L, G, E]), `none`.
      total_tokens: valid tokens of the whole optimiser step.

    Raises:
      ValueError: for an unknown scope, or a scope whose `prior` or `frequency` is missing.
    """
    require(scope in get_args(BalanceScope), "balance.scope", scope, f"one of {', '.join(get_args(BalanceScope))}")
    if scope == "none":
        return jnp.float32(0.0)
    if scope in ("sequence", "microbatch", "device", "shuffle_micro"):
        size = 1 if scope == "sequence" else group_size
        prob_sums = group_sum(stats.prob_sums, size)
        if scope == "shuffle_micro":
            require(frequency is not None, "frequency", None, "the sampled frequency [L, G, E] for scope shuffle_micro")
        else:
            counts, tokens = group_sum(stats.balance_counts, size), group_sum(stats.tokens, size)
            frequency = selection_frequency(counts, tokens, top_k)
    else:
        prob_sums = stats.prob_sums.sum(axis=1, keepdims=True)
        if scope == "global_prefix":
            require(prior is not None, "prior", None, "the counts so far (BalancePrior) for scope global_prefix")
        if scope == "ema":
            require(frequency is not None, "frequency", None, "f of the steps before, [L, 1, E], for scope ema")
        if frequency is None:
            zero = BalancePrior(jnp.zeros_like(stats.counts[:, 0]), jnp.zeros_like(stats.tokens[:, 0]))
            seen = (prior or zero).add(stats)
            frequency = selection_frequency(seen.counts, seen.tokens, top_k)[:, None]
    assert frequency is not None
    return balance_loss(frequency, prob_sums, total_tokens)


def z_loss(stats: RoutingStats, total_tokens: Array | float) -> Array:
    """Mean over tokens and layers of logsumexp(logits)^2; (log E)^2 at zero logits (ST-MoE 2202.08906, Eq. 5)."""
    return jnp.sum(stats.z_sums) / (stats.z_sums.shape[0] * jnp.maximum(total_tokens, 1.0))


def importance_loss(stats: RoutingStats, group_size: int, total_tokens: Array | float) -> Array:
    """Squared coefficient of variation of sum_t p_t over experts, per group of sequences, weighted by their tokens.

    Shazeer et al. 1701.06538, Eq. 6-7, with their CV of the batch at hand: the group is the batch it speaks of.
    """
    sums, tokens = group_sum(stats.prob_sums, group_size), group_sum(stats.tokens, group_size)
    return jnp.sum(tokens * squared_variation(sums)) / (sums.shape[0] * jnp.maximum(total_tokens, 1.0))


def squared_variation(x: Array) -> Array:
    """var(x) / mean(x)^2 over the last axis; zero where the mean is zero."""
    mean = jnp.mean(x, axis=-1)
    return jnp.var(x, axis=-1) / jnp.maximum(jnp.square(mean), 1e-10)


def device_stats(stats: RoutingStats, devices: int) -> RoutingStats:
    """The statistics of D = `devices` equal groups of consecutive experts: their balance loss is DeepSeek-V2's
    device-level one (2405.04434, Eqs. 26-28; uniform routing gives 1)."""
    num_experts = stats.counts.shape[-1]
    require(devices >= 1 and num_experts % devices == 0, "balance.devices", devices, f"a divisor of {num_experts}")
    grouped = lambda x: x.reshape(*x.shape[:-1], devices, num_experts // devices).sum(axis=-1)  # noqa: E731
    counts = grouped(stats.counts)
    return replace(
        stats, counts=counts, balance_counts=grouped(stats.balance_counts), prob_sums=grouped(stats.prob_sums)
    )


def communication_stats(stats: RoutingStats, devices: int) -> RoutingStats:
    """As `device_stats`, but a token counts once for every device it is sent to: DeepSeek-V2's communication loss
    (2405.04434, Eqs. 29-31) is its balance loss with M, the devices a token may reach, for k."""
    grouped, local = device_stats(stats, devices), stats.counts.shape[-1] // devices
    sent = jnp.any(jax.nn.one_hot(stats.indices // local, devices, dtype=bool), axis=-2)  # invalid is E: no device
    counts = jnp.sum(sent, axis=-2, dtype=jnp.float32)
    return replace(grouped, counts=counts, balance_counts=counts)
