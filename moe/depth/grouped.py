"""Batches with mixed decisions, layer by layer: the rows that run a block are gathered and run it together.

Dr.LLM's batching (2510.12773): a repeat is a second pass of its rows; here the first pass of executing and repeating
rows is one, for the weights are the same. Which rows those are is known on the host alone, so every layer is a program
of its own and its decisions wait for it; group sizes are rounded up to powers of two, so that few are compiled.

Legend: B sequences, G rows of a group, Q new positions, C cache slots, d hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe.config import LayerKind, ModelConfig, require
from moe.depth.execute import PathCache, check_plain, padded_prompts
from moe.depth.paths import check_labels, path_of
from moe.depth.policy import DepthPolicy
from moe.depth.router import DepthConfig, route
from moe.generate import Generator, Weights, apply_norm, empty_caches
from moe.transformer import Block, Cache, PerLayer, Shared, rotations

# (layer, stream entering it [B, Q, d], embedding [B, Q, d]) -> decisions [B].
Decide = Callable[[int, Array, Array], np.ndarray]


@dataclass
class GroupedCache:
    """What both passes of every layer wrote, and the decisions [B, L] it was written under; None before the first."""

    passes: tuple[tuple[Cache, Cache], ...]
    labels: np.ndarray | None = None

    def of_row(self, row: int) -> PathCache:
        """One sequence's part, to go on along its path."""
        if self.labels is None:
            raise ValueError("cache.labels = None: expected a cache that was written")
        path = path_of(self.labels[row])
        steps = [(layer, path[:i].count(layer)) for i, layer in enumerate(path)]
        return PathCache(
            tuple(tuple(leaf[row : row + 1] for leaf in self.passes[layer][again]) for layer, again in steps), path
        )


def empty_grouped_cache(config: ModelConfig, batch: int, slots: int) -> GroupedCache:
    """A cache of C = `slots` positions for both passes of every layer."""
    return GroupedCache(tuple(zip(empty_caches(config, batch, slots), empty_caches(config, batch, slots))))


def given(labels: np.ndarray) -> Decide:
    """Decisions that are known, [B, L]; those of a cache, when decoding."""
    return lambda layer, x, embedded: labels[:, layer]


def routed(depth: DepthConfig, routers: Any, policy: DepthPolicy, lengths: np.ndarray) -> Decide:
    """Decisions of routers on prompts of `lengths` [B], padded on the right; for a prompt's pass only."""

    def call(layer: int, x: Array, embedded: Array) -> np.ndarray:
        router = jax.tree.map(lambda leaf: leaf[layer], routers)
        return np.asarray(_decisions(depth, policy, router, embedded if depth.reads == "embedding" else x, lengths))

    return call


@partial(jax.jit, static_argnames=("depth", "policy"))
def _decisions(depth: DepthConfig, policy: DepthPolicy, router: Any, h: Array, lengths: Array) -> Array:
    return policy(route(depth, router, h, jnp.arange(h.shape[1])[None] < lengths[:, None]))


def grouped_forward(
    config: ModelConfig,
    weights: Weights,
    decide: Decide,
    tokens: Array,
    segment_ids: Array,
    positions: Array,
    cache: GroupedCache | None = None,
) -> tuple[Array, np.ndarray, GroupedCache | None]:
    """The model on new tokens [B, Q], each row along its own decisions.

    Args:
      config, weights: of the model, `moe.generate.unstacked`.
      decide: called once for every layer, bottom to top: `given` or `routed`.
      tokens, segment_ids, positions: [B, Q], as `moe.generate.cached_forward`.
      cache: written at the positions and returned; its arrays are given away.

    Returns:
      hidden [B, Q, d] after the final norm, the labels [B, L] that were decided, and the cache.

    Raises:
      ValueError: decisions other than 0, 1, 2 for each row, or other than those the cache was written under.
    """
    check_plain(weights)
    x = embedded = _embedded(config, weights, tokens)
    shared = Shared(tokens, segment_ids, positions, rotations(config, positions))
    labels = np.zeros((len(tokens), config.num_layers), np.int32)
    passes = [] if cache is None else list(cache.passes)
    for i, kind in enumerate(config.layer_kinds):
        labels[:, i] = check_decisions(decide(i, x, embedded), len(tokens), i)
        if cache is not None and cache.labels is not None:
            same = np.array_equal(labels[:, i], cache.labels[:, i])
            require(same, f"decisions of layer {i}", labels[:, i].tolist(), "those the cache was written under")
        layer = PerLayer(weights.router_states[i], None, None)
        run = partial(_run_rows, config, kind, config.windows[i] if config.windows else 0, weights.layers[i], layer)
        of_layer: list[Any] = [None, None] if cache is None else list(passes[i])
        for again in (0, 1):
            if (rows := np.flatnonzero(labels[:, i] > again)).size:
                x, of_layer[again] = run(shared, padded_rows(rows, len(tokens)), x, of_layer[again])
        if cache is not None:
            passes[i] = (of_layer[0], of_layer[1])
    return _normed(config, weights, x), labels, None if cache is None else GroupedCache(tuple(passes), labels)


