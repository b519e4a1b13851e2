"""Random experts: the control that shows what a choice is worth. A benchmark control, from no paper.

    training     I_t = a uniform k-subset, drawn anew for every token, layer and step,   w = 1 / k
    evaluation   I_t = a fixed uniform k-subset of the token id (one draw per id, the same in every layer)

The fixed draw sees the token id alone. A place in the array would tie a token's loss to the batch around it: to its
other sequences, their order and their padding. So counts at evaluation are as uneven as the ids are. `probs` is the
distribution drawn from, 1 / E: the balance loss is exactly 1, without gradient.
Legend: T tokens, E experts, k active.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from moe.config import require
from moe.routing import RouterOutput, at_least_float32, token_choice, top_k_indices


@dataclass(frozen=True)
class Random:
    """See the module; `seed` is that of the draw at evaluation."""

    num_experts: int
    top_k: int
    seed: int

    def init_state(self) -> dict:
        return {}

    def __call__(
        self, x: Array, logits: Array, token_ids: Array, router_state: dict, key: Array | None
    ) -> tuple[RouterOutput, dict[str, Array]]:
        del x, router_state
        logits = at_least_float32(logits)
        if key is None:
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(self.seed), token_ids)
            scores = jax.vmap(lambda k: jax.random.uniform(k, (self.num_experts,)))(keys)
        else:
            scores = jax.random.uniform(jax.random.fold_in(key, 1), logits.shape)
        indices = top_k_indices(scores, self.top_k)
        weights = jnp.full(indices.shape, 1 / self.top_k, jnp.float32)
        return token_choice(jnp.full_like(logits, 1 / self.num_experts), logits, indices, weights), {}


def make(num_experts: int, top_k: int, seed: int = 0) -> Random:
    """Raises ValueError unless 1 <= top_k <= num_experts and seed >= 0."""
    require(1 <= top_k <= num_experts, "moe.top_k", top_k, f"1 <= top_k <= num_experts = {num_experts}")
    require(seed >= 0, "moe.router seed", seed, "0 or a positive integer")
    return Random(num_experts, top_k, seed)
