"""The fused router in the interpreter: choices, weights and gradients of the routers in JAX, the order of `sort_rows`.

Scores are of a grid, so that those of two logits are equal or far apart: a choice is then one, whatever exp rounds to.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.grouped_matmul import sort_rows
from kernels.routing_gpu import block_tokens, permute, route, sort_assignments, unpermute
from moe.routers import group_limited, softmax_topk

drawn = settings(derandomize=True, deadline=None, database=None, max_examples=12)


@st.composite
def sizes(draw):
    """T, E, K and a seed; with 40 tokens there are three blocks, the last of them ragged."""
    num_experts = draw(st.integers(1, 64))
    return draw(st.integers(1, 40)), num_experts, draw(st.integers(1, min(8, num_experts))), draw(st.integers(0, 99))


def grid(rng, shape, kind):
    """Logits: drawn from 33 values, all but a few of them equal, or one expert far above the others."""
    logits = rng.integers(-16, 17, shape) / 4
    if kind == "ties":
        logits = np.where(rng.random(shape) < 0.1, logits, 0.25)
    if kind == "one_expert":
        logits[:, rng.integers(shape[1])] = 9.0
    return logits


def assert_equal(got, want):
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def assert_close(got, want, tolerance):
    want = np.asarray(want, np.float64)
    bound = tolerance * max(1.0, np.abs(want).max())
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=bound)


def with_gradients(function, x, g):
    """What `function` gives, the gradient of x from those of its first part, and its second part; compiled once."""

    def run(x):
        out, transpose, other = jax.vjp(function, x, has_aux=True)
        return out, *transpose(g), other

    return jax.jit(run)(x)


@partial(jax.jit, static_argnums=1)
def sorted_rows(ids, num_experts):
    return sort_rows(ids.reshape(-1), num_experts)


def block_counts(indices, valid, num_experts):
    tokens = block_tokens(num_experts)
    blocks = np.zeros((-(-len(indices) // tokens), num_experts), int)
    for t, row in enumerate(np.asarray(indices)):
        for e in row:
            blocks[t // tokens, e] += bool(valid[t])
    return blocks


@drawn
@given(
    sizes(), st.sampled_from(["softmax", "sigmoid"]), st.sampled_from(["grid", "ties", "one_expert"]), st.booleans(),
    st.booleans(), st.sampled_from([1.0, 2.5]), st.sampled_from([None, bool, np.int8]),
    st.sampled_from([np.float32, np.float16]),
)  # fmt: skip
def test_choices_weights_counts_and_gradients_are_the_routers(
    size, score, kind, biased, renormalize, scaling, mask, dtype
):
    num_tokens, num_experts, top_k, seed = size
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(grid(rng, (num_tokens, num_experts), kind), dtype)
    bias = jnp.asarray(rng.integers(-9, 10, num_experts) / 16, jnp.float32) if biased else None
    valid = None if mask is None else jnp.asarray(rng.random(num_tokens) < 0.6, mask)
    options = {"score": score, "renormalize": renormalize, "scaling": scaling}
    router = group_limited.make(num_experts, top_k, selection_bias=biased, **options)

    def fused(logits):
        routed = route(logits, top_k, bias=bias, valid=valid, **options)
        return (routed.weights, routed.probs), (routed.indices, routed.block_counts)

    def reference(logits):
        routing, _ = router(jnp.zeros(()), logits, jnp.zeros(()), {"bias": bias}, None)
        return (routing.weights, routing.probs), routing.indices

    shapes = (num_tokens, top_k), logits.shape
    g = tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    made, d_logits, (indices, counts) = with_gradients(fused, logits, g)
    wanted, d_logits_reference, indices_reference = with_gradients(reference, logits, g)
    assert_equal(indices, indices_reference)
    assert_equal(counts, block_counts(indices, np.ones(num_tokens) if valid is None else valid, num_experts))
    for got, want in zip(made, wanted):
        assert got.dtype == jnp.float32
        assert_close(got, want, 1e-6)
    assert d_logits.dtype == logits.dtype
    assert_close(d_logits, d_logits_reference, 1e-5 if dtype == np.float32 else 1e-3)


@pytest.mark.parametrize("renormalize", [True, False])
def test_softmax_topk_is_one_of_them_and_probabilities_are_not_asked_for(renormalize):
    logits = jnp.asarray(grid(np.random.default_rng(0), (21, 6), "grid"), jnp.float32)
    routing, _ = softmax_topk.make(6, 2, renormalize)(jnp.zeros(()), logits, jnp.zeros(()), {}, None)
    g = jnp.asarray(np.random.default_rng(1).standard_normal((21, 2)), jnp.float32)

    def weights(logits):
        return route(logits, 2, renormalize=renormalize, with_probs=False).weights

    def reference(logits):
        return softmax_topk.make(6, 2, renormalize)(jnp.zeros(()), logits, jnp.zeros(()), {}, None)[0].weights

    routed = jax.jit(lambda logits: route(logits, 2, renormalize=renormalize, with_probs=False))(logits)
    assert routed.probs is None
    assert_equal(routed.indices, routing.indices)
    assert_equal(np.sum(routed.block_counts, axis=0), routing.counts)
    assert_close(routed.weights, routing.weights, 1e-6)
    assert_close(jax.vjp(weights, logits)[1](g)[0], jax.vjp(reference, logits)[1](g)[0], 1e-5)


def test_a_bias_reaches_the_choice_alone():
    logits, bias = jnp.zeros((3, 5)), jnp.asarray([0.0, -1.0, 2.0, 0.0, 1.0])

    def weights(bias):
        return route(logits, 3, score="sigmoid", bias=bias, renormalize=False).weights

    routed = route(logits, 3, score="sigmoid", bias=bias, renormalize=False)
    assert_equal(routed.indices, [[2, 4, 0]] * 3)
    assert_equal(routed.weights, np.full((3, 3), 0.5))
    assert_equal(jax.vjp(weights, bias)[1](jnp.ones((3, 3)))[0], np.zeros(5))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_extreme_logits_choose_as_top_k_does(score):
    inf = np.inf
    rows = [[1e30, 0, -1e30, 1], [-200, -200, -300, -200], [-inf, 0, -inf, 0], [0, 200, 0, 200], [inf, 0, 0, inf]]
    logits = jnp.asarray(rows, jnp.float32)
    probs = jax.nn.softmax(logits, axis=-1) if score == "softmax" else jax.nn.sigmoid(logits)
    routed = route(logits, 3, score=score, renormalize=False)
    weights, indices = jax.lax.top_k(probs, 3)
    assert_equal(routed.indices, indices)
    np.testing.assert_allclose(routed.weights, weights, rtol=0, atol=1e-6)


def test_scores_of_zero_are_weights_and_probabilities_of_zero():
    routed = route(jnp.full((2, 5), -200.0), 3, score="sigmoid")
    assert_equal(routed.weights, np.zeros((2, 3)))
    assert_equal(routed.probs, np.zeros((2, 5)))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_expert_is_chosen_once_whatever_its_score(sign):
    """Six experts, padded to eight: neither padding nor what was chosen comes (again) where no score is a number."""
    nan = np.copysign(np.nan, sign)
    bias = jnp.asarray([[-np.inf] * 6, [nan] * 6, [0, nan, -np.inf, 1, nan, -np.inf]], jnp.float32)
    want = [range(6), range(6), [1, 4, 3, 0, 2, 5]]
    for row, indices in zip(bias, want):
        assert_equal(route(jnp.zeros((2, 6)), 6, score="sigmoid", bias=row).indices, [indices] * 2)


@drawn
@given(
    sizes(), st.sampled_from(["uniform", "one_expert", "few", "out_of_range"]),
    st.sampled_from(["none", "tokens", "assignments", "nothing"]), st.sampled_from([bool, np.int8]),
)  # fmt: skip
def test_the_order_is_sort_rows(size, kind, mask, dtype):
    num_tokens, num_experts, top_k, seed = size
    rng = np.random.default_rng(seed)
    low, high = {"out_of_range": (-2, num_experts + 3), "few": (0, min(2, num_experts))}.get(kind, (0, num_experts))
    indices = rng.integers(low, high, (num_tokens, top_k))
    if kind == "one_expert":
        indices[:] = rng.integers(num_experts)
    shapes = {"none": (1, 1), "tokens": (num_tokens, 1), "assignments": indices.shape, "nothing": (num_tokens, 1)}
    valid = rng.random(shapes[mask]) < {"none": 2.0, "nothing": -1.0}.get(mask, 0.6)
    inside = (indices >= 0) & (indices < num_experts)
    want = sorted_rows(jnp.asarray(np.where(valid & inside, indices, num_experts)), num_experts)
    given_mask = {"none": None, "assignments": valid}.get(mask, valid[:, 0])
    given_mask = None if given_mask is None else jnp.asarray(given_mask, dtype)
    got = jax.jit(partial(sort_assignments, num_experts=num_experts))(jnp.asarray(indices, jnp.int32), valid=given_mask)
    for name, a, b in zip(got._fields, got, want):
        assert a.dtype == jnp.int32, name
        assert_equal(a, b)


@settings(drawn, max_examples=6)
@given(sizes(), st.booleans())
def test_counts_of_the_first_pass_give_the_same_order(size, masked):
    num_tokens, num_experts, top_k, seed = size
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(grid(rng, (num_tokens, num_experts), "grid"), jnp.float32)
    valid = jnp.asarray(rng.random(num_tokens) < 0.7) if masked else None

    @jax.jit
    def two_passes(logits):
        routed = route(logits, top_k, valid=valid)
        counts = routed.block_counts
        return routed.indices, sort_assignments(routed.indices, num_experts, valid=valid, block_counts=counts)

    indices, got = two_passes(logits)
    kept = np.ones(num_tokens, bool) if valid is None else np.asarray(valid)
    want = sorted_rows(jnp.asarray(np.where(kept[:, None], indices, num_experts)), num_experts)
    for a, b in zip(got, want):
        assert_equal(a, b)


def moved_with_gradients(move, rows, factors, g):
    out, transpose = jax.vjp(move, rows, factors)
    return out, *transpose(g)


def test_blocks_of_many_experts_hold_fewer_tokens():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.permuted(np.tile(np.arange(1500) / 100, (11, 1)), axis=1), jnp.float32)
    assert block_tokens(1500) == 4
    routed = route(logits, 3, valid=jnp.arange(11) != 5)
    assert_equal(routed.indices, jax.lax.top_k(logits, 3)[1])
    assert_equal(routed.block_counts, block_counts(routed.indices, np.arange(11) != 5, 1500))
    got = sort_assignments(routed.indices, 1500)
    for a, b in zip(got, sorted_rows(routed.indices, 1500)):
        assert_equal(a, b)


@settings(drawn, max_examples=8)
@given(sizes(), st.sampled_from([1, 20, 150]), st.booleans(), st.sampled_from([np.float32, np.float16]))
def test_rows_moved_to_expert_order_and_back_and_their_gradients(size, width, weighted, dtype):
    num_tokens, num_experts, top_k, seed = size
    rng = np.random.default_rng(seed)
    kept = rng.random((num_tokens, top_k)) < 0.7
    ids = jnp.asarray(np.where(kept, rng.integers(0, num_experts, kept.shape), num_experts))
    rows = sort_rows(ids.reshape(-1), num_experts)
    real = jnp.arange(num_tokens * top_k) < jnp.sum(rows.counts)
    x = jnp.asarray(rng.standard_normal((num_tokens, width)), dtype)
    values = jnp.asarray(rng.standard_normal((num_tokens * top_k, width)), dtype)
    weights = jnp.asarray(rng.random((num_tokens, top_k)), jnp.float32)
    scale = weights.reshape(-1)[rows.order]

    def reference_permute(x, scale):
        return jnp.where(real[:, None], x.astype(jnp.float32)[rows.order // top_k] * scale[:, None], 0).astype(dtype)

    def reference_unpermute(values, weights):
        taken = values.astype(jnp.float32)[rows.position].reshape(num_tokens, top_k, width)
        return jnp.sum(taken * (weights * kept)[..., None], axis=1).astype(dtype)

    pairs = (
        (permute, reference_permute, x, scale, values),
        (unpermute, reference_unpermute, values, weights, x),
    )
    tolerance = 1e-6 if dtype == np.float32 else 2e-3
    for function, reference, given_rows, factors, g in pairs:
        fused = partial(moved_with_gradients, lambda a, b, move=function: move(a, rows, top_k, b))
        got, *gradients = jax.jit(fused)(given_rows, factors if weighted else None, g)
        factors = factors if weighted else jnp.ones_like(factors)
        want, *wanted = jax.jit(partial(moved_with_gradients, reference))(given_rows, factors, g)
        assert got.dtype == dtype
        assert_close(got, want, tolerance)
        assert (gradients[1] is None) == (not weighted)
        for a, b in zip(gradients, wanted[: 1 + weighted]):
            assert_close(a, b, 10 * tolerance)


def test_a_gradient_passes_from_the_output_to_the_logits():
    """Through all of it: choice, order, copies, weighted sum; against the same by gathers, which sort nothing."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(grid(rng, (19, 6), "grid"), jnp.float32)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((19, 5), (6, 5)))
    valid = jnp.arange(19) % 5 != 0

    def fused(logits, x):
        routed = route(logits, 2, valid=valid, with_probs=False)
        rows = sort_assignments(routed.indices, 6, valid=valid, block_counts=routed.block_counts)
        group = routed.indices.reshape(-1)[rows.order]
        return jnp.sum(jnp.sin(unpermute(permute(x, rows, 2) * w[group], rows, 2, routed.weights)))

    def reference(logits, x):
        weights, indices = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), 2)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True) * valid[:, None]
        return jnp.sum(jnp.sin(jnp.sum(weights[..., None] * x[:, None] * w[indices], axis=1)))

    got, want = (jax.jit(jax.value_and_grad(each, (0, 1)))(logits, x) for each in (fused, reference))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert_close(a, b, 1e-5)


