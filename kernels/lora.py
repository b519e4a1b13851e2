"""Products with low-rank experts: the two thin matrices of each of E adapters, for tokens that chose some of them.

Legend: T tokens, K slots (a token's chosen experts), J = K inputs per token or 1 that all its slots share, E experts,
d in, o out, r rank, N = T K assignments.

    mixed_lora     out[t]    = sum_e gates[t, e] (x[t] A_e) B_e
    slot_lora      out[t, j] = (x[t, j] A_e) B_e,                      e = indices[t, j]
    slot_lora_sum  out[t]    = sum_j weights[t, j] (x[t, j] A_e) B_e

Two ways. `concat` multiplies by all experts at once, x [A_1 .. A_E], keeps the r columns of the chosen ones and
multiplies by [B_1; ..; B_E]: up to E times the arithmetic, but as one product of E r columns. The others
sort assignments by expert and take each group through its own pair, in `grouped_matmul`; rows move by gathers alone,
forward and backward. Which is faster is a matter of shapes: see `choose`. Adapters may share one A (HydraLoRA,
arXiv 2404.19245), which then multiplies each input once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels.checks import require, require_choice, require_integer, require_shape
from kernels.grouped_matmul import SortedRows, grouped_matmul, sort_rows

Implementation = Literal["auto", "concat", "blocks", "ragged_dot", "triton", "reference"]
Grouped = Literal["blocks", "ragged_dot", "triton"]
IMPLEMENTATIONS = get_args(Implementation)


def _all_experts(x_TJD: Array, a: Array) -> Array:
    """x [T, J, d] by every A at once, [T, J, E, r]; [T, J, 1, r] where experts share A."""
    d, wide = x_TJD.shape[-1], jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1)
    return (x_TJD.reshape(-1, d) @ wide.astype(x_TJD.dtype)).reshape(*x_TJD.shape[:2], a.shape[0], a.shape[2])


def _sum_experts(h: Array, b: Array) -> Array:
    """h [..., E, r], zero or weighted by expert, through [B_1; ..; B_E] in one product, [..., o]."""
    rows = h.reshape(-1, b.shape[0] * b.shape[1])
    return (rows @ b.reshape(-1, b.shape[2]).astype(h.dtype)).reshape(*h.shape[:-2], b.shape[2])


def _chosen(indices: Array, valid: Array, num_experts: int, dtype: jnp.dtype) -> Array:
    """[T, K, E]: one at a valid slot's expert."""
    return jax.nn.one_hot(jnp.where(valid, indices, num_experts), num_experts, dtype=dtype)


def _concat(x_TJD: Array, a: Array, b: Array, indices: Array, valid: Array) -> Array:
    chosen = _chosen(indices, valid, b.shape[0], x_TJD.dtype)
    return _sum_experts(chosen[..., None] * _all_experts(x_TJD, a), b)


def _concat_sum(x_TJD: Array, a: Array, b: Array, indices: Array, weights: Array, valid: Array) -> Array:
    gates = weights[..., None].astype(x_TJD.dtype) * _chosen(indices, valid, b.shape[0], x_TJD.dtype)
    return _sum_experts(jnp.sum(gates[..., None] * _all_experts(x_TJD, a), axis=1), b)


def _reference(x_TJD: Array, a: Array, b: Array, indices: Array, valid: Array) -> Array:
    """The oracle: every slot through every expert, then the one that is its own."""
    a, x = jnp.broadcast_to(a, (b.shape[0], *a.shape[1:])), jnp.broadcast_to(x_TJD, (*indices.shape, a.shape[1]))
    chosen = _chosen(indices, valid, b.shape[0], x.dtype)
    exact = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    every = exact("tjer,ero->tjeo", exact("tjd,edr->tjer", x, a.astype(x.dtype)), b.astype(x.dtype))
    return exact("tje,tjeo->tjo", chosen, every)


