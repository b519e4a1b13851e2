"""`MixedLoRADense`: what stands beside one frozen linear map; `Adaptation`: those of one sublayer and their routers.

Parameters are the collection `adapters`, apart from the frozen `params`: gradients and optimiser states are made of
this collection alone, and several adapters share one base by `jax.vmap` over it.

Legend: B sequences, S positions, T = B * S tokens, E experts, K slots, r rank, d in, o out.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from kernels.lora import mixed_lora
from moe.config import require
from moe.lora.config import AdapterConfig, ExpertsConfig
from moe.losses import RoutingStats, routing_stats
from moe.policies import make_policy
from moe.routing import RouterOutput, drop_padding, make_router, token_choice

COLLECTION = "adapters"
SHARED_INPUTS = {"q": "attention_in", "k": "attention_in", "v": "attention_in", "o": "attention_out",
                 "gate": "ffn_in", "up": "ffn_in", "down": "ffn_out"}  # fmt: skip


class Context(NamedTuple):
    """What adapters see beside their inputs: valid [B, S] bool, token ids [B, S], labels [B] int or None (an expert
    for each sequence that takes the router's place), the layer's key or None at evaluation."""

    valid: Array
    tokens: Array
    labels: Array | None
    key: Array | None


class LoRA(NamedTuple):
    """A [E, d, r] ([1, d, r] where experts share it), B [E, r, o], and DoRA's m [E, o] float32 or None; E = 1 if
    plain."""

    a: Array
    b: Array
    magnitude: Array | None


class Choice(NamedTuple):
    """A router's choice for T tokens: indices and weights [T, K], and the slots [T, K] whose expert is carried out;
    the others go through the frozen map."""

    indices: Array
    weights: Array
    kept: Array

    def gates(self, num_experts: int) -> Array:
        """The experts' weights, [T, E], zero where not chosen."""
        weights = self.weights * self.kept
        return jnp.einsum("tk,tke->te", weights, jax.nn.one_hot(self.indices, num_experts, dtype=weights.dtype))


def column_norms(weight: Array, lora: LoRA, scale: float) -> Array:
    """|W + s A_e B_e| over inputs, [E, o] float32: |W|^2 + 2 s diag(B^T A^T W) + s^2 diag(B^T A^T A B), so that no
    [E, d, o] is formed. No gradient, as in DoRA's section 4.3."""
    wide = jnp.promote_types(weight.dtype, jnp.float32)
    w, a, b = (jax.lax.stop_gradient(x).astype(wide) for x in (weight, lora.a, lora.b))
    cross = jnp.einsum("edr,do->ero", a, w)
    gram = jnp.einsum("edr,eds->ers", a, a)
    square = jnp.sum(w * w, axis=0)[None] + 2 * scale * jnp.sum(b * cross, axis=1)
    square += scale**2 * jnp.einsum("ero,ers,eso->eo", b, gram, b)
    return jnp.sqrt(jnp.maximum(square, 0.0))


def direction_scale(weight: Array, lora: LoRA, scale: float) -> Array:
    """m_e / |W + s A_e B_e|, [E, o] float32: what DoRA multiplies an adapted map's outputs with. It is near 1, where
    bfloat16 has steps of a hundredth: what is multiplied by in a narrower type is its distance from 1."""
    assert lora.magnitude is not None
    return lora.magnitude / column_norms(weight, lora, scale)


def mixed(x: Array, base: Array, weight: Array, lora: LoRA, gates: Array | None, scale: float) -> Array:
    """base [T, o] = x W with experts in the weights `gates` [T, E] beside it (None: the one adapter, weight 1).

    sum_e g_e s x A_e B_e is added; with DoRA each expert is a whole map, so the sum over e of g_e (c_e (x W + s x A_e
    B_e) - x W) is: what the weights leave of 1 stays with the frozen map.
    """
    gates = jnp.ones((x.shape[0], 1), jnp.float32) if gates is None else gates
    if lora.magnitude is None:
        return base + mixed_lora(x, lora.a, lora.b, (scale * gates).astype(x.dtype))
    factors = direction_scale(weight, lora, scale)
    scaled = lora.b * (scale * factors)[:, None, :]
    change = jnp.dot(gates, factors - 1.0).astype(base.dtype)
    return base + base * change + mixed_lora(x, lora.a, scaled.astype(x.dtype), gates.astype(x.dtype))


class MixedLoRADense(nn.Module):
    """Holds the adapters of one frozen map, `target`: LoRA, DoRA, or E of them.

    One block for plain adapters, LoRAMoE, MoLA, HydraLoRA and LoRA-Mixer, which differ in the router whose weights
    `mixed` takes, and for MixLoRA, whose experts `moe.lora.feed_forward` keeps apart.
    """

    config: AdapterConfig
    target: str

    @nn.compact
    def __call__(self, weight: Array, dtype: Any) -> LoRA:
        """The adapters of `weight` [d, o], in `dtype`. ValueError for a rank above min(d, o)."""
        cfg, name = self.config, self.target
        (d, o), r = weight.shape, self.config.rank
        require(r <= min(d, o), "adapters.rank", r, f"at most min(in, out) = {min(d, o)} of {name!r} [{d}, {o}]")
        experts = cfg.experts.num_experts if cfg.experts is not None and cfg.holds_experts(name) else 1
        shared = cfg.experts is not None and cfg.experts.shared_a
        a = self.variable(COLLECTION, "a", self.first_a, (1 if shared else experts, d, r))
        b = self.variable(COLLECTION, "b", jnp.zeros, (experts, r, o))
        magnitude = None
        if cfg.dora:
            norms = lambda: jnp.tile(jnp.linalg.norm(weight.astype(jnp.float32), axis=0)[None], (experts, 1))  # noqa: E731
            magnitude = self.variable(COLLECTION, "magnitude", norms).value
        return LoRA(a.value.astype(dtype), b.value.astype(dtype), magnitude)

    def first_a(self, shape: tuple[int, ...]) -> Array:
        key = self.make_rng(COLLECTION)
        if self.config.init == "normal":
            return jax.random.normal(key, shape) * shape[-1] ** -0.5
        bound = shape[-2] ** -0.5
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


class AdapterRouter(nn.Module):
    """logits = x W_r in float32 and the router that a config names; see `MoELayer`, whose steps 1 to 3 these are."""

    config: ExpertsConfig

    @nn.compact
    def __call__(self, x: Array, context: Context) -> tuple[Choice, RoutingStats]:
        """x [T, d] -> the choice for each token, statistics per sequence."""
        cfg, moe, d = self.config, self.config.as_moe, x.shape[-1]
        first = lambda: cfg.router_std * jax.random.normal(self.make_rng(COLLECTION), (d, cfg.num_experts))  # noqa: E731
        weight = self.variable(COLLECTION, "weight", first).value
        router = make_router(moe)
        require(not router.init_state(), "experts.router", cfg.router, "a router that keeps no state")
        key = None if context.key is None else jax.random.fold_in(context.key, zlib.crc32((self.name or "").encode()))
        jitter = getattr(router, "router_input", None)
        seen = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        seen = seen if key is None or jitter is None else jitter(seen, jax.random.fold_in(key, 0))
        logits = jnp.dot(seen, weight, precision="float32")
        ids = jnp.where(context.valid, context.tokens, -1).reshape(-1)
        if context.labels is None:
            routing, losses = router(x, logits, ids, {}, key)
            require(routing.scale_on == "output", "experts.router", cfg.router, "weights on outputs")
        else:
            routing, losses = labelled(context.labels, logits), {}
        routing = drop_padding(routing, context.valid.reshape(-1))
        kept = make_policy(moe)(routing, num_sequences=context.valid.shape[0], training=key is not None)
        choice = Choice(routing.indices, routing.weights * routing.valid, kept.valid)
        return choice, routing_stats(routing, context.valid, losses, kept=kept.valid)


def labelled(labels: Array, logits: Array) -> RouterOutput:
    """Hard routing: every token of sequence b goes to expert labels[b], with weight 1."""
    tokens = logits.shape[0] // labels.shape[0]
    indices = jnp.repeat(labels.astype(jnp.int32), tokens)[:, None]
    return token_choice(jax.nn.softmax(logits, axis=-1), logits, indices, jnp.ones(indices.shape, jnp.float32))


class Adaptation:
    """The adapters of one sublayer. Made inside its compact method, whose submodules they are; without a config it
    changes nothing.

    `stats` holds what the routers that ran tell, by site: a target's name, or an input's (`SHARED_INPUTS`).
    """

    def __init__(self, config: AdapterConfig | None, context: Context | None) -> None:
        self.config, self.context = config, context
        self.stats: dict[str, RoutingStats] = {}
        self._choices: dict[str, Choice] = {}

    def has(self, target: str) -> bool:
        return self.config is not None and target in self.config.targets

    def parameters(self, target: str, weight: Array, dtype: Any) -> LoRA:
        assert self.config is not None
        return MixedLoRADense(self.config, target, name=f"lora_{target}")(weight, dtype)

    def choice(self, site: str, x: Array) -> Choice:
        """The choice of the router at `site` for x [T, d]; each router runs once."""
        assert self.config is not None
        assert self.config.experts is not None
        assert self.context is not None
        if site not in self._choices:
            router = AdapterRouter(self.config.experts, name=f"router_{site}")
            self._choices[site], self.stats[site] = router(x, self.context)
        return self._choices[site]

    def dropped_out(self, target: str, x: Array) -> Array:
        """The adapter's input in training: dropout with a mask of its own."""
        assert self.config is not None
        if self.context is None or self.context.key is None or not self.config.dropout:
            return x
        key = jax.random.fold_in(self.context.key, zlib.crc32(target.encode()))
        kept = jax.random.bernoulli(key, 1.0 - self.config.dropout, x.shape)
        return jnp.where(kept, x / (1.0 - self.config.dropout), 0.0)

    def __call__(self, target: str, x: Array, base: Array, weight: Array) -> Array:
        """base [..., o] = x [..., d] @ weight, adapted."""
        if not self.has(target):
            return base
        assert self.config is not None
        flat = x.reshape(-1, x.shape[-1])
        lora, gates = self.parameters(target, weight, x.dtype), None
        if self.config.holds_experts(target):
            experts = self.config.experts
            assert experts is not None
            site = SHARED_INPUTS.get(target, target) if experts.routing == "input" else target
            gates = self.choice(site, flat).gates(experts.num_experts)
        seen = self.dropped_out(target, flat)
        return mixed(seen, base.reshape(-1, base.shape[-1]), weight, lora, gates, self.config.scale).reshape(base.shape)
