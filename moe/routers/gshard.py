"""GShard: two experts per token, the second one at random in training.

    p = softmax(x' W_r),  g1 >= g2 its two largest,  w1 = g1 / (g1 + g2),  w2 = g2 / (g1 + g2)           (2006.16668)
    in training the second is kept with probability min(1, 2 w2);  x' as in `moe.routers.switch`

Algorithm 1 normalises first and draws then, as Lingvo's default does: the draw sees w2, and w1 stays g1 / (g1 + g2)
when the second is not kept (w1 + w2 < 1 in effect). Other codes differ: HF NLLB draws with the raw g2, Lingvo's
`legacy_mtf_behavior=False` divides by what is left after drops. Capacity is a token policy.

ST-MoE (2202.08906) is not this router: top-2 with the probabilities as they are is `softmax_topk(renormalize=False)`.
Legend: T tokens, E experts, d hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from moe.config import require
from moe.routers.switch import jittered
from moe.routing import RouterOutput, at_least_float32, token_choice, top_k_indices


@dataclass(frozen=True)
class GShard:
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
        del x, token_ids, router_state
        logits = at_least_float32(logits)
        probs = jax.nn.softmax(logits, axis=-1)
        indices = top_k_indices(probs, 2)
        weights = jnp.take_along_axis(probs, indices, axis=-1)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        valid = jnp.ones(indices.shape, bool)
        if key is not None:
            # fold_in(key, 0) is the layer's, for `router_input`.
            draw = jax.random.uniform(jax.random.fold_in(key, 1), weights.shape[:1])
            valid = valid.at[:, 1].set(draw < 2 * weights[:, 1])
        return token_choice(probs, logits, indices, weights, valid), {}


def make(num_experts: int, top_k: int, jitter: float = 0.0) -> GShard:
    """Raises ValueError unless top_k = 2 <= num_experts and 0 <= jitter < 1."""
    require(top_k == 2, "moe.top_k", top_k, "2 (GShard sends a token to two experts)")
    require(num_experts >= 2, "moe.num_experts", num_experts, "at least top_k = 2")
    require(0 <= jitter < 1, "moe.router jitter", jitter, "0 (none) <= jitter < 1")
    return GShard(num_experts, jitter)
