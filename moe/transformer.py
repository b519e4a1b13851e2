"""Decoder-only transformer: pre-norm, RoPE, grouped-query attention, SwiGLU, dense or MoE per layer.

Consecutive layers of one kind are stacked and scanned (`runs_0`, `runs_1`, ... bottom to top), so compile time does
not grow with depth. Parameters are float32; activations run in `compute_dtype`; norms' statistics, router and loss in
float32.

Legend: B sequences, S positions, d hidden, H query heads, G key/value heads, D head width, V vocabulary, L MoE layers.
"""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from kernels.attention import attention
from moe.config import LayerKind, ModelConfig
from moe.layer import DenseFFN, MoELayer
from moe.losses import RoutingStats
from moe.routing import make_router
from parallel.mesh import AXES, on_shards


class TransformerOutput(NamedTuple):
    """hidden [B, S, d] after the final norm, head [V, d] (the embedding when tied), stats stacked over MoE layers."""

    hidden: Array
    head: Array
    stats: RoutingStats | None


def _inverse_rms(x: Array, eps: float) -> Array:
    return jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + eps)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x / rms(x) * scale over the last axis, [..., d] and [d] -> [..., d] in x's dtype; statistics in float32.

    (1910.07467.) The gradient is written out, from x and one number per row: JAX's own keeps three arrays of x's size.
    """
    return _rms_norm_fwd(x, scale, eps)[0]


def _rms_norm_fwd(x: Array, scale: Array, eps: float) -> tuple[Array, tuple[Array, Array, Array]]:
    inverse = _inverse_rms(x, eps)
    return (x * inverse * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype), (x, scale, inverse)


def _rms_norm_bwd(eps: float, residuals: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array]:
    del eps
    x, scale, inverse = residuals
    normed, g = x * inverse, g.astype(jnp.float32)
    dnormed = g * jnp.expand_dims(scale, range(x.ndim - 1))
    dx = inverse * (dnormed - normed * jnp.mean(dnormed * normed, axis=-1, keepdims=True))
    dscale = jnp.sum(g * normed, axis=tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


def rope_tables(positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """cos and signed sin [B, S, 1, D] of positions [B, S] for `apply_rope`; half-split as in Llama (2104.09864)."""
    inverse = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions.astype(jnp.float32)[..., None, None] * inverse.reshape(1, 1, 1, -1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (x_i, x_{i + D/2}) of x [B, S, H, D]: the halves swap places, the table holds the signs."""
    swapped = jnp.roll(x, x.shape[-1] // 2, axis=-1)
    return x * cos.astype(x.dtype) + swapped * sin.astype(x.dtype)


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.param("scale", nn.initializers.ones, (x.shape[-1],)), self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention within segments; wq [d, H, D], wk and wv [d, G, D], wo [H, D, d]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, segment_ids: Array, rope: tuple[Array, Array]) -> Array:
        cfg = self.config
        (b, s, d), dim = x.shape, cfg.head_dim

        def project(name: str, heads: int) -> Array:
            weight = self.param(name, nn.initializers.truncated_normal(cfg.init_std), (d, heads, dim))
            return (x @ weight.reshape(d, heads * dim).astype(x.dtype)).reshape(b, s, heads, dim)

        q, k, v = project("wq", cfg.num_heads), project("wk", cfg.num_kv_heads), project("wv", cfg.num_kv_heads)
        if cfg.qk_norm == "head":
            q, k = RMSNorm(cfg.norm_eps, name="q_norm")(q), RMSNorm(cfg.norm_eps, name="k_norm")(k)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        heads = P(AXES, None, None, None)
        mixed = on_shards(attention, (heads, heads, heads, P(AXES, None)), heads)(q, k, v, segment_ids)
        wo = self.param("wo", nn.initializers.truncated_normal(residual_std(cfg)), (cfg.num_heads, dim, d))
        return mixed.reshape(b, s, cfg.num_heads * dim) @ wo.reshape(cfg.num_heads * dim, d).astype(x.dtype)


