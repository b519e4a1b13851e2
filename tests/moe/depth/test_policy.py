"""The knob's marks and the straight lines between them."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe.depth.policy import DepthPolicy

LOGITS = jnp.asarray(np.random.default_rng(0).standard_normal((50, 3)), jnp.float32)
ROUTER = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
SKIP, EXECUTE, REPEAT = np.eye(3)


def test_marks():
    np.testing.assert_array_equal(DepthPolicy()(LOGITS), LOGITS.argmax(-1))
    np.testing.assert_array_equal(DepthPolicy(-0.5)(LOGITS), LOGITS.argmax(-1))
    assert set(np.unique(LOGITS.argmax(-1))) == {0, 1, 2}
    for knob, decision in ((-1.0, 0), (0.5, 1), (1.0, 2)):
        assert (np.asarray(DepthPolicy(knob)(LOGITS)) == decision).all()


@pytest.mark.parametrize(
    ("knob", "want"),
    [
        (-0.8, 0.6 * SKIP[None] + 0.4 * ROUTER),
        (-0.5, ROUTER),
        (-0.1, 0.6 * ROUTER + 0.4 * EXECUTE[None]),
        (0.6, np.broadcast_to(0.8 * EXECUTE + 0.2 * REPEAT, (50, 3))),
    ],
)
def test_mixtures(knob, want):
    mixed = np.asarray(DepthPolicy(knob).mixed(LOGITS))
    np.testing.assert_allclose(mixed, want, atol=1e-6)
    np.testing.assert_array_equal(DepthPolicy(knob)(LOGITS), mixed.argmax(-1))


def test_more_is_deeper_between_skip_and_execute():
    skipped = [int((np.asarray(DepthPolicy(knob)(LOGITS)) == 0).sum()) for knob in np.linspace(-1, 0.5, 13)]
    assert skipped == sorted(skipped, reverse=True)
    assert skipped[0] == 50
    assert skipped[-1] == 0


def test_neutral_decides_by_logits_that_probabilities_cannot_tell_apart():
    close = jnp.array([0.0, 100.0, np.nextafter(np.float32(100), np.float32(200))], jnp.float32)
    assert int(DepthPolicy()(close)) == 2


@pytest.mark.parametrize("knob", [-1.1, 1.5, float("nan")])
def test_bad_input(knob):
    with pytest.raises(ValueError, match="knob = "):
        DepthPolicy(knob)
