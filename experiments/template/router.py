"""Softmax top-k at a temperature: a router of your own, to change.

    s = softmax(l / tau),  I = top-k(s),  w_i = s_i / sum_I s            l = x W_r, from the layer

`probs` is what the balance loss averages, so it is the sharpened s; `logits` stay as they came, for the z-loss.
Legend: T tokens, E experts, k active, d hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from moe.config import require
from moe.routing import RouterOutput, expert_counts, top_k_indices


@dataclass(frozen=True)
class TemperatureTopK:
    """A pure function of its inputs, in float32; what moves between steps belongs in `init_state`."""

    num_experts: int
    top_k: int
    temperature: float

    def init_state(self) -> dict:
        return {}

    def __call__(
        self, x: Array, logits: Array, token_ids: Array, router_state: dict, key: Array | None
    ) -> tuple[RouterOutput, dict[str, Array]]:
        """x [T, d], logits [T, E], token_ids [T] -> (who goes where, own losses by name as sums over tokens)."""
        del x, token_ids, router_state, key
        logits = logits.astype(jnp.float32)
        probs = jax.nn.softmax(logits / self.temperature, axis=-1)
        indices = top_k_indices(probs, self.top_k)
        weights = jnp.take_along_axis(probs, indices, axis=-1)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        valid = jnp.ones(indices.shape, bool)
        return RouterOutput(indices, weights, valid, probs, logits, expert_counts(indices, valid, self.num_experts)), {}


def make(num_experts: int, top_k: int, temperature: float = 0.25) -> TemperatureTopK:
    """What `--router experiments.template.router:make` calls; ValueError for a temperature that is not positive."""
    require(temperature > 0, "temperature", temperature, "above 0")
    return TemperatureTopK(num_experts, top_k, temperature)