LOGITS, INDICES = jnp.zeros((4, 5)), jnp.zeros((4, 2), jnp.int32)
SORTED = sort_rows(INDICES.reshape(-1), 5)
BAD = {
    "top_k = 6: expected 1 <= top_k <= num_experts = 5": lambda: route(LOGITS, 6),
    "top_k = 0": lambda: route(LOGITS, 0),
    "num_experts = 0": lambda: route(jnp.zeros((4, 0)), 1),
    "num_tokens = 0": lambda: route(jnp.zeros((0, 5)), 1),
    "logits.shape = (5,)": lambda: route(LOGITS[0], 1),
    "logits.dtype = 'int32': expected one of float32, bfloat16, float16": lambda: route(LOGITS.astype(int), 1),
    "score = 'tanh'": lambda: route(LOGITS, 1, score="tanh"),
    "scaling = 0.0": lambda: route(LOGITS, 1, scaling=0.0),
    "bias.shape = (4,): expected [E = 5]": lambda: route(LOGITS, 1, bias=jnp.zeros(4)),
    "bias.dtype = 'float16'": lambda: route(LOGITS, 1, bias=jnp.zeros(5, jnp.float16)),
    "valid.shape = (5,): expected [T = 4]": lambda: route(LOGITS, 1, valid=jnp.ones(5, bool)),
    "valid.dtype = 'float32': expected bool or int8": lambda: route(LOGITS, 1, valid=jnp.ones(4)),
    "indices.dtype = 'float32': expected int32": lambda: sort_assignments(jnp.zeros((4, 2)), 5),
    "indices.shape = (0, 2)": lambda: sort_assignments(INDICES[:0], 5),
    "indices.shape = (4,)": lambda: sort_assignments(INDICES[:, 0], 5),
    "num_experts = -1": lambda: sort_assignments(INDICES, -1),
    "valid.shape = (2, 4): expected [T] or [T, K]": lambda: sort_assignments(INDICES, 5, valid=jnp.ones((2, 4), bool)),
    "valid.dtype = 'int32'": lambda: sort_assignments(INDICES, 5, valid=jnp.ones(4, int)),
    "block_counts.shape = (2, 5)": lambda: sort_assignments(INDICES, 5, block_counts=jnp.zeros((2, 5), int)),
    "block_counts.dtype = 'float32'": lambda: sort_assignments(INDICES, 5, block_counts=jnp.zeros((1, 5))),
    "x.shape = (5, 3): expected [T = 4, d]": lambda: permute(jnp.zeros((5, 3)), SORTED, 2),
    "x.dtype = 'int32'": lambda: permute(jnp.zeros((4, 3), int), SORTED, 2),
    "scale.shape = (4,): expected [N = 8]": lambda: permute(jnp.zeros((4, 3)), SORTED, 2, jnp.ones(4)),
    "scale.dtype = 'int32'": lambda: permute(jnp.zeros((4, 3)), SORTED, 2, jnp.ones(8, int)),
    "top_k = 3: expected a divisor of the 8 sorted rows": lambda: permute(jnp.zeros((4, 3)), SORTED, 3),
    "values.shape = (4, 3): expected [N = 8, d]": lambda: unpermute(jnp.zeros((4, 3)), SORTED, 2),
    "weights.shape = (2, 4)": lambda: unpermute(jnp.zeros((8, 3)), SORTED, 2, jnp.ones((2, 4))),
    "weights.dtype = 'int32'": lambda: unpermute(jnp.zeros((8, 3)), SORTED, 2, jnp.ones((4, 2), int)),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError) as error:
        BAD[message]()
    assert str(error.value).startswith(message)
