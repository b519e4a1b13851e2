"""ReMoE: experts are chosen by a ReLU, and how many is controlled by an L1 term (2412.14711).

    w = relu(x W_r),  I = {i : w_i > 0}
    L_reg = lambda E / (k T^2) sum_i c_i sum_t w_ti                     (Eqs. 6 and 9, load balancing included)
    after each step: lambda <- lambda * 1.2 if 1 - mean active / E < 1 - k / E, else lambda / 1.2;  lambda_0 = 1e-8

L_reg is the balance loss with probs = lambda w, in whatever scope the run names: train it with `balance.weight` 1.
lambda is one number for all layers, moved by their mean sparsity. K = E slots: slot i of a token is expert i.
Legend: L layers, T tokens, E experts, k experts per token aimed at, c_i assignments of expert i, d hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from moe.config import require
from moe.routing import RouterOutput, at_least_float32, token_choice


@dataclass(frozen=True)
class ReMoE:
    """See the module; the state is `lambda`, equal in all layers."""

    num_experts: int
    top_k: int
    start: float
    factor: float

    def init_state(self) -> dict[str, Array]:
        return {"lambda": jnp.float32(self.start)}

    def __call__(
        self, x: Array, logits: Array, token_ids: Array, router_state: dict[str, Array], key: Array | None
    ) -> tuple[RouterOutput, dict[str, Array]]:
        del x, key
        logits = at_least_float32(logits)
        weights = jax.nn.relu(logits)
        expert = jnp.arange(self.num_experts, dtype=jnp.int32)
        tokens = jnp.sum(token_ids >= 0, dtype=jnp.float32)
        probs = jax.lax.stop_gradient(router_state["lambda"]) * weights
        indices = jnp.broadcast_to(expert, logits.shape)
        return token_choice(probs, logits, indices, weights, logits > 0, observed=tokens), {}

    def update(self, state: dict[str, Array], counts: Array, observed: Array) -> dict[str, Array]:
        """counts [L, G, E], observed the tokens [L] of the step."""
        active = jnp.mean(counts.sum(axis=(1, 2)) / jnp.maximum(observed, 1.0))  # experts per token
        too_dense = active > self.top_k
        return {"lambda": state["lambda"] * jnp.where(too_dense, self.factor, 1.0 / self.factor)}


def make(num_experts: int, top_k: int, start: float = 1e-8, factor: float = 1.2) -> ReMoE:
    """Raises ValueError unless start > 0 and factor > 1."""
    require(start > 0, "moe.router start", start, "above 0")
    require(factor > 1, "moe.router factor", factor, "above 1")
    return ReMoE(num_experts, top_k, start, factor)
