"""Chunked cross-entropy against the naive loss: values, gradients, and that the logits never exist at once."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels.cross_entropy import automatic_chunk_size, cross_entropy, token_nll

T, D, V = 45, 6, 11


def problem(dtype=np.float32, num_tokens=T, vocab=V):
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((num_tokens, D)), rng.standard_normal((vocab, D))
    weights = rng.random(num_tokens) * (rng.random(num_tokens) < 0.8)
    targets = jnp.asarray(rng.integers(0, vocab, num_tokens), jnp.int32)
    return (
        jnp.asarray(hidden.astype(dtype)),
        jnp.asarray(head.astype(dtype)),
        targets,
        jnp.asarray(weights.astype(dtype)),
    )


def naive_nll(hidden, head, targets):
    logits = hidden @ head.T
    return jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]


def naive(hidden, head, targets, weights):
    return jnp.sum(weights * naive_nll(hidden, head, targets))


def assert_close(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("chunk_size", [None, 1, 8, 15, 45, 64])
def test_values_and_gradients_match_the_naive_loss(chunk_size):
    with jax.enable_x64(True):
        inputs = problem(np.float64)
        loss = partial(cross_entropy, chunk_size=chunk_size)

        def scaled(f):
            return jax.jit(jax.value_and_grad(lambda h, e, t, w: 3 * f(h, e, t, w), argnums=(0, 1)))

        assert_close(scaled(loss)(*inputs), scaled(naive)(*inputs), 1e-13)
        assert_close(loss(*inputs), naive(*inputs), 1e-13)
        assert_close(token_nll(*inputs[:3], chunk_size=chunk_size), naive_nll(*inputs[:3]), 1e-13)


def weighted_by_itself(nll):
    """A weight of each token's own loss, as reweighting has."""
    def loss(hidden, head, targets):
        losses = nll(hidden, head, targets)
        return jnp.sum(jax.lax.stop_gradient(losses**2) * losses + jnp.sin(losses))

    return loss


@pytest.mark.parametrize("chunk_size", [None, 1, 8, 15, 45, 64])
def test_gradients_of_token_losses_match_the_naive_ones_when_weights_depend_on_them(chunk_size):
    with jax.enable_x64(True):
        inputs = problem(np.float64)[:3]
        run = lambda nll: jax.jit(jax.value_and_grad(weighted_by_itself(nll), argnums=(0, 1)))(*inputs)  # noqa: E731
        assert_close(run(partial(token_nll, chunk_size=chunk_size)), run(naive_nll), 1e-13)


def test_token_losses_have_the_gradient_of_the_fused_loss():
    hidden, head, targets, weights = problem()
    summed = lambda h, e: jnp.sum(weights * token_nll(h, e, targets, chunk_size=8))  # noqa: E731
    fused = partial(cross_entropy, chunk_size=8)
    grads = jax.jit(jax.grad(summed, argnums=(0, 1)))(hidden, head)
    jax.tree.map(
        np.testing.assert_array_equal, grads, jax.jit(jax.grad(fused, argnums=(0, 1)))(hidden, head, targets, weights)
    )


def test_token_losses_of_bfloat16_hidden():
    hidden, head, targets, _ = problem()
    run = jax.jit(jax.value_and_grad(weighted_by_itself(partial(token_nll, chunk_size=16)), argnums=(0, 1)))
    value, (dhidden, dhead) = run(hidden.astype(jnp.bfloat16), head, targets)
    assert (value.dtype, dhidden.dtype, dhead.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    naive_run = jax.value_and_grad(weighted_by_itself(naive_nll), argnums=(0, 1))
    assert_close((value, dhidden, dhead), naive_run(hidden, head, targets), 0.03)


def test_gradients_match_finite_differences():
    with jax.enable_x64(True):
        hidden, head, targets, weights = problem(np.float64)
        rng = np.random.default_rng(1)
        direction = tuple(rng.standard_normal(a.shape) for a in (hidden, head))
        run = jax.jit(jax.value_and_grad(partial(cross_entropy, chunk_size=8), argnums=(0, 1)))

        def value(step):
            moved = (np.asarray(a) + step * b for a, b in zip((hidden, head), direction))
            return run(*moved, targets, weights)[0]

        numeric = (value(1e-5) - value(-1e-5)) / 2e-5
        exact = sum(np.vdot(a, b) for a, b in zip(run(hidden, head, targets, weights)[1], direction))
        np.testing.assert_allclose(exact, numeric, rtol=1e-8)


def test_no_gradient_to_weights_and_zero_weight_is_inert():
    hidden, head, targets, weights = problem()
    loss = partial(cross_entropy, chunk_size=8)
    assert not np.asarray(jax.grad(loss, argnums=3)(hidden, head, targets, weights)).any()
    dhidden = jax.grad(loss)(hidden, head, targets, weights)
    np.testing.assert_array_equal(np.abs(np.asarray(dhidden)).sum(axis=1) > 0, np.asarray(weights) > 0)


def test_large_logits_stay_finite():
    hidden, head, targets, weights = problem()
    value, gradients = jax.jit(jax.value_and_grad(cross_entropy, argnums=(0, 1)))(hidden * 1e4, head, targets, weights)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in gradients)


