"""Decoder-only transformer: pre-norm, RoPE, grouped-query attention, SwiGLU, dense or MoE per layer.

Consecutive layers of one kind are stacked and scanned (`runs_0`, `runs_1`, ... bottom to top), so compile time does
not grow with depth. Parameters are float32; activations run in `compute_dtype`; norms' statistics, router and loss in
float32.

Legend: B sequences, S positions, d hidden, H query heads, G key/value heads, D head width, V vocabulary, L MoE layers.
"""

from __future__ import annotations

from functools import lru_cache, partial
from itertools import groupby
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from kernels.attention import attention
from kernels.cached_attention import cached_attention, write_cache
from moe.config import LayerKind, ModelConfig
from moe.layer import DenseFFN, MoELayer
from moe.lora.config import AdapterConfig
from moe.lora.dense import COLLECTION, Adaptation, Context
from moe.losses import RoutingStats
from moe.rope import apply_rope, rope_tables, yarn_scale
from moe.routing import make_router
from parallel.mesh import AXES, on_shards


class TransformerOutput(NamedTuple):
    """hidden [B, S, d] after the final norm, head [V, d] (the embedding when tied), stats stacked over MoE layers;
    adapter_stats those of the adapters' routers by site, stacked over the layers that have it."""

    hidden: Array
    head: Array
    stats: RoutingStats | None
    adapter_stats: dict[str, RoutingStats]


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


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.param("scale", nn.initializers.ones, (x.shape[-1],)), self.eps)


# One layer's keys and values [B, C, G, D] of C slots, or its latent vectors [B, C, 1, kv_rank + rope_dim] alone.
Cache = tuple[Array, ...]


class Where(NamedTuple):
    """Which tokens may see which: segment_ids (0 is padding) and positions [B, S], their rotation's cos and sin
    [B, S, 1, D], the layer's window (0 is none; None where no layer has one)."""

    segment_ids: Array
    positions: Array
    rope: tuple[Array, Array]
    window: Array | int | None


def attend(q: Array, k: Array, v: Array, where: Where, **options: Any) -> Array:
    """`attention` on each device's sequences; options are the kernel's `sinks` and `scale`."""
    heads, scale = P(AXES, None, None, None), options.pop("scale", None)

    def call(q: Array, k: Array, v: Array, segment_ids: Array, window: Any, sinks: Array | None) -> Array:
        return attention(q, k, v, segment_ids, window=window, sinks=sinks, scale=scale)

    specs = (heads, heads, heads, P(AXES, None), P(), P())
    return on_shards(call, specs, heads)(q, k, v, where.segment_ids, where.window, options.pop("sinks", None))


def projection(
    module: nn.Module,
    name: str,
    x: Array,
    outputs: tuple[int, ...],
    std: float,
    *,
    adapt: Adaptation,
    inputs: int = 1,
    bias: bool = False,
) -> Array:
    """x contracted over its last `inputs` axes with `w{name}` [*inputs, *outputs], adapted, plus `b{name}` [*outputs];
    the parameters are `module`'s. One product of two matrices."""
    shape = x.shape[x.ndim - inputs :]
    weight = module.param(f"w{name}", nn.initializers.truncated_normal(std), (*shape, *outputs))
    flat = x.reshape(*x.shape[: x.ndim - inputs], -1)
    matrix = weight.reshape(flat.shape[-1], -1).astype(x.dtype)
    out = adapt(name, flat, flat @ matrix, matrix).reshape(*flat.shape[:-1], *outputs)
    if not bias:
        return out
    b = module.param(f"b{name}", nn.initializers.zeros, outputs)
    return out + jnp.expand_dims(b.astype(x.dtype), range(out.ndim - len(outputs)))


