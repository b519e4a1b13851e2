"""A model along a path: blocks left out are not there, blocks that repeat are there twice (Dr.LLM, 2510.12773).

`along` writes a path as a model of its own, whose layers are the path's steps. Everything that runs a model then runs
it: a cache has one entry per (layer, repetition) and none for a skipped layer, while positions come from the tokens and
not from any layer's cache. A decision is taken once, on the prompt, and a sequence decodes along the path it began.
Layers are arguments of the compiled programs, so all paths of one length (and sequence of layer kinds and windows)
share one: at most 2L + 1 programs for a model with one kind of layer.

Legend: B sequences, S positions (padded), C cache slots, d hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from moe.config import LayerKind, ModelConfig, require
from moe.depth.paths import Path, check_labels, check_path, path_of
from moe.generate import Generator, Weights, cached_forward, check_prompts, empty_caches, padded_length
from moe.transformer import Cache


@dataclass(frozen=True)
class PathConfig(ModelConfig):
    """The config of a model along a path: layers of any kinds in any order, also none. Made by `along`."""

    kinds: tuple[LayerKind, ...] = ()

    def __post_init__(self) -> None:
        """Nothing is checked again: all but the layers is the model's own, and those a checked path."""

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        return self.kinds


def along(config: ModelConfig, weights: Weights, path: Sequence[int]) -> tuple[PathConfig, Weights]:
    """The model whose layers are the steps of a path; layers are shared, not copied.

    Raises:
      ValueError: a path that `check_path` refuses.
    """
    path = check_path(path, config.num_layers)
    of_path = {
        "num_layers": len(path),
        "windows": tuple(config.windows[layer] for layer in path) if config.windows else (),
        "kinds": tuple(config.layer_kinds[layer] for layer in path),
    }
    layers, states = (tuple(of_layers[i] for i in path) for of_layers in (weights.layers, weights.router_states))
    return PathConfig(**(vars(config) | of_path)), weights._replace(layers=layers, router_states=states)


@partial(jax.jit, static_argnames="config")
def _full_forward(config: PathConfig, weights: Weights, tokens: Array, lengths: Array) -> Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    no_caches: Any = (None,) * config.num_layers  # a layer without one attends to the sequence itself
    return cached_forward(config, weights, tokens, segment_ids, positions, no_caches)[0]


def check_plain(weights: Weights) -> None:
    """ValueError for layers with adapters, which only `generate_along` applies."""
    adapted = [i for i, layer in enumerate(weights.layers) if "adapters" in layer]
    require(not adapted, "weights.layers with adapters", adapted, "none: merge them, or generate")


def forward_along(config: ModelConfig, weights: Weights, path: Sequence[int], tokens: Array, lengths: Array) -> Array:
    """Hidden [B, S, d] after the final norm of whole sequences, all along one path and without a cache.

    Args:
      config, weights: of the model, `moe.generate.unstacked`; logits are hidden @ weights.head.
      path: blocks to run.
      tokens: [B, S] int, of which `lengths` [B] are real, padded on the right.
    """
    check_plain(weights)
    return _full_forward(*along(config, weights, path), jnp.asarray(tokens), jnp.asarray(lengths))


# Shared by all paths of one length; the cache is given away.
_cached_forward = jax.jit(cached_forward, static_argnames="config", donate_argnames="caches")


@struct.dataclass
class PathCache:
    """What a sequence's steps wrote: layers[i] is of the i-th step of the path, which is no leaf of the tree."""

    layers: tuple[Cache, ...]
    path: Path = struct.field(pytree_node=False)


def empty_path_cache(config: ModelConfig, path: Sequence[int], batch: int, slots: int) -> PathCache:
    """A cache of C = `slots` positions for every step of a path."""
    path = check_path(path, config.num_layers)
    one = empty_caches(config, batch, slots)
    return PathCache(tuple(jax.tree.map(jnp.copy, one[layer]) for layer in path), path)


def cached_forward_along(
    config: ModelConfig,
    weights: Weights,
    path: Sequence[int],
    tokens: Array,
    segment_ids: Array,
    positions: Array,
    cache: PathCache,
) -> tuple[Array, PathCache]:
    """`moe.generate.cached_forward` along a path: hidden [B, Q, d] of new tokens at their positions [B, Q].

    Compiled once for all paths of a length; the old cache's arrays are given away.

    Raises:
      ValueError: a bad path, or a cache that was built along another one.
    """
    path = check_path(path, config.num_layers)
    require(cache.path == path, "cache.path", cache.path, f"{path}, the path that is run")
    check_plain(weights)
    of_path = along(config, weights, path)
    hidden, layers = _cached_forward(*of_path, tokens, segment_ids, positions, cache.layers)
    return hidden, PathCache(layers, path)


class PathGenerator(Generator):
    """A `Generator` along one path; the layers, and adapters where there are any, are those of `base`."""

    def __init__(self, base: Generator, path: Sequence[int]) -> None:
        vars(self).update(vars(base))
        self.config, self.weights = along(base.config, base.weights, path)


def generate_along(
    base: Generator, prompts: Sequence[Sequence[int]], labels: np.ndarray, **options: Any
) -> Iterator[np.ndarray]:
    """Generates every prompt along its own path, prompts of one path together.

    Args:
      base: of the model.
      prompts, options: as `Generator.__call__`; draws are a function of a prompt's place among those of its path.
      labels: [B, L], a decision for each prompt and layer.

    Yields:
      The next token of every sequence, int32 [B]; -1 for one that has ended.

    Raises:
      ValueError: as `Generator.__call__`; labels that are none, or not one row for each prompt.
    """
    labels = check_labels(labels, base.config.num_layers)
    require(labels.ndim == 2 and len(labels) == len(prompts), "labels shape", labels.shape, f"[{len(prompts)}, L]")
    groups: dict[Path, list[int]] = {}
    for row, of_row in enumerate(labels):
        groups.setdefault(path_of(of_row), []).append(row)
    streams = [
        (rows, PathGenerator(base, path)([prompts[row] for row in rows], **options)) for path, rows in groups.items()
    ]
    return _merged(streams, len(prompts))


def _merged(streams: Sequence[tuple[list[int], Iterator[np.ndarray]]], batch: int) -> Iterator[np.ndarray]:
    """Streams of some rows each as one stream of all rows, -1 where a stream has ended."""
    while True:
        tokens, ended = np.full(batch, -1, np.int32), True
        for rows, stream in streams:
            if (new := next(stream, None)) is not None:
                tokens[rows], ended = new, False
        if ended:
            return
        yield tokens


def padded_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as tokens [B, S] int32, padded on the right to a length that few programs are compiled for, and lengths.

    Raises:
      ValueError: no prompts, an empty one, a token outside of the vocabulary, more of them than the context.
    """
    check_prompts(config, prompts)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), padded_length(lengths.max())), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    return tokens, lengths
