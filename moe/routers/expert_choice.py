"""Expert choice: every expert takes its C most probable tokens (2202.09368).

    s = softmax(x W_r),  expert i takes the top C of s_1i .. s_Ti,  w_ti = s_ti,  C = ceil(factor T / E)

Balanced by construction; a token meets 0 to E experts. Not causal: whether a token is taken depends on all others of
the pass, so a decoder sees its future. `factor` is the mean number of experts per token, k unless given.
Legend: T tokens of the pass, E experts, C tokens per expert, d hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from moe.config import require
from moe.routing import RouterOutput, at_least_float32, token_choice


@dataclass(frozen=True)
class ExpertChoice:
    """See the module. K = E slots: slot i of a token is expert i."""

    num_experts: int
    factor: float
    causal = False

    def init_state(self) -> dict:
        return {}

    def __call__(
        self, x: Array, logits: Array, token_ids: Array, router_state: dict, key: Array | None
    ) -> tuple[RouterOutput, dict[str, Array]]:
        del x, router_state, key
        logits = at_least_float32(logits)
        probs = jax.nn.softmax(logits, axis=-1)
        num_tokens = logits.shape[0]
        taken = min(num_tokens, math.ceil(self.factor * num_tokens / self.num_experts))
        bids = jnp.where(token_ids[:, None] >= 0, jax.lax.stop_gradient(probs), -1.0)  # padding is nobody's choice
        chosen = jax.lax.top_k(bids.T, taken)[1]  # [E, C]
        expert = jnp.arange(self.num_experts, dtype=jnp.int32)
        valid = jnp.zeros(probs.shape, bool).at[chosen, expert[:, None]].set(True)
        return token_choice(probs, logits, jnp.broadcast_to(expert, probs.shape), probs, valid), {}


def make(num_experts: int, top_k: int, factor: float | None = None) -> ExpertChoice:
    """Raises ValueError unless 0 < factor <= num_experts."""
    factor = float(top_k) if factor is None else factor
    require(0 < factor <= num_experts, "moe.router factor", factor, f"above 0, at most num_experts = {num_experts}")
    return ExpertChoice(num_experts, factor)
