"""Causal, grouped-query, segment-masked attention, fast on CPU; sliding windows and sinks where a model has them.

Legend: B sequences, S positions, H query heads, G key-value heads, R = H / G, D head width (values may have another),
Q positions of one query block, U key-value heads unrolled in one loop step.

XLA runs batched small products one after another in a slow loop on CPU. Here a loop walks (sequence, U heads) and its
body holds plain 2-D products only, which go to the multi-threaded library, U independent chains at a time. Queries
are cut into blocks whose keys end at the block's own last position (static prefixes), which skips most of the upper
triangle. The backward recomputes probabilities from the log-sum-exp (FlashAttention-2, Dao 2023, arXiv 2307.08691,
equations of section 2.3.2), so nothing S x S outlives a loop step.

A sink is one more logit in a head's softmax, with no value (2309.17453; learned in gpt-oss). It only adds to the
log-sum-exp: the output is scaled once, and the backward's equations stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels.checks import require, require_choice, require_integer, require_shape
from kernels.products import dot_lt, dot_rt, wide

Implementation = Literal["auto", "reference", "blocks"]
Arrays = tuple[Array, ...]

_MASKED = -1e30  # finite: a row of nothing but masked scores must not become NaN
_QUERY_BLOCK = 64
_MAX_QUERY_BLOCKS = 4
_MAX_UNROLL = 4


def _query_blocks(length: int) -> list[tuple[int, int]]:
    """Static (first, end) positions of the query blocks; the keys of a block are [0, end)."""
    count = max(1, min(_MAX_QUERY_BLOCKS, length // _QUERY_BLOCK))
    size = -(-length // count)
    return [(first, min(first + size, length)) for first in range(0, length, size)]


class _Place(NamedTuple):
    """Where a loop step is: sequence b, key-value head g.

    It cuts from whole arrays. Of a cut of a cut XLA:CPU makes loops that it does not vectorise: the masked exponentials
    of a block took 66 us instead of 6.
    """

    segment_BS: Array
    window: Array | None
    b: Array
    g: Array

    def segments(self, first: int, end: int) -> Array:
        """Segment ids of positions [first, end)."""
        return lax.dynamic_slice(self.segment_BS, (self.b, first), (1, end - first))[0]

    def rows(self, x_BGRS: Array, first: int, end: int) -> Array:
        """Values of positions [first, end) of the head's R query heads, stacked as in `_stack`: [R * Q]."""
        size = (1, 1, x_BGRS.shape[2], end - first)
        return lax.dynamic_slice(x_BGRS, (self.b, self.g, 0, first), size).reshape(-1)


def _mask(place: _Place, repeats: int, first: int, end: int, query_axis: Literal[0, 1]) -> Array:
    """Which of the keys [0, end) the queries [first, end) of R stacked heads see: [R * Q, end], or its transpose."""

    def along_queries(x_Q: Array) -> Array:
        return jnp.expand_dims(jnp.tile(x_Q, repeats), 1 - query_axis)

    def along_keys(x: Array) -> Array:
        return jnp.expand_dims(x, query_axis)

    query, key = along_queries(jnp.arange(first, end)), along_keys(jnp.arange(end))
    causal = query >= key
    if place.window is not None:
        causal = causal & (query - key < place.window)
    return causal & (along_queries(place.segments(first, end)) == along_keys(place.segments(0, end)))


def _stack(x_SRD: Array, first: int, end: int) -> Array:
    """Positions [first, end) of R heads as rows, [R * Q, ...]."""
    return jnp.swapaxes(x_SRD[first:end], 0, 1).reshape(-1, *x_SRD.shape[2:])


def _unstack(rows: Array, repeats: int) -> Array:
    """[R * Q, ...] -> [Q, R, ...]."""
    return jnp.swapaxes(rows.reshape(repeats, -1, *rows.shape[1:]), 0, 1)