def _reference_sum(x_TJD: Array, a: Array, b: Array, indices: Array, weights: Array, valid: Array) -> Array:
    slots = _reference(x_TJD, a, b, indices, valid)
    return jnp.einsum("tj,tjo->to", weights.astype(slots.dtype), slots, precision=lax.Precision.HIGHEST)


@jax.custom_vjp
def _dispatch(x_TJD: Array, rows: SortedRows) -> Array:
    """[T, J, d] -> [N, d], the inputs in the order of `rows`; the transpose is a gather, and a sum over slots."""
    slots = rows.order.shape[0] // x_TJD.shape[0]
    source = rows.order if x_TJD.shape[1] == slots else rows.order // slots
    return _take(x_TJD.reshape(-1, x_TJD.shape[2]), source)


def _dispatch_fwd(x_TJD: Array, rows: SortedRows):
    return _dispatch(x_TJD, rows), (x_TJD.shape, rows)


def _dispatch_bwd(residuals, g_ND: Array):
    shape, rows = residuals
    g = _take(g_ND, rows.position).reshape(shape[0], -1, shape[2])
    return (g if g.shape == shape else jnp.sum(g, axis=1, keepdims=True)), None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _collect(y_NO: Array, rows: SortedRows) -> Array:
    """Undoes the order of `rows`, [N, o]."""
    return _take(y_NO, rows.position)


def _collect_fwd(y_NO: Array, rows: SortedRows):
    return _collect(y_NO, rows), rows


def _collect_bwd(rows: SortedRows, g_NO: Array):
    return _take(g_NO, rows.order), None


_collect.defvjp(_collect_fwd, _collect_bwd)


def _take(rows: Array, index: Array) -> Array:
    return rows.at[index].get(mode="promise_in_bounds")


def block_rows(num_assignments: int, num_experts: int) -> int:
    """Rows of one block: about a quarter of the mean assignments per expert, a multiple of 16 from 16 to 64."""
    return min(64, max(16, round(num_assignments / num_experts / 64) * 16))


def _grouped(implementation: Grouped, x_TJD: Array, a: Array, b: Array, indices: Array, valid: Array) -> Array:
    rows = _sort(indices, valid, b.shape[0])
    return _collect(_in_order(implementation, x_TJD, a, b, rows, None), rows).reshape(*indices.shape, b.shape[2])


def _grouped_sum(
    implementation: Grouped, x_TJD: Array, a: Array, b: Array, indices: Array, weights: Array, valid: Array
) -> Array:
    rows = _sort(indices, valid, b.shape[0])
    y_NO = _collect(_in_order(implementation, x_TJD, a, b, rows, weights), rows)
    return jnp.sum(y_NO.reshape(*indices.shape, b.shape[2]), axis=1)


def _sort(indices: Array, valid: Array, num_experts: int) -> SortedRows:
    return sort_rows(jnp.where(valid, indices, num_experts).reshape(-1), num_experts)


def _matmul(how: tuple[Grouped, int], x_MK: Array, w_EKN: Array, group_sizes: Array) -> Array:
    return grouped_matmul(x_MK, w_EKN, group_sizes, implementation=how[0], block_size=how[1])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one_by_one(how: tuple[Grouped, int], x_MK: Array, w_EKN: Array, group_sizes: Array) -> Array:
    """`grouped_matmul` whose `vmap` is a loop over adapters, forward and backward: a while loop of batched trip counts
    would copy its buffers at every step, and `ragged_dot` has no batches of which a part of the operands is none."""
    return jax.custom_batching.sequential_vmap(partial(_matmul, how))(x_MK, w_EKN, group_sizes)


def _one_by_one_fwd(how: tuple[Grouped, int], *operands: Array):
    return _one_by_one(how, *operands), operands


def _one_by_one_bwd(how: tuple[Grouped, int], operands: tuple[Array, Array, Array], g_MN: Array):
    @jax.custom_batching.sequential_vmap
    def gradients(x: Array, w: Array, group_sizes: Array, g: Array) -> tuple[Array, Array]:
        return jax.vjp(lambda x, w: _matmul(how, x, w, group_sizes), x, w)[1](g)

    return *gradients(*operands, g_MN), None


