"""Products of row groups with their own matrices, and the walk over blocks every grouped CPU loop shares.

Legend: M rows, E groups (experts), K and N the matrix sides, B rows of one block.

`jax.lax.ragged_dot` on CPU is E masked copies and one big contraction: E times the arithmetic, forward and backward.
Here rows sorted by group are walked in windows of B rows, each inside one group except for its tail. The tail belongs
to the next groups; their own windows, later in the walk, overwrite it. So rows are never moved to padded slots, a
group costs ceil(rows / B) 2-D products, and an empty group or a dropped row nearly nothing: shapes are static, trip
counts are data. B is the group's own choice among a few static sizes, so that most groups are one block with little
padding. A traced trip count is a while loop, which has no reverse mode, hence the hand-written VJP.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jax.experimental import checkify

from kernels import _triton
from kernels.checks import require, require_choice, require_float, require_integer, require_shape
from kernels.products import dot_lt, dot_rt, wide

Implementation = Literal["blocks", "reference", "ragged_dot", "triton"]
Arrays = tuple[Array, ...]


class SortedRows(NamedTuple):
    """Where each row goes once rows are sorted by expert.

    Attributes:
      order: [N] int32, the row at each sorted position; dropped rows come last.
      position: [N] int32, the sorted position of each row (the inverse of `order`).
      counts: [E] int32, valid rows per expert.
    """

    order: Array
    position: Array
    counts: Array


def sort_rows(expert_ids: Array, num_experts: int) -> SortedRows:
    """Sorts rows by expert, stable.

    Args:
      expert_ids: [N] int, the expert of each row; `num_experts` (or more) drops the row.
      num_experts: E.

    Raises:
      ValueError: expert_ids is not a vector of integers; num_experts below 1.
    """
    require_shape("expert_ids", expert_ids, (None,), "[N]")
    require_integer("expert_ids", expert_ids)
    require(num_experts >= 1, "num_experts", num_experts, "at least 1")
    num_rows = expert_ids.shape[0]
    order = jnp.argsort(expert_ids, stable=True).astype(jnp.int32)
    position = (
        jnp.zeros((num_rows,), jnp.int32)
        .at[order]
        .set(jnp.arange(num_rows, dtype=jnp.int32), unique_indices=True, mode="promise_in_bounds")
    )
    counts = jnp.zeros((num_experts,), jnp.int32).at[expert_ids].add(1, mode="drop")
    return SortedRows(order, position, counts)


Block = Callable[[int, Array, Array, Any], Any]
Blocks = Callable[[Block, Any], Any]
Group = Callable[[Array, Blocks, Any], Any]


def automatic_block_sizes(num_assignments: int, num_experts: int) -> tuple[int, ...]:
    """Rows a block may have, ascending: up to twelve multiples of one unit, none longer than all assignments need.

    The unit is an eighth of the mean assignments per expert (16 to 64 rows): a nearly balanced expert is then one block
    with about a sixteenth of padding, and even a block of a large expert stays near the cache. Each size is compiled.
    """
    mean = -(-num_assignments // num_experts)
    unit = min(64, max(16, round(mean / 128) * 16))
    return tuple(unit * i for i in range(1, min(12, max(1, -(-num_assignments // unit))) + 1))


def choose_blocks(counts: Array, sizes: tuple[int, ...]) -> tuple[Array, Array]:
    """The block size of each group and how many blocks it takes.

    As few blocks as the largest size allows, equally long, of the smallest size that holds them.

    Args:
      counts: [...] int, rows per group.
      sizes: the sizes to choose from, ascending.

    Returns:
      size, number: [...] int32.
    """
    share = -(-counts // jnp.maximum(-(-counts // sizes[-1]), 1))
    size = jnp.asarray(sizes, jnp.int32)[jnp.searchsorted(jnp.asarray(sizes, jnp.int32), share)]
    return size, (-(-counts // size)).astype(jnp.int32)


def walk_groups(counts: Array, sizes: tuple[int, ...], group: Group, carry: Any) -> Any:
    """Walks the groups of sorted rows, and the blocks of each, in order; not differentiable.

    Two loops, so that what a group needs (its weights) or makes (their gradient) is read and written once per group,
    not per block. Sizes are loops in a row of which one runs: behind a `lax.switch` XLA:CPU would copy the carry.

    Args:
      counts: [E] int32, rows per group, none negative (data: not checked).
      sizes: block sizes, ascending; each group takes the one `choose_blocks` gives it.
      group: `carry = group(e, blocks, carry)` for every group e. Inside it, `blocks(body, inner)` returns the last
        `inner = body(size, start, stop, inner)` over the windows of `size` rows from `start` on; rows from `stop` on
        belong to the next groups. e, start and stop are int32 scalars, size is static.
      carry: arrays of fixed shapes and dtypes.

    Returns:
      The last carry.
    """
    ends = jnp.cumsum(counts)
    chosen, number = choose_blocks(counts, sizes)

    def step(e: Array, carry: Any) -> Any:
        first = ends[e] - counts[e]

        def blocks(body: Block, inner: Any) -> Any:
            for size in sizes:
                block = partial(_block, body, size, first, ends[e])
                inner = lax.fori_loop(0, jnp.where(chosen[e] == size, number[e], 0), block, inner)
            return inner

        return group(e, blocks, carry)

    return lax.fori_loop(0, counts.shape[0], step, carry)


def _block(body: Block, size: int, first: Array, stop: Array, i: Array, inner: Any) -> Any:
    return body(size, first + i * size, stop, inner)


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
def _blocks_matmul(x_MK: Array, w_EKN: Array, group_sizes: Array, sizes: tuple[int, ...]) -> Array:
    num_rows = x_MK.shape[0]
    x_pad = jnp.pad(x_MK, ((0, sizes[-1]), (0, 0)))

    def group(e: Array, blocks: Blocks, out: Array) -> Array:
        w = w_EKN[e]

        def block(size: int, start: Array, stop: Array, out: Array) -> Array:
            return set_window(out, keep_rows(window(x_pad, start, size) @ w, start, stop), start)

        return blocks(block, out)

    out = jnp.zeros((num_rows + sizes[-1], w_EKN.shape[2]), x_MK.dtype)
    return walk_groups(group_sizes.astype(jnp.int32), sizes, group, out)[:num_rows]


def _blocks_matmul_fwd(x_MK: Array, w_EKN: Array, group_sizes: Array, sizes: tuple[int, ...]):
    return _blocks_matmul(x_MK, w_EKN, group_sizes, sizes), (x_MK, w_EKN, group_sizes)


def _blocks_matmul_bwd(sizes: tuple[int, ...], residuals: tuple[Array, Array, Array], g_MN: Array):
    x_MK, w_EKN, group_sizes = residuals
    num_rows = x_MK.shape[0]
    x_pad = jnp.pad(x_MK, ((0, sizes[-1]), (0, 0)))
    g_pad = jnp.pad(g_MN, ((0, sizes[-1]), (0, 0)))

    def group(e: Array, blocks: Blocks, carry: Arrays) -> Arrays:
        dx, dw = carry
        w = w_EKN[e]

        def block(size: int, start: Array, stop: Array, carry: Arrays) -> Arrays:
            dx, dw_e = carry
            x, g = window(x_pad, start, size), keep_rows(window(g_pad, start, size), start, stop)
            return set_window(dx, dot_rt(g, w), start), dw_e + dot_lt(x, g)

        dx, dw_e = blocks(block, (dx, jnp.zeros(w.shape, dw.dtype)))
        return dx, dw.at[e].set(dw_e)

    dx = jnp.zeros((num_rows + sizes[-1], x_MK.shape[1]), x_MK.dtype)
    carry = dx, jnp.zeros(w_EKN.shape, wide(x_MK.dtype))
    dx, dw = walk_groups(group_sizes.astype(jnp.int32), sizes, group, carry)
    return dx[:num_rows], dw.astype(w_EKN.dtype), None


_blocks_matmul.defvjp(_blocks_matmul_fwd, _blocks_matmul_bwd)


@jax.custom_vjp
def _triton_matmul(x_MK: Array, w_EKN: Array, group_sizes: Array) -> Array:
    cpu = lambda *args: _blocks_matmul(*args, automatic_block_sizes(x_MK.shape[0], w_EKN.shape[0]))  # noqa: E731
    return _triton.on_gpu(_triton_products, cpu, x_MK, w_EKN, group_sizes)


def _triton_products(x_MK: Array, w_EKN: Array, group_sizes: Array) -> Array:
    from kernels.grouped_gpu import products

    return _inside(products(x_MK, w_EKN, group_sizes, x_MK.shape[0]), group_sizes)


def _inside(rows: Array, group_sizes: Array) -> Array:
    """Rows past the last group's as zeros."""
    return keep_rows(rows, jnp.int32(0), jnp.sum(group_sizes))


