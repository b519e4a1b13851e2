"""Attention of a few new queries over a cache of keys and values, for decoding. No gradient is needed or defined here.

A cache slot's index is its position, so one comparison masks slots that are not written yet, that hold a longer
sequence's padding, or that a window has left behind.
Legend: B sequences, Q new positions, C slots, H query heads, G key-value heads, R = H / G, D head width, W value width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from kernels.checks import require, require_shape
from kernels.products import wide

_MASKED = -1e30


def cached_attention(
    q: Array,
    keys: Array,
    values: Array,
    positions: Array,
    *,
    window: Array | int | None = None,
    sinks: Array | None = None,
    scale: float | None = None,
) -> Array:
    """A query at position p sees the slots up to p. Softmax in float32.

    Args:
      q: [B, Q, H, D]. keys: [B, C, G, D], values: [B, C, G, W]; H a multiple of G.
      positions: [B, Q] int, below C, of the queries; their own keys are in the cache already.
      window, sinks, scale: as in `kernels.attention.attention`.

    Returns:
      [B, Q, H, W] in q's dtype.

    Raises:
      ValueError: shapes that do not fit.
    """
    require_shape("q", q, (None, None, None, None), "[B, Q, H, D]")
    batch, length, heads, width = q.shape
    require_shape("keys", keys, (batch, None, None, width), f"[B = {batch}, C, G, D = {width}]")
    require_shape("values", values, (*keys.shape[:3], None), f"[B, C, G, W] with keys' {tuple(keys.shape[:3])}")
    require_shape("positions", positions, (batch, length), f"[B = {batch}, Q = {length}]")
    groups = keys.shape[2]
    require(heads % groups == 0, "keys.shape[2]", groups, f"a divisor of the {heads} query heads")
    scale_q = width**-0.5 if scale is None else float(scale)

    grouped = (q * scale_q).reshape(batch, length, groups, heads // groups, width)
    scores = jnp.einsum("bqgrd,bcgd->bgrqc", grouped, keys, preferred_element_type=wide(q.dtype))
    behind = positions[:, :, None] - jnp.arange(keys.shape[1])[None, None, :]  # [B, Q, C]
    seen = behind >= 0
    if window is not None:
        seen &= (behind < window) | (jnp.asarray(window) == 0)
    scores = jnp.where(seen[:, None, None], scores, _MASKED)
    top = jnp.max(scores, axis=-1, keepdims=True)
    if sinks is not None:
        sink = sinks.astype(scores.dtype).reshape(1, groups, -1, 1, 1)
        top = jnp.maximum(top, sink)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sink - top)
    out = jnp.einsum("bgrqc,bcgw->bqgrw", (weights / total).astype(values.dtype), values)
    return out.reshape(batch, length, heads, -1)


def write_cache(cache: Array, new: Array, positions: Array) -> Array:
    """cache [B, C, ...] with new [B, Q, ...] at slots positions [B, Q]."""
    if new.shape[0] == new.shape[1] == 1:  # one slot: cheaper on CPU than a scatter
        start = (0, positions[0, 0]) + (0,) * (cache.ndim - 2)
        return jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype), start)
    rows = jnp.arange(cache.shape[0])[:, None]
    return cache.at[rows, positions].set(new.astype(cache.dtype), unique_indices=True)
