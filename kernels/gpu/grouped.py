"""Products of row groups with their own matrices, as Triton kernels that gather on load and scatter on store.

Legend: N sorted rows, E groups, K the contracted side, C columns, BM x BN x BK one tile, f half of a gated width.

A kernel is persistent: PROGRAMS programs walk the tiles that exist, whose number is data, so an empty group costs
nothing. Tiles of rows lie within one group (`tile_group`, `tile_first`, `tile_stop`, from `kernels.grouped_gpu.tiles`);
a group's last tile is masked. Rows are read where they are (`source`) and written where they go (`target`): neither the
permuted copy of tokens nor that of results exists (ScatterMoE, arXiv 2403.08245). Products accumulate in float32.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(index, row, inside, INDEXED: tl.constexpr):
    """Where the sorted rows lie, int64."""
    if INDEXED:
        return tl.load(index + row, mask=inside, other=0).to(tl.int64)
    else:
        return row.to(tl.int64)


@triton.jit
def _tile(tile_group, tile_first, tile_stop, m, BM: tl.constexpr):
    """Of tile m: its group, int64, the sorted rows and which of them are its own."""
    row = tl.load(tile_first + m) + tl.arange(0, BM)
    return tl.load(tile_group + m).to(tl.int64), row, row < tl.load(tile_stop + m)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def rows_kernel(
    x, w, target, scale, tile_group, tile_first, tile_stop, num_tiles, out,
    K: tl.constexpr, C: tl.constexpr, W_GROUP: tl.constexpr, W_ROW: tl.constexpr, W_COLUMN: tl.constexpr,
    SCATTER: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """out[target[n]] = scale[n] x[n] w[group of n], [N, K] [E, K, C] -> [., C]; w by strides, so w^T too."""
    columns_of = tl.cdiv(C, BN)
    total = tl.load(num_tiles) * columns_of
    for tile in range(tl.program_id(0), total, PROGRAMS):
        m = tile // columns_of
        group, row, inside = _tile(tile_group, tile_first, tile_stop, m, BM)
        column = (tile % columns_of) * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        x_at = x + row.to(tl.int64)[:, None] * K + k[None, :]
        w_at = w + group * W_GROUP + k[:, None] * W_ROW + column[None, :] * W_COLUMN
        total_MN = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, K, BK):
            left = tl.load(x_at + k0, mask=inside[:, None] & (k[None, :] < K - k0), other=0)
            right = tl.load(w_at + k0 * W_ROW, mask=(k[:, None] < K - k0) & (column[None, :] < C), other=0)
            total_MN = tl.dot(left, right, total_MN, input_precision=PRECISION)
        if SCALED:
            total_MN *= tl.load(scale + row, mask=inside, other=0).to(tl.float32)[:, None]
        out_at = out + _rows(target, row, inside, SCATTER)[:, None] * C + column[None, :]
        tl.store(out_at, total_MN.to(out.dtype.element_ty), mask=inside[:, None] & (column[None, :] < C))


@triton.jit
def swiglu_kernel(
    x, w, source, tile_group, tile_first, tile_stop, num_tiles, hidden, activation,
    K: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """hidden = x[source] w, [N, 2C], and activation = silu(its first half) times its second, [N, C]; w [E, K, 2C].

    The activation is of the rounded `hidden`, as is what the backward makes of it.
    """
    columns_of = tl.cdiv(C, BN)
    total = tl.load(num_tiles) * columns_of
    for tile in range(tl.program_id(0), total, PROGRAMS):
        m = tile // columns_of
        group, row, inside = _tile(tile_group, tile_first, tile_stop, m, BM)
        column = (tile % columns_of) * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        x_at = x + _rows(source, row, inside, True)[:, None] * K + k[None, :]
        w_at = w + group * (2 * K * C) + k[:, None] * (2 * C) + column[None, :]
        gate = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, K, BK):
            left = tl.load(x_at + k0, mask=inside[:, None] & (k[None, :] < K - k0), other=0)
            w_inside = (k[:, None] < K - k0) & (column[None, :] < C)
            gate = tl.dot(left, tl.load(w_at + k0 * (2 * C), mask=w_inside, other=0), gate, input_precision=PRECISION)
            up = tl.dot(left, tl.load(w_at + k0 * (2 * C) + C, mask=w_inside, other=0), up, input_precision=PRECISION)
        gate, up = gate.to(hidden.dtype.element_ty), up.to(hidden.dtype.element_ty)
        stored = inside[:, None] & (column[None, :] < C)
        hidden_at = hidden + row.to(tl.int64)[:, None] * (2 * C) + column[None, :]
        tl.store(hidden_at, gate, mask=stored)
        tl.store(hidden_at + C, up, mask=stored)
        gate, up = gate.to(tl.float32), up.to(tl.float32)
        made = gate * _sigmoid(gate) * up
        activation_at = activation + row.to(tl.int64)[:, None] * C + column[None, :]
        tl.store(activation_at, made.to(activation.dtype.element_ty), mask=stored)


@triton.jit
def swiglu_backward_kernel(
    g, w, source, scale, hidden, tile_group, tile_first, tile_stop, num_tiles, d_hidden, scaled, d_scale,
    K: tl.constexpr, C: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """From g, the gradient of the weighted outputs at their tokens [., K], and w [E, C, K], the down projection:

        d_hidden  [N, 2C]     of `hidden`, through scale[n] g[source[n]] w^T and the activation, made again
        scaled    [N, C]      scale[n] activation[n], which the gradient of w multiplies by g
        d_scale   [C / BN, N] parts, one of each tile of columns, of <activation[n], g[source[n]] w^T>, the weight's
                              gradient (no expert output is kept: SonicMoE, arXiv 2512.14080)
    """
    columns_of = tl.cdiv(C, BN)
    total = tl.load(num_tiles) * columns_of
    for tile in range(tl.program_id(0), total, PROGRAMS):
        m = tile // columns_of
        group, row, inside = _tile(tile_group, tile_first, tile_stop, m, BM)
        column = (tile % columns_of) * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        g_at = g + _rows(source, row, inside, True)[:, None] * K + k[None, :]
        w_at = w + group * (C * K) + column[None, :] * K + k[:, None]
        d_made = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, K, BK):
            left = tl.load(g_at + k0, mask=inside[:, None] & (k[None, :] < K - k0), other=0)
            right = tl.load(w_at + k0, mask=(k[:, None] < K - k0) & (column[None, :] < C), other=0)
            d_made = tl.dot(left, right, d_made, input_precision=PRECISION)
        stored = inside[:, None] & (column[None, :] < C)
        wide_at = row.to(tl.int64)[:, None] * (2 * C) + column[None, :]
        gate = tl.load(hidden + wide_at, mask=stored, other=0).to(tl.float32)
        up = tl.load(hidden + wide_at + C, mask=stored, other=0).to(tl.float32)
        sigmoid = _sigmoid(gate)
        silu = gate * sigmoid
        made = silu * up
        weight = tl.load(scale + row, mask=inside, other=0).to(tl.float32)
        tl.store(d_scale + (tile % columns_of) * N + row, tl.sum(d_made * made, axis=1), mask=inside)
        d_made *= weight[:, None]
        d_gate = d_made * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(d_hidden + wide_at, d_gate.to(d_hidden.dtype.element_ty), mask=stored)
        tl.store(d_hidden + wide_at + C, (d_made * silu).to(d_hidden.dtype.element_ty), mask=stored)
        scaled_at = scaled + row.to(tl.int64)[:, None] * C + column[None, :]
        tl.store(scaled_at, (made * weight[:, None]).to(scaled.dtype.element_ty), mask=stored)


@triton.jit
def weights_kernel(
    left, right, left_source, right_source, starts, out,
    L: tl.constexpr, R: tl.constexpr, E: tl.constexpr, GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """out[e] = sum of left[left_source[n]]^T right[right_source[n]] over the rows n of group e, [E, L, R] float32.

    Tiles are BM x BN of out, and rows come BK at a time, `starts[e]` to `starts[e + 1]`. An empty group gives zeros.
    """
    across = tl.cdiv(R, BN)
    of_group = tl.cdiv(L, BM) * across
    for tile in range(tl.program_id(0), E * of_group, PROGRAMS):
        group = tile // of_group
        i = (tile % of_group) // across * BM + tl.arange(0, BM)
        j = (tile % of_group) % across * BN + tl.arange(0, BN)
        stop = tl.load(starts + group + 1)
        total = tl.zeros((BM, BN), tl.float32)
        for first in range(tl.load(starts + group), stop, BK):
            row = first + tl.arange(0, BK)
            inside = row < stop
            left_at = left + _rows(left_source, row, inside, GATHER_LEFT)[:, None] * L + i[None, :]
            right_at = right + _rows(right_source, row, inside, GATHER_RIGHT)[:, None] * R + j[None, :]
            a = tl.load(left_at, mask=inside[:, None] & (i[None, :] < L), other=0)
            b = tl.load(right_at, mask=inside[:, None] & (j[None, :] < R), other=0)
            total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
        out_at = out + group.to(tl.int64) * (L * R) + i[:, None] * R + j[None, :]
        tl.store(out_at, total, mask=(i[:, None] < L) & (j[None, :] < R))