def _head_forward(place: _Place, q_SRD: Array, k_SD: Array, v_SD: Array) -> tuple[Array, Array]:
    """One key-value head and its R (scaled) query heads: output [S, R, D] and log-sum-exp [S, R]."""
    outputs, log_sums = [], []
    for first, end in _query_blocks(k_SD.shape[0]):
        mask = _mask(place, q_SRD.shape[1], first, end, query_axis=0)
        scores = jnp.where(mask, dot_rt(_stack(q_SRD, first, end), k_SD[:end], accumulate=True), _MASKED)
        top = jnp.max(scores, axis=1)
        weights = jnp.exp(scores - top[:, None])
        total = jnp.sum(weights, axis=1)
        out = (weights.astype(v_SD.dtype) @ v_SD[:end]) / total[:, None].astype(v_SD.dtype)
        outputs.append(_unstack(out, q_SRD.shape[1]))
        log_sums.append(_unstack(top + jnp.log(total), q_SRD.shape[1]))
    return jnp.concatenate(outputs), jnp.concatenate(log_sums)


def _head_backward(
    place: _Place, q_SRD: Array, k_SD: Array, v_SD: Array, g_SRD: Array, log_sum_BGRS: Array, delta_BGRS: Array
) -> tuple[Array, Array, Array]:
    """Gradients of the scaled queries, keys and values; keys' and values' in float32.

    Scores are [keys, R * Q] here: then only one of the five products has a transposed left side, the slow form.
    """
    dq, dk, dv = [], None, None
    for first, end in reversed(_query_blocks(k_SD.shape[0])):
        q, g = _stack(q_SRD, first, end), _stack(g_SRD, first, end)
        mask = _mask(place, q_SRD.shape[1], first, end, query_axis=1)
        scores = jnp.where(mask, dot_rt(k_SD[:end], q, accumulate=True), _MASKED)
        weights = jnp.exp(scores - place.rows(log_sum_BGRS, first, end)[None, :])
        dweights = dot_rt(v_SD[:end], g, accumulate=True)
        dscores = (weights * (dweights - place.rows(delta_BGRS, first, end)[None, :])).astype(q.dtype)
        dq.append(_unstack(dot_lt(dscores, k_SD[:end]), q_SRD.shape[1]))
        dk_block, dv_block = dscores @ q, weights.astype(g.dtype) @ g
        dk = dk_block if dk is None else dk.at[:end].add(dk_block)  # the last block covers all keys
        dv = dv_block if dv is None else dv.at[:end].add(dv_block)
    return jnp.concatenate(dq[::-1]), jnp.asarray(dk), jnp.asarray(dv)


def _grouped_heads(x: Array, num_groups: int) -> Array:
    """[B, S, H, ...] -> [B, S, G, R, ...], a free reshape."""
    return x.reshape(*x.shape[:2], num_groups, -1, *x.shape[3:])


def _unroll(num_groups: int) -> int:
    return max(u for u in range(1, _MAX_UNROLL + 1) if num_groups % u == 0)


