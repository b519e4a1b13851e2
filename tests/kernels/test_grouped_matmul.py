"""Grouped matmul against a row-by-row NumPy oracle, and the invariants of sorting and of the walk over blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from kernels.grouped_matmul import choose_blocks, grouped_matmul, sort_rows, walk_groups

M, K, N, E, B = 50, 6, 5, 4, 8
SIZES = {
    "uneven": (13, 1, 20, 9),
    "empty_groups": (0, 24, 0, 17),
    "one_takes_all": (0, 0, 50, 0),
    "exact_blocks": (8, 16, 8, 8),
    "nothing": (0, 0, 0, 0),
}


def arrays(dtype=np.float64):
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in ((M, K), (E, K, N), (M, N)))


def oracle(x, w, sizes, g):
    group = np.repeat(np.arange(E), sizes)
    out, dx, dw = np.zeros((M, N)), np.zeros((M, K)), np.zeros((E, K, N))
    for row, e in enumerate(group):
        out[row] = x[row] @ w[e]
        dx[row] = w[e] @ g[row]
        dw[e] += np.outer(x[row], g[row])
    return out, dx, dw


@pytest.mark.parametrize(
    ("implementation", "block_size"), [("blocks", B), ("blocks", 0), ("reference", B), ("ragged_dot", B)]
)
def test_values_and_gradients_match_a_row_by_row_oracle(implementation, block_size):
    with jax.enable_x64(True):
        x, w, g = map(jnp.asarray, arrays())

        @jax.jit
        def run(sizes):
            out, vjp = jax.vjp(
                lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation, block_size=block_size), x, w
            )
            return out, *vjp(g)

        for name, sizes in SIZES.items():
            for got, want in zip(run(jnp.array(sizes, jnp.int32)), oracle(*arrays()[:2], sizes, arrays()[2])):
                np.testing.assert_allclose(got, want, atol=1e-12, err_msg=name)


def test_bfloat16_accumulates_weight_gradients_in_float32():
    x, w, g = (jnp.asarray(a, jnp.bfloat16) for a in arrays(np.float32))

    @jax.jit
    def run(x, w, g):
        out, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.array(SIZES["uneven"]), block_size=B), x, w)
        return out, *vjp(g)

    results = run(x, w, g)
    want = oracle(*(np.asarray(a, np.float64) for a in (x, w)), SIZES["uneven"], np.asarray(g, np.float64))
    for got, exact in zip(results, want):
        assert got.dtype == jnp.bfloat16
        # Two roundings of 2**-9 relative to the largest magnitude, no accumulation error.
        np.testing.assert_allclose(np.asarray(got, np.float64), exact, atol=2**-8 * np.abs(exact).max())


@pytest.mark.parametrize("sizes", [(3,), (2, 4), (1, 2, 3, 5)])
def test_chosen_blocks_are_few_equal_and_tight(sizes):
    counts = np.arange(40)
    size, number = (np.asarray(x) for x in choose_blocks(jnp.asarray(counts), sizes))
    assert (number * size >= counts).all()
    assert ((number - 1) * size < np.maximum(counts, 1)).all(), "no block without a row"
    np.testing.assert_array_equal(number, -(-counts // size))
    assert (number <= -(-counts // sizes[-1])).all()
    smaller = np.array([max([s for s in sizes if s < chosen], default=0) for chosen in size])
    assert (smaller * -(-counts // sizes[-1]) < np.maximum(counts, 1)).all(), "the next smaller size would not do"


@pytest.mark.parametrize("sizes", [(3,), (2, 4), (1, 2, 6)])
@pytest.mark.parametrize("ids", [[2, 0, 3, 2, 2, 4, 0, 2, 4, 2, 2], [4] * 11, [1] * 11])
def test_the_walk_meets_each_valid_row_once_in_stable_order(ids, sizes):
    num_experts = 4
    rows = sort_rows(jnp.array(ids), num_experts)
    order, valid = np.asarray(rows.order), sum(i < num_experts for i in ids)
    np.testing.assert_array_equal(order[np.asarray(rows.position)], np.arange(len(ids)))
    np.testing.assert_array_equal(rows.counts, np.bincount(ids, minlength=5)[:4])
    kept = [row for row in range(len(ids)) if ids[row] < num_experts]
    np.testing.assert_array_equal(order[:valid], sorted(kept, key=ids.__getitem__))

    def group(e, blocks, carry):
        def block(size, start, stop, carry):
            seen, log, n = carry
            inside = (jnp.arange(len(ids)) >= start) & (jnp.arange(len(ids)) < jnp.minimum(start + size, stop))
            return seen + inside * (e + 1), log.at[n].set(jnp.stack([e, start, stop])), n + 1

        return blocks(block, carry)

    start = jnp.zeros(len(ids), jnp.int32), jnp.zeros((len(ids), 3), jnp.int32), 0
    seen, log, n = jax.jit(lambda: walk_groups(rows.counts, sizes, group, start))()
    np.testing.assert_array_equal(seen[:valid], [ids[row] + 1 for row in order[:valid]])
    assert not np.any(seen[valid:])
    assert n == choose_blocks(rows.counts, sizes)[1].sum()
    assert all(first < stop for _, first, stop in np.asarray(log)[:n])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((M,))}, "x.shape"),
        ({"w": jnp.zeros((E, K + 1, N))}, "w.shape"),
        ({"group_sizes": jnp.zeros((E + 1,), jnp.int32)}, "group_sizes.shape"),
        ({"group_sizes": jnp.zeros((E,))}, "group_sizes.dtype"),
        ({"x": jnp.zeros((M, K), jnp.int4)}, "x.dtype = 'int4': expected a float type of at least 16 bits"),
        ({"w": jnp.zeros((E, K, N), jnp.float8_e4m3fn)}, "w.dtype = 'float8_e4m3fn'"),
        ({"implementation": "fast"}, "implementation = 'fast'"),
        ({"block_size": -1}, "block_size = -1"),
    ],
)
def test_bad_input_names_field_and_value(change, message):
    good = {"x": jnp.zeros((M, K)), "w": jnp.zeros((E, K, N)), "group_sizes": jnp.zeros((E,), jnp.int32)}
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**(good | change))


@pytest.mark.parametrize("sizes", [[-1, 3] + [0] * (E - 2), [M, 1] + [0] * (E - 2)])
def test_bad_sizes_are_named_where_they_can_be_read_and_by_checkify_within_jit(sizes):
    x, w, sizes = jnp.ones((M, K)), jnp.ones((E, K, N)), jnp.array(sizes, jnp.int32)
    message = rf"group_sizes = \[.*\]: expected none negative, sum at most M = {M}"
    with pytest.raises(ValueError, match=message):
        grouped_matmul(x, w, sizes)
    run = jax.jit(jax.grad(lambda x, sizes: grouped_matmul(x, w, sizes).sum()))
    run(x, sizes)  # silent, as it costs a reduction and a branch
    error, _ = jax.jit(checkify.checkify(run))(x, sizes)
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        error.throw()
    error, _ = jax.jit(checkify.checkify(run))(x, jnp.zeros_like(sizes))
    error.throw()
