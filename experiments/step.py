"""The training step, on one screen, and the state it moves.

One optimiser step: the batch's sequences go through A accumulation passes in a `lax.scan`; every loss is a sum over
tokens divided once by the token count of the whole step; gradients are added; the optimiser updates once.

Legend: A accumulation passes, B sequences per pass, S positions, L MoE layers, G micro-batches, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.config import OptimizerConfig, RunConfig
from experiments.weighted_loss import (
    Weighting,
    pass_weighting,
    step_weighting,
    token_losses,
    unit_losses,
    weighted_cross_entropy,
    with_effective_samples,
)
from kernels.cross_entropy import cross_entropy
from moe.losses import (
    BalancePrior,
    RoutingStats,
    communication_stats,
    device_stats,
    group_sum,
    importance_loss,
    scoped_balance_loss,
    selection_frequency,
    shuffled_frequency,
    z_loss,
)
from moe.metrics import pass_metrics, step_metrics
from moe.routing import from_spec, update_router_state
from moe.transformer import Transformer, TransformerOutput, init_router_state
from optim.sharding import opt_state_shardings
from parallel.mesh import AXES, on_shards
from parallel.sharding import tree_shardings

Batch = dict[str, Array]  # tokens, segment_ids, positions: [A, B, S + 1] int32


@struct.dataclass
class TrainState:
    """Everything a checkpoint holds.

    Attributes:
      step: int32, finished optimiser steps.
      position: uint32, the next global sample index of the data.
      params, opt_state: model and optimiser.
      router_state: biases and controllers of the routers, stacked over MoE layers.
      method_state: any pytree a method keeps (the counts of scope `ema`; bilevel copies, data weights).
      key: the run's PRNG key; randomness is a function of (key, step, layer, sample), never of call order.
    """

    step: Array
    position: Array
    params: Any
    opt_state: Any
    router_state: Any
    method_state: Any
    key: Array


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser a config names: `adamw` is a factory of `experiments.optimizers`, `a.b:c` is an import path."""
    return from_spec(config.name, "experiments.optimizers:{}", "optimizer.name", config=config, steps=steps)


def init_state(config: RunConfig, tx: optax.GradientTransformation) -> TrainState:
    """A fresh state; a function of config.seed alone. Call under jit with `state_shardings` as out_shardings."""
    key = jax.random.key(config.seed)
    zeros = jnp.zeros((config.mesh.devices, 8), jnp.int32)  # shapes only: one short sequence per device
    model, router_state = Transformer(config.model), init_router_state(config.model)
    params = model.init(jax.random.fold_in(key, 0), zeros, zeros, zeros, router_state, key)["params"]
    return TrainState(
        step=jnp.int32(0),
        position=jnp.uint32(0),
        params=params,
        opt_state=tx.init(params),
        router_state=router_state,
        method_state=init_method_state(config),
        key=jax.random.fold_in(key, 1),
    )


def init_method_state(config: RunConfig) -> dict[str, Any]:
    """What the balance scope keeps across steps: the decayed counts [L, E] of `ema`, nothing for the others."""
    moe = config.model.moe
    if moe is None or config.balance.scope != "ema":
        return {}
    return {"balance_ema": BalancePrior.zeros(config.model.num_moe_layers, moe.num_experts)}