def test_bfloat16_hidden_with_a_float32_head():
    hidden, head, targets, weights = problem()
    run = jax.jit(jax.value_and_grad(partial(cross_entropy, chunk_size=16), argnums=(0, 1)))
    value, (dhidden, dhead) = run(hidden.astype(jnp.bfloat16), head, targets, weights)
    assert (value.dtype, dhidden.dtype, dhead.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert_close(
        (value, dhidden, dhead), jax.value_and_grad(naive, argnums=(0, 1))(hidden, head, targets, weights), 0.02
    )


def test_neither_jaxpr_nor_program_holds_all_logits():
    """No array of T x V elements (or more) in the differentiated program; the naive loss has them."""
    num_tokens, vocab, chunk = 512, 96, 64
    inputs = problem(num_tokens=num_tokens, vocab=vocab)

    def by_token(nll):
        return lambda h, e, t, w: jnp.sum(jnp.tanh(nll(h, e, t)) * w)

    def largest(loss):
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        texts = str(jax.make_jaxpr(run)(*inputs)), run.lower(*inputs).compile().as_text()
        shapes = [re.findall(r"(?:f32|float32|s32|i32|pred|bool)\[([\d,]+)\]", text) for text in texts]
        return [max(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in found) for found in shapes]

    most = max(chunk * vocab, num_tokens * D, vocab * D)
    assert max(largest(partial(cross_entropy, chunk_size=chunk))) <= most
    assert max(largest(by_token(partial(token_nll, chunk_size=chunk)))) <= most
    assert min(largest(naive)) >= num_tokens * vocab
    assert min(largest(by_token(naive_nll))) >= num_tokens * vocab


def test_inside_a_rematerialised_scan():
    hidden, head, targets, weights = problem()

    def total(hidden, head, loss):
        def step(carry, scale):
            return (carry + loss(hidden * scale, head, targets, weights), None)

        return jax.lax.scan(jax.checkpoint(step), jnp.zeros(()), jnp.array([0.5, 1.0]))[0]

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1)), static_argnums=2)
    assert_close(run(hidden, head, partial(cross_entropy, chunk_size=8)), run(hidden, head, naive), 3e-6)


def summed_nll(h, e, t, w, chunk_size):
    return jnp.sum(w * token_nll(h, e, t, chunk_size=chunk_size))


@pytest.mark.parametrize("fused", [cross_entropy, summed_nll])
def test_inside_shard_map_with_a_replicated_head(fused):
    hidden, head, targets, weights = problem(num_tokens=80)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def loss(hidden, head):
        def local(h, e, t, w):
            return jax.lax.psum(fused(h, e, t, w, chunk_size=4), "data")

        specs = P("data"), P(), P("data"), P("data")
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(
            hidden, head, targets, weights
        )

    got = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)
    assert_close(got, jax.value_and_grad(naive, argnums=(0, 1))(hidden, head, targets, weights), 3e-6)


@pytest.mark.parametrize("vocab", [16, 256, 4096, 49152])
def test_automatic_chunk_bounds_live_logits(vocab):
    chunk = automatic_chunk_size(1 << 20, vocab)
    assert chunk * vocab <= max(1 << 20, 128 * vocab)
    assert automatic_chunk_size(10, vocab) == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": jnp.zeros((T, D, 1))}, "hidden.shape"),
        ({"head": jnp.zeros((V, D + 1))}, "head.shape"),
        ({"targets": jnp.zeros((T - 1,), jnp.int32)}, "targets.shape"),
        ({"targets": jnp.zeros((T,))}, "targets.dtype"),
        ({"weights": jnp.zeros((T, 1))}, "weights.shape"),
        ({"chunk_size": 0}, "chunk_size = 0"),
    ],
)
def test_bad_input_names_field_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(**(dict(zip(("hidden", "head", "targets", "weights"), problem())) | change))