def _triton_matmul_fwd(x_MK: Array, w_EKN: Array, group_sizes: Array):
    return _triton_matmul(x_MK, w_EKN, group_sizes), (x_MK, w_EKN, group_sizes)


def _triton_matmul_bwd(residuals: tuple[Array, Array, Array], g_MN: Array):
    def gpu(x: Array, w: Array, group_sizes: Array, g: Array) -> Arrays:
        from kernels.grouped_gpu import products, weight_gradients

        dx = products(g, w, group_sizes, x.shape[0], transposed=True)
        return _inside(dx, group_sizes), weight_gradients(x, g, group_sizes, x.shape[0]).astype(w.dtype)

    sizes = automatic_block_sizes(g_MN.shape[0], residuals[1].shape[0])
    cpu = lambda *args: _blocks_matmul_bwd(sizes, args[:3], args[3])[:2]  # noqa: E731
    return *_triton.on_gpu(gpu, cpu, *residuals, g_MN), None


_triton_matmul.defvjp(_triton_matmul_fwd, _triton_matmul_bwd)


def _check_sizes(group_sizes: Array, num_rows: int) -> None:
    expected = f"none negative, sum at most M = {num_rows}"
    fits = jnp.all(group_sizes >= 0) & (jnp.sum(group_sizes) <= num_rows)
    if isinstance(fits, Tracer):
        checkify.debug_check(fits, "group_sizes = {sizes}: expected " + expected, sizes=group_sizes)
    else:
        require(bool(fits), "group_sizes", group_sizes.tolist(), expected)