def _over_heads(
    head_fn: Callable[..., tuple[Array, ...]], segment_BS: Array, window: Array | None, inputs: Arrays, outputs: Arrays
) -> Arrays:
    """Runs `head_fn(place, *inputs [S, R, ...]) -> outputs [S, R, ...]` for every sequence and head group.

    `inputs` and `outputs` are [B, S, G, R, ...]; each loop step slices and writes U head groups of one sequence, so
    heads are never transposed in memory.
    """
    batch, length, groups = inputs[0].shape[:3]
    unroll = _unroll(groups)

    def body(step: Array, outputs: Arrays) -> Arrays:
        b, first = step // (groups // unroll), step % (groups // unroll) * unroll

        def read(x: Array) -> Array:
            start = (b, 0, first) + (0,) * (x.ndim - 3)
            return lax.dynamic_slice(x, start, (1, length, unroll, *x.shape[3:]))[0]

        def write(x: Array, heads: tuple[Array, ...]) -> Array:
            rows = jnp.stack(heads, axis=1)[None].astype(x.dtype)
            return lax.dynamic_update_slice(x, rows, (b, 0, first) + (0,) * (x.ndim - 3))

        slices = [read(x) for x in inputs]
        results = [head_fn(_Place(segment_BS, window, b, first + u), *(x[:, u] for x in slices)) for u in range(unroll)]
        return tuple(write(x, heads) for x, heads in zip(outputs, zip(*results)))

    return lax.fori_loop(0, batch * (groups // unroll), body, outputs)


def _keep(x_BSHD: Array, segment_BS: Array) -> Array:
    """Zeroes padding positions."""
    return jnp.where((segment_BS != 0)[:, :, None, None], x_BSHD, jnp.zeros((), x_BSHD.dtype))


def _with_sinks(out: Array, log_sum: Array, sinks: Array | None) -> tuple[Array, Array]:
    """Output and log-sum-exp once the sinks [H] have joined the softmax."""
    if sinks is None:
        return out, log_sum
    total = jnp.logaddexp(log_sum, sinks.astype(log_sum.dtype)[None, None])
    return out * jnp.exp(log_sum - total)[..., None].astype(out.dtype), total


def _blocks_forward(
    scale: float, q: Array, k: Array, v: Array, segment_ids: Array, window: Array | None, sinks: Array | None
) -> tuple[Array, Array]:
    """Output [B, S, H, D] (padding rows not yet zeroed) and log-sum-exp [B, S, H]."""

    def head(place: _Place, q_SRD: Array, k_SRD: Array, v_SRD: Array) -> tuple[Array, Array]:
        return _head_forward(place, q_SRD * scale, k_SRD[:, 0], v_SRD[:, 0])

    inputs = tuple(_grouped_heads(x, k.shape[2]) for x in (q, k, v))
    rows = inputs[0].shape[:4]
    outputs = jnp.zeros((*rows, v.shape[3]), q.dtype), jnp.zeros(rows, wide(q.dtype))
    out, log_sum = _over_heads(head, segment_ids, window, inputs, outputs)
    return _with_sinks(out.reshape(*q.shape[:3], v.shape[3]), log_sum.reshape(q.shape[:3]), sinks)


def _blocks_backward(
    scale: float,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    window: Array | None,
    sinks: Array | None,
    out: Array,
    log_sum: Array,
    g: Array,
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of q, k, v and the sinks; `g` is zero at padding."""

    def positions_last(x_BSH: Array) -> Array:
        return jnp.moveaxis(_grouped_heads(x_BSH, k.shape[2]), 1, 3)

    log_sum_BGRS = positions_last(log_sum)
    delta = jnp.sum(out.astype(log_sum.dtype) * g.astype(log_sum.dtype), axis=-1)
    delta_BGRS = positions_last(delta)

    def head(place: _Place, q_SRD: Array, k_SRD: Array, v_SRD: Array, g_SRD: Array):
        k_SD, v_SD = k_SRD[:, 0], v_SRD[:, 0]
        dq, dk, dv = _head_backward(place, q_SRD * scale, k_SD, v_SD, g_SRD, log_sum_BGRS, delta_BGRS)
        return dq * scale, dk[:, None], dv[:, None]

    inputs = tuple(_grouped_heads(x, k.shape[2]) for x in (q, k, v, g))
    outputs = tuple(jnp.zeros_like(x) for x in inputs[:3])
    gradients = _over_heads(head, segment_ids, window, inputs, outputs)
    dq, dk, dv = (x.reshape(y.shape) for x, y in zip(gradients, (q, k, v)))
    if sinks is None:
        return dq, dk, dv, None
    share = jnp.exp(sinks.astype(log_sum.dtype)[None, None] - log_sum)
    return dq, dk, dv, -jnp.sum(share * delta, axis=(0, 1)).astype(sinks.dtype)


def _einsum_forward(
    scale: float, q: Array, k: Array, v: Array, segment_ids: Array, window: Array | None, sinks: Array | None
) -> tuple[Array, Array]:
    """The plain version of `_blocks_forward`, for accelerators and as the oracle."""
    batch, length, heads, _ = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, q.shape[3])
    scores = jnp.einsum("bqgrd,bkgd->bgrqk", q * scale, k, preferred_element_type=wide(q.dtype))
    behind = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    causal = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    mask = causal[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])
    scores = jnp.where(mask[:, None, None], scores, _MASKED)
    log_sum = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - log_sum[..., None]).astype(v.dtype)
    out = jnp.einsum("bgrqk,bkgd->bqgrd", weights, v).reshape(batch, length, heads, -1)
    return _with_sinks(out, jnp.moveaxis(log_sum, 3, 1).reshape(batch, length, heads), sinks)


def _einsum_backward(
    scale: float,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    window: Array | None,
    sinks: Array | None,
    out: Array,
    log_sum: Array,
    g: Array,
) -> tuple[Array, Array, Array, Array | None]:
    def forward(q: Array, k: Array, v: Array, sinks: Array | None) -> Array:
        return _einsum_forward(scale, q, k, v, segment_ids, window, sinks)[0]

    _, transpose = jax.vjp(forward, q, k, v, sinks)
    return transpose(g)


def attention_reference(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    *,
    window: Array | int | None = None,
    sinks: Array | None = None,
    scale: float | None = None,
) -> Array:
    """The oracle: all scores at once. Arguments and result as in `attention`; differentiated by JAX."""
    scale_q = q.shape[-1] ** -0.5 if scale is None else scale
    return _keep(_einsum_forward(scale_q, q, k, v, segment_ids, _limit(window, q), sinks)[0], segment_ids)


def _limit(window: Array | int | None, q: Array) -> Array | None:
    """The window as a number of positions; 0 becomes the whole sequence."""
    return None if window is None else jnp.where(jnp.asarray(window) == 0, q.shape[1], window)


def _choose(implementation: Implementation, blocks, einsum, *args):
    if implementation == "blocks":
        return blocks(*args)
    return lax.platform_dependent(*args, cpu=blocks, default=einsum)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    implementation: Implementation,
    scale: float,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    window: Array | None,
    sinks: Array | None,
) -> Array:
    return _attention_fwd(implementation, scale, q, k, v, segment_ids, window, sinks)[0]


def _attention_fwd(implementation: Implementation, scale: float, *inputs: Any):
    """inputs: q, k, v, segment_ids, window or None, sinks or None."""
    forward = partial(_blocks_forward, scale), partial(_einsum_forward, scale)
    out, log_sum = _choose(implementation, *forward, *inputs)
    out = _keep(out, inputs[3])
    return out, (*inputs, out, log_sum)


def _attention_bwd(implementation: Implementation, scale: float, residuals: tuple[Any, ...], g: Array):
    backward = partial(_blocks_backward, scale), partial(_einsum_backward, scale)
    dq, dk, dv, dsinks = _choose(implementation, *backward, *residuals, _keep(g, residuals[3]))
    return dq, dk, dv, None, None, dsinks


_attention.defvjp(_attention_fwd, _attention_bwd)


def attention(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    *,
    window: Array | int | None = None,
    sinks: Array | None = None,
    implementation: Implementation = "auto",
    scale: float | None = None,
) -> Array:
    """Each position attends to itself and to earlier positions of its own segment. Softmax in float32.

    Under a mesh call it inside `jax.shard_map` with the batch (and, if wished, key-value heads with their query
    heads) sharded: the CPU path loops over B.

    Args:
      q: [B, S, H, D]. k: [B, S, G, D], H a multiple of G; query head h reads key-value head h // (H / G).
      v: [B, S, G, W], W = D mostly.
      segment_ids: [B, S] int; 0 is padding: its outputs are zero and it gets and gives no gradient.
      window: int or int scalar array (so that one program serves layers with different ones): a position sees that many
        positions up to its own; 0 or None sees all earlier ones.
      sinks: [H], a further logit of each head's softmax that has no value.
      implementation: `blocks` (the CPU path), `reference`, or `auto`: blocks on CPU, else einsums.
      scale: multiplies q; None is D ** -0.5.

    Returns:
      [B, S, H, W] in q's dtype.

    Raises:
      ValueError: shapes, dtypes or options that do not fit.
    """
    require_choice("implementation", implementation, ("auto", "reference", "blocks"))
    require_shape("q", q, (None, None, None, None), "[B, S, H, D]")
    batch, length, heads, width = q.shape
    require_shape("k", k, (batch, length, None, width), f"[B = {batch}, S = {length}, G, D = {width}]")
    require_shape("v", v, (*k.shape[:3], None), f"[B, S, G, W] with k's {tuple(k.shape[:3])}")
    require(heads % k.shape[2] == 0, "k.shape[2]", k.shape[2], f"a divisor of the {heads} query heads")
    require_shape("segment_ids", segment_ids, (batch, length), f"[B = {batch}, S = {length}]")
    require_integer("segment_ids", segment_ids)
    if sinks is not None:
        require_shape("sinks", sinks, (heads,), f"[H = {heads}]")
    scale = width**-0.5 if scale is None else float(scale)
    if implementation == "reference":
        return attention_reference(q, k, v, segment_ids, window=window, sinks=sinks, scale=scale)
    return _attention(implementation, scale, q, k, v, segment_ids, _limit(window, q), sinks)
