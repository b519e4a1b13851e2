"""Products of row groups with their own matrices, and the block plan every grouped CPU loop shares.

Legend: M rows, E groups (experts), K and N the matrix sides, B rows of one block.

`jax.lax.ragged_dot` on CPU is E masked copies and one big contraction: E times the arithmetic, forward and backward.
Here rows sorted by group are walked in windows of B rows, each inside one group except for its tail. The tail belongs
to the next groups; their own windows, later in the same loop, overwrite it. So rows are never moved to padded slots,
a group costs ceil(rows / B) small 2-D products, and an empty group or a dropped row costs nothing: shapes are static,
the trip count is data. A traced trip count is a while loop, which has no reverse mode, hence the hand-written VJP.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels.checks import require, require_choice, require_integer, require_shape
from kernels.products import dot_lt, dot_rt, wide

Implementation = Literal["blocks", "reference", "ragged_dot"]


class BlockPlan(NamedTuple):
    """Where each row goes once rows are sorted by expert, and the windows of B sorted rows that cover the valid ones.

    Attributes:
      order: [N] int32, the row at each sorted position; dropped rows come last.
      position: [N] int32, the sorted position of each row (the inverse of `order`).
      counts: [E] int32, valid rows per expert.
      expert: [N // B + E] int32, the expert of each block.
      start: [N // B + E] int32, first sorted position of each block.
      stop: [N // B + E] int32, one past the last position of the block that belongs to its expert (<= start + B).
      num_blocks: [] int32, blocks in use; entries past it are meaningless.
    """

    order: Array
    position: Array
    counts: Array
    expert: Array
    start: Array
    stop: Array
    num_blocks: Array


def _blocks(counts: Array, num_rows: int, block_size: int) -> tuple[Array, Array, Array, Array]:
    """`expert`, `start`, `stop` and `num_blocks` of a plan, from the rows of each group."""
    num_groups = counts.shape[0]
    ends = jnp.cumsum(counts)
    blocks_per_group = -(-counts // block_size)
    block_ends = jnp.cumsum(blocks_per_group)
    block = jnp.arange(num_rows // block_size + num_groups, dtype=jnp.int32)
    expert = jnp.sum(block[:, None] >= block_ends[None, :], axis=1, dtype=jnp.int32)
    expert = jnp.minimum(expert, num_groups - 1)
    first_block = (block_ends - blocks_per_group)[expert]
    start = (ends - counts)[expert] + (block - first_block) * block_size
    stop = jnp.minimum(start + block_size, ends[expert])
    return expert, start, stop, block_ends[-1]


def plan_blocks(expert_ids: Array, num_experts: int, block_size: int) -> BlockPlan:
    """Sorts rows by expert (stable) and covers each expert's rows with blocks.

    Args:
      expert_ids: [N] int, the expert of each row; `num_experts` (or more) drops the row.
      num_experts: E.
      block_size: B.

    Raises:
      ValueError: expert_ids is not a vector of integers; num_experts or block_size below 1.
    """
    require_shape("expert_ids", expert_ids, (None,), "[N]")
    require_integer("expert_ids", expert_ids)
    require(num_experts >= 1, "num_experts", num_experts, "at least 1")
    require(block_size >= 1, "block_size", block_size, "at least 1")
    num_rows = expert_ids.shape[0]
    order = jnp.argsort(expert_ids, stable=True).astype(jnp.int32)
    position = (
        jnp.zeros((num_rows,), jnp.int32)
        .at[order]
        .set(jnp.arange(num_rows, dtype=jnp.int32), unique_indices=True, mode="promise_in_bounds")
    )
    counts = jnp.zeros((num_experts,), jnp.int32).at[expert_ids].add(1, mode="drop")
    return BlockPlan(order, position, counts, *_blocks(counts, num_rows, block_size))


def window(array: Array, start: Array, size: int) -> Array:
    """Rows `start` to `start + size` of an array that has them (no clamping is wanted: pad the array by `size`)."""
    return lax.dynamic_slice_in_dim(array, start, size)


def set_window(array: Array, rows: Array, start: Array) -> Array:
    """`array` with `rows` written from `start` on; in place inside a loop."""
    return lax.dynamic_update_slice_in_dim(array, rows.astype(array.dtype), start, 0)


def keep_rows(rows: Array, start: Array, stop: Array, tail: Array | None = None) -> Array:
    """Replaces the tail of a window, which belongs to the next groups, by `tail`'s rows or by zeros."""
    inside = start + jnp.arange(rows.shape[0], dtype=jnp.int32) < stop
    return jnp.where(inside[:, None], rows, jnp.zeros((), rows.dtype) if tail is None else tail.astype(rows.dtype))


def group_of_row(group_sizes: Array, num_rows: int) -> Array:
    """[E] sizes -> [M] int32 group of each sorted row; E for rows past their sum."""
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    return jnp.searchsorted(jnp.cumsum(group_sizes), rows, side="right").astype(jnp.int32)


def _reference(x_MK: Array, w_EKN: Array, group_sizes: Array) -> Array:
    one_hot_ME = jax.nn.one_hot(group_of_row(group_sizes, x_MK.shape[0]), w_EKN.shape[0], dtype=x_MK.dtype)
    return jnp.einsum("me,mk,ekn->mn", one_hot_ME, x_MK, w_EKN, precision=lax.Precision.HIGHEST)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocks_matmul(x_MK: Array, w_EKN: Array, group_sizes: Array, block_size: int) -> Array:
    num_rows = x_MK.shape[0]
    expert, start, stop, num_blocks = _blocks(group_sizes.astype(jnp.int32), num_rows, block_size)
    x_pad = jnp.pad(x_MK, ((0, block_size), (0, 0)))

    def body(i: Array, out: Array) -> Array:
        rows = window(x_pad, start[i], block_size) @ w_EKN[expert[i]]
        return set_window(out, keep_rows(rows, start[i], stop[i]), start[i])

    out = jnp.zeros((num_rows + block_size, w_EKN.shape[2]), x_MK.dtype)
    return lax.fori_loop(0, num_blocks, body, out)[:num_rows]


def _blocks_matmul_fwd(x_MK: Array, w_EKN: Array, group_sizes: Array, block_size: int):
    return _blocks_matmul(x_MK, w_EKN, group_sizes, block_size), (x_MK, w_EKN, group_sizes)


def _blocks_matmul_bwd(block_size: int, residuals: tuple[Array, Array, Array], g_MN: Array):
    x_MK, w_EKN, group_sizes = residuals
    num_rows = x_MK.shape[0]
    expert, start, stop, num_blocks = _blocks(group_sizes.astype(jnp.int32), num_rows, block_size)
    x_pad = jnp.pad(x_MK, ((0, block_size), (0, 0)))
    g_pad = jnp.pad(g_MN, ((0, block_size), (0, 0)))

    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dx, dw = carry
        x = window(x_pad, start[i], block_size)
        g = keep_rows(window(g_pad, start[i], block_size), start[i], stop[i])
        dx = set_window(dx, dot_rt(g, w_EKN[expert[i]]), start[i])
        return dx, dw.at[expert[i]].add(dot_lt(x, g))

    dx = jnp.zeros((num_rows + block_size, x_MK.shape[1]), x_MK.dtype)
    dx, dw = lax.fori_loop(0, num_blocks, body, (dx, jnp.zeros(w_EKN.shape, wide(x_MK.dtype))))
    return dx[:num_rows], dw.astype(w_EKN.dtype), None


_blocks_matmul.defvjp(_blocks_matmul_fwd, _blocks_matmul_bwd)


def grouped_matmul(
    x: Array,
    w: Array,
    group_sizes: Array,
    *,
    implementation: Implementation = "blocks",
    block_size: int = 128,
) -> Array:
    """out[m] = x[m] @ w[group of row m], rows sorted by group.

    Args:
      x: [M, K] rows, the first group_sizes[0] of group 0, and so on; rows past sum(group_sizes) give zeros and
        get zero gradient.
      w: [E, K, N].
      group_sizes: [E] int, none negative, sum at most M (data: not checked).
      implementation: `blocks` (the CPU path), `ragged_dot` (grouped GEMM on GPU) or `reference` (one-hot einsum).
      block_size: rows of one block of `blocks`.

    Returns:
      [M, N] in x's dtype.

    Raises:
      ValueError: shapes, dtypes or options that do not fit.
    """
    require_choice("implementation", implementation, ("blocks", "reference", "ragged_dot"))
    require_shape("x", x, (None, None), "[M, K]")
    require_shape("w", w, (None, x.shape[1], None), f"[E, K = {x.shape[1]}, N]")
    require_shape("group_sizes", group_sizes, (w.shape[0],), f"[E = {w.shape[0]}]")
    require_integer("group_sizes", group_sizes)
    require(block_size >= 1, "block_size", block_size, "at least 1")
    if implementation == "reference":
        return _reference(x, w, group_sizes)
    if implementation == "ragged_dot":
        valid = group_of_row(group_sizes, x.shape[0]) < w.shape[0]
        return jnp.where(valid[:, None], lax.ragged_dot(x, w.astype(x.dtype), group_sizes), jnp.zeros((), x.dtype))
    return _blocks_matmul(x, w, group_sizes, block_size)