class Attention(nn.Module):
    """Causal grouped-query attention within segments; wq [d, H, D], wk and wv [d, G, D], wo [H, D, d]; biases bq, bk,
    bv, bo, `sinks` [H], norms where the config has them.

    With a cache, keys and values are written at their positions and queries see what the cache then holds.
    """

    config: ModelConfig
    adapters: AdapterConfig | None = None

    @nn.compact
    def __call__(
        self, x: Array, where: Where, cache: Cache | None, context: Context | None = None
    ) -> tuple[Array, Cache | None, dict[str, RoutingStats]]:
        cfg, adapt = self.config, Adaptation(self.adapters, context)
        bias, out_bias, std = cfg.attention_bias != "none", cfg.attention_bias == "all", cfg.init_std
        q = projection(self, "q", x, (cfg.num_heads, cfg.head_dim), std, adapt=adapt, bias=bias)
        k = projection(self, "k", x, (cfg.num_kv_heads, cfg.head_dim), std, adapt=adapt, bias=bias)
        v = projection(self, "v", x, (cfg.num_kv_heads, cfg.head_dim), std, adapt=adapt, bias=bias)
        if cfg.qk_norm != "none":
            q, k = self.normed("q_norm", q), self.normed("k_norm", k)
        if cfg.clip_qkv:
            q, k, v = (jnp.clip(y, -cfg.clip_qkv, cfg.clip_qkv) for y in (q, k, v))
        q, k = apply_rope(q, *where.rope), apply_rope(k, *where.rope)
        sinks = self.param("sinks", nn.initializers.zeros, (cfg.num_heads,)) if cfg.sinks else None
        if cache is None:
            mixed = attend(q, k, v, where, sinks=sinks)
        else:
            keys, values = (write_cache(old, new, where.positions) for old, new in zip(cache, (k, v), strict=True))
            mixed = cached_attention(q, keys, values, where.positions, window=where.window, sinks=sinks)
            cache = keys, values
        out = projection(self, "o", mixed, (x.shape[-1],), residual_std(cfg), adapt=adapt, inputs=2, bias=out_bias)
        return out, cache, adapt.stats

    def normed(self, name: str, x: Array) -> Array:
        """RMSNorm of x [B, S, H, D] over each head, or over the width of all heads (OLMoE)."""
        norm = RMSNorm(self.config.norm_eps, name=name)
        return norm(x) if self.config.qk_norm == "head" else norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2 2405.04434, section 2.1; the released V3 code's norms and scale).

        c_t = norm(W_down x_t),  k_t = [W_k c_t ; rope(w_r x_t)],  v_t = W_v c_t,  q_t = [q_nope ; rope(q_rope)]

    A cache holds c_t and the one rotated key. Against it, W_k and W_v are absorbed into the query and the output
    (section 2.1.2), so that all heads share one key [c ; k_rope] and one value c.
    """

    config: ModelConfig
    adapters: AdapterConfig | None = None

    @nn.compact
    def __call__(
        self, x: Array, where: Where, cache: Cache | None, context: Context | None = None
    ) -> tuple[Array, Cache | None, dict[str, RoutingStats]]:
        cfg, latent, adapt = self.config, self.config.latent, Adaptation(self.adapters, context)
        assert latent is not None
        std, bias, heads = cfg.init_std, cfg.attention_bias == "all", cfg.num_heads
        # The released code gives these two norms their class's epsilon, whatever the model's.
        norm = partial(RMSNorm, 1e-6)
        if latent.q_rank:
            q = norm(name="q_norm")(projection(self, "q_down", x, (latent.q_rank,), std, adapt=adapt, bias=bias))
            q = projection(self, "q_up", q, (heads, cfg.head_dim), std, adapt=adapt)
        else:
            q = projection(self, "q", x, (heads, cfg.head_dim), std, adapt=adapt)
        q_nope, q_rope = jnp.split(q, [latent.nope_dim], axis=-1)
        down = projection(self, "kv_down", x, (latent.kv_rank + latent.rope_dim,), std, adapt=adapt, bias=bias)
        c, k_rope = jnp.split(down, [latent.kv_rank], axis=-1)
        c, k_rope = norm(name="kv_norm")(c)[:, :, None], apply_rope(k_rope[:, :, None], *where.rope)
        q_rope = apply_rope(q_rope, *where.rope)
        normal = nn.initializers.truncated_normal(std)
        k_up = self.param("wk_up", normal, (latent.kv_rank, heads, latent.nope_dim)).astype(x.dtype)
        v_up = self.param("wv_up", normal, (latent.kv_rank, heads, latent.value_dim)).astype(x.dtype)
        scale = cfg.head_dim**-0.5
        if cfg.rope_scaling is not None and cfg.rope_scaling.mscale_all_dim:
            scale *= yarn_scale(cfg.rope_scaling.factor, cfg.rope_scaling.mscale_all_dim) ** 2
        if cache is None:
            up = c[:, :, 0] @ k_up.reshape(latent.kv_rank, -1), c[:, :, 0] @ v_up.reshape(latent.kv_rank, -1)
            k_nope, v = (y.reshape(*y.shape[:2], heads, -1) for y in up)
            k = jnp.concatenate([k_nope, jnp.broadcast_to(k_rope, (*k_nope.shape[:3], latent.rope_dim))], axis=-1)
            mixed = attend(jnp.concatenate([q_nope, q_rope], axis=-1), k, v, where, scale=scale)
        else:
            keys = write_cache(cache[0], jnp.concatenate([c, k_rope], axis=-1), where.positions)
            q = jnp.concatenate([jnp.einsum("bshn,rhn->bshr", q_nope, k_up), q_rope], axis=-1)
            values = keys[..., : latent.kv_rank]
            mixed = cached_attention(q, keys, values, where.positions, window=where.window, scale=scale)
            mixed, cache = jnp.einsum("bshr,rhv->bshv", mixed, v_up), (keys,)
        out = projection(self, "o", mixed, (x.shape[-1],), residual_std(cfg), adapt=adapt, inputs=2, bias=bias)
        return out, cache, adapt.stats


def residual_std(cfg: ModelConfig) -> float:
    """Initial standard deviation of what writes into the residual stream: init_std / sqrt(2L) (GPT-2)."""
    return cfg.init_std / (2 * cfg.num_layers) ** 0.5


class PerLayer(NamedTuple):
    """What differs between the layers of a run: router state, key (None at evaluation), window."""

    router_state: Any
    key: Array | None
    window: Array | int | None


class Shared(NamedTuple):
    """What all layers see: tokens, segment_ids and positions [B, S], rotations [B, S, 1, D], labels [B] or None (see
    `moe.lora.dense.Context`)."""

    tokens: Array
    segment_ids: Array
    positions: Array
    rope: tuple[Array, Array]
    labels: Array | None = None


class Block(nn.Module):
    """One layer: x + Attention(norm(x)), then x + FFN(norm(x)). Shaped for `nn.scan`: (carry, per-layer inputs)."""

    config: ModelConfig
    kind: LayerKind
    adapters: AdapterConfig | None = None

    @nn.compact
    def __call__(
        self, x: Array, layer: PerLayer, shared: Shared, cache: Cache | None = None
    ) -> tuple[Array, tuple[RoutingStats | None, dict[str, RoutingStats], Cache | None]]:
        """-> (x, (statistics of a MoE layer, those of the adapters' routers by site, the cache))."""
        cfg = self.config
        where = Where(shared.segment_ids, shared.positions, shared.rope, layer.window)
        context = None
        if self.adapters is not None:
            context = Context(shared.segment_ids > 0, shared.tokens, shared.labels, layer.key)
        mixer = (Attention if cfg.latent is None else LatentAttention)(cfg, self.adapters, name="attention")
        mixed, cache, adapted = mixer(RMSNorm(cfg.norm_eps, name="attention_norm")(x), where, cache, context)
        x = x + mixed
        normed = RMSNorm(cfg.norm_eps, name="ffn_norm")(x)
        if self.kind == "dense" or cfg.moe is None:
            ffn = DenseFFN(cfg.ffn_dim, cfg.init_std, residual_std(cfg), cfg.ffn_bias, self.adapters, name="ffn")
            out, of_ffn = ffn(normed, context)
            return x + out, (None, adapted | of_ffn, cache)
        moe = MoELayer(cfg.moe, cfg.init_std, residual_std(cfg), name="moe")
        out, stats = moe(normed, shared.segment_ids > 0, shared.tokens, layer.router_state, layer.key)
        return x + out, (stats, adapted, cache)


def rematerialised(block: type[Block], policy: str) -> Any:
    """`none`: keep activations; `dots`: keep products without batch dimensions; `full`: keep only the layer's input."""
    if policy == "none":
        return block
    saveable = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return nn.remat(block, policy=saveable, prevent_cse=False)


def rotations(config: ModelConfig, positions: Array) -> tuple[Array, Array]:
    """cos and signed sin [B, S, 1, D] for the rotated part of a head."""
    dim = config.head_dim if config.latent is None else config.latent.rope_dim
    return rope_tables(positions, dim, config.rope_theta, config.rope_scaling)


def init_router_state(config: ModelConfig) -> Any:
    """Router state of all MoE layers, leaves stacked to [L, ...]; biases and controllers live here."""
    if config.moe is None:
        return {}
    state = make_router(config.moe).init_state()
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * config.num_moe_layers), state)