def state_shardings(abstract: TrainState, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Parameters and moments by the rules of `parallel.sharding`, everything else replicated."""
    params = tree_shardings(abstract.params, mesh)
    replicated = jax.tree.map(lambda _: NamedSharding(mesh, P()), abstract)
    return replace(replicated, params=params, opt_state=opt_state_shardings(tx, abstract.params, params))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(None, AXES, None))


def targets_of(batch: Batch) -> tuple[Array, Array]:
    """Next tokens and their weights [..., S]: the first token of the next document is not predicted from this one."""
    segments = batch["segment_ids"]
    same = (segments[..., 1:] == segments[..., :-1]) & (segments[..., :-1] > 0)
    return batch["tokens"][..., 1:], same.astype(jnp.float32)


def forward(config: RunConfig, params: Any, batch: Batch, router_state: Any, key: Array | None) -> TransformerOutput:
    """One pass over batch leaves [B, S + 1]; the last token is only a target. Key None is evaluation."""
    inputs = [batch[name][:, :-1] for name in ("tokens", "segment_ids", "positions")]
    return Transformer(config.model).apply({"params": params}, *inputs, router_state, key)  # type: ignore[return-value]


def summed_cross_entropy(out: TransformerOutput, targets: Array, weights: Array) -> Array:
    """Sum of weighted negative log-likelihoods in nats; chunked on each device's own tokens."""
    hidden = out.hidden.reshape(-1, out.hidden.shape[-1])
    tokens = P(AXES)

    def local(hidden: Array, head: Array, targets: Array, weights: Array) -> Array:
        return cross_entropy(hidden, head.astype(hidden.dtype), targets, weights)[None]

    fn = on_shards(local, (P(AXES, None), P(), tokens, tokens), tokens)
    return jnp.sum(fn(hidden, out.head, targets.reshape(-1), weights.reshape(-1)))


def step_frequency(config: RunConfig, state: TrainState, batch: Batch, step_key: Array) -> Array | None:
    """The routing pre-pass: f of the whole optimiser step before its first gradient, where a scope needs it.

    `global_exact` -> [A, L, 1, E] and `shuffle_micro` -> [A, L, G / A, E] under accumulation; None where one pass sees
    everything anyway. Costs one forward pass; only `ema`, [A, L, 1, E] of the steps before, costs nothing.
    """
    scope, moe = config.balance.scope, config.model.moe
    if moe is not None and scope == "ema":
        seen = state.method_state["balance_ema"]
        return _for_every_pass(config, selection_frequency(seen.counts, seen.tokens, moe.top_k))
    if moe is None or config.accumulation == 1 or scope not in ("global_exact", "shuffle_micro"):
        return None

    def route(_: None, one: tuple[Batch, Array]) -> tuple[None, RoutingStats]:
        return None, forward(config, state.params, one[0], state.router_state, one[1]).stats  # type: ignore[return-value]

    stats = jax.lax.scan(route, None, (batch, _pass_keys(config, step_key)))[1]
    if scope == "global_exact":
        counts, tokens = stats.balance_counts.sum(axis=(0, 2)), stats.tokens.sum(axis=(0, 2))
        return _for_every_pass(config, selection_frequency(counts, tokens, moe.top_k))
    indices = stats.indices.swapaxes(0, 1)
    frequency = _shuffled(config, indices.reshape(indices.shape[0], -1, indices.shape[-1]), step_key)
    return frequency.reshape(frequency.shape[0], config.accumulation, -1, moe.num_experts).swapaxes(0, 1)


def data_weighting(config: RunConfig, state: TrainState, batch: Batch, step_key: Array) -> Weighting | None:
    """How `config.reweighting` weights each pass, None if it does not. Weights of the whole step under accumulation
    cost one forward pass: all losses before the first gradient, with the parameters and keys they will have."""
    weigh = config.reweighting
    if not weigh.strategy:
        return None
    if config.accumulation == 1 or weigh.scope == "micro":
        return pass_weighting(weigh, state.step, targets_of(batch)[1])

    def look(_: None, one: tuple[Batch, Array]) -> tuple[None, tuple[Array, Array]]:
        out = forward(config, state.params, one[0], state.router_state, one[1])
        targets, weights = targets_of(one[0])
        return None, unit_losses(weigh, token_losses(out, targets), weights)

    return step_weighting(weigh, state.step, *jax.lax.scan(look, None, (batch, _pass_keys(config, step_key)))[1])


def _for_every_pass(config: RunConfig, frequency: Array) -> Array:
    """[L, E] -> [A, L, 1, E]."""
    layers, experts = frequency.shape
    return jnp.broadcast_to(frequency[None, :, None], (config.accumulation, layers, 1, experts))


def _pass_keys(config: RunConfig, step_key: Array) -> Array:
    return jax.vmap(lambda i: jax.random.fold_in(step_key, i))(jnp.arange(config.accumulation))


def _shuffled(config: RunConfig, indices: Array, step_key: Array) -> Array:
    """`shuffled_frequency` for every micro-batch of the step, [L, G, E]; its keys lie beyond those of any pass."""
    assert config.model.moe is not None
    groups = config.batch_size // config.balance.micro_batch_size
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(step_key, 1 << 20), i))(jnp.arange(groups))
    sample = config.balance.micro_batch_size * config.data.seq_len
    return shuffled_frequency(indices, keys, sample, config.model.moe.num_experts, config.model.moe.top_k)