_one_by_one.defvjp(_one_by_one_fwd, _one_by_one_bwd)


def _in_order(
    implementation: Grouped, x_TJD: Array, a: Array, b: Array, rows: SortedRows, weights: Array | None
) -> Array:
    """Each sorted assignment through its expert, [N, o], weighted where it is thinnest."""
    product = partial(_one_by_one, (implementation, block_rows(rows.order.shape[0], b.shape[0])))
    if a.shape[0] == 1:
        h = _dispatch(_all_experts(x_TJD, a)[:, :, 0], rows)
    else:
        h = product(_dispatch(x_TJD, rows), a.astype(x_TJD.dtype), rows.counts)
    if weights is not None:
        h = h * _dispatch(weights[..., None], rows).astype(h.dtype)
    return product(h, b.astype(h.dtype), rows.counts)


def choose(num_experts: int, rank: int, platform: str) -> Implementation:
    """What `auto` runs: on CPU `concat` while r (E - 2) is at most 24.

    Per assignment it multiplies E r columns; sorted groups multiply r, at half the rate, and move rows; K, T, d and o
    are in both. Measured forward and backward by `bench lora-experts` in float32 on two busy cores of an AMD EPYC, T
    from 256 to 2048, K = 2, d and o 576 and 1536: milliseconds of `blocks` to those of `concat` at r (E - 2) = 0 (E =
    2, r = 64): 1.0 to 1.1; 24: 0.8 to 1.2; 32: 0.7 to 1.0; 48: 0.6 to 0.8; 96: 0.5 to 0.9; 144: 0.3 to 0.7; 480: 0.1
    to 0.2. In a process that has allocated little, pages of fresh buffers slow `blocks` by half from N = 4096 on.

    On GPU `concat` always. Measured on an H200 in bfloat16, T = 4096, K = 2, d and o 4096 and 11008: milliseconds of
    `ragged_dot` to those of `concat` at E r = 32: 7 to 8; 128: 7; 256: 5; 512: 5. Beyond it is not measured.
    """
    sorting_pays = platform == "cpu" and rank * (num_experts - 2) > 24
    return "blocks" if sorting_pays else "concat"


def _run(implementation: Implementation, forms: dict[str, Callable[..., Array]], x: Array, *args: Array) -> Array:
    if implementation != "auto":
        return forms[implementation](x, *args)
    num_experts, rank, _ = args[1].shape
    cpu, gpu = (choose(num_experts, rank, platform) for platform in ("cpu", "gpu"))
    if cpu == gpu:
        return forms[cpu](x, *args)
    return lax.platform_dependent(x, *args, cpu=forms[cpu], default=forms[gpu])


_SLOT: dict[str, Callable[..., Array]] = {
    "concat": _concat,
    "blocks": partial(_grouped, "blocks"),
    "ragged_dot": partial(_grouped, "ragged_dot"),
    "triton": partial(_grouped, "triton"),
    "reference": _reference,
}
_SUM: dict[str, Callable[..., Array]] = {
    "concat": _concat_sum,
    "blocks": partial(_grouped_sum, "blocks"),
    "ragged_dot": partial(_grouped_sum, "ragged_dot"),
    "triton": partial(_grouped_sum, "triton"),
    "reference": _reference_sum,
}


def mixed_lora(x: Array, a: Array, b: Array, gates: Array) -> Array:
    """out[t] = sum_e gates[t, e] (x[t] A_e) B_e, any gates: soft, or zero where an expert was not chosen.

    Two products whatever the gates, with E r columns between them; differentiable in all arguments.

    Args:
      x: [T, d]. Products run in its dtype.
      a: [E, d, r], or [1, d, r] or [d, r] where experts share it. Any float dtype, as for b; gradients keep it.
      b: [E, r, o].
      gates: [T, E] float.

    Returns:
      [T, o] in x's dtype.

    Raises:
      ValueError: shapes that do not fit.
    """
    require_shape("x", x, (None, None), "[T, d]")
    a = _checked_pair(a, b, x.shape[1])
    require_shape("gates", gates, (x.shape[0], b.shape[0]), f"[T, E] = {(x.shape[0], b.shape[0])}")
    h = _all_experts(x[:, None], a)[:, 0]
    return _sum_experts(gates[..., None].astype(h.dtype) * h, b)


