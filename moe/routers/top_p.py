"""Top-p token choice: the smallest set of experts whose probabilities sum to more than p (2403.07652).

    s = softmax(x W_r),  I = the first experts by s until their sum exceeds p,  w_i = s_i (over their sum, renormalized)
    entropy loss = c sum_t -sum_i s_ti log s_ti

The number of experts varies by token, so K = max_k (E by default) slots of which only the first are valid; the entropy
loss keeps routers from spreading their probability to use more of them. Legend: T tokens, E experts, K slots, d hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from moe.config import require
from moe.routing import RouterOutput, at_least_float32, token_choice, top_k_indices


@dataclass(frozen=True)
class TopP:
    """See the module; at least one expert is always chosen."""

    num_experts: int
    p: float
    max_k: int
    renormalize: bool
    entropy_weight: float

    def init_state(self) -> dict:
        return {}

    def __call__(
        self, x: Array, logits: Array, token_ids: Array, router_state: dict, key: Array | None
    ) -> tuple[RouterOutput, dict[str, Array]]:
        del x, router_state, key
        logits = at_least_float32(logits)
        probs = jax.nn.softmax(logits, axis=-1)
        indices = top_k_indices(probs, self.max_k)
        weights = jnp.take_along_axis(probs, indices, axis=-1)
        before = jnp.cumsum(weights, axis=-1) - weights
        valid = jax.lax.stop_gradient(before) <= self.p
        if self.renormalize:
            weights = weights / jnp.sum(weights * valid, axis=-1, keepdims=True)
        losses = {}
        if self.entropy_weight:
            entropy = -jnp.sum(probs * jax.nn.log_softmax(logits, axis=-1), axis=-1)
            losses["entropy"] = self.entropy_weight * jnp.sum(jnp.where(token_ids >= 0, entropy, 0.0))
        return token_choice(probs, logits, indices, weights, valid), losses


def make(
    num_experts: int,
    top_k: int,
    p: float = 0.4,
    max_k: int | None = None,
    renormalize: bool = False,
    entropy_weight: float = 0.0,
) -> TopP:
    """`top_k` does not limit the choice (`max_k` does): it only sets what the balance loss calls balanced.

    Raises:
      ValueError: unless 0 <= p < 1, 1 <= max_k <= num_experts, entropy_weight >= 0.
    """
    del top_k
    most = num_experts if max_k is None else max_k
    require(0.0 <= p < 1.0, "moe.router p", p, "at least 0 and below 1")
    require(1 <= most <= num_experts, "moe.router max_k", max_k, f"1 to num_experts = {num_experts}")
    require(entropy_weight >= 0, "moe.router entropy_weight", entropy_weight, "0 or more")
    return TopP(num_experts, p, most, renormalize, entropy_weight)