def check_decisions(decisions: np.ndarray, batch: int, layer: int) -> np.ndarray:
    """ValueError unless there is one decision for every row."""
    decisions = np.asarray(decisions)
    require(decisions.shape == (batch,), f"decisions of layer {layer}, shape", decisions.shape, f"[B = {batch}]")
    return check_labels(decisions[:, None], 1)[:, 0]


def padded_rows(rows: np.ndarray, batch: int) -> np.ndarray | None:
    """Row numbers filled up with B, which is no row, to a power of two; None for all rows."""
    size = min(batch, 1 << (len(rows) - 1).bit_length())
    if len(rows) == batch:
        return None
    return np.concatenate([rows, np.full(size - len(rows), batch)]).astype(np.int32)


@partial(jax.jit, static_argnames=("config", "kind", "window"), donate_argnames="cache")
def _run_rows(
    config: ModelConfig,
    kind: LayerKind,
    window: int,
    weights: Any,
    layer: PerLayer,
    shared: Shared,
    rows: Array | None,
    x: Array,
    cache: Cache | None,
) -> tuple[Array, Cache | None]:
    """x [B, Q, d] and the cache [B, C, ...] with the block run on the rows [G] alone."""
    if rows is None:
        take, put = (lambda a: a), (lambda a, b: b)
    else:  # a row number B reads some row and is written to none
        take = lambda a: jnp.take(a, rows, axis=0, mode="clip")  # noqa: E731
        put = lambda a, b: a.at[rows].set(b, mode="drop")  # noqa: E731
    inputs = layer._replace(window=window or None)
    of_rows: Any = [jax.tree.map(take, tree) for tree in (x, shared, cache)]
    out, (*_, written) = Block(config, kind).apply(weights, of_rows[0], inputs, *of_rows[1:])  # pyright: ignore
    return put(x, out), jax.tree.map(put, cache, written)


@partial(jax.jit, static_argnames="config")
def _embedded(config: ModelConfig, weights: Weights, tokens: Array) -> Array:
    return jnp.take(weights.embedding, tokens, axis=0).astype(config.compute_dtype)


@partial(jax.jit, static_argnames="config")
def _normed(config: ModelConfig, weights: Weights, x: Array) -> Array:
    return apply_norm(config, weights, x)


def decided_labels(
    base: Generator, depth: DepthConfig, routers: Any, policy: DepthPolicy, prompts: Sequence[Sequence[int]]
) -> np.ndarray:
    """The routers' labels [B, L] for prompts, by one pass over them that skips what they skip.

    Together with `moe.depth.execute.generate_along`, routed generation; the prompts are then run twice, once to decide
    and once along what was decided.
    """
    tokens, lengths = padded_prompts(base.config, prompts)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    segment_ids = (positions < lengths[:, None]).astype(np.int32)
    decide = routed(depth, routers, policy, lengths)
    where = jnp.asarray(tokens), jnp.asarray(segment_ids), jnp.asarray(positions)
    return grouped_forward(base.config, base.weights, decide, *where)[1]
