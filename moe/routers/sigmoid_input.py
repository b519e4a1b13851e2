"""Top-k of the logits, each chosen one's sigmoid on its expert's *input*: the router of Llama 4 (k = 1 there).

    I = top-k(z),  w_i = sigmoid(z_i),  out = sum_I FFN_i(w_i x)               z = x W_r

Source: the released model code (meta-llama/llama-models, `llama4/moe.py`); there is no report. Sigmoids keep a gradient
to the router at k = 1. The balance loss averages softmax(z), our choice: the release says nothing of one.
Legend: T tokens, E experts, k active, d hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from moe.config import require
from moe.routing import RouterOutput, at_least_float32, token_choice, top_k_indices


@dataclass(frozen=True)
class SigmoidInput:
    """See the module; no state, nothing drawn."""

    num_experts: int
    top_k: int

    def init_state(self) -> dict:
        return {}

    def __call__(
        self, x: Array, logits: Array, token_ids: Array, router_state: dict, key: Array | None
    ) -> tuple[RouterOutput, dict[str, Array]]:
        del x, token_ids, router_state, key
        logits = at_least_float32(logits)
        indices = top_k_indices(logits, self.top_k)
        weights = jax.nn.sigmoid(jnp.take_along_axis(logits, indices, axis=-1))
        return token_choice(jax.nn.softmax(logits, axis=-1), logits, indices, weights, scale_on="input"), {}


def make(num_experts: int, top_k: int) -> SigmoidInput:
    """Raises ValueError unless 1 <= top_k <= num_experts."""
    require(1 <= top_k <= num_experts, "moe.top_k", top_k, f"1 <= top_k <= num_experts = {num_experts}")
    return SigmoidInput(num_experts, top_k)
