"""Grouped products and the fused FFN on GPU: what launches the kernels of `kernels.gpu.grouped`.

Legend: T tokens, K experts per token, E experts or groups, N sorted rows, d model width, f expert width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kernels import _triton
from kernels.grouped_matmul import SortedRows
from kernels.tiles import Tile, tile_for


class Tiles(NamedTuple):
    """Tiles of rows, each within one group: as many entries as there may ever be, the first `number` are real.

    Attributes:
      group, first, stop: [N / BM + E] int32, the tile's group, its first row, and the row its group ends before.
      number: [1] int32.
    """

    group: Array
    first: Array
    stop: Array
    number: Array


def tiles(counts: Array, num_rows: int, rows_of_tile: int) -> Tiles:
    """Cuts N sorted rows into tiles, on the device: what groups hold is data.

    Args:
      counts: [E] int, rows of each group, in order.
      num_rows: N, the most they may be together.
      rows_of_tile: BM.
    """
    starts, number = jnp.cumsum(counts) - counts, -(-counts // rows_of_tile)
    ends = jnp.cumsum(number)
    index = jnp.arange(num_rows // rows_of_tile + counts.shape[0], dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(ends, index, side="right"), counts.shape[0] - 1)
    first = starts[group] + (index - (ends[group] - number[group])) * rows_of_tile
    whole = [group, first, starts[group] + counts[group], ends[-1:]]
    return Tiles(*(array.astype(jnp.int32) for array in whole))


def products(
    x: Array, w: Array, counts: Array, num_rows: int, *, transposed: bool = False, target: Array | None = None,
    scale: Array | None = None, num_targets: int = 0,
) -> Array:  # fmt: skip
    """out[target[n]] = scale[n] x[n] w[e], e the group of sorted row n; what no row goes to is undefined.

    Args:
      x: [N, K], sorted.
      w: [E, K, C], or [E, C, K] if `transposed`.
      counts: [E] int.
      num_rows: N.
      target: [N] int32, rows of out [num_targets, C]; without, out is [N, C].
      scale: [N] float.
    """
    from kernels.gpu.grouped import rows_kernel

    (num_groups, *sides), inner = w.shape, x.shape[1]
    columns = sides[0] if transposed else sides[1]
    tile = tile_for("rows_kernel", x.dtype, num_rows // num_groups)
    (out,) = launch(
        rows_kernel, tile, x, w, jnp.zeros((1,), jnp.int32) if target is None else target,
        jnp.zeros((1,), jnp.float32) if scale is None else scale, *tiles(counts, num_rows, tile.BM),
        outputs=[jax.ShapeDtypeStruct((num_targets if target is not None else num_rows, columns), x.dtype)],
        K=inner, C=columns, W_GROUP=inner * columns,
        W_ROW=1 if transposed else columns, W_COLUMN=inner if transposed else 1,
        SCATTER=target is not None, SCALED=scale is not None,
    )  # fmt: skip
    return out


def weight_gradients(
    left: Array, right: Array, counts: Array, num_rows: int, *, left_source: Array | None = None,
    right_source: Array | None = None,
) -> Array:  # fmt: skip
    """out[e] = sum of left[left_source[n]]^T right[right_source[n]] over the rows n of group e, [E, L, R] float32.

    Args:
      left, right: [., L], [., R]; without indices [N] int32 their first N rows.
      counts: [E] int.
      num_rows: N.
    """
    from kernels.gpu.grouped import weights_kernel

    num_groups, sides = counts.shape[0], (left.shape[1], right.shape[1])
    tile = tile_for("weights_kernel", left.dtype, num_rows // num_groups)
    none = jnp.zeros((1,), jnp.int32)
    starts = jnp.concatenate([none, jnp.cumsum(counts).astype(jnp.int32)])
    (out,) = launch(
        weights_kernel, tile, left, right, none if left_source is None else left_source,
        none if right_source is None else right_source, starts,
        outputs=[jax.ShapeDtypeStruct((num_groups, *sides), jnp.float32)],
        L=sides[0], R=sides[1], E=num_groups,
        GATHER_LEFT=left_source is not None, GATHER_RIGHT=right_source is not None,
    )  # fmt: skip
    return out


def swiglu_forward(
    x: Array, gate_up: Array, down: Array, rows: SortedRows, token: Array, scale: Array
) -> tuple[Array, Array]:
    """Every sorted row through its expert.

    Args:
      x: [T, d].
      gate_up, down: [E, d, 2f], [E, f, d].
      token, scale: [N or more], each sorted row's token, int32, and weight.

    Returns:
      [N, d], the weighted outputs at their assignments t K + k, undefined where nothing was sent; and what the
      backward needs, the pre-activations in sorted order, as many as `token` has.
    """
    from kernels.gpu.grouped import swiglu_kernel

    num_rows, (num_groups, width, d) = rows.order.shape[0], down.shape
    tile = tile_for("swiglu_kernel", x.dtype, num_rows // num_groups)
    shapes = (token.shape[0], 2 * width), (num_rows, width)
    hidden, activation = launch(
        swiglu_kernel, tile, x, gate_up, token, *tiles(rows.counts, num_rows, tile.BM),
        outputs=[jax.ShapeDtypeStruct(shape, x.dtype) for shape in shapes],
        K=d, C=width,
    )  # fmt: skip
    scattered = {"target": rows.order, "num_targets": num_rows, "scale": scale}
    return products(activation, down, rows.counts, num_rows, **scattered), hidden


class Gradients(NamedTuple):
    """Of the rows of x [N, d], each at its assignment, and of the weights [N] of the sorted rows, both undefined where
    nothing was sent; of gate_up and down, float32."""

    x: Array
    scale: Array
    gate_up: Array
    down: Array


def swiglu_backward(
    x: Array, gate_up: Array, down: Array, rows: SortedRows, token: Array, scale: Array, hidden: Array, g: Array
) -> Gradients:
    """From g [T, d], the gradient of the sum of weighted outputs, and what `swiglu_forward` had and gave."""
    from kernels.gpu.grouped import swiglu_backward_kernel

    num_rows, counts, (num_groups, width, d) = rows.order.shape[0], rows.counts, down.shape
    tile = tile_for("swiglu_backward_kernel", x.dtype, num_rows // num_groups)
    parts = -(-width // tile.BN)
    shapes = ((num_rows, 2 * width), x.dtype), ((num_rows, width), x.dtype), ((parts, num_rows), jnp.float32)
    d_hidden, scaled, d_scale = launch(
        swiglu_backward_kernel, tile, g, down, token, scale, hidden, *tiles(counts, num_rows, tile.BM),
        outputs=[jax.ShapeDtypeStruct(*shape) for shape in shapes], K=d, C=width, N=num_rows,
    )  # fmt: skip
    d_rows = products(d_hidden, gate_up, counts, num_rows, transposed=True, target=rows.order, num_targets=num_rows)
    d_gate_up = weight_gradients(x, d_hidden, counts, num_rows, left_source=token)
    d_down = weight_gradients(scaled, g, counts, num_rows, right_source=token)
    return Gradients(d_rows, jnp.sum(d_scale, axis=0), d_gate_up, d_down)


def launch(kernel: Any, tile: Tile, *arrays: Array, outputs: list[jax.ShapeDtypeStruct], **constants: Any):
    """A persistent kernel with this tile; products of float32 are exact, not TF32."""
    programs = tile.programs(_triton.multiprocessors())
    return _triton.call(
        kernel, *arrays, outputs=outputs, grid=(programs,), num_warps=tile.warps, num_stages=tile.stages,
        PRECISION="ieee", PROGRAMS=programs, BM=tile.BM, BN=tile.BN, BK=tile.BK, **constants,
    )  # fmt: skip