def pass_loss(
    params: Any,
    batch: Batch,
    frequency: Array | None,
    prior: BalancePrior | None,
    key: Array,
    step_key: Array,
    *,
    config: RunConfig,
    router_state: Any,
    total_targets: Array,
    total_tokens: Array,
    weighting: Weighting | None = None,
) -> tuple[Array, tuple[dict[str, Array], RoutingStats | None]]:
    """This pass' share of the step's loss, and its sums. Added up over passes they are the loss of the whole batch."""
    out = forward(config, params, batch, router_state, key)
    if weighting is None:
        ce = summed_cross_entropy(out, *targets_of(batch)) / jnp.maximum(total_targets, 1.0)
        sums = {"loss": ce}
    else:
        ce, sums = weighted_cross_entropy(config.reweighting, out, *targets_of(batch), weighting, total_targets)
    if out.stats is None or config.model.moe is None:
        return ce, (sums, None)
    moe, stats, balance = config.model.moe, out.stats, config.balance
    if balance.scope == "shuffle_micro" and frequency is None:
        rows = stats.indices.reshape(stats.indices.shape[0], -1, stats.indices.shape[-1])
        frequency = _shuffled(config, rows, step_key)
    passed = batch["tokens"].shape[0]
    scoped = functools.partial(
        scoped_balance_loss,
        scope=balance.scope,
        total_tokens=total_tokens,
        group_size=passed // config.mesh.devices if balance.scope == "device" else balance.micro_batch_size,
    )
    terms = {
        "balance_loss": (balance.weight, scoped(stats, top_k=moe.top_k, prior=prior, frequency=frequency)),
        "z_loss": (balance.z_weight, z_loss(stats, total_tokens)),
    }
    if balance.importance_weight:
        terms["importance_loss"] = balance.importance_weight, importance_loss(stats, passed, total_tokens)
    if balance.device_weight:
        terms["device_loss"] = balance.device_weight, scoped(device_stats(stats, balance.devices), top_k=moe.top_k)
    if balance.communication_weight:
        sent = communication_stats(stats, balance.devices)
        terms["communication_loss"] = balance.communication_weight, scoped(sent, top_k=balance.device_limit)
    own = {name: jnp.sum(v) / jnp.maximum(total_tokens, 1.0) for name, v in stats.router_losses.items()}
    loss = ce + sum(weight * term for weight, term in terms.values()) + sum(own.values())
    return loss, ({**sums, **{name: term for name, (_, term) in terms.items()}, **own}, stats)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    config: RunConfig,
    tx: optax.GradientTransformation,
    routing_metrics: bool = True,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimiser step: (state, batch leaves [A, B, S + 1]) -> (state, metrics).

    `routing_metrics` is for the bench alone: False leaves pass_metrics and step_metrics out, so that the compiler drops
    what only they need. The new state does not depend on it.
    """
    step_key = jax.random.fold_in(state.key, state.step)
    total_targets = jnp.sum(targets_of(batch)[1])
    total_tokens = jnp.sum(batch["segment_ids"][..., :-1] > 0, dtype=jnp.float32)
    frequency = step_frequency(config, state, batch, step_key)
    weighting = data_weighting(config, state, batch, step_key)
    grad = jax.value_and_grad(
        functools.partial(
            pass_loss,
            step_key=step_key,
            config=config,
            router_state=state.router_state,
            total_targets=total_targets,
            total_tokens=total_tokens,
        ),
        has_aux=True,
    )

    def accumulate(prior: BalancePrior | None, one: tuple[Batch, Array | None, Weighting | None, Array]) -> Any:
        part, f, w, key = one
        (_, (sums, stats)), grads = grad(state.params, part, f, prior, key, weighting=w)
        if stats is None or prior is None:
            return prior, (grads, sums, {}, None, None), None
        size = config.balance.micro_batch_size
        size = size if stats.tokens.shape[1] % size == 0 else 1
        counted = pass_metrics(stats, size) if routing_metrics else {}
        sums_of = grads, sums, counted, stats.dropped.sum(), stats.observed
        return prior.add(stats), sums_of, group_sum(stats.counts, size)

    moe = config.model.moe
    seen = BalancePrior.zeros(config.model.num_moe_layers, moe.num_experts) if moe else None
    seen, (grads, sums, counted, dropped, observed), counts = scan_sum(
        accumulate, seen, (batch, frequency, weighting, _pass_keys(config, step_key)), config.accumulation
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    metrics = {**with_effective_samples(sums), "grad_norm": optax.tree.norm(grads), "tokens": total_tokens}
    router_state, method_state = state.router_state, state.method_state
    if moe is not None and seen is not None:
        counts = counts.swapaxes(0, 1).reshape(counts.shape[1], -1, moe.num_experts)  # [L, G, E] of the whole step
        metrics |= {name: value / config.accumulation for name, value in counted.items()}
        metrics |= step_metrics(counts.sum(axis=1), dropped) if routing_metrics else {}
        router_state = update_router_state(moe, router_state, counts, observed)
        if config.balance.scope == "ema":
            method_state = {"balance_ema": method_state["balance_ema"].decayed(config.balance.ema_decay, seen)}
    new_state = replace(
        state,
        step=state.step + 1,
        position=state.position + jnp.uint32(config.batch_size),
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        router_state=router_state,
        method_state=method_state,
    )
    return new_state, metrics


def scan_sum(
    fn: Callable[[Any, Any], tuple[Any, Any, Any]], carry: Any, xs: Any, length: int
) -> tuple[Any, Any, Any]:
    """`lax.scan` of `fn(carry, x) -> (carry, summed, stacked)` that adds the second output up instead of stacking it;
    a single pass is called outright."""
    first = jax.tree.map(lambda x: x[0], xs)
    if length == 1:
        carry, summed, stacked = fn(carry, first)
        return carry, summed, jax.tree.map(lambda x: x[None], stacked)

    def body(acc: tuple[Any, Any], x: Any) -> tuple[tuple[Any, Any], Any]:
        inner, summed, stacked = fn(acc[0], x)
        return (inner, jax.tree.map(jnp.add, acc[1], summed)), stacked

    shapes = jax.eval_shape(fn, carry, first)[1]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (carry, summed), stacked = jax.lax.scan(body, (carry, zeros), xs)
    return carry, summed, stacked


def compile_step(
    config: RunConfig, tx: optax.GradientTransformation, mesh: Mesh, *, routing_metrics: bool = True
) -> Any:
    """The jitted step: donates the state, keeps its shardings. Call it (and lower it) under `jax.set_mesh(mesh)`.

    `routing_metrics`: see `train_step`; bench only.
    """
    abstract = jax.eval_shape(functools.partial(init_state, config, tx))
    shardings = state_shardings(abstract, tx, mesh)
    step = functools.partial(train_step, config=config, tx=tx, routing_metrics=routing_metrics)
    return jax.jit(
        step, donate_argnums=0, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=(shardings, None)
    )
