"""Depth decisions as data: one compiled program for every choice of blocks, over a model's stacked layers.

`masked_forward` runs every block twice and keeps what each row's label names: it saves nothing, and is the oracle and
the training form. `agreed_forward` branches once per layer and really skips, for batches that agree. `decide` lets
routers choose as the stream passes, `forced_windows` lets labels choose and returns what the routers would have read
(teacher forcing; Dr.LLM, 2510.12773: following the routers' own choices instead costs 1.7 points).

The base model is frozen: no gradient passes to it from any function here.
Legend: B sequences, S positions (padded), W windows, d hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe.config import ModelConfig, require
from moe.depth.paths import check_labels
from moe.depth.policy import DepthPolicy
from moe.depth.router import DepthConfig, pooled_logits, stacked_logits, window_pool
from moe.transformer import Block, PerLayer, Shared, rms_norm, rotations

Apply = Callable[[Array], Array]


class DepthOutput(NamedTuple):
    """hidden [B, S, d] after the final norm, head [V, d]: as a `Transformer`'s output, without statistics."""

    hidden: Array
    head: Array


class Decisions(NamedTuple):
    """labels [B, L] int32, the routers' logits [B, L, 3], and the model's output along the labels."""

    labels: Array
    logits: Array
    output: DepthOutput


def masked_forward(
    config: ModelConfig, params: Any, router_state: Any, tokens: Array, lengths: Array, labels: Any
) -> DepthOutput:
    """The model with row b along labels[b]; every block runs twice.

    Args:
      params, router_state: of a `Transformer`.
      tokens: [B, S] int, of which `lengths` [B] are real, padded on the right.
      labels: [B, L].

    Raises:
      ValueError: labels of another shape or outside of 0, 1, 2; an empty sequence.
    """
    labels = _labels_of_rows(config, tokens, lengths, labels)
    return _masked_forward(config, params, router_state, jnp.asarray(tokens), jnp.asarray(lengths), labels)


def agreed_forward(
    config: ModelConfig, params: Any, router_state: Any, tokens: Array, lengths: Array, labels: Any
) -> DepthOutput:
    """As `masked_forward` for rows with the same labels, [L] or [B, L]: a block runs as often as its label says.

    Raises:
      ValueError: also rows that disagree; `moe.depth.grouped` or `masked_forward` run those.
    """
    _check_lengths(tokens, lengths)
    labels = check_labels(labels, config.num_layers)
    rows = labels.reshape(-1, config.num_layers)
    mixed = np.flatnonzero((rows != rows[:1]).any(axis=0)).tolist()
    require(not mixed, "labels: layers with mixed decisions", mixed, "one decision for the whole batch")
    return _agreed_forward(config, params, router_state, jnp.asarray(tokens), jnp.asarray(lengths), rows[0])


def forced_windows(
    config: ModelConfig, depth: DepthConfig, params: Any, router_state: Any, tokens: Array, lengths: Array, labels: Any
) -> tuple[Array, Array]:
    """What every layer's router reads when rows run along their labels: pooled [B, L, W, d] float32, valid [B, W].

    The base model and the labels do not change while routers train, so this is computed once for a data set, and
    `moe.depth.router.stacked_logits` of it is all that an epoch needs. Arguments and errors as `masked_forward`, the
    tokens being prompts.
    """
    labels = _labels_of_rows(config, tokens, lengths, labels)
    return _forced_windows(config, depth, params, router_state, jnp.asarray(tokens), jnp.asarray(lengths), labels)


@partial(jax.jit, static_argnames="depth")
def _stacked_logits(depth: DepthConfig, routers: Any, pooled: Array, valid: Array) -> Array:
    return stacked_logits(depth, routers, pooled, valid)


def teacher_forced_logits(
    config: ModelConfig,
    depth: DepthConfig,
    params: Any,
    router_state: Any,
    routers: Any,
    tokens: Array,
    lengths: Array,
    labels: Any,
) -> Array:
    """Logits [B, L, 3] of all routers while execution follows the labels [B, L]; differentiable in the routers."""
    pooled, valid = forced_windows(config, depth, params, router_state, tokens, lengths, labels)
    return _stacked_logits(depth, routers, pooled, valid)


def decide(
    config: ModelConfig,
    depth: DepthConfig,
    params: Any,
    router_state: Any,
    routers: Any,
    policy: DepthPolicy,
    tokens: Array,
    lengths: Array,
) -> Decisions:
    """Routers decide for each prompt, layer after layer, on the stream their own decisions made; masked execution.

    Raises:
      ValueError: an empty prompt.
    """
    _check_lengths(tokens, lengths)
    tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
    return _decide(config, depth, params, router_state, routers, policy, tokens, lengths)


# --- compiled ---


def _masked(block: Apply, x: Array, labels: Array) -> Array:
    once = block(x)
    labels = labels[:, None, None]
    return jnp.where(labels == 0, x, jnp.where(labels == 1, once, block(once)))


def _branched(block: Apply, x: Array, label: Array) -> Array:
    return jax.lax.switch(label, (lambda x: x, block, lambda x: block(block(x))), x)


@partial(jax.jit, static_argnames="config")
def _masked_forward(config: ModelConfig, params: Any, state: Any, tokens: Array, lengths: Array, labels: Array) -> Any:
    step = lambda block, x, labels: (_masked(block, x, labels), None)  # noqa: E731
    return scan_blocks(config, params, state, tokens, lengths, labels.T, step)[0]