def slot_lora(
    x: Array, a: Array, b: Array, indices: Array, valid: Array, *, implementation: Implementation = "auto"
) -> Array:
    """out[t, j] = (x[t, j] A_e) B_e with e = indices[t, j]; differentiable in x, a and b.

    Under a mesh call it inside `jax.shard_map`: T is then the local tokens.

    Args:
      x: [T, K, d], or [T, 1, d] where all slots of a token have one input. Products run in its dtype.
      a: [E, d, r], or [1, d, r] or [d, r] where experts share it. Any float dtype, as for b; gradients keep it.
      b: [E, r, o].
      indices: [T, K] int, a slot's expert. Ids that are no expert's are not valid.
      valid: [T, K] bool; the output is zero where False.
      implementation: `concat`, `blocks`, `ragged_dot` (GPU), `triton` (GPU; `blocks` on CPU), `reference` (all
        experts, the oracle) or `auto`: `choose`.

    Returns:
      [T, K, o] in x's dtype.

    Raises:
      ValueError: shapes, dtypes or options that do not fit.
    """
    a = _checked(x, a, b, indices, implementation)
    require_shape("valid", valid, indices.shape, f"indices' [T, K] = {tuple(indices.shape)}")
    require(valid.dtype == jnp.bool_, "valid.dtype", valid.dtype.name, "bool")
    return _run(implementation, _SLOT, x, a, b, indices, valid & _exists(indices, b))


def slot_lora_sum(
    x: Array, a: Array, b: Array, indices: Array, weights: Array, *, implementation: Implementation = "auto"
) -> Array:
    """out[t] = sum_j weights[t, j] (x[t, j] A_e) B_e with e = indices[t, j]; differentiable in all but indices.

    The down projection of MixLoRA's experts (arXiv 2404.15159, Eq. 6), summed. Weights multiply r columns, not o, and
    `concat` sums slots before its one product with B. A slot of weight zero is computed: its weight has a gradient.

    Args:
      x, a, b, indices, implementation: as in `slot_lora`; ids that are no expert's add nothing.
      weights: [T, K] float.

    Returns:
      [T, o] in x's dtype.

    Raises:
      ValueError: shapes, dtypes or options that do not fit.
    """
    a = _checked(x, a, b, indices, implementation)
    require_shape("weights", weights, indices.shape, f"indices' [T, K] = {tuple(indices.shape)}")
    return _run(implementation, _SUM, x, a, b, indices, weights, _exists(indices, b))


def _exists(indices: Array, b: Array) -> Array:
    return (indices >= 0) & (indices < b.shape[0])


def _checked(x: Array, a: Array, b: Array, indices: Array, implementation: str) -> Array:
    """a with its leading axis, once all fits."""
    require_choice("implementation", implementation, IMPLEMENTATIONS)
    require_shape("x", x, (None, None, None), "[T, K, d] or [T, 1, d]")
    require_shape("indices", indices, (x.shape[0], None), f"[T = {x.shape[0]}, K]")
    require_integer("indices", indices)
    slots = indices.shape[1]
    require(x.shape[1] in (1, slots), "x.shape[1]", x.shape[1], f"1 or K = {slots}")
    return _checked_pair(a, b, x.shape[2])


def _checked_pair(a: Array, b: Array, d: int) -> Array:
    a = a[None] if len(a.shape) == 2 else a
    require_shape("a", a, (None, d, None), f"[E, d = {d}, r]")
    require_shape("b", b, (None, a.shape[2], None), f"[E, r = {a.shape[2]}, o]")
    require(a.shape[0] in (1, b.shape[0]), "a.shape[0]", a.shape[0], f"E = {b.shape[0]} or 1")
    return a
