"""Feed-forward layers: a dense SwiGLU and the mixture of experts. Thin Linen holders around pure functions.

Legend: B sequences, S positions, T = B * S tokens, d hidden, f width, E experts.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from kernels.grouped_ffn import is_gated
from moe.config import MoEConfig, require
from moe.dispatch import ExpertParams, dispatch, make_dispatcher
from moe.lora.config import FEED_FORWARD, AdapterConfig
from moe.lora.dense import Adaptation, Context
from moe.lora.feed_forward import adapted_feed_forward
from moe.losses import RoutingStats, routing_stats
from moe.policies import make_policy
from moe.routing import Router, drop_padding, make_router


def swiglu(
    x: Array, gate_up: Array, down: Array, gate_up_bias: Array | None = None, down_bias: Array | None = None
) -> Array:
    """(silu(x W_gate) * (x W_up)) W_down with gate_up [d, 2f] holding both: [..., d] -> [..., d] (2002.05202); biases
    [2f] and [d] after the products."""
    both = x @ gate_up
    both = both if gate_up_bias is None else both + jnp.expand_dims(gate_up_bias, range(both.ndim - 1))
    gate, up = jnp.split(both, 2, axis=-1)
    out = (jax.nn.silu(gate) * up) @ down
    return out if down_bias is None else out + jnp.expand_dims(down_bias, range(out.ndim - 1))


class DenseFFN(nn.Module):
    """SwiGLU feed-forward of width `ffn_dim`; [..., d] -> [..., d] in the input's dtype, adapted where `adapters` says,
    and the statistics of their routers by site."""

    ffn_dim: int
    init_std: float
    out_std: float
    bias: bool = False
    adapters: AdapterConfig | None = None

    @nn.compact
    def __call__(self, x: Array, context: Context | None = None) -> tuple[Array, dict[str, RoutingStats]]:
        d = x.shape[-1]
        gate_up = self.param("gate_up", nn.initializers.truncated_normal(self.init_std), (d, 2 * self.ffn_dim))
        down = self.param("down", nn.initializers.truncated_normal(self.out_std), (self.ffn_dim, d))
        weights = gate_up.astype(x.dtype), down.astype(x.dtype)
        biases = ()
        if self.bias:
            gate_up_bias = self.param("gate_up_bias", nn.initializers.zeros, (2 * self.ffn_dim,))
            down_bias = self.param("down_bias", nn.initializers.zeros, (d,))
            biases = gate_up_bias.astype(x.dtype), down_bias.astype(x.dtype)
        adapt = Adaptation(self.adapters, context)
        if not any(adapt.has(target) for target in FEED_FORWARD):
            return swiglu(x, *weights, *biases), {}
        return adapted_feed_forward(adapt, x, *weights, *biases), adapt.stats


class Experts(nn.Module):
    """Holds the routed experts' weights and, where they have them, biases; see `ExpertParams`."""

    config: MoEConfig
    hidden: int
    init_std: float
    out_std: float

    @nn.compact
    def __call__(self, dtype: Any) -> ExpertParams:
        cfg, e, d, f = self.config, self.config.num_experts, self.hidden, self.config.expert_dim
        width = 2 * f if is_gated(cfg.activation) else f
        normal = nn.initializers.truncated_normal
        gate_up = self.param("gate_up", normal(self.init_std), (e, d, width))
        down = self.param("down", normal(self.out_std), (e, f, d))
        params = ExpertParams(gate_up.astype(dtype), down.astype(dtype))
        if not cfg.expert_bias:
            return params
        gate_up_bias = self.param("gate_up_bias", nn.initializers.zeros, (e, width))
        down_bias = self.param("down_bias", nn.initializers.zeros, (e, d))
        return params._replace(gate_up_bias=gate_up_bias.astype(dtype), down_bias=down_bias.astype(dtype))


class SharedExpert(nn.Module):
    """The SwiGLU every token passes; scaled by sigmoid(x w) where `shared_gate` asks for it (Qwen2-MoE)."""

    config: MoEConfig
    init_std: float
    out_std: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        out, _ = DenseFFN(self.config.shared_dim, self.init_std, self.out_std, name="ffn")(x)
        if not self.config.shared_gate:
            return out
        gate = self.param("gate", nn.initializers.truncated_normal(self.init_std), (x.shape[-1], 1))
        return jax.nn.sigmoid(x @ gate.astype(x.dtype)) * out


def require_state(router: Router, state: Any) -> None:
    """ValueError unless `state` has the leaves and shapes of `router.init_state()`: a bias of one number, or of another
    layer stacked on top, would broadcast in silence."""
    shapes = lambda tree: {  # noqa: E731
        f"router_state {jax.tree_util.keystr(path, simple=True, separator='.')}.shape": jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    got, wanted = shapes(state), shapes(router.init_state())
    for name in wanted | got:
        require(got.get(name) == wanted.get(name), name, got.get(name), str(wanted.get(name)))


class MoELayer(nn.Module):
    """1. logits = x W_r in float32; 2. the router chooses and weighs; 3. padding is dropped, and what the token policy
    drops; 4. the dispatcher runs the experts; 5. the shared expert, which needs none of this, is added. Balance losses
    leave as `RoutingStats`, by return value.
    """

    config: MoEConfig
    init_std: float
    out_std: float

    @nn.compact
    def __call__(
        self, x: Array, token_valid: Array, token_ids: Array, router_state: Any, key: Array | None
    ) -> tuple[Array, RoutingStats]:
        """x [B, S, d], token_valid [B, S] bool, token_ids [B, S], key None at evaluation -> ([B, S, d], stats)."""
        b, s, d = x.shape
        cfg = self.config
        router_weight = self.param("router", nn.initializers.truncated_normal(self.init_std), (d, cfg.num_experts))
        experts = Experts(cfg, d, self.init_std, self.out_std, name="experts")(x.dtype)

        flat = x.reshape(b * s, d)
        router = make_router(cfg)
        require_state(router, router_state)
        router_input = getattr(router, "router_input", None)
        seen = flat.astype(jnp.float32)
        seen = seen if key is None or router_input is None else router_input(seen, jax.random.fold_in(key, 0))
        logits = jnp.dot(seen, router_weight, precision="float32")
        ids = jnp.where(token_valid, token_ids, -1).reshape(-1)
        routing, losses = router(flat, logits, ids, router_state, key)
        routing = drop_padding(routing, token_valid.reshape(-1))
        kept = make_policy(cfg)(routing, num_sequences=b, training=key is not None)
        out = dispatch(flat, kept, experts, make_dispatcher(cfg)).reshape(b, s, d)
        if cfg.shared_dim:
            out = out + SharedExpert(cfg, self.init_std, self.out_std, name="shared")(x)
        return out, routing_stats(routing, token_valid, losses, kept=kept.valid)
