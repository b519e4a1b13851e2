"""Routing as Triton kernels: each token's experts and weights, each assignment's place in expert order, moving rows.

Legend: T tokens, E experts, K experts per token, N = T K assignments, n = t K + k, D row width, G blocks of BT tokens;
EP, KP, RP: E, K and BT K padded to powers of two. An assignment is dropped where its mask says so, or where its expert
is none of the E.

A stable counting sort takes the place of a comparison sort: `route_kernel` (or `count_kernel`, once a policy has edited
the mask) counts the assignments of each block to each expert; a sum over blocks and experts before each gives its first
place; `place_kernel` adds the rank within the block. Nothing is added atomically: equal inputs give equal bits.
"""

import triton
import triton.language as tl

LEAST = tl.constexpr(-(2**31))  # below the key of every float
MOST = tl.constexpr(2**31 - 1)
TINY = tl.constexpr(1e-20)  # in the divisors of sigmoid scores, which may all be zero


@triton.jit
def _key(x):
    """int32 in the order of float32 x, so that what was chosen can go below minus infinity; not-a-number is on top."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, MOST, bits ^ ((bits >> 31) & MOST))


@triton.jit
def route_kernel(
    logits, bias, valid, indices, weights, probs, counts,
    T: tl.constexpr, E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, BIASED: tl.constexpr,
    MASKED: tl.constexpr, RENORMALIZE: tl.constexpr, SCALING: tl.constexpr, PROBS: tl.constexpr,
    BT: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """From logits [T, E], a selection bias [E] and a mask of tokens [T], in one reading:

        s        softmax or sigmoid of the logits, in float32
        indices  [T, K] int32    the K largest of s + bias, largest first, ties to the lowest index
        weights  [T, K] float32  SCALING s, divided by the chosen ones' sum if RENORMALIZE
        probs    [T, E] float32  s, over its sum for sigmoids, if PROBS
        counts   [G, E] int32    the block's assignments of valid tokens
    """
    block = tl.program_id(0)
    token = block * BT + tl.arange(0, BT)
    expert = tl.arange(0, EP)[None, :]
    inside = (token < T)[:, None]
    real = expert < E
    row = token.to(tl.int64)[:, None]
    logit = tl.load(logits + row * E + expert, mask=inside & real, other=0).to(tl.float32)
    if SIGMOID:
        score = tl.where(real, tl.sigmoid(logit), 0)
        prob = score / (tl.sum(score, axis=1) + TINY)[:, None]
    else:
        logit = tl.where(real, logit, float("-inf"))
        score = tl.exp(logit - tl.max(logit, axis=1)[:, None])
        score = score / tl.sum(score, axis=1)[:, None]
        prob = score
    if PROBS:
        tl.store(probs + row * E + expert, prob, mask=inside & real)
    wanted = score
    if BIASED:
        wanted += tl.load(bias + expert, mask=real, other=0)
    key = tl.where(real, _key(wanted), LEAST)
    slot = tl.arange(0, KP)[None, :]
    chosen = tl.zeros((BT, KP), tl.int32)
    weight = tl.zeros((BT, KP), tl.float32)
    for k in range(K):
        best = tl.max(key, axis=1)
        index = tl.min(tl.where(key == best[:, None], expert, EP), axis=1)
        hit = expert == index[:, None]
        key = tl.where(hit, LEAST, key)
        chosen = tl.where(slot == k, index[:, None], chosen)
        weight = tl.where(slot == k, tl.sum(tl.where(hit, score, 0), axis=1)[:, None], weight)
    if RENORMALIZE:
        weight = weight / (tl.sum(weight, axis=1) + TINY)[:, None]
    stored = inside & (slot < K)
    tl.store(indices + row * K + slot, chosen, mask=stored)
    tl.store(weights + row * K + slot, weight * SCALING, mask=stored)
    taken = (key == LEAST) & real & inside
    if MASKED:
        taken &= (tl.load(valid + token, mask=token < T, other=0) != 0)[:, None]
    count = tl.sum(taken.to(tl.int32), axis=0)
    tl.store(counts + block.to(tl.int64) * E + tl.arange(0, EP), count, mask=tl.arange(0, EP) < E)


@triton.jit
def _expert(
    indices, valid, n, inside,
    E: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr, VALID_TOKEN: tl.constexpr, VALID_SLOT: tl.constexpr,
):  # fmt: skip
    """The experts of assignments n, E for dropped ones."""
    expert = tl.load(indices + n, mask=inside, other=E)
    kept = (expert >= 0) & (expert < E)
    if MASKED:
        kept &= tl.load(valid + n // K * VALID_TOKEN + n % K * VALID_SLOT, mask=inside, other=0) != 0
    return tl.where(kept, expert, E)


@triton.jit
def count_kernel(
    indices, valid, counts,
    N: tl.constexpr, E: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr, VALID_TOKEN: tl.constexpr,
    VALID_SLOT: tl.constexpr, ROWS: tl.constexpr, RP: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """counts [G, E] int32 of indices [N], ROWS = BT K of them a block; `valid` by its strides, [T] or [T, K]."""
    block = tl.program_id(0)
    lane = tl.arange(0, RP)
    n = block * ROWS + lane
    expert = _expert(indices, valid, n, (lane < ROWS) & (n < N), E, K, MASKED, VALID_TOKEN, VALID_SLOT)
    count = tl.histogram(expert, EP, mask=expert < E)
    tl.store(counts + block.to(tl.int64) * E + tl.arange(0, EP), count, mask=tl.arange(0, EP) < E)


@triton.jit
def place_kernel(
    indices, valid, first, position, order,
    N: tl.constexpr, E: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr, VALID_TOKEN: tl.constexpr,
    VALID_SLOT: tl.constexpr, ROWS: tl.constexpr, RP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """position [N] of every assignment in expert order and its inverse, order [N], both int32.

    `first` [G, E + 1] int32 holds where the block's first assignment to each expert, and its first dropped one, goes.
    The others follow in their order: their rank is counted against CHUNK assignments of the block at a time.
    """
    block = tl.program_id(0)
    lane = tl.arange(0, RP)
    n = block * ROWS + lane
    inside = (lane < ROWS) & (n < N)
    expert = _expert(indices, valid, n, inside, E, K, MASKED, VALID_TOKEN, VALID_SLOT)
    rank = tl.zeros((RP,), tl.int32)
    for start in range(0, ROWS, CHUNK):
        m = block * ROWS + start + tl.arange(0, CHUNK)
        other = _expert(indices, valid, m, m < N, E, K, MASKED, VALID_TOKEN, VALID_SLOT)
        before = (other[None, :] == expert[:, None]) & (m[None, :] < n[:, None])
        rank += tl.sum(before.to(tl.int32), axis=1)
    place = tl.load(first + block.to(tl.int64) * (E + 1) + expert, mask=inside, other=0) + rank
    tl.store(position + n, place, mask=inside)
    tl.store(order + place, n, mask=inside)


@triton.jit
def permute_kernel(
    x, order, scale, kept, out,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, SCALED: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[i] = scale[i] x[order[i] / K], [T, D] -> [N, D], zero from `kept` [1] on."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    column = (tl.program_id(1) * BD + tl.arange(0, BD))[None, :]
    inside = i < N
    read = inside & (i < tl.load(kept))
    token = (tl.load(order + i, mask=read, other=0) // K).to(tl.int64)
    row = tl.load(x + token[:, None] * D + column, mask=read[:, None] & (column < D), other=0)
    if SCALED:
        row = row.to(tl.float32) * tl.load(scale + i, mask=read, other=0).to(tl.float32)[:, None]
    out_at = out + i.to(tl.int64)[:, None] * D + column
    tl.store(out_at, row.to(out.dtype.element_ty), mask=inside[:, None] & (column < D))


@triton.jit
def unpermute_kernel(
    rows, position, weights, kept, out,
    T: tl.constexpr, D: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k of weights[t, k] rows[position[t, k]], those before `kept` [1]: [N, D] -> [T, D].

    The sum is in float32 and in the order of k.
    """
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    column = (tl.program_id(1) * BD + tl.arange(0, BD))[None, :]
    inside = t < T
    stop = tl.load(kept)
    total = tl.zeros((BM, BD), tl.float32)
    for k in range(K):
        at = tl.load(position + t * K + k, mask=inside, other=0)
        read = inside & (at < stop)
        row = tl.load(rows + at.to(tl.int64)[:, None] * D + column, mask=read[:, None] & (column < D), other=0)
        row = row.to(tl.float32)
        if WEIGHTED:
            row *= tl.load(weights + t * K + k, mask=read, other=0).to(tl.float32)[:, None]
        total += row
    out_at = out + t.to(tl.int64)[:, None] * D + column
    tl.store(out_at, total.to(out.dtype.element_ty), mask=inside[:, None] & (column < D))