@partial(jax.jit, static_argnames="config")
def _agreed_forward(config: ModelConfig, params: Any, state: Any, tokens: Array, lengths: Array, labels: Array) -> Any:
    step = lambda block, x, label: (_branched(block, x, label), None)  # noqa: E731
    return scan_blocks(config, params, state, tokens, lengths, labels, step)[0]


@partial(jax.jit, static_argnames=("config", "depth"))
def _forced_windows(
    config: ModelConfig, depth: DepthConfig, params: Any, state: Any, tokens: Array, lengths: Array, labels: Array
) -> tuple[Array, Array]:
    pool, valid = _pooling(config, depth, params, tokens, lengths)

    def step(block: Apply, x: Array, labels: Array) -> tuple[Array, Array]:
        return _masked(block, x, labels), pool(x)

    pooled = scan_blocks(config, params, state, tokens, lengths, labels.T, step)[1]
    return jnp.moveaxis(pooled, 0, 1), valid


@partial(jax.jit, static_argnames=("config", "depth", "policy"))
def _decide(
    config: ModelConfig,
    depth: DepthConfig,
    params: Any,
    state: Any,
    routers: Any,
    policy: DepthPolicy,
    tokens: Array,
    lengths: Array,
) -> Decisions:
    pool, valid = _pooling(config, depth, params, tokens, lengths)

    def step(block: Apply, x: Array, router: Any) -> tuple[Array, tuple[Array, Array]]:
        logits = pooled_logits(depth, router, pool(x), valid)
        labels = policy(logits)
        return _masked(block, x, labels), (labels, logits)

    output, (labels, logits) = scan_blocks(config, params, state, tokens, lengths, routers, step)
    return Decisions(labels.T, jnp.moveaxis(logits, 0, 1), output)


def _pooling(
    config: ModelConfig, depth: DepthConfig, params: Any, tokens: Array, lengths: Array
) -> tuple[Apply, Array]:
    """What a router reads of the stream x [B, S, d], pooled [B, W, d]; and which windows there are, [B, W]."""
    mask = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    embedded, valid = window_pool(_embedded(config, params, tokens), mask, depth.num_windows)
    if depth.reads == "embedding":
        return lambda x: embedded, valid
    return lambda x: window_pool(x, mask, depth.num_windows)[0], valid


def _embedded(config: ModelConfig, params: Any, tokens: Array) -> Array:
    return jnp.take(params["embedding"], tokens, axis=0).astype(config.compute_dtype)


def scan_blocks(
    config: ModelConfig,
    params: Any,
    router_state: Any,
    tokens: Array,
    lengths: Array,
    per_layer: Any,
    step: Callable[[Apply, Array, Any], tuple[Array, Any]],
) -> tuple[DepthOutput, Any]:
    """Carries the stream x through step(block, x, per_layer[l]) -> (x, out), bottom to top; outs are stacked [L, ...].

    per_layer's leaves are [L, ...]. Layers of one kind are one `lax.scan`, as in the `Transformer`.
    """
    params = jax.lax.stop_gradient(params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    shared = Shared(tokens, segment_ids, positions, rotations(config, positions))
    windows = jnp.array(config.windows, jnp.int32) if config.windows else None
    x, outs, layer, moe_layer = _embedded(config, params, tokens), [], 0, 0
    for run, (kind, group) in enumerate(groupby(config.layer_kinds)):
        length = len(list(group))
        of_run, of_state = slice(layer, layer + length), slice(moe_layer, moe_layer + length)
        block = Block(config, kind)

        def body(x: Array, inputs: Any, block: Block = block) -> tuple[Array, Any]:
            weights, layer, of_step = inputs
            apply: Any = partial(block.apply, {"params": weights})
            return step(lambda x: apply(x, layer, shared)[0], x, of_step)

        state = jax.tree.map(lambda leaf, of=of_state: leaf[of], router_state) if kind == "moe" else {}
        inputs = PerLayer(state, None, None if windows is None else windows[of_run])
        of_step = jax.tree.map(lambda leaf, of=of_run: leaf[of], per_layer)
        x, out = jax.lax.scan(body, x, (params[f"runs_{run}"], inputs, of_step), unroll=config.unroll or length)
        outs.append(out)
        layer, moe_layer = layer + length, moe_layer + length * (kind == "moe")
    hidden: Any = rms_norm(x, params["final_norm"]["scale"], config.norm_eps)
    head = params["embedding"] if config.tie_embeddings else params["head"]
    return DepthOutput(hidden, head), jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outs)


# --- checks ---


def _check_lengths(tokens: Any, lengths: Sequence[int] | Array) -> None:
    given = np.asarray(lengths)
    require(given.shape == np.shape(tokens)[:1], "lengths shape", given.shape, f"[B = {np.shape(tokens)[0]}]")
    fits = bool(np.all((given >= 1) & (given <= np.shape(tokens)[1])))
    require(fits, "lengths", given.tolist()[:5], f"1 to S = {np.shape(tokens)[1]} tokens: no sequence is empty")


def _labels_of_rows(config: ModelConfig, tokens: Any, lengths: Any, labels: Any) -> np.ndarray:
    _check_lengths(tokens, lengths)
    labels = check_labels(labels, config.num_layers)
    want = (np.shape(tokens)[0], config.num_layers)
    require(labels.shape == want, "labels shape", labels.shape, f"[B, L] = {want}")
    return labels
