"""Switch: one expert per token, weighed by its own probability.

    p = softmax(x' W_r),  i = argmax p,  w = p_i,  x' = x * U(1 - eps, 1 + eps) elementwise in training    (2101.03961)

w is not renormalised: dividing by itself would leave the task loss no gradient to the router. The jitter belongs to the
router's input, which only the layer multiplies by W_r: the layer applies `router_input` to x before the logits, in
training; the experts see x as it is. The paper uses eps = 1e-2, a capacity factor and a tenth of the usual init scale.
Legend: T tokens, E experts, d hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from moe.config import require
from moe.routing import RouterOutput, at_least_float32, token_choice, top_k_indices


def jittered(x: Array, key: Array, jitter: float) -> Array:
    """x * U(1 - jitter, 1 + jitter), a draw per element: [T, d] -> [T, d] float32; jitter = 0 draws nothing."""
    x = x.astype(jnp.float32)
    return x * jax.random.uniform(key, x.shape, minval=1.0 - jitter, maxval=1.0 + jitter) if jitter else x


@dataclass(frozen=True)
class Switch:
    """See the module; `jitter` is eps."""

    num_experts: int
    jitter: float

    def init_state(self) -> dict:
        return {}

    def router_input(self, x: Array, key: Array) -> Array:
        """The router's input in training, [T, d] -> [T, d] float32."""
        return jittered(x, key, self.jitter)

    def __call__(
        self, x: Array, logits: Array, token_ids: Array, router_state: dict, key: Array | None
    ) -> tuple[RouterOutput, dict[str, Array]]:
        del x, token_ids, router_state, key
        logits = at_least_float32(logits)
        probs = jax.nn.softmax(logits, axis=-1)
        indices = top_k_indices(probs, 1)
        return token_choice(probs, logits, indices, jnp.take_along_axis(probs, indices, axis=-1)), {}


def make(num_experts: int, top_k: int, jitter: float = 0.0) -> Switch:
    """Raises ValueError unless top_k = 1 and 0 <= jitter < 1."""
    require(top_k == 1, "moe.top_k", top_k, "1 (Switch sends a token to one expert)")
    require(0 <= jitter < 1, "moe.router jitter", jitter, "0 (none) <= jitter < 1")
    return Switch(num_experts, jitter)
