"""Feed-forward layers: a dense SwiGLU and the mixture of experts. Thin Linen holders around pure functions.

Legend: B sequences, S positions, T = B * S tokens, d hidden, f width, E experts.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from moe.config import MoEConfig
from moe.dispatch import ExpertParams, dispatch, make_dispatcher
from moe.losses import RoutingStats, routing_stats
from moe.routing import drop_padding, make_router


def swiglu(x: Array, gate_up: Array, down: Array) -> Array:
    """(silu(x W_gate) * (x W_up)) W_down with gate_up [d, 2f] holding both: [..., d] -> [..., d] (2002.05202)."""
    gate, up = jnp.split(x @ gate_up, 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ down


class DenseFFN(nn.Module):
    """SwiGLU feed-forward of width `ffn_dim`; [..., d] -> [..., d] in the input's dtype."""

    ffn_dim: int
    init_std: float
    out_std: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        d = x.shape[-1]
        gate_up = self.param("gate_up", nn.initializers.truncated_normal(self.init_std), (d, 2 * self.ffn_dim))
        down = self.param("down", nn.initializers.truncated_normal(self.out_std), (self.ffn_dim, d))
        return swiglu(x, gate_up.astype(x.dtype), down.astype(x.dtype))


class Experts(nn.Module):
    """Holds the routed experts' weights, gate_up [E, d, 2f] and down [E, f, d]."""

    num_experts: int
    hidden: int
    expert_dim: int
    init_std: float
    out_std: float

    @nn.compact
    def __call__(self, dtype: Any) -> ExpertParams:
        e, d, f = self.num_experts, self.hidden, self.expert_dim
        gate_up = self.param("gate_up", nn.initializers.truncated_normal(self.init_std), (e, d, 2 * f))
        down = self.param("down", nn.initializers.truncated_normal(self.out_std), (e, f, d))
        return ExpertParams(gate_up.astype(dtype), down.astype(dtype))


class MoELayer(nn.Module):
    """1. logits = x W_r in float32; 2. the router chooses and weighs; 3. padding is dropped; 4. the dispatcher runs the
    experts; 5. shared experts are added. Balance losses leave as `RoutingStats`, by return value.
    """

    config: MoEConfig
    init_std: float
    out_std: float

    @nn.compact
    def __call__(
        self, x: Array, token_valid: Array, token_ids: Array, router_state: Any, key: Array
    ) -> tuple[Array, RoutingStats]:
        """x [B, S, d], token_valid [B, S] bool, token_ids [B, S] -> ([B, S, d], stats)."""
        b, s, d = x.shape
        cfg = self.config
        router_weight = self.param("router", nn.initializers.truncated_normal(self.init_std), (d, cfg.num_experts))
        experts = Experts(cfg.num_experts, d, cfg.expert_dim, self.init_std, self.out_std, name="experts")(x.dtype)

        flat = x.reshape(b * s, d)
        logits = jnp.dot(flat.astype(jnp.float32), router_weight, precision="float32")
        routing, losses = make_router(cfg)(flat, logits, token_ids.reshape(-1), router_state, key)
        routing = drop_padding(routing, token_valid.reshape(-1))
        out = dispatch(flat, routing, experts, make_dispatcher(cfg)).reshape(b, s, d)
        if cfg.num_shared_experts:
            width = cfg.num_shared_experts * cfg.expert_dim
            out = out + DenseFFN(width, self.init_std, self.out_std, name="shared")(x)
        return out, routing_stats(routing, token_valid, losses, kept=routing.valid)
