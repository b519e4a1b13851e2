"""Noisy top-k gating, the router of the sparsely-gated mixture of experts.

    H = z + N(0, 1) * softplus(x W_noise),  I = top-k(H),  w = softmax(H_I)         z = x W_r     (1701.06538, Eqs. 3-5)
    P_ti = Phi((z_ti - kth_excluding(H_t, k, i)) / softplus(x_t W_noise)_i)                          (Eqs. 8-9)
    load_i = sum_t P_ti,   L_load = load_weight * CV(load)^2                                         (Eqs. 10-11)

P_ti is the chance that expert i is chosen if its noise alone is drawn again; kth_excluding(H, k, i) is the k-th
largest of H without H_i. It is smooth in z and W_noise: the load has the gradient that a count has not. The CV is that
of the valid tokens of one call (a micro-batch). With k = E every P_ti is 1 and the load is balanced. The paper starts
W_r and W_noise at zero, so that all experts begin alike; here W_noise does. `probs` is softmax(z), and
`losses.importance_loss` sums that where the paper's importance sums w. At evaluation: no noise, no loss.
Legend: T tokens, E experts, k active, d hidden.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from moe.config import require
from moe.losses import squared_variation
from moe.routing import RouterOutput, at_least_float32, token_choice, top_k_indices


def chosen_probability(logits: Array, noisy: Array, scale: Array, k: int) -> Array:
    """P of the module's Eq. 8-9: the chance of a place among the top k; logits, noisy H, scale [T, E] -> [T, E]."""
    num_experts = logits.shape[-1]
    if k == num_experts:
        return jnp.ones_like(logits)
    values, indices = jax.lax.top_k(noisy, k + 1)
    inside = jnp.any(jax.nn.one_hot(indices[:, :k], num_experts, dtype=bool), axis=1)
    threshold = jnp.where(inside, values[:, k:], values[:, k - 1 : k])
    return jax.scipy.stats.norm.cdf((logits - threshold) / jnp.maximum(scale, 1e-10))


class NoisyTopK(nn.Module):
    """See the module; its one parameter is W_noise, `noise` [d, E]."""

    num_experts: int
    top_k: int
    load_weight: float

    def init_state(self) -> dict:
        return {}

    @nn.compact
    def __call__(
        self, x: Array, logits: Array, token_ids: Array, router_state: dict, key: Array | None
    ) -> tuple[RouterOutput, dict[str, Array]]:
        del router_state
        noise_weight = self.param("noise", nn.initializers.zeros, (x.shape[-1], self.num_experts))
        noisy = logits = at_least_float32(logits)
        losses = {}
        if key is not None:
            scale = jax.nn.softplus(jnp.dot(x.astype(jnp.float32), noise_weight, precision="float32"))
            noisy = logits + jax.random.normal(jax.random.fold_in(key, 1), logits.shape) * scale
            if self.load_weight:
                token_valid = (token_ids >= 0).astype(jnp.float32)
                load = token_valid @ chosen_probability(logits, noisy, scale, self.top_k)
                losses["load"] = self.load_weight * jnp.sum(token_valid) * squared_variation(load)
        indices = top_k_indices(noisy, self.top_k)
        weights = jax.nn.softmax(jnp.take_along_axis(noisy, indices, axis=-1), axis=-1)
        return token_choice(jax.nn.softmax(logits, axis=-1), logits, indices, weights), losses


def make(num_experts: int, top_k: int, load_weight: float = 0.0) -> NoisyTopK:
    """Raises ValueError unless 1 <= top_k <= num_experts and load_weight is finite and not negative (paper: 0.1)."""
    require(1 <= top_k <= num_experts, "moe.top_k", top_k, f"1 <= top_k <= num_experts = {num_experts}")
    require(0 <= load_weight < math.inf, "moe.router load_weight", load_weight, "0 (none) or a finite positive number")
    return NoisyTopK(num_experts, top_k, load_weight, name="gate")