def grouped_matmul(
    x: Array,
    w: Array,
    group_sizes: Array,
    *,
    implementation: Implementation = "blocks",
    block_size: int = 0,
) -> Array:
    """out[m] = x[m] @ w[group of row m], rows sorted by group.

    Args:
      x: [M, K] rows, the first group_sizes[0] of group 0, and so on; rows past sum(group_sizes) give zeros and
        get zero gradient.
      w: [E, K, N].
      group_sizes: [E] int, none negative, sum at most M. Checked where they can be read; within jit by
        `jax.experimental.checkify`, if the caller has it on, and else not.
      implementation: `blocks` (the CPU path), `ragged_dot` (XLA's, on GPU), `triton` (our kernels on GPU, `blocks` on
        CPU) or `reference` (one-hot einsum).
      block_size: rows of one block of `blocks`; 0 picks several sizes by the mean rows of a group.

    Returns:
      [M, N] in x's dtype.

    Raises:
      ValueError: shapes, dtypes or options that do not fit.
    """
    require_choice("implementation", implementation, get_args(Implementation))
    require_shape("x", x, (None, None), "[M, K]")
    require_shape("w", w, (None, x.shape[1], None), f"[E, K = {x.shape[1]}, N]")
    require_float("x", x)
    require_float("w", w)
    require_shape("group_sizes", group_sizes, (w.shape[0],), f"[E = {w.shape[0]}]")
    require_integer("group_sizes", group_sizes)
    require(block_size >= 0, "block_size", block_size, "0 (automatic) or a positive row count")
    _check_sizes(group_sizes, x.shape[0])
    if implementation == "reference":
        return _reference(x, w, group_sizes)
    if implementation == "ragged_dot":
        valid = group_of_row(group_sizes, x.shape[0]) < w.shape[0]
        return jnp.where(valid[:, None], lax.ragged_dot(x, w.astype(x.dtype), group_sizes), jnp.zeros((), x.dtype))
    if implementation == "triton":
        return _triton_matmul(x, w.astype(x.dtype), group_sizes)
    sizes = (block_size,) if block_size else automatic_block_sizes(x.shape[0], w.shape[0])
    return _blocks_matmul(x, w, group_sizes, sizes)
