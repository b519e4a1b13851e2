"""Selection by reducible loss and by influence: cosines exact in float64, projections right on average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim import selection
from optim.selection import (
    adam_directions,
    cosines,
    influence,
    project,
    reducible_loss,
    released_adam_directions,
    rows,
    source_scores,
    source_weights,
    top,
)


def tree(n, seed=0):
    rng = np.random.default_rng(seed)
    return {"a": jnp.asarray(rng.standard_normal((n, 3, 4))), "b": jnp.asarray(rng.standard_normal((n, 7)))}


def flat(x):
    return np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(x)], 1)


def test_rho_skips_what_is_known_and_what_is_noise():
    """Known already, noise (as hard for the model of held-out data), worth learning, rare but learnable."""
    loss, irreducible = jnp.array([0.1, 6.0, 3.0, 4.0]), jnp.array([0.05, 5.9, 0.5, 2.0])
    chosen = jax.jit(lambda a, b: top(reducible_loss(a, b), 2))(loss, irreducible)
    np.testing.assert_array_equal(chosen, [2, 3])
    np.testing.assert_array_equal(top(loss, 2), [1, 3])  # by loss alone: the noise first


def test_top_keeps_the_order_of_equals_and_never_prefers_nan():
    scores = jnp.array([1.0, jnp.nan, 2.0, 1.0, 2.0])
    np.testing.assert_array_equal(top(scores, 4), [2, 4, 0, 3])
    np.testing.assert_array_equal(top(scores, 5), [2, 4, 0, 3, 1])


def test_without_projection_it_is_the_cosine():
    with jax.enable_x64(True):
        train, validation = tree(5), tree(2, 1)
        got = jax.jit(lambda a, b: cosines(rows(a), rows(b)))(train, validation)
        a, b = flat(train), flat(validation)
        want = [[x @ y / np.sqrt(x @ x) / np.sqrt(y @ y) for y in b] for x in a]
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, want, rtol=1e-13)


def test_influence_sums_checkpoints_by_learning_rate():
    rates = [0.3, 0.1]
    with jax.enable_x64(True):
        train, validation = [tree(5, i) for i in (0, 1)], [tree(2, i) for i in (2, 3)]
        got = influence([rows(x) for x in train], [rows(x) for x in validation], rates)
        want = np.zeros((5, 2))
        for x, y, rate in zip(train, validation, rates):
            unit = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (flat(x), flat(y))]
            want += rate * unit[0] @ unit[1].T
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_gradient_of_zero_has_no_influence():
    np.testing.assert_array_equal(cosines(jnp.zeros((1, 3)), jnp.ones((2, 3))), 0)


@pytest.mark.parametrize("block", [4096, 5])
def test_projected_inner_products_are_right_on_average(block, monkeypatch):
    """Over keys, the mean lies within four standard errors, whose size is the known one for signs."""
    monkeypatch.setattr(selection, "BLOCK", block)  # 12 and 7 parameters: whole, or in blocks with a remainder
    k, keys = 6, 2000
    with jax.enable_x64(True):
        train, validation = tree(3), tree(2, 1)
        both = lambda key: project(train, key, k) @ project(validation, key, k).T  # noqa: E731
        got = np.asarray(jax.jit(jax.vmap(both))(jax.random.split(jax.random.key(0), keys)))
        a, b = flat(train), flat(validation)
    exact = a @ b.T
    variance = ((a**2).sum(1)[:, None] * (b**2).sum(1)[None] + exact**2 - 2 * (a**2) @ (b**2).T) / k
    assert np.abs(got.mean(0) - exact).max() < 4 * np.sqrt(variance.max() / keys)
    np.testing.assert_allclose(got.var(0), variance, rtol=0.2)


def test_projection_is_a_function_of_the_key_and_linear():
    key = jax.random.key(3)
    whole = project(tree(5), key, 8)
    np.testing.assert_array_equal(project(jax.tree.map(lambda x: x[1:3], tree(5)), key, 8), whole[1:3])
    assert np.abs(np.asarray(project(tree(5), jax.random.key(4), 8) - whole)).max() > 0.1
    same = {"a": jnp.ones((1, 7)), "b": -jnp.ones((1, 7))}  # leaves alike have signs of their own
    assert np.abs(np.asarray(project(same, key, 8))).max() > 0.1


def test_projection_never_holds_all_signs():
    text = str(jax.make_jaxpr(lambda x: project({"w": x}, jax.random.key(0), 16))(jnp.ones((1, 100_000))))
    assert "4096,16]" in text
    assert "100000,16]" not in text


def test_each_sample_takes_adams_own_step():
    with jax.enable_x64(True):
        train, adam = tree(4), optax.scale_by_adam(b1=0.9, b2=0.99, eps=0, eps_root=1e-3)
        one = lambda i: jax.tree.map(lambda x: x[i], train)  # noqa: E731
        state = adam.init(one(0))
        for i in (2, 3):
            _, state = adam.update(one(i), state)
        got = jax.jit(adam_directions, static_argnames=("b2", "eps"))(
            train, state.mu, state.nu, state.count, b2=0.99, eps=1e-3
        )
        for i in range(4):
            want, _ = adam.update(one(i), state)
            jax.tree.map(lambda g, w, i=i: np.testing.assert_allclose(g[i], w, rtol=1e-12), got, want)


def test_the_released_direction_is_the_same_but_for_its_length():
    with jax.enable_x64(True):
        train = tree(4)
        mu, nu = (jax.tree.map(lambda x, r=rate: r * x[0] ** 2, train) for rate in (0.1, 0.02))
        a = flat(adam_directions(train, mu, nu, 5, eps=1e-30))
        b = flat(released_adam_directions(train, mu, nu, eps=1e-30))
    m = 0.9 * flat({k: np.asarray(v)[None] for k, v in mu.items()}) + 0.1 * flat(train)
    v = 0.999 * flat({k: np.asarray(x)[None] for k, x in nu.items()}) + 0.001 * flat(train) ** 2
    np.testing.assert_allclose(b, m / np.sqrt(v), rtol=1e-12)
    np.testing.assert_allclose(a / b, np.sqrt(1 - 0.999**6) / (1 - 0.9**6), rtol=1e-12)


def test_sources_by_mean_and_by_counting():
    scores = jnp.array([0.9, 0.8, 0.1, 0.7, 0.2, 0.0])
    sources = jnp.array([2, 0, 0, 2, 1, 1])
    np.testing.assert_allclose(source_scores(scores, sources, 3), [0.45, 0.1, 0.8], rtol=1e-6)
    weights = jax.jit(source_weights, static_argnums=(2, 3))(scores, sources, 3, 0.5)
    np.testing.assert_allclose(weights, [1 / 3, 0, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(source_weights(scores, sources, 3, 0.01), [0, 0, 1])
    np.testing.assert_allclose(source_weights(scores, sources, 3, 1.0), 1 / 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: reducible_loss(jnp.ones(3), jnp.ones(2)), "irreducible"),
        (lambda: top(jnp.ones(3), 4), "n"),
        (lambda: top(jnp.ones(3), 0), "n"),
        (lambda: top(jnp.ones((3, 1)), 1), "scores"),
        (lambda: rows({}), "gradients"),
        (lambda: rows({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}), "gradients"),
        (lambda: project(tree(2), jax.random.key(0), 0), "k"),
        (lambda: cosines(jnp.ones((2, 3)), jnp.ones((2, 4))), "validation"),
        (lambda: cosines(jnp.ones((2, 3)), jnp.ones((0, 3))), "validation"),
        (lambda: influence([], [], []), "train"),
        (lambda: influence([jnp.ones((2, 3))], [], [0.1]), "validation"),
        (lambda: influence([jnp.ones((2, 3))], [jnp.ones((1, 3))], [float("nan")]), "learning_rates"),
        (lambda: influence([jnp.ones((n, 3)) for n in (2, 1)], [jnp.ones((1, 3))] * 2, [0.1, 0.1]), "train"),
        (lambda: adam_directions(tree(2), tree(2), tree(2), 1), "mu"),
        (lambda: adam_directions(tree(2), *[jax.tree.map(lambda x: x[0], tree(1))] * 2, -1), "count"),
        (lambda: adam_directions(tree(2), *[jax.tree.map(lambda x: x[0], tree(1))] * 2, 1, b1=1.0), "b1"),
        (lambda: released_adam_directions(tree(2), *[jax.tree.map(lambda x: x[0], tree(1))] * 2, eps=0.0), "eps"),
        (lambda: source_scores(jnp.ones(2), jnp.array([0, 2]), 2), "domains"),
        (lambda: source_scores(jnp.ones(2), jnp.array([0, 0]), 2), "sources"),
        (lambda: source_scores(jnp.ones(2), jnp.array([0, 0]), 1), "num_domains"),
        (lambda: source_weights(jnp.ones(2), jnp.array([0, 1]), 2, 0.0), "share"),
        (lambda: source_weights(jnp.ones(2), jnp.array([0, 1, 1]), 2, 0.5), "sources"),
    ],
)
def test_bad_input(call, field):
    with pytest.raises(ValueError, match=field):
        call()
