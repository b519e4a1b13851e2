"""Auxiliary-loss-free balancing: a bias that only takes part in the choice, moved by past loads (2408.15664).

    I = top-k of s + b (groups as in `group_limited`),  w_i = s_i;   after the step, with loads c and L = mean c:

    sign          b_i <- b_i + u sign(L - c_i)                          (2408.15664, DeepSeek-V3 2412.19437)
    proportional  b_i <- b_i + u (L - c_i) / L                          (2408.15664's variant; u in the sign's unit)
    quantile      b_i <- (b_i - q_i) / 2,  q_i = the (1 - k/E) quantile over tokens of s_ti - theta_ti  (2607.24653)

theta_ti is what expert i must beat at token t: the k-th largest of the others' s + b. Moving all experts to their
quantile at once overshoots (for E = 2 it swings for ever), hence halfway [reconstructed]. Subtracting the mean of b
changes no choice; it is done after every update. The pool over which c is counted matters more than the rule: `global`
is the whole optimiser step, `local` averages the updates that every micro-batch alone would ask for. With softmax
scores, of size 1 / E, a step u is some E / 4 times coarser than with sigmoid ones.

Legend: L layers, G micro-batches, T tokens, E experts, k active, H bins, d hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from moe.config import require
from moe.routers.group_limited import GroupLimited
from moe.routers.group_limited import make as make_group_limited
from moe.routing import RouterOutput

Rule = Literal["sign", "proportional", "quantile"]
Pool = Literal["global", "local"]
BINS, REACH = 1024, 2.0  # margins of sigmoid scores with |b| < 1/2 lie within (-2, 2)


def load_error(counts: Array, rule: Rule) -> Array:
    """The direction of the bias: sign(L - c) or (L - c) / L; counts [..., E] -> [..., E]."""
    mean = jnp.mean(counts, axis=-1, keepdims=True)
    return jnp.sign(mean - counts) if rule == "sign" else (mean - counts) / jnp.maximum(mean, 1e-9)


def margins(biased: Array, scores: Array, top_k: int) -> Array:
    """s_ti - theta_ti [T, E] from biased scores s + b and scores s [T, E]; -inf thresholds give +inf (k = E)."""
    num_experts = biased.shape[-1]
    best = jax.lax.top_k(biased, min(top_k + 1, num_experts))[0]
    kth = best[:, top_k - 1 : top_k]
    following = best[:, top_k:] if top_k < num_experts else jnp.full_like(kth, -jnp.inf)
    return scores - jnp.where(biased >= kth, following, kth)


def histogram(values: Array, valid: Array) -> Array:
    """How many of values [T, E] of valid tokens [T] fall into each of H bins of [-2, 2], outliers in the last ones."""
    place = jnp.clip((values + REACH) / (2 * REACH) * BINS, 0, BINS - 1).astype(jnp.int32)
    place = jnp.where(valid[:, None], place, BINS)
    expert = jnp.arange(values.shape[1])
    return jnp.zeros((values.shape[1], BINS), jnp.float32).at[expert, place].add(1.0, mode="drop")


def quantile(counted: Array, share: float) -> Array:
    """The `share` quantile of histograms [..., H], linear within a bin: [...]; exact to a bin's width, 1 / 256."""
    total = jnp.cumsum(counted, axis=-1)
    wanted = share * total[..., -1:]
    place = jnp.minimum(jnp.sum(total < wanted, axis=-1, keepdims=True), BINS - 1)
    inside = jnp.take_along_axis(counted, place, axis=-1)
    before = jnp.take_along_axis(total, place, axis=-1) - inside
    within = (wanted - before) / jnp.maximum(inside, 1.0)
    return ((place + within) / BINS * 2 * REACH - REACH)[..., 0]


@dataclass(frozen=True)
class LossFree(GroupLimited):
    """See the module; the state is the bias, [E] per layer, and the number of updates made."""

    step_size: float = 1e-3
    rule: Rule = "sign"
    pool: Pool = "global"
    updates: int = 0

    def init_state(self) -> dict[str, Array]:
        return super().init_state() | {"updates": jnp.int32(0)}

    def __call__(
        self, x: Array, logits: Array, token_ids: Array, router_state: dict[str, Array], key: Array | None
    ) -> tuple[RouterOutput, dict[str, Array]]:
        routing, losses = super().__call__(x, logits, token_ids, router_state, key)
        if self.rule != "quantile":
            return routing, losses
        scores = jax.lax.stop_gradient(jax.nn.sigmoid(routing.logits))
        of = margins(scores + router_state["bias"][None], scores, self.top_k)
        return replace(routing, observed=histogram(of, token_ids >= 0)), losses

    def update(self, state: dict[str, Array], counts: Array, observed: Any) -> dict[str, Array]:
        """counts [L, G, E] of the step's micro-batches; observed [L, E, H] for the quantile rule."""
        bias = state["bias"]
        if self.rule == "quantile":
            new = (bias - quantile(observed, 1.0 - self.top_k / self.num_experts)) / 2.0
        elif self.pool == "local":
            new = bias + self.step_size * jnp.mean(load_error(counts, self.rule), axis=1)
        else:
            new = bias + self.step_size * load_error(counts.sum(axis=1), self.rule)
        new = new - jnp.mean(new, axis=-1, keepdims=True)
        going_on = (self.updates == 0) | (state["updates"][:, None] < self.updates)
        return {"bias": jnp.where(going_on, new, bias), "updates": state["updates"] + 1}


def make(
    num_experts: int,
    top_k: int,
    step_size: float = 1e-3,
    rule: Rule = "sign",
    pool: Pool = "global",
    updates: int = 0,
    **options: Any,
) -> LossFree:
    """`options` are those of `group_limited` (score="sigmoid" unless given); `updates` freezes the bias after that many
    steps (0: never).

    Raises:
      ValueError: options out of range; u must be a positive number, a quantile needs sigmoid scores, global counts and
        one group.
    """
    require(0 < step_size < 1, "moe.router step_size", step_size, "above 0 and below 1")
    require(rule in get_args(Rule), "moe.router rule", rule, f"one of {', '.join(get_args(Rule))}")
    require(pool in get_args(Pool), "moe.router pool", pool, f"one of {', '.join(get_args(Pool))}")
    require(updates >= 0, "moe.router updates", updates, "0 (never stop) or a number of steps")
    require("selection_bias" not in options, "moe.router selection_bias", True, "no such option: it is always there")
    base = make_group_limited(num_experts, top_k, **({"score": "sigmoid", "selection_bias": True} | options))
    if rule == "quantile":
        plain = base.score == "sigmoid" and base.groups == 1 and pool == "global" and top_k < num_experts
        require(plain, "moe.router rule", rule, "sigmoid scores, one group, pool='global' and k < E")
    return LossFree(**vars(base), step_size=step_size, rule=rule, pool=pool, updates=updates)
