"""Grouped products and the fused FFN in the interpreter: values and gradients against float32 oracles.

bfloat16 takes the same paths as float16, which is tested here; that it compiles and lowers is tested beside, and its
numbers wait for a GPU (the interpreter's are wrong).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import grouped_gpu
from kernels.grouped_ffn import grouped_ffn
from kernels.grouped_matmul import grouped_matmul
from kernels.lora import slot_lora, slot_lora_sum
from kernels.tiles import Tile, using

SMALL = Tile(16, 16, 16, 4, 2)
TILES = (SMALL, Tile(16, 32, 16, 4, 2), Tile(32, 16, 32, 4, 2))
TOLERANCE = {np.float32: 2e-5, np.float16: 4e-3}  # of the largest magnitude; float16 has 11 bits
LOADS = ("random", "empty", "one", "none")
drawn = partial(settings, derandomize=True, deadline=None, database=None)


def near(got, want, dtype):
    got, want = (jax.tree.map(lambda a: np.asarray(a, np.float64), tree) for tree in (got, want))
    for i, (a, b) in enumerate(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)):
        assert np.isfinite(a).all(), f"result {i} has numbers nothing wrote"
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE[dtype] * max(np.abs(b).max(), 1e-2), err_msg=f"{i}")


def sizes_of(rng, load, rows, groups):
    """Sizes of groups, some rows in none."""
    if load == "none":
        return np.zeros(groups, np.int32)
    if load == "one":
        return np.eye(groups, dtype=np.int32)[rng.integers(groups)] * rows
    share = rng.dirichlet(np.full(groups + 1, 0.3 if load == "empty" else 5.0))
    return np.floor(share[:groups] * rows).astype(np.int32)


@given(
    rows=st.integers(1, 70), groups=st.sampled_from((1, 2, 5, 8, 64)), inner=st.integers(1, 40),
    columns=st.integers(1, 40), load=st.sampled_from(LOADS), dtype=st.sampled_from((np.float32, np.float16)),
    tile=st.sampled_from(TILES), seed=st.integers(0, 99),
)  # fmt: skip
@drawn(max_examples=25)
def test_grouped_products_and_their_gradients(rows, groups, inner, columns, load, dtype, tile, seed):
    rng = np.random.default_rng(seed)
    x, w, g = (jnp.asarray(rng.standard_normal(shape), dtype)
               for shape in ((rows, inner), (groups, inner, columns), (rows, columns)))  # fmt: skip
    sizes = jnp.asarray(sizes_of(rng, load, rows, groups))

    def run(how, *arrays):
        out, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=how), *arrays[:2])
        return out, vjp(arrays[2])

    with using(tile):
        got = run("triton", x, w, g)
    near(got, run("reference", *(a.astype(jnp.float32) for a in (x, w, g))), dtype)


def routed(rng, load, tokens, experts, top_k):
    """indices [T, K], distinct within a token; weights; valid."""
    indices = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
    valid = rng.random((tokens, top_k)) < (0.0 if load == "none" else 0.8)
    if load == "one":
        indices[:, 0], valid = rng.integers(experts), np.arange(top_k)[None] < np.ones((tokens, 1))
    if load == "empty":
        valid &= indices < max(1, experts // 3)
    return jnp.asarray(indices, jnp.int32), jnp.asarray(rng.random((tokens, top_k)), jnp.float32), jnp.asarray(valid)


@given(
    tokens=st.integers(1, 40), experts=st.sampled_from((1, 2, 3, 8, 64)), top_k=st.integers(1, 8),
    d=st.integers(1, 40), f=st.integers(1, 24), load=st.sampled_from(LOADS),
    dtype=st.sampled_from((np.float32, np.float16)), tile=st.sampled_from(TILES), seed=st.integers(0, 99),
)  # fmt: skip
@drawn(max_examples=30)
def test_the_fused_ffn_and_all_its_gradients(tokens, experts, top_k, d, f, load, dtype, tile, seed):
    top_k, rng = min(top_k, experts), np.random.default_rng(seed)
    indices, weights, valid = routed(rng, load, tokens, experts, top_k)
    made = (rng.standard_normal((tokens, d)), rng.standard_normal((experts, d, 2 * f)) / np.sqrt(d),
            rng.standard_normal((experts, f, d)) / np.sqrt(f), rng.standard_normal((tokens, d)))  # fmt: skip
    x, gate_up, down, g = (jnp.asarray(a, dtype) for a in made)

    def run(how, x, weights, gate_up, down, g):
        def call(x, weights, gate_up, down):
            return grouped_ffn(x, indices, weights, valid, gate_up, down, implementation=how)

        out, vjp = jax.vjp(call, x, weights, gate_up, down)
        return out, vjp(g)

    with using(tile):
        got = run("triton", x, weights, gate_up, down, g)
    assert got[0].dtype == dtype
    assert got[1][2].dtype == dtype
    near(got, run("reference", *(a.astype(jnp.float32) for a in (x, weights, gate_up, down, g))), dtype)


@pytest.mark.parametrize("rank", [4, 20])
@pytest.mark.parametrize("summed", [False, True])
def test_experts_of_low_rank(rank, summed):
    rng = np.random.default_rng(0)
    tokens, experts, d, o = 21, 5, 24, 18
    indices, weights, valid = routed(rng, "random", tokens, experts, 2)
    x, a, b, g = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in (
        (tokens, 1, d), (experts, d, rank), (experts, rank, o), (tokens, o) if summed else (tokens, 2, o)))  # fmt: skip

    def run(how):
        if summed:
            call = lambda x, a, b: slot_lora_sum(x, a, b, indices, weights, implementation=how)  # noqa: E731
        else:
            call = lambda x, a, b: slot_lora(x, a, b, indices, valid, implementation=how)  # noqa: E731
        out, vjp = jax.vjp(call, x, a, b)
        return out, vjp(g)

    with using(SMALL):
        got = run("triton")
    near(got, run("reference"), np.float32)


@given(
    counts=st.lists(st.sampled_from((0, 0, 1, 2, 15, 16, 17, 40)), min_size=1, max_size=9), spare=st.integers(0, 20),
    height=st.sampled_from((16, 32)),
)  # fmt: skip
@drawn(max_examples=60)
def test_tiles_cover_each_group_once(counts, spare, height):
    made = grouped_gpu.tiles(jnp.asarray(counts, jnp.int32), sum(counts) + spare, height)
    number = int(made.number[0])
    assert number == sum(-(-count // height) for count in counts) <= made.group.shape[0]
    seen = np.zeros(sum(counts) + spare, int)
    owner = np.repeat(np.arange(len(counts)), counts)
    for group, first, stop in zip(*(np.asarray(a)[:number] for a in made[:3])):
        last = min(first + height, stop)
        assert last > first
        assert (owner[first:last] == group).all()
        seen[first:last] += 1
    assert (seen == np.r_[np.ones(sum(counts), int), np.zeros(spare, int)]).all()


def test_a_bfloat16_array_is_refused_here():
    x = jnp.ones((4, 16), jnp.bfloat16)
    with pytest.raises(ValueError, match="dtype = 'bfloat16': expected one of float32, float16.* in the interpreter"):
        grouped_matmul(x, jnp.ones((1, 16, 16), jnp.bfloat16), jnp.array([4]), implementation="triton")
