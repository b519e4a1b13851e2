"""Round robin: the content-free control with perfect balance. A benchmark control, from no paper.

    I_t = {(t k + j) mod E : j < k},   w = 1 / k          t the token's place in the array

The T k assignments spread over the experts to within 1 (padding takes its turn too, and is dropped). The choice moves
with the batch's layout: a tool for timing and for balance, not for comparing losses. `probs` is 1 / E.
Legend: T tokens, E experts, k active.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from moe.config import require
from moe.routing import RouterOutput, at_least_float32, token_choice


@dataclass(frozen=True)
class Uniform:
    """See the module."""

    num_experts: int
    top_k: int

    def init_state(self) -> dict:
        return {}

    def __call__(
        self, x: Array, logits: Array, token_ids: Array, router_state: dict, key: Array | None
    ) -> tuple[RouterOutput, dict[str, Array]]:
        del x, token_ids, router_state, key
        logits = at_least_float32(logits)
        shape = (logits.shape[0], self.top_k)
        indices = jnp.arange(shape[0] * shape[1], dtype=jnp.int32).reshape(shape) % self.num_experts
        weights = jnp.full(shape, 1 / self.top_k, jnp.float32)
        return token_choice(jnp.full_like(logits, 1 / self.num_experts), logits, indices, weights), {}


def make(num_experts: int, top_k: int) -> Uniform:
    """Raises ValueError unless 1 <= top_k <= num_experts."""
    require(1 <= top_k <= num_experts, "moe.top_k", top_k, f"1 <= top_k <= num_experts = {num_experts}")
    return Uniform(num_experts, top_k)
