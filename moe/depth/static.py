"""Depth without routers: what learned decisions must beat at equal block executions.

Random skipping; the majority label of each layer; ShortGPT's block influence (Men et al., 2403.03853): 1 - cos of what
enters a block and what leaves it, blocks of the least influence removed; early exit after the first blocks.

Legend: N questions, B sequences, S positions, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe.config import ModelConfig, require
from moe.depth.paths import EXECUTE, Path, check_labels, path_of
from moe.depth.scanned import scan_blocks


def random_skip(num_layers: int, skipped: int, seed: int) -> Path:
    """The full path without `skipped` blocks drawn evenly."""
    require(0 <= skipped <= num_layers, "skipped", skipped, f"0 to {num_layers} blocks")
    kept = np.random.default_rng(seed).permutation(num_layers)[skipped:]
    return tuple(sorted(kept.tolist()))


def shuffled_labels(labels: np.ndarray, seed: int) -> np.ndarray:
    """Labels [N, L] with each row's decisions at random layers: for every question as many skips and repeats."""
    return np.random.default_rng(seed).permuted(check_labels(labels, labels.shape[-1]), axis=-1)


def majority_path(labels: np.ndarray) -> Path:
    """The path of each layer's most frequent label in [N, L]; ties go to execute, then to skip."""
    labels = check_labels(labels, labels.shape[-1])
    require(labels.ndim == 2 and len(labels) > 0, "labels shape", labels.shape, "[N, L], of at least one question")
    counts = np.stack([(labels == label).sum(axis=0) for label in (0, 1, 2)], axis=-1) * 2
    counts[:, EXECUTE] += 1
    return path_of(counts.argmax(axis=-1))


def early_exit(num_layers: int, executed: int) -> Path:
    """The first `executed` blocks."""
    require(0 <= executed <= num_layers, "executed", executed, f"0 to {num_layers} blocks")
    return tuple(range(executed))


def block_influence(config: ModelConfig, params: Any, router_state: Any, tokens: Any, lengths: Any) -> np.ndarray:
    """ShortGPT's influence [L] of each block at full depth, a mean over the real tokens of [B, S]; in [0, 2].

    Args:
      params, router_state: of a `Transformer`.
      tokens: [B, S] int, of which `lengths` [B] are real, padded on the right.
    """
    return np.asarray(_block_influence(config, params, router_state, jnp.asarray(tokens), jnp.asarray(lengths)))


@partial(jax.jit, static_argnames="config")
def _block_influence(config: ModelConfig, params: Any, router_state: Any, tokens: Array, lengths: Array) -> Array:
    mask = jnp.arange(tokens.shape[1])[None] < lengths[:, None]

    def step(block: Any, x: Array, _: None) -> tuple[Array, Array]:
        out = block(x)
        a, b = x.astype(jnp.float32), out.astype(jnp.float32)
        cosine = jnp.sum(a * b, -1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))
        return out, 1.0 - jnp.sum(jnp.where(mask, cosine, 0.0)) / jnp.sum(mask)

    return scan_blocks(config, params, router_state, tokens, lengths, None, step)[1]


def least_influence(influence: Sequence[float] | np.ndarray, skipped: int) -> Path:
    """The full path without the `skipped` blocks of the least influence [L]."""
    require(0 <= skipped <= len(influence), "skipped", skipped, f"0 to {len(influence)} blocks")
    return tuple(sorted(np.argsort(influence, kind="stable")[skipped:].tolist()))