def residual_std(cfg: ModelConfig) -> float:
    """Initial standard deviation of what writes into the residual stream: init_std / sqrt(2L) (GPT-2)."""
    return cfg.init_std / (2 * cfg.num_layers) ** 0.5


class Block(nn.Module):
    """One layer: x + Attention(norm(x)), then x + FFN(norm(x)). Shaped for `nn.scan`: (carry, per-layer inputs)."""

    config: ModelConfig
    kind: LayerKind

    @nn.compact
    def __call__(self, x: Array, per_layer: tuple[Any, Array | None], shared: tuple[Array, ...]) -> tuple[Array, Any]:
        cfg = self.config
        router_state, key = per_layer
        tokens, segment_ids, cos, sin = shared
        x = x + Attention(cfg, name="attention")(
            RMSNorm(cfg.norm_eps, name="attention_norm")(x), segment_ids, (cos, sin)
        )
        normed = RMSNorm(cfg.norm_eps, name="ffn_norm")(x)
        if self.kind == "dense" or cfg.moe is None:
            return x + DenseFFN(cfg.ffn_dim, cfg.init_std, residual_std(cfg), name="ffn")(normed), None
        layer = MoELayer(cfg.moe, cfg.init_std, residual_std(cfg), name="moe")
        out, stats = layer(normed, segment_ids > 0, tokens, router_state, key)
        return x + out, stats


def rematerialised(block: type[Block], policy: str) -> Any:
    """`none`: keep activations; `dots`: keep products without batch dimensions; `full`: keep only the layer's input."""
    if policy == "none":
        return block
    saveable = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return nn.remat(block, policy=saveable, prevent_cse=False)


def init_router_state(config: ModelConfig) -> Any:
    """Router state of all MoE layers, leaves stacked to [L, ...]; biases and controllers live here."""
    if config.moe is None:
        return {}
    state = make_router(config.moe).init_state()
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * config.num_moe_layers), state)


class Transformer(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(
        self, tokens: Array, segment_ids: Array, positions: Array, router_state: Any, key: Array | None
    ) -> TransformerOutput:
        """tokens, segment_ids (0 is padding), positions [B, S] int32; router_state stacked over MoE layers; one key, or
        None at evaluation."""
        cfg = self.config
        dtype = jnp.dtype(cfg.compute_dtype)
        embedding = self.param("embedding", nn.initializers.normal(cfg.init_std), (cfg.vocab_size, cfg.hidden))
        x = jnp.take(embedding, tokens, axis=0).astype(dtype)
        shared = (tokens, segment_ids, *rope_tables(positions, cfg.head_dim, cfg.rope_theta))
        keys = None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(cfg.num_layers))

        stats, layer, moe_layer = [], 0, 0
        for run, (kind, group) in enumerate(groupby(cfg.layer_kinds)):
            length = len(list(group))
            state = jax.tree.map(lambda leaf: leaf[moe_layer : moe_layer + length], router_state)  # noqa: B023
            blocks = nn.scan(
                rematerialised(Block, cfg.remat),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=length,
                unroll=cfg.unroll or length,
            )(cfg, kind, name=f"runs_{run}")
            layer_keys = None if keys is None else keys[layer : layer + length]
            x, out = blocks(x, (state if kind == "moe" else {}, layer_keys), shared)
            layer += length
            if kind == "moe":
                moe_layer += length
                stats.append(out)
        stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stats) if stats else None

        hidden = RMSNorm(cfg.norm_eps, name="final_norm")(x)
        if cfg.tie_embeddings:
            return TransformerOutput(hidden, embedding, stacked)
        head = self.param("head", nn.initializers.normal(cfg.init_std), (cfg.vocab_size, cfg.hidden))
        return TransformerOutput(hidden, head, stacked)