class Transformer(nn.Module):
    """The model; with `adapters`, their parameters are the collection `adapters` beside `params` (`moe.lora`)."""

    config: ModelConfig
    adapters: AdapterConfig | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        segment_ids: Array,
        positions: Array,
        router_state: Any,
        key: Array | None,
        labels: Array | None = None,
    ) -> TransformerOutput:
        """tokens, segment_ids (0 is padding), positions [B, S] int32; router_state stacked over MoE layers; one key, or
        None at evaluation; labels [B] int or None: the adapters' expert for each sequence, in place of their routers'
        choice."""
        cfg = self.config
        dtype = jnp.dtype(cfg.compute_dtype)
        embedding = self.param("embedding", nn.initializers.normal(cfg.init_std), (cfg.vocab_size, cfg.hidden))
        x = jnp.take(embedding, tokens, axis=0).astype(dtype)
        shared = Shared(tokens, segment_ids, positions, rotations(cfg, positions), labels)
        windows = jnp.array(cfg.windows, jnp.int32) if cfg.windows else None
        keys = None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(cfg.num_layers))

        stats, layer, moe_layer = [], 0, 0
        adapter_stats: dict[str, list[RoutingStats]] = {}
        for run, (kind, group) in enumerate(groupby(cfg.layer_kinds)):
            length = len(list(group))
            state = jax.tree.map(lambda leaf: leaf[moe_layer : moe_layer + length], router_state)  # noqa: B023
            blocks = nn.scan(
                rematerialised(Block, cfg.remat),
                variable_axes={"params": 0, COLLECTION: 0},
                split_rngs={"params": True, COLLECTION: True},
                in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=length,
                unroll=cfg.unroll or length,
            )(cfg, kind, self.adapters, name=f"runs_{run}")
            of_run = slice(layer, layer + length)
            layer_keys, layer_windows = (None if values is None else values[of_run] for values in (keys, windows))
            per_layer = PerLayer(state if kind == "moe" else {}, layer_keys, layer_windows)
            x, (out, adapted, _) = blocks(x, per_layer, shared)
            layer += length
            if kind == "moe":
                moe_layer += length
                stats.append(out)
            for site, of_run in adapted.items():
                adapter_stats.setdefault(site, []).append(of_run)
        joined = lambda parts: jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)  # noqa: E731
        stacked = joined(stats) if stats else None
        of_sites = {site: joined(parts) for site, parts in adapter_stats.items()}

        hidden = RMSNorm(cfg.norm_eps, name="final_norm")(x)
        if cfg.tie_embeddings:
            return TransformerOutput(hidden, embedding, stacked, of_sites)
        head = self.param("head", nn.initializers.normal(cfg.init_std), (cfg.vocab_size, cfg.hidden))
        return TransformerOutput(hidden, head, stacked, of_sites)


def init_params(config: ModelConfig, key: Array) -> Any:
    """Random parameters of a `Transformer`, a function of the key; shapes alone under `jax.eval_shape`."""
    mesh = jax.sharding.get_abstract_mesh()
    zeros = jnp.zeros((1 if mesh.empty else mesh.size, 8), jnp.int32)  # shapes only: a short sequence per device
    state = init_router_state(config)
    variables: Any = Transformer(config).init(key, zeros, zeros, zeros, state, key)
    return variables["params"]


@lru_cache(maxsize=16)
def abstract_params(config: ModelConfig) -> Any:
    """Shapes and dtypes of `init_params`, made once for a config; nothing is allocated, not even a key."""
    return jax.eval_shape(partial(init_params, config), jax.eval_shape(lambda: jax.random.key(0)))
