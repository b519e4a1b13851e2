"""Where a train step's time goes: every part forward and backward in isolation, by the functions the model calls.

Two rows are one measured layer apart: `experts` is the dense SwiGLU on T k rows (the same products without any
routing) and `router + dispatch` is the whole MoE layer minus that: the router, top-k, sorting, gathering, combining,
routing statistics, and what products per expert lose against one big product.

Legend: T tokens, B sequences, S positions, d hidden, f expert width, k active, H heads, D head width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.bench.peak import seconds_of
from experiments.bench.shape import StepShape
from experiments.step import TrainState
from kernels.attention import attention
from kernels.cross_entropy import cross_entropy
from moe.layer import MoELayer, swiglu
from moe.losses import RoutingStats
from moe.rope import apply_rope, rope_tables
from moe.transformer import rms_norm


@dataclass(frozen=True)
class Part:
    """`call` runs a piece once; a step runs it `repeats` times. Pieces of one name are one row."""

    name: str
    repeats: int
    call: Callable[[], Any]


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    return scale * jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def forward_backward(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """A compiled call of `fn` and of its transpose, with gradients of all arguments.

    The cotangents are random inputs: a constant would let the compiler do part of the work beforehand.
    """

    @jax.jit
    def run(args: Any, cotangents: Any) -> Any:
        out, pull = jax.vjp(fn, *args)
        return out, pull(cotangents)

    cotangents = jax.tree.map(lambda out: normal(9, *out.shape), jax.eval_shape(fn, *args))
    return lambda: run(args, cotangents)


def embedding_and_norms(shape: StepShape) -> list[Part]:
    """The lookup, every residual RMSNorm, and what queries and keys pass: an RMSNorm per head and the rotation.

    Apart, not chained in one program: the compiler would fuse neighbours that the model keeps asunder.
    """
    config = shape.run_config().model
    b, s, h, d = shape.batch, shape.seq, shape.heads, shape.head_dim
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, shape.vocab, (b, s)))
    cos, sin = rope_tables(jnp.broadcast_to(jnp.arange(s), (b, s)), d, config.rope_theta)

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return rms_norm(x, scale, config.norm_eps)

    lookup = forward_backward(lambda table: jnp.take(table, tokens, axis=0), normal(1, shape.vocab, shape.hidden))
    residual = forward_backward(norm, normal(2, b, s, shape.hidden), jnp.ones(shape.hidden))
    heads = forward_backward(lambda x, scale: apply_rope(norm(x, scale), cos, sin), normal(3, b, s, h, d), jnp.ones(d))
    calls = (1, lookup), (2 * shape.layers + 1, residual), (2 * shape.layers, heads)
    return [Part("embedding + norms", repeats, call) for repeats, call in calls]


def attention_projections(shape: StepShape) -> Part:
    width = shape.heads * shape.head_dim

    def run(x: jax.Array, wq: jax.Array, wk: jax.Array, wv: jax.Array, mixed: jax.Array, wo: jax.Array) -> Any:
        return x @ wq, x @ wk, x @ wv, mixed @ wo

    x, mixed = normal(0, shape.batch, shape.seq, shape.hidden), normal(1, shape.batch, shape.seq, width)
    wq, wk, wv = (normal(i, shape.hidden, width, scale=0.05) for i in (2, 3, 4))
    call = forward_backward(run, x, wq, wk, wv, mixed, normal(5, width, shape.hidden, scale=0.05))
    return Part("attention projections", shape.layers, call)


def attention_products(shape: StepShape) -> Part:
    q, k, v = (normal(i, shape.batch, shape.seq, shape.heads, shape.head_dim) for i in range(3))
    segment_ids = jnp.ones((shape.batch, shape.seq), jnp.int32)
    call = forward_backward(lambda q, k, v: attention(q, k, v, segment_ids), q, k, v)
    return Part("attention products", shape.layers, call)


def expert_products(shape: StepShape) -> Part:
    rows = normal(0, shape.tokens * shape.top_k, shape.hidden)
    gate_up = normal(1, shape.hidden, 2 * shape.expert_dim, scale=0.05)
    down = normal(2, shape.expert_dim, shape.hidden, scale=0.05)
    return Part("experts", shape.layers, forward_backward(swiglu, rows, gate_up, down))


def moe_layer(shape: StepShape) -> Part:
    """The model's own layer with its routing statistics, on tokens that spread over the experts."""
    moe = shape.run_config().model.moe
    assert moe is not None
    layer = MoELayer(moe, init_std=0.02, out_std=0.02)
    x = normal(0, shape.batch, shape.seq, shape.hidden)
    tokens, key = jnp.ones(x.shape[:2], jnp.int32), jax.random.key(0)
    params = jax.jit(layer.init)(key, x, tokens > 0, tokens, {}, key)

    def run(params: Any, x: jax.Array) -> Any:
        out, stats = cast(tuple[jax.Array, RoutingStats], layer.apply(params, x, tokens > 0, tokens, {}, key))
        return out, stats.counts, stats.prob_sums, stats.z_sums

    return Part("moe layer", shape.layers, forward_backward(run, params, x))


def head_and_loss(shape: StepShape) -> Part:
    hidden, head = normal(0, shape.tokens, shape.hidden), normal(1, shape.vocab, shape.hidden, scale=0.05)
    targets = jnp.asarray(np.random.default_rng(2).integers(0, shape.vocab, shape.tokens))
    weights = jnp.ones(shape.tokens)
    call = forward_backward(lambda h, e: cross_entropy(h, e, targets, weights), hidden, head)
    return Part("head + cross-entropy", 1, call)


def optimiser_update(tx: optax.GradientTransformation, state: TrainState) -> Part:
    """Clipping, moments, decay and the addition, in place as in the step."""

    def run(params: Any, opt_state: Any, grads: Any) -> Any:
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    update = jax.jit(run, donate_argnums=(0, 1))
    grads = jax.tree.map(lambda p: jnp.full_like(p, 1e-3), state.params)
    held = jax.tree.map(jnp.copy, (state.params, state.opt_state))

    def call() -> Any:
        nonlocal held
        held = update(*held, grads)
        return held

    return Part("optimiser update", 1, call)


def all_parts(shape: StepShape, tx: optax.GradientTransformation, state: TrainState) -> list[Part]:
    return [
        *embedding_and_norms(shape), attention_projections(shape), attention_products(shape), moe_layer(shape),
        expert_products(shape), head_and_loss(shape), optimiser_update(tx, state),
    ]  # fmt: skip


def sample(parts: list[Part]) -> dict[str, float]:
    """Seconds each part takes in one step, from one call of every piece; the rows of `StepShape.part_flops`."""
    found = {part.name: 0.0 for part in parts}
    for part in parts:
        found[part.name] += part.repeats * seconds_of(part.call)
    found["router + dispatch"] = found.pop("moe layer") - found["experts"]
    return found
