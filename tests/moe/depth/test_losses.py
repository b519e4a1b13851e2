"""Focal loss and effective-number weights against formulas written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.depth.losses import effective_number_weights, effective_numbers, focal_loss

WEIGHTS = np.array([0.5, 0.8, 1.7])
COUNTS = (4399, 120956, 1457)  # the paper's


def draw(shape=(4, 5)):
    rng = np.random.default_rng(0)
    return 2 * rng.standard_normal((*shape, 3)), rng.integers(0, 3, shape)


def probabilities(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_value_and_gradient_are_the_closed_form(gamma):
    """dL/dz_j = a (gamma p (1 - p)^(gamma - 1) log p - (1 - p)^gamma) (1[j = y] - p_j) / N."""
    logits, labels = draw()
    p = probabilities(logits)
    of_label = np.take_along_axis(p, labels[..., None], -1)[..., 0]
    a = WEIGHTS[labels]
    want = -(a * (1 - of_label) ** gamma * np.log(of_label)).mean()
    slope = gamma * of_label * (1 - of_label) ** (gamma - 1) * np.log(of_label) - (1 - of_label) ** gamma
    gradient = (a * slope)[..., None] * (np.eye(3)[labels] - p) / labels.size
    got = jax.value_and_grad(focal_loss)(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), gamma, WEIGHTS)
    np.testing.assert_allclose(got[0], want, rtol=1e-5)
    np.testing.assert_allclose(got[1], gradient, rtol=1e-4, atol=1e-7)


def test_gamma_zero_is_weighted_cross_entropy():
    logits, labels = draw()
    of_label = np.take_along_axis(probabilities(logits), labels[..., None], -1)[..., 0]
    got = focal_loss(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), 0.0, WEIGHTS)
    np.testing.assert_allclose(got, -(WEIGHTS[labels] * np.log(of_label)).mean(), rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_certain_and_impossible_labels_have_finite_gradients(gamma):
    logits = jnp.array([[1e3, 0.0, 0.0], [0.0, 1e3, 0.0]])
    value, gradient = jax.value_and_grad(focal_loss)(logits, jnp.array([0, 0]), gamma, [1.0, 1.0, 1.0])
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(value, 500.0)  # the impossible label alone: 1000 / 2


def test_effective_numbers():
    np.testing.assert_allclose(1 / effective_numbers([10**9], 0.999), 1 - 0.999)  # n to infinity
    np.testing.assert_array_equal(effective_numbers([1, 7], 0.0), 1.0)
    np.testing.assert_allclose(effective_numbers([3], 0.5), 1 + 0.5 + 0.25)  # the geometric series
    np.testing.assert_allclose(effective_number_weights(COUNTS, 0.999), [0.916, 0.905, 1.179], atol=1e-3)
    np.testing.assert_allclose(effective_number_weights(COUNTS, 0.9999), [0.75, 0.27, 1.98], atol=5e-3)
    np.testing.assert_allclose(effective_number_weights([1, 2, 6], 0.9).mean(), 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: effective_number_weights([3, 0, 1], 0.9), r"counts = \[3, 0, 1\]"),
        (lambda: effective_number_weights([], 0.9), "counts = "),
        (lambda: effective_number_weights([3, 1], 1.0), "beta = 1.0"),
        (lambda: effective_number_weights([3, 1], -0.1), "beta = -0.1"),
        (lambda: focal_loss(jnp.zeros((2, 3)), jnp.zeros(2, int), -1.0, WEIGHTS), "gamma = -1.0"),
        (lambda: focal_loss(jnp.zeros((2, 3)), jnp.zeros(2, int), 2.0, WEIGHTS[:2]), "class_weights = 2"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
