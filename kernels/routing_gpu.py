"""The fused router on GPU: choice, weights, counts and stable expert order in two passes, and moving rows. On a CPU the
same functions are XLA's operations.

What launches the kernels of `kernels.gpu.routing`. The choice is that of the softmax and sigmoid top-k routers (Mixtral
2401.04088, OLMoE 2409.02060; with a bias for the choice alone, DeepSeek-V3 2412.19437), the order that of
`kernels.grouped_matmul.sort_rows`. What a policy drops after the choice needs one more pass, to count again.

Bytes of device memory at T = 8192, E = 64, K = 8, in MiB (2^20), counted and not measured. An array [T, E] is 2, an
array [T, K] 0.25, the counts of 512 blocks 0.125. XLA: the fewest its operations move, all elementwise work fused.

    XLA                                  read   write  |  here                                       read   write
    softmax                              2      2      |  route_kernel: logits; probabilities        2      2
    top_k: values, indices               2      0.5    |    indices, weights, counts of blocks              0.625
    weights: gather (whole sectors)      2.25   0.25   |
      their sum, division                0.53   0.28   |
    counts (one-hot inside the sum)      0.25          |
    sort keys, row numbers               0.31   0.5    |  sums over blocks and experts before each   0.375  0.25
    radix sort of pairs, 8 bits a pass   2.25   2      |  place_kernel: indices, first places        0.375
    inverse order; counts by scatter     0.5    0.5    |    position, order                                 0.5
    together                             10.1   6.0    |                                             2.75   3.4

So 16.1 against 6.1, and 4.1 where nobody asks for probabilities; `count_kernel` adds 0.4. At 3.35 TB/s that is 5 and 2
microseconds, as long as a launch takes: here are two and the few of XLA's sums, there a dozen.

Legend: T tokens, E experts, K experts per token, N = T K assignments, G blocks of tokens, d row width.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kernels import _triton
from kernels.checks import require, require_choice, require_shape
from kernels.grouped_matmul import SortedRows, sort_rows

Score = Literal["softmax", "sigmoid"]
BLOCK_TOKENS = 16  # of one program, at most: 512 programs at T = 8192
TILE = 8192  # scores of one program, at most: 16 for each thread of 16 warps, whose registers hold them
PAIRS = 4096  # of assignments, compared at a time
ROWS, COLUMNS = 16, 128  # of a tile of moved rows, at most: a warp reads whole sectors and keeps many loads in flight
TINY = 1e-20  # as in the kernels
FLOATS = ("float32", "bfloat16", "float16")


class Routed(NamedTuple):
    """A routing of T tokens, of which `moe.routing.RouterOutput` says more.

    Attributes:
      indices: [T, K] int32, best first; of masked tokens too.
      weights: [T, K] float32.
      probs: [T, E] float32, the distribution balance losses average, or None.
      block_counts: [G, E] int32, assignments of valid tokens in each block; their sum over G is the experts' counts.
    """

    indices: Array
    weights: Array
    probs: Array | None
    block_counts: Array


def block_tokens(num_experts: int) -> int:
    """Tokens of a block: of the counts that `route` gives and `sort_assignments` takes."""
    return max(1, min(BLOCK_TOKENS, TILE // _power_of_two(num_experts)))


class _Options(NamedTuple):
    top_k: int
    score: Score
    renormalize: bool
    scaling: float
    with_probs: bool


def route(
    logits: Array, top_k: int, *, score: Score = "softmax", bias: Array | None = None, valid: Array | None = None,
    renormalize: bool = True, scaling: float = 1.0, with_probs: bool = True,
) -> Routed:  # fmt: skip
    """The top k of softmax(logits) or sigmoid(logits), plus `bias`, and their weights: `scaling` times the scores
    without bias, divided by the sum of the chosen ones if `renormalize`.

    Differentiable in the logits through weights and probabilities, not through the choice, and not in the bias.

    Args:
      logits: [T, E] float32, bfloat16 or float16; all is computed in float32. Not-a-numbers come first.
      top_k: K.
      score: of probabilities; sigmoids are divided by their sum for `probs` only.
      bias: [E] float32, of the choice alone.
      valid: [T] bool or int8; tokens where it is false are chosen for but not counted.
      with_probs: whether to write probabilities.

    Raises:
      ValueError: shapes, dtypes or options that do not fit.
    """
    require_shape("logits", logits, (None, None), "[T, E]")
    require(logits.dtype.name in FLOATS, "logits.dtype", logits.dtype.name, f"one of {', '.join(FLOATS)}")
    num_tokens, num_experts = logits.shape
    require(num_tokens >= 1, "num_tokens", num_tokens, "at least one token")
    require(num_experts >= 1, "num_experts", num_experts, "at least 1")
    require(1 <= top_k <= num_experts, "top_k", top_k, f"1 <= top_k <= num_experts = {num_experts}")
    require_choice("score", score, ("softmax", "sigmoid"))
    require(0 < scaling < math.inf, "scaling", scaling, "a finite number above 0")
    if bias is not None:
        require_shape("bias", bias, (num_experts,), f"[E = {num_experts}]")
        require(bias.dtype == jnp.float32, "bias.dtype", bias.dtype.name, "float32")
    if valid is not None:
        require_shape("valid", valid, (num_tokens,), f"[T = {num_tokens}]")
        _require_mask(valid)
    return _route(logits, bias, valid, _Options(top_k, score, renormalize, float(scaling), with_probs))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _route(logits: Array, bias: Array | None, valid: Array | None, options: _Options) -> Routed:
    return _choose(logits, bias, valid, options)


def _choose(logits: Array, bias: Array | None, valid: Array | None, options: _Options) -> Routed:
    ways = (partial(way, options) for way in (_choose_triton, _choose_xla))
    return _triton.on_gpu(*ways, logits, bias, valid)


def _choose_xla(options: _Options, logits: Array, bias: Array | None, valid: Array | None) -> Routed:
    (num_tokens, num_experts), tokens = logits.shape, block_tokens(logits.shape[1])
    wide = logits.astype(jnp.float32)
    scores = jax.nn.sigmoid(wide) if options.score == "sigmoid" else jax.nn.softmax(wide, axis=-1)
    indices = jax.lax.top_k(scores if bias is None else scores + bias[None], options.top_k)[1].astype(jnp.int32)
    weights, probs = _weigh(logits, indices, options)
    taken = jnp.sum(jax.nn.one_hot(indices, num_experts, dtype=jnp.int32), axis=1)
    if valid is not None:
        taken = taken * (valid != 0)[:, None]
    blocks = -(-num_tokens // tokens)
    taken = jnp.pad(taken, ((0, blocks * tokens - num_tokens), (0, 0)))
    counts = jnp.sum(taken.reshape(blocks, tokens, num_experts), axis=1)
    return Routed(indices, weights, probs if options.with_probs else None, counts)


def _choose_triton(options: _Options, logits: Array, bias: Array | None, valid: Array | None) -> Routed:
    from kernels.gpu.routing import route_kernel

    (num_tokens, num_experts), top_k = logits.shape, options.top_k
    tokens, padded = block_tokens(num_experts), _power_of_two(num_experts)
    blocks = -(-num_tokens // tokens)
    f32, i32 = (partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.float32, jnp.int32))
    indices, weights, probs, counts = _triton.call(
        route_kernel, logits, jnp.zeros((1,), jnp.float32) if bias is None else bias, _mask(valid),
        outputs=[i32((num_tokens, top_k)), f32((num_tokens, top_k)),
                 f32((num_tokens, num_experts) if options.with_probs else (1,)), i32((blocks, num_experts))],
        grid=(blocks,), num_warps=max(4, tokens * padded // 512), num_stages=1,
        T=num_tokens, E=num_experts, K=top_k, SIGMOID=options.score == "sigmoid", BIASED=bias is not None,
        MASKED=valid is not None, RENORMALIZE=options.renormalize, SCALING=options.scaling, PROBS=options.with_probs,
        BT=tokens, EP=padded, KP=_power_of_two(top_k),
    )  # fmt: skip
    return Routed(indices, weights, probs if options.with_probs else None, counts)


def _weigh(logits: Array, indices: Array, options: _Options) -> tuple[Array, Array]:
    """Weights [T, K] of the chosen and probabilities [T, E], in XLA: what the backward differentiates."""
    logits = logits.astype(jnp.float32)
    if options.score == "sigmoid":
        scores = jax.nn.sigmoid(logits)
        probs = scores / (jnp.sum(scores, axis=-1, keepdims=True) + TINY)
    else:
        scores = probs = jax.nn.softmax(logits, axis=-1)
    # A one-hot, which XLA fuses into the sum: the transpose of a gather would be a scatter.
    hit = indices[..., None] == jnp.arange(logits.shape[1], dtype=jnp.int32)[None, None]
    weights = jnp.sum(jnp.where(hit, scores[:, None], 0.0), axis=-1)
    if options.renormalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + TINY)
    return options.scaling * weights, probs


def _route_fwd(logits: Array, bias: Array | None, valid: Array | None, options: _Options):
    routed = _choose(logits, bias, valid, options)
    return routed, (logits, routed.indices)


def _route_bwd(options: _Options, residuals: tuple[Array, Array], g: Routed):
    logits, indices = residuals
    (_, probs), transpose = jax.vjp(lambda logits: _weigh(logits, indices, options), logits)
    return *transpose((g.weights, jnp.zeros_like(probs) if g.probs is None else g.probs)), None, None


_route.defvjp(_route_fwd, _route_bwd)


def sort_assignments(
    indices: Array, num_experts: int, *, valid: Array | None = None, block_counts: Array | None = None
) -> SortedRows:
    """`sort_rows` of the assignments, flat in the order of [T, K]: stable, dropped ones last.

    Args:
      indices: [T, K] int32; none of the E experts drops the assignment.
      num_experts: E.
      valid: [T] or [T, K] bool or int8; false drops.
      block_counts: `route`'s, if it chose these indices and had this `valid`; else they are counted.

    Raises:
      ValueError: shapes or dtypes that do not fit.
    """
    require_shape("indices", indices, (None, None), "[T, K]")
    require(indices.dtype == jnp.int32, "indices.dtype", indices.dtype.name, "int32")
    require(num_experts >= 1, "num_experts", num_experts, "at least 1")
    num_tokens, top_k = indices.shape
    blocks = -(-num_tokens // block_tokens(num_experts))
    require(1 <= num_tokens * top_k < 2**31, "indices.shape", indices.shape, "1 to 2^31 - 1 assignments")
    if valid is not None:
        shapes = (num_tokens,), (num_tokens, top_k)
        require(valid.shape in shapes, "valid.shape", valid.shape, f"[T] or [T, K], one of {shapes}")
        _require_mask(valid)
    if block_counts is not None:
        require_shape("block_counts", block_counts, (blocks, num_experts), f"[G = {blocks}, E = {num_experts}]")
        require(block_counts.dtype == jnp.int32, "block_counts.dtype", block_counts.dtype.name, "int32")
    return _sort(indices, valid, block_counts, num_experts)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sort(indices: Array, valid: Array | None, block_counts: Array | None, num_experts: int) -> SortedRows:
    return _sorted(indices, valid, block_counts, num_experts)


def _sorted(indices: Array, valid: Array | None, block_counts: Array | None, num_experts: int) -> SortedRows:
    ways = (partial(way, num_experts) for way in (_sorted_triton, _sorted_xla))
    return _triton.on_gpu(*ways, indices, valid, block_counts)


def _sorted_xla(num_experts: int, indices: Array, valid: Array | None, block_counts: Array | None) -> SortedRows:
    del block_counts
    kept = (indices >= 0) & (indices < num_experts)
    if valid is not None:
        kept = kept & (valid != 0).reshape(valid.shape[0], -1)
    return sort_rows(jnp.where(kept, indices, num_experts).reshape(-1), num_experts)


def _sorted_triton(num_experts: int, indices: Array, valid: Array | None, block_counts: Array | None) -> SortedRows:
    from kernels.gpu.routing import count_kernel, place_kernel

    (num_tokens, top_k), tokens = indices.shape, block_tokens(num_experts)
    blocks, block_rows = -(-num_tokens // tokens), tokens * top_k
    padded = _power_of_two(block_rows)
    strides = (top_k, 1) if valid is not None and valid.ndim == 2 else (1, 0)
    constants = {
        "N": indices.size, "E": num_experts, "K": top_k, "MASKED": valid is not None, "VALID_TOKEN": strides[0],
        "VALID_SLOT": strides[1], "ROWS": block_rows, "RP": padded,
    }  # fmt: skip
    given = indices, _mask(valid)
    if block_counts is None:
        shape = jax.ShapeDtypeStruct((blocks, num_experts), jnp.int32)
        (block_counts,) = _triton.call(
            count_kernel, *given, outputs=[shape], grid=(blocks,), num_stages=1, EP=_power_of_two(num_experts),
            **constants,
        )  # fmt: skip
    first, counts = _first_places(block_counts, block_rows)
    position, order = _triton.call(
        place_kernel, *given, first, outputs=[jax.ShapeDtypeStruct((indices.size,), jnp.int32)] * 2, grid=(blocks,),
        num_stages=1, CHUNK=max(1, min(32, PAIRS // padded)), **constants,
    )  # fmt: skip
    return SortedRows(order, position, counts)


def _sort_fwd(indices: Array, valid: Array | None, block_counts: Array | None, num_experts: int):
    return _sorted(indices, valid, block_counts, num_experts), None


def _sort_bwd(num_experts: int, residuals: None, g: SortedRows):
    return None, None, None  # of integers; `route`'s come with tangents, which a kernel's call refuses


_sort.defvjp(_sort_fwd, _sort_bwd)


def _first_places(block_counts: Array, block_rows: int) -> tuple[Array, Array]:
    """Where each block's first assignment to each expert goes, then its first dropped one, [G, E + 1]; counts [E]."""
    counts = jnp.sum(block_counts, axis=0, dtype=jnp.int32)
    ends, before = jnp.cumsum(counts), jnp.cumsum(block_counts, axis=0) - block_counts
    dropped_before = block_rows * jnp.arange(before.shape[0], dtype=jnp.int32) - jnp.sum(before, 1, dtype=jnp.int32)
    return jnp.concatenate([(ends - counts)[None] + before, (ends[-1:] + dropped_before)[:, None]], axis=1), counts


