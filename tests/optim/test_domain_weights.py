"""DoReMi and DoGE against exponentiated gradient by hand, in float64; absent domains; the sums of a step."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from optim.domain_weights import (
    average_weights,
    doge,
    domain_sums,
    doremi,
    excess_loss,
    generalization,
    generalization_to_others,
    inner_products,
    released_estimate,
)
from parallel.mesh import make_mesh

LAMBDA = np.array([0.3, 0.0, 1.2, 0.7])
TOKENS = np.array([10.0, 200.0, 3.0, 50.0])


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def run(rule, steps, *args, domains=4):
    """Weights after each of `steps` updates with the same arguments, and the last state."""
    state, update, seen = rule.init(domains), jax.jit(rule.update), []
    for _ in range(steps):
        weights, state = update(*args, state)
        seen.append(np.asarray(weights))
    assert update._cache_size() == 1
    return seen, state


def test_constant_excess_is_softmax_and_the_answer_is_the_mean_of_all_steps():
    with jax.enable_x64(True):
        seen, state = run(doremi(0.4, 0.0), 30, jnp.asarray(LAMBDA * TOKENS), jnp.asarray(TOKENS))
        mean = np.asarray(average_weights(state))
    want = [softmax(0.4 * (t + 1) * LAMBDA) for t in range(30)]
    np.testing.assert_allclose(seen, want, rtol=1e-12)
    np.testing.assert_allclose(mean, np.mean(want, 0), rtol=1e-12)


def test_smoothing_bounds_weights_and_reaches_its_fixed_point():
    """Two domains, lambda = (x, 0): p = (1 - c) p e^s / (p e^s + 1 - p) + c / 2 is a quadratic in p."""
    c, s = 0.1, 0.5
    with jax.enable_x64(True):
        seen, _ = run(doremi(s, c), 400, jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0]), domains=2)
    e = np.exp(s)
    roots = np.roots([e - 1, 1 - (1 - c) * e - c / 2 * (e - 1), -c / 2])
    fixed = roots[(roots > 0) & (roots < 1)].item()
    np.testing.assert_allclose(seen[-1], [fixed, 1 - fixed], rtol=1e-12)
    assert min(w.min() for w in seen) >= c / 2


def test_domains_alike_stay_uniform():
    excess, tokens = 0.7 * TOKENS, TOKENS
    with jax.enable_x64(True):
        seen, state = run(doremi(), 50, jnp.asarray(excess), jnp.asarray(tokens))
        np.testing.assert_allclose(seen, 0.25, rtol=1e-12)
        np.testing.assert_allclose(average_weights(state), 0.25, rtol=1e-12)


def test_before_any_step_the_answer_is_uniform():
    np.testing.assert_allclose(average_weights(doremi().init(5)), 0.2, rtol=1e-6)


def test_an_absent_domain_keeps_its_last_excess():
    """A domain in every third batch alone gains as much as one of equal excess in all."""
    rule = doremi(0.2, 0.0)
    always, sometimes = jnp.array([1.0, 1.0, 1.0]), jnp.array([1.0, 1.0, 0.0])
    with jax.enable_x64(True):
        state = rule.init(3)
        for t in range(30):
            tokens = always if t % 3 == 0 else sometimes
            weights, state = rule.update(jnp.array([0.2, 0.9, 0.9]) * tokens, tokens, state)
        np.testing.assert_allclose(weights, softmax(6 * np.array([0.2, 0.9, 0.9])), rtol=1e-12)


def test_a_domain_not_seen_so_far_neither_gains_nor_loses_to_the_mean():
    rule = doremi(1.0, 0.0)
    with jax.enable_x64(True):
        weights, state = rule.update(jnp.array([0.2, 0.6, 0.0]), jnp.array([1.0, 1.0, 0.0]), rule.init(3))
        np.testing.assert_allclose(weights, softmax(np.array([0.2, 0.6, 0.4])), rtol=1e-12)
        weights, _ = rule.update(jnp.array([0.0, 0.0, 2.0]), jnp.array([0.0, 0.0, 1.0]), state)
        np.testing.assert_allclose(weights, softmax(np.array([0.4, 1.2, 2.4])), rtol=1e-12)


def test_a_weight_too_small_for_its_type_comes_back():
    rule, ones = doremi(1.0, 0.0), jnp.ones(2)
    _, state = rule.update(jnp.array([300.0, 0.0]), ones, rule.init(2))
    weights, _ = rule.update(jnp.array([0.0, 300.0]), ones, state)
    np.testing.assert_allclose(weights, 0.5, rtol=1e-4)


def test_excess_is_clipped_for_each_token_and_masked():
    proxy = jnp.array([[3.0, 1.0, 2.0], [1.0, 1.0, jnp.nan], [5.0, 0.0, 0.0]])
    reference = jnp.array([[1.0, 2.0, 2.0], [0.5, 3.0, 0.0], [1.0, 1.0, 1.0]])
    mask = jnp.array([[1, 1, 1], [1, 1, 0], [1, 1, 1]])
    sums, counts = jax.jit(excess_loss, static_argnums=3)(proxy, reference, jnp.array([2, 0, 2]), 3, mask)
    np.testing.assert_array_equal(sums, [0.5, 0, 2 + 4])
    np.testing.assert_array_equal(counts, [2, 0, 6])


def test_sums_of_halves_are_those_of_the_batch():
    rng = np.random.default_rng(0)
    values, ids = jnp.asarray(rng.integers(0, 9, (8, 5)), jnp.float32), jnp.asarray(rng.integers(0, 4, (8, 5)))
    whole = domain_sums(values, ids, 4)
    halves = [domain_sums(values[i : i + 4], ids[i : i + 4], 4) for i in (0, 4)]
    for i, want in enumerate(whole):
        np.testing.assert_array_equal(halves[0][i] + halves[1][i], want)
    np.testing.assert_array_equal(whole[0], [np.asarray(values)[np.asarray(ids) == d].sum() for d in range(4)])


def test_a_batch_over_eight_devices_moves_weights_as_on_one():
    rng = np.random.default_rng(0)
    losses = [jnp.asarray(rng.integers(0, 9, (16, 5)), jnp.float32) for _ in range(2)]
    ids, rule = jnp.asarray(rng.integers(0, 4, 16)), doremi()

    @jax.jit
    def weights(proxy, reference, ids):
        return rule.update(*excess_loss(proxy, reference, ids, 4), rule.init(4))[0]

    split = NamedSharding(make_mesh(data=8), PartitionSpec("data"))
    over = weights(*(jax.device_put(x, split) for x in (*losses, ids)))
    np.testing.assert_array_equal(over, weights(*losses, ids))
    assert len(over.devices()) == 8


def quadratics(theta, centres):
    """Gradients of 1/2 |theta - mu_j|^2 as a tree of two leaves [S, ...]."""
    g = theta[None] - centres
    return {"a": jnp.asarray(g[:, :2]), "b": jnp.asarray(g[:, 2:].reshape(len(g), 1, -1))}


def test_doge_on_quadratics():
    """W_j = <theta - mu_j, S (theta - mean mu)>, and a proxy that takes the weighted step with it."""
    rng = np.random.default_rng(0)
    theta, centres, mu, rate = rng.standard_normal(5), rng.standard_normal((4, 5)), 0.3, 0.05
    ours = theta.copy()
    with jax.enable_x64(True):
        rule = doge(mu)
        state, update = rule.init(4), jax.jit(rule.update)
        logits, history = np.zeros(4), []
        for _ in range(20):
            gradients = quadratics(ours, centres)
            estimate = generalization(inner_products(gradients, gradients), jnp.ones(4))
            weights, state = update(estimate, jnp.ones(4), rate, state)
            ours = ours - rate * np.asarray(weights) @ (ours[None] - centres)
            logits += rate / mu * (theta[None] - centres) @ (4 * (theta - centres.mean(0)))
            history.append(softmax(logits))
            theta = theta - rate * history[-1] @ (theta[None] - centres)
            np.testing.assert_allclose(weights, history[-1], rtol=1e-11)
        np.testing.assert_allclose(average_weights(state), np.mean(history, 0), rtol=1e-11)
    assert np.ptp(history[-1]) > 0.05


def test_doge_to_a_target():
    rng = np.random.default_rng(1)
    theta, centres, target = rng.standard_normal(5), rng.standard_normal((4, 5)), rng.standard_normal((1, 5))
    with jax.enable_x64(True):
        products = inner_products(quadratics(theta, centres), quadratics(theta, target))
    np.testing.assert_allclose(products, (theta[None] - centres) @ (theta - target[0])[:, None], rtol=1e-12)


@pytest.mark.parametrize("present", [2, 3, 4])
def test_generalization_is_right_on_average_over_which_domains_are_present(present):
    rng = np.random.default_rng(2)
    g = rng.standard_normal((4, 6))
    products, total = g @ g.T, np.zeros(4)
    times = np.zeros(4)
    with jax.enable_x64(True):
        for chosen in combinations(range(4), present):
            there = np.isin(np.arange(4), chosen)
            seen = np.where(there[:, None] & there[None], products, np.nan)  # what the batch lacks is not known
            with_own = np.where(there, np.asarray(generalization(jnp.asarray(seen), jnp.asarray(there))), 0)
            total, times = total + with_own, times + there
    np.testing.assert_allclose(total / times, products.sum(1), rtol=1e-12)


def test_released_estimate_is_normalised_and_clipped():
    g = np.array([[3.0, 4.0], [-30.0, -40.0], [0.0, 5.0]])
    there, products = jnp.ones(3), jnp.asarray(g @ g.T)
    others = generalization_to_others(products, there)
    np.testing.assert_allclose(others, [-230, -450, -180])
    norms = jnp.array([5.0, 50.0, 5.0])
    np.testing.assert_array_equal(released_estimate(others, norms, there), 0)
    np.testing.assert_allclose(released_estimate(jnp.array([40.0, -1.0, 400.0]), norms, there), [2, 0, 5], rtol=1e-6)
    mean_of_present = released_estimate(jnp.array([10.0, 0.0, 0.0]), norms, jnp.array([1.0, 0.0, 1.0]))
    np.testing.assert_allclose(mean_of_present, [2, 0, 0], rtol=1e-6)


def test_doge_keeps_the_last_estimate_of_an_absent_domain():
    rule, estimate = doge(1.0), jnp.array([0.1, 0.4])
    with jax.enable_x64(True):
        _, state = rule.update(estimate, jnp.array([True, True]), 1.0, rule.init(2))
        weights, _ = rule.update(jnp.array([0.1, jnp.nan]), jnp.array([True, False]), 1.0, state)
    np.testing.assert_allclose(weights, softmax(np.array([0.2, 0.8])), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: doremi(eta=float("nan")), "eta"),
        (lambda: doremi(eta=0.0), "eta"),
        (lambda: doremi(smoothing=1.0), "smoothing"),
        (lambda: doge(mu=float("inf")), "mu"),
        (lambda: doge(smoothing=-0.1), "smoothing"),
        (lambda: doremi().init(1), "num_domains"),
        (lambda: doremi().init(2.0), "num_domains"),
        (lambda: doremi().update(jnp.ones(3), jnp.ones(2), doremi().init(2)), "excess"),
        (lambda: doremi().update(jnp.ones(2), jnp.ones(3), doremi().init(2)), "tokens"),
        (lambda: doge().update(jnp.ones((2, 2)), jnp.ones(2), 0.1, doge().init(2)), "estimate"),
        (lambda: doge().update(jnp.ones(2), jnp.ones(2), float("nan"), doge().init(2)), "learning_rate"),
        (lambda: domain_sums(jnp.ones(3), jnp.array([0, 1, 2]), 2), "domains"),
        (lambda: domain_sums(jnp.ones(3), jnp.array([0, -1, 1]), 2), "domains"),
        (lambda: domain_sums(jnp.ones(3), jnp.array([0, 1]), 2), "domains"),
        (lambda: domain_sums(jnp.ones(3), jnp.ones(3), 2), "domains"),
        (lambda: domain_sums(jnp.ones(3), jnp.array([0, 1, 1]), 1), "num_domains"),
        (lambda: domain_sums(jnp.ones((3, 2)), jnp.array([0, 1, 1]), 2, jnp.ones(3)), "mask"),
        (lambda: excess_loss(jnp.ones(3), jnp.ones(2), jnp.array([0, 1, 1]), 2), "reference"),
        (lambda: inner_products({"a": jnp.ones((2, 3))}, {"b": jnp.ones((2, 3))}), "targets"),
        (lambda: inner_products({"a": jnp.ones((2, 3))}, {"a": jnp.ones((1, 4))}), "leaf 0"),
        (lambda: generalization(jnp.ones((2, 3)), jnp.ones(2)), "products"),
        (lambda: generalization(jnp.ones((2, 2)), jnp.ones(3)), "present"),
        (lambda: released_estimate(jnp.ones(2), jnp.ones(3), jnp.ones(2)), "norms"),
    ],
)
def test_bad_input(call, field):
    with pytest.raises(ValueError, match=field):
        call()


def test_unknown_domains_are_dropped_within_jit():
    sums, counts = jax.jit(domain_sums, static_argnums=2)(jnp.ones(4), jnp.array([0, 1, 2, -1]), 2)
    np.testing.assert_array_equal(sums, [1, 1])
    np.testing.assert_array_equal(counts, [1, 1])
