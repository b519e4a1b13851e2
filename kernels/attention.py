"""Causal, grouped-query, segment-masked attention, fast on CPU.

Legend: B sequences, S positions, H query heads, G key-value heads, R = H / G, D head width, Q positions of one query
block, U key-value heads unrolled in one loop step.

XLA runs batched small products one after another in a slow loop on CPU. Here a loop walks (sequence, U heads) and its
body holds plain 2-D products only, which go to the multi-threaded library, U independent chains at a time. Queries
are cut into blocks whose keys end at the block's own last position (static prefixes), which skips most of the upper
triangle. The backward recomputes probabilities from the log-sum-exp (FlashAttention-2, Dao 2023, arXiv 2307.08691,
equations of section 2.3.2), so nothing S x S outlives a loop step.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels.checks import require, require_choice, require_integer, require_shape
from kernels.products import dot_lt, dot_rt, wide

Implementation = Literal["auto", "reference", "blocks"]

_MASKED = -1e30  # finite: a row of nothing but masked scores must not become NaN
_QUERY_BLOCK = 128
_MAX_QUERY_BLOCKS = 4
_MAX_UNROLL = 4


def _query_blocks(length: int) -> list[tuple[int, int]]:
    """Static (first, end) positions of the query blocks; the keys of a block are [0, end)."""
    count = max(1, min(_MAX_QUERY_BLOCKS, length // _QUERY_BLOCK))
    size = -(-length // count)
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def _scores(q: Array, k: Array, segment_ids: Array, first: int, end: int) -> Array:
    """Masked scores of queries [first, end) of R stacked heads, [R * Q, D], against keys [0, end): [R * Q, end]."""
    scores = dot_rt(q, k, accumulate=True)
    repeats = q.shape[0] // (end - first)
    position = jnp.tile(jnp.arange(first, end), repeats)
    segment = jnp.tile(segment_ids[first:end], repeats)
    causal = position[:, None] >= jnp.arange(end)[None, :]
    return jnp.where(causal & (segment[:, None] == segment_ids[None, :end]), scores, _MASKED)


def _stack(x_SRD: Array, first: int, end: int) -> Array:
    """Positions [first, end) of R heads as rows, [R * Q, ...]."""
    return jnp.swapaxes(x_SRD[first:end], 0, 1).reshape(-1, *x_SRD.shape[2:])


def _unstack(rows: Array, repeats: int) -> Array:
    """[R * Q, ...] -> [Q, R, ...]."""
    return jnp.swapaxes(rows.reshape(repeats, -1, *rows.shape[1:]), 0, 1)


def _head_forward(q_SRD: Array, k_SD: Array, v_SD: Array, segment_S: Array) -> tuple[Array, Array]:
    """One key-value head and its R (scaled) query heads: output [S, R, D] and log-sum-exp [S, R]."""
    outputs, log_sums = [], []
    for first, end in _query_blocks(k_SD.shape[0]):
        scores = _scores(_stack(q_SRD, first, end), k_SD[:end], segment_S, first, end)
        top = jnp.max(scores, axis=1)
        weights = jnp.exp(scores - top[:, None])
        total = jnp.sum(weights, axis=1)
        out = (weights.astype(v_SD.dtype) @ v_SD[:end]) / total[:, None].astype(v_SD.dtype)
        outputs.append(_unstack(out, q_SRD.shape[1]))
        log_sums.append(_unstack(top + jnp.log(total), q_SRD.shape[1]))
    return jnp.concatenate(outputs), jnp.concatenate(log_sums)


def _head_backward(
    q_SRD: Array, k_SD: Array, v_SD: Array, segment_S: Array, log_sum_SR: Array, delta_SR: Array, g_SRD: Array
) -> tuple[Array, Array, Array]:
    """Gradients of the scaled queries, keys and values; keys' and values' in float32."""
    dq, dk, dv = [], None, None
    for first, end in reversed(_query_blocks(k_SD.shape[0])):
        q, g = _stack(q_SRD, first, end), _stack(g_SRD, first, end)
        log_sum, delta = _stack(log_sum_SR, first, end), _stack(delta_SR, first, end)
        weights = jnp.exp(_scores(q, k_SD[:end], segment_S, first, end) - log_sum[:, None])
        dweights = dot_rt(g, v_SD[:end], accumulate=True)
        dscores = (weights * (dweights - delta[:, None])).astype(q.dtype)
        dq.append(_unstack(dscores @ k_SD[:end], q_SRD.shape[1]))
        dk_block, dv_block = dot_lt(dscores, q), dot_lt(weights.astype(g.dtype), g)
        dk = dk_block if dk is None else dk.at[:end].add(dk_block)  # the last block covers all keys
        dv = dv_block if dv is None else dv.at[:end].add(dv_block)
    return jnp.concatenate(dq[::-1]), jnp.asarray(dk), jnp.asarray(dv)


def _unroll(num_groups: int) -> int:
    return max(u for u in range(1, _MAX_UNROLL + 1) if num_groups % u == 0)


def _steps(x: Array, num_groups: int) -> Array:
    """[B, S, G * R, ...] -> [B * G / U, S, U, R, ...]: what one loop step reads. No copy when G = U."""
    batch, length, heads, *rest = x.shape
    unroll = _unroll(num_groups)
    x = x.reshape(batch, length, num_groups // unroll, unroll, heads // num_groups, *rest)
    return jnp.moveaxis(x, 2, 1).reshape(-1, length, *x.shape[3:])


def _unsteps(x: Array, batch: int) -> Array:
    """The inverse: [B * G / U, S, U, R, ...] -> [B, S, H, ...]."""
    _, length, unroll, repeats, *rest = x.shape
    x = jnp.moveaxis(x.reshape(batch, -1, length, unroll, repeats, *rest), 1, 2)
    return x.reshape(batch, length, -1, *rest)


def _segment_steps(segment_BS: Array, num_groups: int) -> Array:
    return jnp.repeat(segment_BS, num_groups // _unroll(num_groups), axis=0)


def _keep(x_BSHD: Array, segment_BS: Array) -> Array:
    """Zeroes padding positions."""
    return jnp.where((segment_BS != 0)[:, :, None, None], x_BSHD, jnp.zeros((), x_BSHD.dtype))


def _blocks_forward(scale: float, q: Array, k: Array, v: Array, segment_ids: Array) -> tuple[Array, Array]:
    """Output [B, S, H, D] (padding rows not yet zeroed) and log-sum-exp [B, S, H]."""
    batch, groups = q.shape[0], k.shape[2]

    def body(carry: None, step: tuple[Array, Array, Array, Array]):
        q, k, v, segment = step
        heads = [_head_forward(q[:, u] * scale, k[:, u, 0], v[:, u, 0], segment) for u in range(q.shape[1])]
        return carry, tuple(jnp.stack(parts, axis=1) for parts in zip(*heads))

    steps = _steps(q, groups), _steps(k, groups), _steps(v, groups), _segment_steps(segment_ids, groups)
    _, (out, log_sum) = lax.scan(body, None, steps)
    return _unsteps(out, batch), _unsteps(log_sum, batch)


def _blocks_backward(
    scale: float, q: Array, k: Array, v: Array, segment_ids: Array, out: Array, log_sum: Array, g: Array
) -> tuple[Array, Array, Array]:
    batch, groups = q.shape[0], k.shape[2]
    delta = jnp.sum(out.astype(log_sum.dtype) * g.astype(log_sum.dtype), axis=-1)

    def body(carry: None, step: tuple[Array, ...]):
        q, k, v, log_sum, delta, g, segment = step
        heads = [
            _head_backward(q[:, u] * scale, k[:, u, 0], v[:, u, 0], segment, log_sum[:, u], delta[:, u], g[:, u])
            for u in range(q.shape[1])
        ]
        dq, dk, dv = (jnp.stack(parts, axis=1) for parts in zip(*heads))
        return carry, ((dq * scale).astype(q.dtype), dk.astype(k.dtype)[:, :, None], dv.astype(v.dtype)[:, :, None])

    steps = (*(_steps(x, groups) for x in (q, k, v, log_sum, delta, g)), _segment_steps(segment_ids, groups))
    _, gradients = lax.scan(body, None, steps)
    dq, dk, dv = (_unsteps(x, batch) for x in gradients)
    return dq, dk, dv


def _einsum_forward(scale: float, q: Array, k: Array, v: Array, segment_ids: Array) -> tuple[Array, Array]:
    """The plain version of `_blocks_forward`, for accelerators and as the oracle."""
    batch, length, heads, _ = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, q.shape[3])
    scores = jnp.einsum("bqgrd,bkgd->bgrqk", q * scale, k, preferred_element_type=wide(q.dtype))
    causal = jnp.tril(jnp.ones((length, length), bool))
    mask = causal[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])
    scores = jnp.where(mask[:, None, None], scores, _MASKED)
    log_sum = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - log_sum[..., None]).astype(v.dtype)
    out = jnp.einsum("bgrqk,bkgd->bqgrd", weights, v).reshape(batch, length, heads, -1)
    return out, jnp.moveaxis(log_sum, 3, 1).reshape(batch, length, heads)


def _einsum_backward(
    scale: float, q: Array, k: Array, v: Array, segment_ids: Array, out: Array, log_sum: Array, g: Array
) -> tuple[Array, Array, Array]:
    _, transpose = jax.vjp(lambda q, k, v: _einsum_forward(scale, q, k, v, segment_ids)[0], q, k, v)
    return transpose(g)


def attention_reference(q: Array, k: Array, v: Array, segment_ids: Array, *, scale: float | None = None) -> Array:
    """The oracle: all scores at once. Arguments and result as in `attention`; differentiated by JAX."""
    scale_q = q.shape[-1] ** -0.5 if scale is None else scale
    return _keep(_einsum_forward(scale_q, q, k, v, segment_ids)[0], segment_ids)


def _choose(implementation: Implementation, blocks, einsum, *args):
    if implementation == "blocks":
        return blocks(*args)
    return lax.platform_dependent(*args, cpu=blocks, default=einsum)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(implementation: Implementation, scale: float, q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    return _attention_fwd(implementation, scale, q, k, v, segment_ids)[0]


def _attention_fwd(implementation: Implementation, scale: float, q: Array, k: Array, v: Array, segment_ids: Array):
    forward = partial(_blocks_forward, scale), partial(_einsum_forward, scale)
    out, log_sum = _choose(implementation, *forward, q, k, v, segment_ids)
    out = _keep(out, segment_ids)
    return out, (q, k, v, segment_ids, out, log_sum)


def _attention_bwd(implementation: Implementation, scale: float, residuals: tuple[Array, ...], g: Array):
    backward = partial(_blocks_backward, scale), partial(_einsum_backward, scale)
    return (*_choose(implementation, *backward, *residuals, _keep(g, residuals[3])), None)


_attention.defvjp(_attention_fwd, _attention_bwd)


def attention(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    *,
    implementation: Implementation = "auto",
    scale: float | None = None,
) -> Array:
    """Each position attends to itself and to earlier positions of its own segment. Softmax in float32.

    Under a mesh call it inside `jax.shard_map` with the batch (and, if wished, key-value heads with their query
    heads) sharded: the CPU path loops over B.

    Args:
      q: [B, S, H, D]. k, v: [B, S, G, D], H a multiple of G; query head h reads key-value head h // (H / G).
      segment_ids: [B, S] int; 0 is padding: its outputs are zero and it gets and gives no gradient.
      implementation: `blocks` (the CPU path), `reference`, or `auto`: blocks on CPU, else einsums.
      scale: multiplies q; None is D ** -0.5.

    Returns:
      [B, S, H, D] in q's dtype.

    Raises:
      ValueError: shapes, dtypes or options that do not fit.
    """
    require_choice("implementation", implementation, ("auto", "reference", "blocks"))
    require_shape("q", q, (None, None, None, None), "[B, S, H, D]")
    batch, length, heads, width = q.shape
    require_shape("k", k, (batch, length, None, width), f"[B = {batch}, S = {length}, G, D = {width}]")
    require_shape("v", v, k.shape, f"k's shape {tuple(k.shape)}")
    require(heads % k.shape[2] == 0, "k.shape[2]", k.shape[2], f"a divisor of the {heads} query heads")
    require_shape("segment_ids", segment_ids, (batch, length), f"[B = {batch}, S = {length}]")
    require_integer("segment_ids", segment_ids)
    scale = width**-0.5 if scale is None else float(scale)
    if implementation == "reference":
        return attention_reference(q, k, v, segment_ids, scale=scale)
    return _attention(implementation, scale, q, k, v, segment_ids)
