"""Dropless expert SwiGLU: every token through its K experts, without capacity, padding or scatter-adds of rows.

Legend: T tokens, K experts per token, E experts, d model width, f expert width, N = T K assignments, B block rows.

    out[t] = sum_k valid[t, k] weights[t, k] (silu(x[t] G_e) * (x[t] U_e)) D_e,   e = indices[t, k]

(SwiGLU: Shazeer 2020, arXiv 2002.05202; dropless blocks: MegaBlocks, arXiv 2211.15841; router gradients from the
activations at hand, so that expert outputs are never kept: SonicMoE, arXiv 2512.14080.)

Assignments are sorted by expert once. Dispatch gathers rows of x; combine gathers rows of the expert outputs; both
transposes are again gathers, through the inverse permutation: sums have a fixed order and results are reproducible.
What a backward needs beyond the inputs is the pre-activations H [N, 2f] in sorted order, on CPU and GPU alike.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels.checks import require, require_choice, require_integer, require_shape
from kernels.grouped_matmul import (
    Arrays,
    Blocks,
    SortedRows,
    keep_rows,
    set_window,
    sort_rows,
    walk_groups,
    window,
)
from kernels.products import dot_lt, dot_rt, wide

Implementation = Literal["auto", "blocks", "ragged_dot", "reference"]
ScaleOn = Literal["output", "input"]


class _Options(NamedTuple):
    """Static choices of one call (hashable: custom_vjp's non-differentiable argument)."""

    sizes: tuple[int, ...]
    scale_on: ScaleOn
    implementation: Implementation


class _Sorted(NamedTuple):
    """The assignments in expert order, padded by the largest B so that the last window never runs over the end."""

    rows: SortedRows
    token: Array  # [N + B] int32
    weight: Array  # [N + B]


def automatic_block_sizes(num_assignments: int, num_experts: int) -> tuple[int, ...]:
    """Rows a block may have, ascending: up to twelve multiples of one unit, none longer than all assignments need.

    The unit is an eighth of the mean assignments per expert (16 to 64 rows): a nearly balanced expert is then one block
    with about a sixteenth of padding, and even a block of a large expert stays near the cache. Each size is compiled.
    """
    mean = -(-num_assignments // num_experts)
    unit = min(64, max(16, round(mean / 128) * 16))
    return tuple(unit * i for i in range(1, min(12, max(1, -(-num_assignments // unit))) + 1))


def _sort(indices: Array, weights: Array, valid: Array, num_experts: int, block_size: int) -> _Sorted:
    expert_ids = jnp.where(valid, indices, num_experts).reshape(-1)
    rows = sort_rows(expert_ids, num_experts)
    # Dropped assignments point at the first row: a window's tail must never read what nobody vouches for.
    inside = jnp.arange(rows.order.shape[0], dtype=jnp.int32) < jnp.sum(rows.counts)
    order = jnp.pad(jnp.where(inside, rows.order, rows.order[0]), (0, block_size), mode="edge")
    weight = jnp.where(valid, weights, jnp.zeros((), weights.dtype)).reshape(-1)[order]
    return _Sorted(rows, order // indices.shape[1], weight)


def _take(rows: Array, index: Array) -> Array:
    return rows.at[index].get(mode="promise_in_bounds")


def _combine(rows_ND: Array, scale_TK: Array | None, position_TK: Array, valid_TK: Array) -> Array:
    """out[t] = sum_k scale[t, k] rows[position[t, k]] over valid k: the transpose of dispatch, as K gathers."""
    out = 0
    for k in range(position_TK.shape[1]):
        rows = _take(rows_ND, position_TK[:, k])
        if scale_TK is not None:
            rows = rows * scale_TK[:, k, None].astype(rows.dtype)
        out = out + jnp.where(valid_TK[:, k, None], rows, jnp.zeros((), rows.dtype))
    return jnp.asarray(out)


def _swiglu(h: Array) -> Array:
    gate, up = jnp.split(h, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _swiglu_transpose(gate: Array, up: Array, da: Array) -> Array:
    """Gradient of `_swiglu` at its pre-activations' halves [.., f], given that of its output, [.., f]; [.., 2f]."""
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return jnp.concatenate([da * up * (sigmoid + silu * (1 - sigmoid)), da * silu], axis=-1)


def _forward_blocks(options: _Options, x: Array, s: _Sorted, gate_up: Array, down: Array) -> tuple[Array, Array]:
    """Sorted expert outputs Y [N + B, d] and pre-activations H [N + B, 2f].

    The carried buffer holds the dispatched rows of x, and each block replaces its own by their outputs.
    """

    def group(e: Array, blocks: Blocks, carry: Arrays) -> Arrays:
        gate_up_e, down_e = gate_up[e], down[e]

        def block(size: int, start: Array, stop: Array, carry: Arrays) -> Arrays:
            buffer, h = carry
            dispatched = window(buffer, start, size)
            rows = dispatched
            if options.scale_on == "input":
                rows = rows * window(s.weight, start, size)[:, None].astype(rows.dtype)
            h_block = rows @ gate_up_e
            y_block = keep_rows(_swiglu(h_block) @ down_e, start, stop, dispatched)
            return set_window(buffer, y_block, start), set_window(h, h_block, start)

        return blocks(block, carry)

    h = jnp.zeros((s.token.shape[0], gate_up.shape[2]), x.dtype)
    y, h = walk_groups(s.rows.counts, options.sizes, group, (_take(x, s.token), h))
    return y, h


def _backward_blocks(
    options: _Options, x: Array, s: _Sorted, gate_up: Array, down: Array, h: Array, dout: Array
) -> tuple[Array, Array, Array, Array]:
    """Sorted dX [N + B, d], sorted d weight [N + B], d gate_up, d down (float32).

    The carried buffer holds the dispatched rows of d out, and each block replaces its own by dX.
    """
    accumulate, f = wide(x.dtype), h.shape[1] // 2

    def group(e: Array, blocks: Blocks, carry: Arrays) -> Arrays:
        buffer, dweight, dgate_up, ddown = carry
        gate_up_e, down_e = gate_up[e], down[e]

        def block(size: int, start: Array, stop: Array, carry: Arrays) -> Arrays:
            buffer, dweight, dgate_up_e, ddown_e = carry
            dispatched = window(buffer, start, size)
            rows, g = _take(x, window(s.token, start, size)), keep_rows(dispatched, start, stop)
            scale = window(s.weight, start, size)[:, None].astype(x.dtype)
            # The halves are cut apart from H itself: XLA:CPU does not vectorise a slice of a window.
            gate, up = (lax.dynamic_slice(h, (start, jnp.int32(first)), (size, f)) for first in (0, f))
            activation, da = jax.nn.silu(gate) * up, dot_rt(g, down_e)
            if options.scale_on == "output":
                dscale = jnp.sum((activation * da).astype(s.weight.dtype), axis=1)
                da, activation, scaled_rows = da * scale, activation * scale, rows
            else:
                scaled_rows = rows * scale
            dh = _swiglu_transpose(gate, up, da)
            drows = dot_rt(dh, gate_up_e)
            if options.scale_on == "input":
                dscale = jnp.sum((drows * rows).astype(s.weight.dtype), axis=1)
                drows = drows * scale
            return (
                set_window(buffer, keep_rows(drows, start, stop, dispatched), start),
                set_window(dweight, dscale, start),
                dgate_up_e + dot_lt(scaled_rows, dh),
                ddown_e + dot_lt(activation, g),
            )

        zeros = jnp.zeros(gate_up_e.shape, accumulate), jnp.zeros(down_e.shape, accumulate)
        buffer, dweight, dgate_up_e, ddown_e = blocks(block, (buffer, dweight, *zeros))
        return buffer, dweight, dgate_up.at[e].set(dgate_up_e), ddown.at[e].set(ddown_e)

    carry = (
        _take(dout, s.token),
        jnp.zeros((s.token.shape[0],), s.weight.dtype),
        jnp.zeros(gate_up.shape, accumulate),
        jnp.zeros(down.shape, accumulate),
    )
    dx, dweight, dgate_up, ddown = walk_groups(s.rows.counts, options.sizes, group, carry)
    return dx, dweight, dgate_up, ddown


def _forward_ragged(options: _Options, x: Array, s: _Sorted, gate_up: Array, down: Array) -> tuple[Array, Array]:
    """The same two arrays through grouped GEMMs."""
    rows = _take(x, s.token)
    if options.scale_on == "input":
        rows = rows * s.weight[:, None].astype(x.dtype)
    h = lax.ragged_dot(rows, gate_up, s.rows.counts)
    return lax.ragged_dot(_swiglu(h), down, s.rows.counts), h


def _backward_ragged(
    options: _Options, x: Array, s: _Sorted, gate_up: Array, down: Array, h: Array, dout: Array
) -> tuple[Array, Array, Array, Array]:
    """The same four arrays through grouped GEMMs; the transposes of `ragged_dot` are JAX's own."""
    sorted_row = jnp.arange(s.token.shape[0], dtype=jnp.int32)
    inside = (sorted_row < jnp.sum(s.rows.counts))[:, None]
    rows, scale = _take(x, s.token), s.weight[:, None].astype(x.dtype)
    g = jnp.where(inside, _take(dout, s.token), jnp.zeros((), x.dtype))
    on_output = options.scale_on == "output"
    activation = _swiglu(h)
    _, into_down = jax.vjp(lambda a, w: lax.ragged_dot(a, w, s.rows.counts), activation, down)
    da, ddown = into_down(g * scale if on_output else g)
    gate, up = jnp.split(h, 2, axis=-1)
    dh = _swiglu_transpose(gate, up, da)
    _, into_up = jax.vjp(lambda a, w: lax.ragged_dot(a, w, s.rows.counts), rows if on_output else rows * scale, gate_up)
    drows, dgate_up = into_up(dh)
    if on_output:
        y = lax.ragged_dot(activation, down, s.rows.counts)
        dscale = jnp.sum((y * g).astype(s.weight.dtype), axis=1)
    else:
        dscale = jnp.sum((drows * rows).astype(s.weight.dtype), axis=1)
        drows = drows * scale
    return drows, dscale, dgate_up.astype(wide(x.dtype)), ddown.astype(wide(x.dtype))


def _choose(options: _Options, blocks, ragged, *args):
    if options.implementation == "blocks":
        return blocks(*args)
    if options.implementation == "ragged_dot":
        return ragged(*args)
    return lax.platform_dependent(*args, cpu=blocks, default=ragged)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(
    options: _Options, x: Array, indices: Array, weights: Array, valid: Array, gate_up: Array, down: Array
) -> Array:
    return _grouped_fwd(options, x, indices, weights, valid, gate_up, down)[0]


def _grouped_fwd(
    options: _Options, x: Array, indices: Array, weights: Array, valid: Array, gate_up: Array, down: Array
):
    s = _sort(indices, weights, valid, gate_up.shape[0], options.sizes[-1])
    experts = gate_up.astype(x.dtype), down.astype(x.dtype)
    forward = partial(_forward_blocks, options), partial(_forward_ragged, options)
    y, h = _choose(options, *forward, x, s, *experts)
    scale = weights if options.scale_on == "output" else None
    out = _combine(y, scale, s.rows.position.reshape(indices.shape), valid)
    return out, (x, weights, valid, gate_up, down, s, h)


def _grouped_bwd(options: _Options, residuals, dout: Array):
    x, weights, valid, gate_up, down, s, h = residuals
    experts = gate_up.astype(x.dtype), down.astype(x.dtype)
    backward = partial(_backward_blocks, options), partial(_backward_ragged, options)
    dx_sorted, dweight_sorted, dgate_up, ddown = _choose(options, *backward, x, s, *experts, h, dout)
    position = s.rows.position.reshape(valid.shape)
    dx = _combine(dx_sorted, None, position, valid)
    dweights = jnp.where(valid, _take(dweight_sorted, position), jnp.zeros((), weights.dtype))
    return dx, None, dweights, None, dgate_up.astype(gate_up.dtype), ddown.astype(down.dtype)


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def grouped_swiglu_reference(
    x: Array, indices: Array, weights: Array, valid: Array, gate_up: Array, down: Array, *, scale_on: ScaleOn = "output"
) -> Array:
    """The oracle: every expert on every token, then a weighted sum. Same arguments and result as `grouped_swiglu`."""
    one_hot = jax.nn.one_hot(jnp.where(valid, indices, gate_up.shape[0]), gate_up.shape[0], dtype=weights.dtype)
    scale_TE = jnp.einsum("tke,tk->te", one_hot, weights).astype(x.dtype)
    kept_TE = jnp.sum(one_hot, axis=1).astype(x.dtype)
    on_input, on_output = (scale_TE, kept_TE) if scale_on == "input" else (kept_TE, scale_TE)
    h = jnp.einsum("te,td,edf->tef", on_input, x, gate_up.astype(x.dtype))
    return jnp.einsum("te,tef,efd->td", on_output, _swiglu(h), down.astype(x.dtype))


def grouped_swiglu(
    x: Array,
    indices: Array,
    weights: Array,
    valid: Array,
    gate_up: Array,
    down: Array,
    *,
    block_size: int = 0,
    scale_on: ScaleOn = "output",
    implementation: Implementation = "auto",
) -> Array:
    """Every token through its experts (module equation); differentiable in x, weights, gate_up and down.

    Under a mesh call it inside `jax.shard_map`: T is then the local tokens and E the local experts.

    Args:
      x: [T, d], float32 or bfloat16; products run in its dtype, weight gradients accumulate in float32.
      indices: [T, K] int, experts; a token's K valid experts are distinct. Ignored where not valid.
      weights: [T, K] float, combine weights.
      valid: [T, K] bool; False drops the assignment, which then costs nothing.
      gate_up: [E, d, 2f], gate half first. down: [E, f, d]. Any float dtype; gradients keep it.
      block_size: rows of one block; 0 picks several sizes by the mean assignments per expert.
      scale_on: `weights` multiply the expert's output, or its input (Llama 4).
      implementation: `blocks`, `ragged_dot`, `reference` (dense, the oracle) or `auto`: first on CPU, else second.

    Returns:
      [T, d] in x's dtype.

    Raises:
      ValueError: shapes, dtypes or options that do not fit.
    """
    _check(x, indices, weights, valid, gate_up, down)
    require(block_size >= 0, "block_size", block_size, "0 (automatic) or a positive row count")
    require_choice("scale_on", scale_on, ("output", "input"))
    require_choice("implementation", implementation, ("auto", "blocks", "ragged_dot", "reference"))
    if implementation == "reference":
        return grouped_swiglu_reference(x, indices, weights, valid, gate_up, down, scale_on=scale_on)
    sizes = (block_size,) if block_size else automatic_block_sizes(indices.size, gate_up.shape[0])
    return _grouped(_Options(sizes, scale_on, implementation), x, indices, weights, valid, gate_up, down)


def _check(x: Array, indices: Array, weights: Array, valid: Array, gate_up: Array, down: Array) -> None:
    require_shape("x", x, (None, None), "[T, d]")
    num_tokens, d = x.shape
    require_shape("indices", indices, (num_tokens, None), f"[T = {num_tokens}, K]")
    require_integer("indices", indices)
    pair = f"indices' [T, K] = {tuple(indices.shape)}"
    require_shape("weights", weights, indices.shape, pair)
    require_shape("valid", valid, indices.shape, pair)
    require(valid.dtype == jnp.bool_, "valid.dtype", valid.dtype.name, "bool")
    require_shape("gate_up", gate_up, (None, d, None), f"[E, d = {d}, 2f]")
    require(gate_up.shape[2] % 2 == 0, "gate_up.shape[2]", gate_up.shape[2], "an even number, gate and up halves")
    shape = (gate_up.shape[0], gate_up.shape[2] // 2, d)
    require_shape("down", down, shape, f"[E, f, d] = {shape}")
