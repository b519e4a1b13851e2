"""Softmax top-k token choice, the router of Mixtral, OLMoE, Qwen and of the global-batch balance study.

    s = softmax(x W_r),  I = top-k(s),  w_i = s_i              (OLMoE 2409.02060, Qwen2-MoE)
                                        w_i = s_i / sum_I s    (Mixtral 2401.04088, Qwen3-MoE; renormalize=True)

Trap: renormalised with k = 1 gives weight 1, so the task loss sends no gradient to the router.
Legend: T tokens, E experts, k active, d hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from moe.config import require
from moe.routing import RouterOutput, at_least_float32, fused_top_k, token_choice, top_k_indices


@dataclass(frozen=True)
class SoftmaxTopK:
    """See the module; `renormalize` divides the kept probabilities by their sum, `fused` runs one kernel on GPU."""

    num_experts: int
    top_k: int
    renormalize: bool = True
    fused: bool = False

    def init_state(self) -> dict:
        return {}

    def __call__(
        self, x: Array, logits: Array, token_ids: Array, router_state: dict, key: Array | None
    ) -> tuple[RouterOutput, dict[str, Array]]:
        del x, token_ids, router_state, key
        logits = at_least_float32(logits)
        if self.fused:
            indices, weights, probs = fused_top_k(logits, self.top_k, renormalize=self.renormalize)
            return token_choice(jnp.asarray(probs), logits, indices, weights), {}
        probs = jax.nn.softmax(logits, axis=-1)
        indices = top_k_indices(probs, self.top_k)
        weights = jnp.take_along_axis(probs, indices, axis=-1)
        if self.renormalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return token_choice(probs, logits, indices, weights), {}


def make(num_experts: int, top_k: int, renormalize: bool = True, fused: bool = False) -> SoftmaxTopK:
    """Raises ValueError unless 1 <= top_k <= num_experts."""
    require(1 <= top_k <= num_experts, "moe.top_k", top_k, f"1 <= top_k <= num_experts = {num_experts}")
    return SoftmaxTopK(num_experts, top_k, renormalize, fused)
