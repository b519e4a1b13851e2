"""Softmax over the kept logits, which have a learned bias: the router of gpt-oss (2508.10925).

    z' = x W_r + b,  I = top-k(z'),  w = softmax(z'_I)

b is a trained parameter and part of the weights, unlike the selection bias of `group_limited`: as of any renormalised
softmax, k = 1 gives weight 1 and no gradient. The z-loss sees z', and the balance loss softmax(z').
Legend: T tokens, E experts, k active, d hidden.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from moe.config import require
from moe.routing import RouterOutput, at_least_float32, token_choice, top_k_indices


def route(logits: Array, bias: Array, top_k: int) -> RouterOutput:
    """The module's equation: logits [T, E] without the bias, bias [E]."""
    logits = at_least_float32(logits) + bias[None]
    indices = top_k_indices(logits, top_k)
    weights = jax.nn.softmax(jnp.take_along_axis(logits, indices, axis=-1), axis=-1)
    return token_choice(jax.nn.softmax(logits, axis=-1), logits, indices, weights)


class LearnedBias(nn.Module):
    """Holds `bias` [E] float32, zero at first; see the module."""

    num_experts: int
    top_k: int

    def init_state(self) -> dict:
        return {}

    @nn.compact
    def __call__(
        self, x: Array, logits: Array, token_ids: Array, router_state: dict, key: Array | None
    ) -> tuple[RouterOutput, dict[str, Array]]:
        del x, token_ids, router_state, key
        bias = self.param("bias", nn.initializers.zeros, (self.num_experts,))
        return route(logits, bias, self.top_k), {}


def make(num_experts: int, top_k: int) -> LearnedBias:
    """Its parameter is `gate/bias` of the layer. Raises ValueError unless 1 <= top_k <= num_experts."""
    require(1 <= top_k <= num_experts, "moe.top_k", top_k, f"1 <= top_k <= num_experts = {num_experts}")
    return LearnedBias(num_experts, top_k, name="gate")
