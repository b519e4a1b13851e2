"""The grouped product in Pallas: a second reference, shorter than the Triton kernel and slower; forward alone.

One program a tile of the result, in a grid as large as tiles may ever be; those beyond the real ones do nothing. It has
no gathers and no persistent schedule. `interpret=True` runs it on a CPU.

Legend: M rows, E groups, K and N the matrix sides, BM x BN a tile.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.checks import require, require_float, require_integer, require_shape
from kernels.grouped_gpu import tiles


def _kernel(group, first, stop, number, x, w, out, *, rows_of_tile: int):
    i = pl.program_id(0)

    @pl.when(i < number[0])
    def _() -> None:
        row = first[i] + jnp.arange(rows_of_tile)
        inside = (row < stop[i])[:, None]
        left = plgpu.load(x.at[pl.ds(first[i], rows_of_tile), :], mask=inside, other=0.0)
        product = jnp.dot(left, w[group[i]], preferred_element_type=jnp.float32)
        plgpu.store(out.at[pl.ds(first[i], rows_of_tile), :], product.astype(out.dtype), mask=inside)


def grouped_matmul_pallas(
    x: Array, w: Array, group_sizes: Array, *, rows_of_tile: int = 64, columns_of_tile: int = 64,
    interpret: bool = False,
) -> Array:  # fmt: skip
    """out[m] = x[m] @ w[group of row m], rows sorted by group; rows past the groups' are zeros.

    Args:
      x: [M, K]. On GPU K is a power of two, as Pallas wants whole arrays to be.
      w: [E, K, N], N a multiple of `columns_of_tile`.
      group_sizes: [E] int, none negative, sum at most M (data: not checked).

    Returns:
      [M, N] in x's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit.
    """
    require_shape("x", x, (None, None), "[M, K]")
    require_shape("w", w, (None, x.shape[1], None), f"[E, K = {x.shape[1]}, N]")
    require_float("x", x)
    require_float("w", w)
    require_shape("group_sizes", group_sizes, (w.shape[0],), f"[E = {w.shape[0]}]")
    require_integer("group_sizes", group_sizes)
    (num_rows, inner), (num_groups, _, columns) = x.shape, w.shape
    require(columns % columns_of_tile == 0, "w.shape[2]", columns, f"a multiple of columns_of_tile = {columns_of_tile}")
    made = tiles(group_sizes, num_rows, rows_of_tile)
    whole = lambda array: pl.BlockSpec(array.shape, lambda i, j: (0,) * array.ndim)  # noqa: E731
    padded = jnp.pad(x, ((0, rows_of_tile), (0, 0)))
    out = pl.pallas_call(
        partial(_kernel, rows_of_tile=rows_of_tile),
        grid=(made.group.shape[0], columns // columns_of_tile),
        in_specs=[
            *map(whole, made),
            whole(padded),
            pl.BlockSpec((num_groups, inner, columns_of_tile), lambda i, j: (0, 0, j)),
        ],
        out_specs=pl.BlockSpec((num_rows + rows_of_tile, columns_of_tile), lambda i, j: (0, j)),
        out_shape=jax.ShapeDtypeStruct((num_rows + rows_of_tile, columns), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )(*made, padded, w)
    owned = jnp.arange(num_rows) < jnp.sum(group_sizes)
    return jnp.where(owned[:, None], out[:num_rows], jnp.zeros((), x.dtype))
