"""Dropless expert FFNs: every token through its K experts, without capacity, padding or scatter-adds of rows.

Legend: T tokens, K experts per token, E experts, d model width, f expert width, N = T K assignments, B block rows,
F pre-activation width: 2f (gate half, then up half) for a gated activation, else f.

    out[t] = sum_k valid[t, k] weights[t, k] (act(x[t] G_e + b_e) D_e + c_e),   e = indices[t, k]

    swiglu      silu(gate) up                                                Shazeer 2020, arXiv 2002.05202
    swiglu_oai  g sigmoid(1.702 g) (clip(up, -7, 7) + 1), g = min(gate, 7)   gpt-oss, arXiv 2508.10925
    relu        max(h, 0)                                                    Switch Transformer, arXiv 2101.03961
    gelu        the tanh approximation (as Flax; Hugging Face's gelu_new)    arXiv 1606.08415

(Dropless blocks: MegaBlocks, arXiv 2211.15841; router gradients from the activations at hand, so that expert outputs
are never kept: SonicMoE, arXiv 2512.14080.)

Assignments are sorted by expert once. Dispatch gathers rows of x; combine gathers rows of the expert outputs; both
transposes are again gathers, through the inverse permutation: sums have a fixed order and results are reproducible.
What a backward needs beyond the inputs is the pre-activations H [N, F], biases added, in sorted order, on CPU and GPU
alike. With `triton` assignments are sorted by counting (kernels/routing_gpu.py), and dispatch and combine are the loads
and stores of the products themselves: no sorted copy of x, of the outputs or of their gradients is made
(kernels/grouped_gpu.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels import _triton
from kernels.checks import require, require_choice, require_float, require_integer, require_shape
from kernels.grouped_gpu import swiglu_backward, swiglu_forward
from kernels.grouped_matmul import (
    Arrays,
    Blocks,
    SortedRows,
    automatic_block_sizes,
    group_of_row,
    keep_rows,
    set_window,
    sort_rows,
    walk_groups,
    window,
)
from kernels.products import dot_lt, dot_rt, wide
from kernels.routing_gpu import sort_assignments

Implementation = Literal["auto", "blocks", "ragged_dot", "triton", "reference"]
ScaleOn = Literal["output", "input"]
Activation = Literal["swiglu", "swiglu_oai", "relu", "gelu"]


class _Options(NamedTuple):
    """Static choices of one call (hashable: custom_vjp's non-differentiable argument)."""

    sizes: tuple[int, ...]
    scale_on: ScaleOn
    activation: Activation
    implementation: Implementation


class _Experts(NamedTuple):
    """Parameters of all experts, of one (without E), or their gradients; an absent bias is no leaf, so it is free."""

    gate_up: Array  # [E, d, F]
    down: Array  # [E, f, d]
    gate_up_bias: Array | None  # [E, F]
    down_bias: Array | None  # [E, d]


class _Sorted(NamedTuple):
    """The assignments in expert order, padded by the largest B so that the last window never runs over the end."""

    rows: SortedRows
    token: Array  # [N + B] int32
    weight: Array  # [N + B]


_Gradients = tuple[Array, Array, _Experts]  # of sorted rows of x [N + B, d] and weights [N + B], of the parameters


def _sort(options: _Options, indices: Array, weights: Array, valid: Array, num_experts: int) -> _Sorted:
    block_size = options.sizes[-1]
    if options.implementation == "triton":
        rows = sort_assignments(indices.astype(jnp.int32), num_experts, valid=valid)
    else:
        rows = sort_rows(jnp.where(valid, indices, num_experts).reshape(-1), num_experts)
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


def _swiglu(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


def _swiglu_transpose(gate: Array, up: Array, da: Array) -> Array:
    """Gradient of `_swiglu` at its pre-activations' halves [.., f], given that of its output, [.., f]; [.., 2f]."""
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return jnp.concatenate([da * up * (sigmoid + silu * (1 - sigmoid)), da * silu], axis=-1)


def _swiglu_oai(gate: Array, up: Array) -> Array:
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)


# Gated or not, and the function of the pre-activations' parts [.., f]: gate and up halves, or the one whole.
_ACTIVATIONS: dict[Activation, tuple[bool, Callable[..., Array]]] = {
    "swiglu": (True, _swiglu),
    "swiglu_oai": (True, _swiglu_oai),
    "relu": (False, jax.nn.relu),
    "gelu": (False, partial(jax.nn.gelu, approximate=True)),
}


def is_gated(activation: Activation) -> bool:
    """Whether gate_up holds two halves, [E, d, 2f]."""
    return _ACTIVATIONS[activation][0]


def _split(name: Activation, h: Array) -> list[Array]:
    return jnp.split(h, 2, axis=-1) if is_gated(name) else [h]


def _activate(name: Activation, h: Array) -> Array:
    """Pre-activations [.., F] -> activations [.., f]."""
    return _ACTIVATIONS[name][1](*_split(name, h))


def _activate_vjp(name: Activation, *parts: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Activations [.., f] of the pre-activations' parts, and the map of their gradient to that of H, [.., F]."""
    if name == "swiglu":
        return _swiglu(*parts), partial(_swiglu_transpose, *parts)
    activation, transpose = jax.vjp(_ACTIVATIONS[name][1], *parts)
    return activation, lambda da: jnp.concatenate(transpose(da), axis=-1)


def _forward_blocks(options: _Options, x: Array, s: _Sorted, experts: _Experts) -> tuple[Array, Array]:
    """Sorted expert outputs Y [N + B, d] and pre-activations H [N + B, F].

    The carried buffer holds the dispatched rows of x, and each block replaces its own by their outputs.
    """

    def group(e: Array, blocks: Blocks, carry: Arrays) -> Arrays:
        own = jax.tree.map(lambda a: a[e], experts)

        def block(size: int, start: Array, stop: Array, carry: Arrays) -> Arrays:
            buffer, h = carry
            dispatched = window(buffer, start, size)
            rows = dispatched
            if options.scale_on == "input":
                rows = rows * window(s.weight, start, size)[:, None].astype(rows.dtype)
            h_block = rows @ own.gate_up
            if own.gate_up_bias is not None:
                h_block = h_block + own.gate_up_bias[None]
            y_block = _activate(options.activation, h_block) @ own.down
            if own.down_bias is not None:
                y_block = y_block + own.down_bias[None]
            y_block = keep_rows(y_block, start, stop, dispatched)
            return set_window(buffer, y_block, start), set_window(h, h_block, start)

        return blocks(block, carry)

    h = jnp.zeros((s.token.shape[0], experts.gate_up.shape[2]), x.dtype)
    y, h = walk_groups(s.rows.counts, options.sizes, group, (_take(x, s.token), h))
    return y, h


def _backward_blocks(options: _Options, x: Array, s: _Sorted, experts: _Experts, h: Array, dout: Array) -> _Gradients:
    """Sorted dX [N + B, d], sorted d weight [N + B], gradients of the parameters (float32).

    The carried buffer holds the dispatched rows of d out, and each block replaces its own by dX.
    """
    accumulate, f = wide(x.dtype), experts.down.shape[1]

    def group(e: Array, blocks: Blocks, carry: _Gradients) -> _Gradients:
        buffer, dweight, gradients = carry
        own = jax.tree.map(lambda a: a[e], experts)

        def block(size: int, start: Array, stop: Array, carry: _Gradients) -> _Gradients:
            buffer, dweight, sums = carry
            dispatched = window(buffer, start, size)
            rows, g = _take(x, window(s.token, start, size)), keep_rows(dispatched, start, stop)
            scale = window(s.weight, start, size)[:, None].astype(x.dtype)
            # The halves are cut apart from H itself: XLA:CPU does not vectorise a slice of a window.
            parts = (lax.dynamic_slice(h, (start, jnp.int32(i)), (size, f)) for i in range(0, h.shape[1], f))
            activation, into_h = _activate_vjp(options.activation, *parts)
            da = dot_rt(g, own.down)
            if options.scale_on == "output":
                dscale = jnp.sum((activation * da).astype(s.weight.dtype), axis=1)
                if own.down_bias is not None:
                    dscale = dscale + jnp.sum((g * own.down_bias[None]).astype(s.weight.dtype), axis=1)
                da, activation, scaled_rows = da * scale, activation * scale, rows
            else:
                scaled_rows = rows * scale
            dh = into_h(da)
            drows = dot_rt(dh, own.gate_up)
            if options.scale_on == "input":
                dscale = jnp.sum((drows * rows).astype(s.weight.dtype), axis=1)
                drows = drows * scale
            gate_up_bias, down_bias = sums.gate_up_bias, sums.down_bias
            if gate_up_bias is not None:
                gate_up_bias = gate_up_bias + jnp.sum(dh, axis=0, dtype=accumulate)
            if down_bias is not None:
                dy = g * scale if options.scale_on == "output" else g
                down_bias = down_bias + jnp.sum(dy, axis=0, dtype=accumulate)
            return (
                set_window(buffer, keep_rows(drows, start, stop, dispatched), start),
                set_window(dweight, dscale, start),
                _Experts(
                    sums.gate_up + dot_lt(scaled_rows, dh), sums.down + dot_lt(activation, g), gate_up_bias, down_bias
                ),
            )

        sums = jax.tree.map(lambda a: jnp.zeros(a.shape, accumulate), own)
        buffer, dweight, sums = blocks(block, (buffer, dweight, sums))
        return buffer, dweight, jax.tree.map(lambda a, b: a.at[e].set(b), gradients, sums)

    carry = (
        _take(dout, s.token),
        jnp.zeros((s.token.shape[0],), s.weight.dtype),
        jax.tree.map(lambda a: jnp.zeros(a.shape, accumulate), experts),
    )
    return walk_groups(s.rows.counts, options.sizes, group, carry)


def _add_bias(rows: Array, bias: Array | None, counts: Array) -> Array:
    """Adds to each sorted row the bias of its expert, [E, ...]; rows past the last expert's get none."""
    if bias is None:
        return rows
    return rows + bias.at[group_of_row(counts, rows.shape[0])].get(mode="fill", fill_value=0)


def _bias_gradient(bias: Array | None, rows: Array, counts: Array) -> Array | None:
    """The transpose of `_add_bias` in the wide type: a product, for a scatter-add on GPU has no fixed order."""
    if bias is None:
        return None
    expert = group_of_row(counts, rows.shape[0])
    rows = jnp.where((expert < bias.shape[0])[:, None], rows, jnp.zeros((), rows.dtype))
    return dot_lt(jax.nn.one_hot(expert, bias.shape[0], dtype=rows.dtype), rows)


def _forward_ragged(options: _Options, x: Array, s: _Sorted, experts: _Experts) -> tuple[Array, Array]:
    """The same two arrays through grouped GEMMs."""
    counts, rows = s.rows.counts, _take(x, s.token)
    if options.scale_on == "input":
        rows = rows * s.weight[:, None].astype(x.dtype)
    h = _add_bias(lax.ragged_dot(rows, experts.gate_up, counts), experts.gate_up_bias, counts)
    y = lax.ragged_dot(_activate(options.activation, h), experts.down, counts)
    return _add_bias(y, experts.down_bias, counts), h


def _backward_ragged(options: _Options, x: Array, s: _Sorted, experts: _Experts, h: Array, dout: Array) -> _Gradients:
    """The same gradients through grouped GEMMs; the transposes of `ragged_dot` are JAX's own."""
    counts, accumulate = s.rows.counts, wide(x.dtype)
    sorted_row = jnp.arange(s.token.shape[0], dtype=jnp.int32)
    inside = (sorted_row < jnp.sum(counts))[:, None]
    rows, scale = _take(x, s.token), s.weight[:, None].astype(x.dtype)
    g = jnp.where(inside, _take(dout, s.token), jnp.zeros((), x.dtype))
    on_output = options.scale_on == "output"
    activation, into_h = _activate_vjp(options.activation, *_split(options.activation, h))
    _, into_down = jax.vjp(lambda a, w: lax.ragged_dot(a, w, counts), activation, experts.down)
    dy = g * scale if on_output else g
    da, ddown = into_down(dy)
    dh = into_h(da)
    scaled_rows = rows if on_output else rows * scale
    _, into_up = jax.vjp(lambda a, w: lax.ragged_dot(a, w, counts), scaled_rows, experts.gate_up)
    drows, dgate_up = into_up(dh)
    if on_output:
        y = _add_bias(lax.ragged_dot(activation, experts.down, counts), experts.down_bias, counts)
        dscale = jnp.sum((y * g).astype(s.weight.dtype), axis=1)
    else:
        dscale = jnp.sum((drows * rows).astype(s.weight.dtype), axis=1)
        drows = drows * scale
    gradients = _Experts(
        dgate_up.astype(accumulate),
        ddown.astype(accumulate),
        _bias_gradient(experts.gate_up_bias, dh, counts),
        _bias_gradient(experts.down_bias, dy, counts),
    )
    return drows, dscale, gradients


def _combined(run: Callable, options: _Options, weights: Array, valid: Array, x: Array, s: _Sorted, experts: _Experts):
    """Outputs [T, d] and H, from what `run` makes in sorted order."""
    y, h = run(options, x, s, experts)
    scale = weights if options.scale_on == "output" else None
    return _combine(y, scale, s.rows.position.reshape(valid.shape), valid), h


def _forward_triton(options: _Options, weights: Array, valid: Array, x: Array, s: _Sorted, experts: _Experts):
    y, h = swiglu_forward(x, experts.gate_up, experts.down, s.rows, s.token, s.weight)
    return _sum_slots(y, valid).astype(x.dtype), h


def _sum_slots(rows_ND: Array, valid: Array) -> Array:
    """Rows at their assignments t K + k, of which valid ones are defined, summed over k in the wide type, [T, d]."""
    rows = jnp.where(valid[..., None], rows_ND.reshape(*valid.shape, -1), jnp.zeros((), rows_ND.dtype))
    return jnp.sum(rows, axis=1, dtype=wide(rows.dtype))


def _to_tokens(run: Callable, options: _Options, weights: Array, valid: Array, *args):
    """Gradients of x [T, d], of the weights [T, K] and of the parameters, from what `run` makes in sorted order."""
    dx_sorted, dweight_sorted, gradients = run(options, *args)
    position = args[1].rows.position.reshape(valid.shape)
    return _combine(dx_sorted, None, position, valid), _take(dweight_sorted, position), gradients


def _backward_triton(
    options: _Options, weights: Array, valid: Array, x: Array, s: _Sorted, experts: _Experts, h: Array, dout: Array
):
    made = swiglu_backward(x, experts.gate_up, experts.down, s.rows, s.token, s.weight, h, dout)
    dweights = _take(made.scale, s.rows.position.reshape(valid.shape)).astype(weights.dtype)
    return _sum_slots(made.x, valid).astype(x.dtype), dweights, _Experts(made.gate_up, made.down, None, None)


_FORWARD = {
    "blocks": partial(_combined, _forward_blocks),
    "ragged_dot": partial(_combined, _forward_ragged),
    "triton": _forward_triton,
}
_BACKWARD = {
    "blocks": partial(_to_tokens, _backward_blocks),
    "ragged_dot": partial(_to_tokens, _backward_ragged),
    "triton": _backward_triton,
}


def _choose(ways: Mapping[str, Callable], options: _Options, *args):
    on = {name: partial(way, options) for name, way in ways.items()}
    if options.implementation == "triton":
        return _triton.on_gpu(on["triton"], on["blocks"], *args)
    if options.implementation == "auto":
        return lax.platform_dependent(*args, cpu=on["blocks"], default=on["ragged_dot"])
    return on[options.implementation](*args)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(options: _Options, x: Array, indices: Array, weights: Array, valid: Array, experts: _Experts) -> Array:
    return _grouped_fwd(options, x, indices, weights, valid, experts)[0]


def _grouped_fwd(options: _Options, x: Array, indices: Array, weights: Array, valid: Array, experts: _Experts):
    s = _sort(options, indices, weights, valid, experts.gate_up.shape[0])
    compute = jax.tree.map(lambda a: a.astype(x.dtype), experts)
    out, h = _choose(_FORWARD, options, weights, valid, x, s, compute)
    return out, (x, weights, valid, experts, s, h)


def _grouped_bwd(options: _Options, residuals, dout: Array):
    x, weights, valid, experts, s, h = residuals
    compute = jax.tree.map(lambda a: a.astype(x.dtype), experts)
    dx, dweights, gradients = _choose(_BACKWARD, options, weights, valid, x, s, compute, h, dout)
    dweights = jnp.where(valid, dweights, jnp.zeros((), weights.dtype))
    return dx, None, dweights, None, jax.tree.map(lambda g, a: g.astype(a.dtype), gradients, experts)


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def _reference(options: _Options, x: Array, indices: Array, weights: Array, valid: Array, experts: _Experts) -> Array:
    """The oracle: every expert on every token, then a weighted sum."""
    num_experts = experts.gate_up.shape[0]
    one_hot = jax.nn.one_hot(jnp.where(valid, indices, num_experts), num_experts, dtype=weights.dtype)
    scale_TE = jnp.einsum("tke,tk->te", one_hot, weights).astype(x.dtype)
    kept_TE = jnp.sum(one_hot, axis=1).astype(x.dtype)
    on_input, on_output = (scale_TE, kept_TE) if options.scale_on == "input" else (kept_TE, scale_TE)
    h = jnp.einsum("te,td,edf->tef", on_input, x, experts.gate_up.astype(x.dtype))
    if experts.gate_up_bias is not None:
        h = h + experts.gate_up_bias.astype(x.dtype)[None]
    activation = _activate(options.activation, h)
    out = jnp.einsum("te,tef,efd->td", on_output, activation, experts.down.astype(x.dtype))
    if experts.down_bias is not None:
        out = out + on_output @ experts.down_bias.astype(x.dtype)
    return out


def grouped_ffn(
    x: Array,
    indices: Array,
    weights: Array,
    valid: Array,
    gate_up: Array,
    down: Array,
    *,
    gate_up_bias: Array | None = None,
    down_bias: Array | None = None,
    activation: Activation = "swiglu",
    block_size: int = 0,
    scale_on: ScaleOn = "output",
    implementation: Implementation = "auto",
) -> Array:
    """Every token through its experts (module equation); differentiable in x, weights and all parameters.

    Under a mesh call it inside `jax.shard_map`: T is then the local tokens and E the local experts.

    Args:
      x: [T, d], float32 or bfloat16; products run in its dtype, parameter gradients accumulate in float32.
      indices: [T, K] int, experts; a token's K valid experts are distinct. Ids that are no expert's are not valid.
      weights: [T, K] float, combine weights.
      valid: [T, K] bool; False drops the assignment, which then costs nothing.
      gate_up: [E, d, 2f], gate half first; for `relu` and `gelu`, which have no gate, [E, d, f] under the same name.
      down: [E, f, d]. Any float dtype, as for all parameters; gradients keep it.
      gate_up_bias: [E, 2f], or [E, f] without a gate; None adds nothing.
      down_bias: [E, d]; None adds nothing.
      activation: a row of the module's table: `swiglu`, `swiglu_oai`, `relu` or `gelu`.
      block_size: rows of one block; 0 picks several sizes by the mean assignments per expert.
      scale_on: `weights` multiply the expert's output, `down_bias` included, or its input before any bias (Llama 4).
      implementation: `blocks`, `ragged_dot`, `reference` (dense, the oracle) or `auto`: first on CPU, else second;
        `triton`: first on CPU, fused kernels on GPU, which know `swiglu` without biases, weights on the output.

    Returns:
      [T, d] in x's dtype.

    Raises:
      ValueError: shapes, dtypes or options that do not fit.
    """
    experts = _Experts(gate_up, down, gate_up_bias, down_bias)
    require_choice("activation", activation, tuple(_ACTIVATIONS))
    _check(x, indices, weights, valid, experts, gated=is_gated(activation))
    require(block_size >= 0, "block_size", block_size, "0 (automatic) or a positive row count")
    require_choice("scale_on", scale_on, ("output", "input"))
    require_choice("implementation", implementation, get_args(Implementation))
    plain = activation == "swiglu" and gate_up_bias is None and down_bias is None and scale_on == "output"
    of = activation, "biases" if gate_up_bias is not None or down_bias is not None else "no biases", scale_on
    require(plain or implementation != "triton", "activation, biases, scale_on", of,
            "swiglu, no biases, output for implementation = 'triton'")  # fmt: skip
    sizes = (block_size,) if block_size else automatic_block_sizes(indices.size, gate_up.shape[0])
    options = _Options(sizes, scale_on, activation, implementation)
    valid = valid & (indices >= 0) & (indices < gate_up.shape[0])
    run = _reference if implementation == "reference" else _grouped
    return run(options, x, indices, weights, valid, experts)


def _check(x: Array, indices: Array, weights: Array, valid: Array, experts: _Experts, *, gated: bool) -> None:
    require_shape("x", x, (None, None), "[T, d]")
    num_tokens, d = x.shape
    require_shape("indices", indices, (num_tokens, None), f"[T = {num_tokens}, K]")
    require_integer("indices", indices)
    pair = f"indices' [T, K] = {tuple(indices.shape)}"
    require_shape("weights", weights, indices.shape, pair)
    require_shape("valid", valid, indices.shape, pair)
    require(valid.dtype == jnp.bool_, "valid.dtype", valid.dtype.name, "bool")
    for name, array in (("x", x), ("gate_up", experts.gate_up), ("down", experts.down)):
        require_float(name, array)
    require_shape("gate_up", experts.gate_up, (None, d, None), f"[E, d = {d}, {'2f' if gated else 'f'}]")
    num_experts, _, width = experts.gate_up.shape
    if gated:
        require(width % 2 == 0, "gate_up.shape[2]", width, "an even number, gate and up halves")
    shape = (num_experts, width // 2 if gated else width, d)
    require_shape("down", experts.down, shape, f"[E, f, d] = {shape}")
    if experts.gate_up_bias is not None:
        shape = (num_experts, width)
        require_shape("gate_up_bias", experts.gate_up_bias, shape, f"gate_up's [E, {'2f' if gated else 'f'}] = {shape}")
    if experts.down_bias is not None:
        shape = (num_experts, d)
        require_shape("down_bias", experts.down_bias, shape, f"down's [E, d] = {shape}")