def permute(x: Array, rows: SortedRows, top_k: int, scale: Array | None = None) -> Array:
    """Copies of tokens in expert order: out[i] = scale[i] x[order[i] / K], and zeros for dropped assignments.

    For those who must have the copy, to send it elsewhere; the kernels of `kernels.grouped_gpu` read rows in place.

    Args:
      x: [T, d] float32, bfloat16 or float16.
      rows: of the N = T K assignments.
      top_k: K.
      scale: [N] float, of the sorted assignments.

    Returns:
      [N, d] in x's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit.
    """
    num_rows = _require_rows("x", x, rows, top_k)
    require_shape("x", x, (num_rows // top_k, None), f"[T = {num_rows // top_k}, d]")
    if scale is not None:
        require_shape("scale", scale, (num_rows,), f"[N = {num_rows}]")
        require(scale.dtype.name in FLOATS, "scale.dtype", scale.dtype.name, f"one of {', '.join(FLOATS)}")
    return _permute(x, scale, rows, top_k)


def unpermute(values: Array, rows: SortedRows, top_k: int, weights: Array | None = None) -> Array:
    """out[t] = sum over k of weights[t, k] values[position[t, k]], in float32, without dropped assignments.

    Args:
      values: [N, d] float32, bfloat16 or float16, in expert order.
      rows: of the N = T K assignments.
      top_k: K.
      weights: [T, K] float.

    Returns:
      [T, d] in the dtype of `values`.

    Raises:
      ValueError: shapes or dtypes that do not fit.
    """
    num_rows = _require_rows("values", values, rows, top_k)
    require_shape("values", values, (num_rows, None), f"[N = {num_rows}, d]")
    if weights is not None:
        require_shape("weights", weights, (num_rows // top_k, top_k), f"[T = {num_rows // top_k}, K = {top_k}]")
        require(weights.dtype.name in FLOATS, "weights.dtype", weights.dtype.name, f"one of {', '.join(FLOATS)}")
    return _unpermute(values, weights, rows, top_k)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _permute(x: Array, scale: Array | None, rows: SortedRows, top_k: int) -> Array:
    return _triton.on_gpu(partial(_permute_triton, top_k), partial(_permute_xla, top_k), x, scale, rows)


def _permute_xla(top_k: int, x: Array, scale: Array | None, rows: SortedRows) -> Array:
    made = x[rows.order // top_k].astype(jnp.float32)
    if scale is not None:
        made = made * scale.astype(jnp.float32)[:, None]
    kept = jnp.arange(made.shape[0], dtype=jnp.int32) < _kept(rows)
    return jnp.where(kept[:, None], made, 0.0).astype(x.dtype)


def _permute_triton(top_k: int, x: Array, scale: Array | None, rows: SortedRows) -> Array:
    from kernels.gpu.routing import permute_kernel

    given = x, rows.order, jnp.zeros((1,), jnp.float32) if scale is None else scale
    return _move(permute_kernel, *given, rows, rows.order.shape[0], N=rows.order.shape[0], K=top_k,
                 SCALED=scale is not None)  # fmt: skip


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _unpermute(values: Array, weights: Array | None, rows: SortedRows, top_k: int) -> Array:
    return _triton.on_gpu(partial(_unpermute_triton, top_k), partial(_unpermute_xla, top_k), values, weights, rows)


def _unpermute_xla(top_k: int, values: Array, weights: Array | None, rows: SortedRows) -> Array:
    position = rows.position.reshape(-1, top_k)
    made = jnp.where((position < _kept(rows))[..., None], values[position].astype(jnp.float32), 0.0)
    if weights is not None:
        made = made * weights.astype(jnp.float32)[..., None]
    return jnp.sum(made, axis=1).astype(values.dtype)


def _unpermute_triton(top_k: int, values: Array, weights: Array | None, rows: SortedRows) -> Array:
    from kernels.gpu.routing import unpermute_kernel

    num_tokens = rows.position.shape[0] // top_k
    given = values, rows.position, jnp.zeros((1,), jnp.float32) if weights is None else weights
    return _move(unpermute_kernel, *given, rows, num_tokens, T=num_tokens, K=top_k, WEIGHTED=weights is not None)


def _move(kernel, source: Array, index: Array, scale: Array, rows: SortedRows, made: int, **constants: int) -> Array:
    """`made` rows of the source's width and dtype."""
    width = source.shape[1]
    columns = min(COLUMNS, _power_of_two(width))
    (out,) = _triton.call(
        kernel, source, index, scale, _kept(rows)[None],
        outputs=[jax.ShapeDtypeStruct((made, width), source.dtype)],
        grid=(-(-made // ROWS), -(-width // columns)), num_stages=1, D=width, BM=ROWS, BD=columns, **constants,
    )  # fmt: skip
    return out


def _permute_fwd(x: Array, scale: Array | None, rows: SortedRows, top_k: int):
    return _permute(x, scale, rows, top_k), (x, scale, rows)


def _permute_bwd(top_k: int, residuals: tuple[Array, Array | None, SortedRows], g: Array):
    x, scale, rows = residuals
    if scale is None:
        return _unpermute(g, None, rows, top_k), None, None
    kept = jnp.arange(g.shape[0], dtype=jnp.int32) < _kept(rows)
    d_scale = jnp.where(kept, _dot(g, x[rows.order // top_k]), 0.0).astype(scale.dtype)
    return _unpermute(g, scale[rows.position].reshape(-1, top_k), rows, top_k), d_scale, None


def _unpermute_fwd(values: Array, weights: Array | None, rows: SortedRows, top_k: int):
    return _unpermute(values, weights, rows, top_k), (values, weights, rows)


def _unpermute_bwd(top_k: int, residuals: tuple[Array, Array | None, SortedRows], g: Array):
    values, weights, rows = residuals
    if weights is None:
        return _permute(g, None, rows, top_k), None, None
    position = rows.position.reshape(-1, top_k)
    d_weights = jnp.where(position < _kept(rows), _dot(values[position], g[:, None]), 0.0).astype(weights.dtype)
    return _permute(g, weights.reshape(-1)[rows.order], rows, top_k), d_weights, None


_permute.defvjp(_permute_fwd, _permute_bwd)
_unpermute.defvjp(_unpermute_fwd, _unpermute_bwd)


def _dot(a: Array, b: Array) -> Array:
    """Products of rows in float32, whose gathers XLA fuses into the sum."""
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=-1)


def _kept(rows: SortedRows) -> Array:
    return jnp.sum(rows.counts, dtype=jnp.int32)


def _mask(valid: Array | None) -> Array:
    return jnp.zeros((1,), bool) if valid is None else valid


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _require_mask(valid: Array) -> None:
    require(valid.dtype.name in ("bool", "int8"), "valid.dtype", valid.dtype.name, "bool or int8")


def _require_rows(name: str, array: Array, rows: SortedRows, top_k: int) -> int:
    """N; ValueError unless the array is of floats and the N rows are of K each."""
    require(array.dtype.name in FLOATS, f"{name}.dtype", array.dtype.name, f"one of {', '.join(FLOATS)}")
    num_rows = rows.order.shape[0]
    require(top_k >= 1 and num_rows % top_k == 0, "top_k", top_k, f"a divisor of the {num_rows} sorted rows")
    return num_rows
