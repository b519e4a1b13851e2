"""The fused router's path on CPUs: the routers' own choices and gradients; its kernels are in `interpreted/`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.grouped_matmul import sort_rows
from kernels.routing_gpu import block_tokens, permute, route, sort_assignments, unpermute
from moe.config import MoEConfig
from moe.routers import group_limited
from moe.routing import make_router

T, E, K, D = 37, 6, 2, 5


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
def test_route(score, biased):
    logits, bias = drawn(T, E), drawn(E) if biased else None
    valid = jnp.arange(T) % 3 != 0
    options = {"score": score, "renormalize": True, "scaling": 2.5}
    router = group_limited.make(E, K, selection_bias=biased, **options)

    def fused(logits):
        routed = route(logits, K, bias=bias, valid=valid, **options)
        return (routed.weights, routed.probs), (routed.indices, routed.block_counts)

    def reference(logits):
        routing, _ = router(jnp.zeros(()), logits, jnp.zeros(()), {"bias": bias}, None)
        return (routing.weights, routing.probs), routing.indices

    g = drawn(T, K), drawn(T, E)
    made, transpose, (indices, counts) = jax.vjp(fused, logits, has_aux=True)
    wanted, transpose_reference, indices_reference = jax.vjp(reference, logits, has_aux=True)
    np.testing.assert_array_equal(indices, indices_reference)
    for got, want in zip([*made, *transpose(g)], [*wanted, *transpose_reference(g)], strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    blocks = np.zeros((-(-T // block_tokens(E)), E), int)
    for t in np.flatnonzero(valid):
        blocks[t // block_tokens(E), np.asarray(indices)[t]] += 1
    np.testing.assert_array_equal(counts, blocks)


SIGMOID = "group_limited(score='sigmoid', renormalize={0}, scaling=2.5, selection_bias={0}{1})"


@pytest.mark.parametrize("of", ["softmax_topk(renormalize={}{})", SIGMOID])
@pytest.mark.parametrize("renormalize", [True, False])
def test_a_fused_router_is_the_router(of, renormalize):
    fused, plain = (make_router(MoEConfig(E, K, 8, router=of.format(renormalize, end))) for end in (", fused=True", ""))
    state = {"bias": drawn(E)} if plain.init_state() else {}

    def call(router, logits):
        routing, losses = router(jnp.zeros(()), logits, jnp.zeros(()), state, None)
        assert losses == {}
        return (routing.weights, routing.probs), routing

    g = drawn(T, K), drawn(T, E)
    (_, pull, made), (_, pull_plain, wanted) = (
        jax.vjp(functools.partial(call, router), drawn(T, E), has_aux=True) for router in (fused, plain)
    )
    assert jax.tree.structure(made) == jax.tree.structure(wanted)
    for got, want in zip(jax.tree.leaves((made, pull(g))), jax.tree.leaves((wanted, pull_plain(g)))):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mask", [None, (T,), (T, K)])
def test_sort_assignments(mask):
    indices = route(drawn(T, E), K).indices
    valid = None if mask is None else drawn(*mask) > 0
    kept = np.ones((T, K), bool) if mask is None else np.broadcast_to(np.asarray(valid).reshape(T, -1), (T, K))
    want = sort_rows(jnp.where(kept, indices, E).reshape(-1), E)
    for got, expected in zip(sort_assignments(indices, E, valid=valid), want, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_there_and_back(weighted):
    valid = np.asarray(drawn(T, K)) > -1
    rows = sort_assignments(route(drawn(T, E), K).indices, E, valid=jnp.asarray(valid))
    x, weights = drawn(T, D), drawn(T, K) if weighted else None

    def moved(x, weights):
        return unpermute(permute(x, rows, K), rows, K, weights)

    def reference(x, weights):
        return x * jnp.sum(valid * (1.0 if weights is None else weights), axis=1, keepdims=True)

    (got, transpose), (want, transpose_reference) = (jax.vjp(f, x, weights) for f in (moved, reference))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    for a, b in zip(*(jax.tree.leaves(f(drawn(T, D))) for f in (transpose, transpose_reference)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    scale = drawn(T * K)
    want = np.where(np.arange(T * K) < int(valid.sum()), scale, 0)[:, None] * np.asarray(x)[np.asarray(rows.order) // K]
    np.testing.assert_allclose(permute(x, rows, K, scale), want, rtol=0, atol=1e-6)
