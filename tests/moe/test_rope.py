"""Rotary embedding and its stretches, against what their definitions say."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import RopeScaling
from moe.rope import apply_rope, attention_factor, rope_tables, stretched

D, THETA, CONTEXT, FACTOR = 16, 1000.0, 64, 4.0
KINDS = {
    "none": None,
    "linear": RopeScaling("linear", FACTOR),
    "dynamic": RopeScaling("dynamic", FACTOR, CONTEXT),
    "yarn": RopeScaling("yarn", FACTOR, CONTEXT),
    "llama3": RopeScaling("llama3", FACTOR, CONTEXT),
}


def rotated(x, positions, scaling=None):
    """x [D] at each of the positions -> [S, D]."""
    cos, sin = rope_tables(jnp.asarray(positions)[None], D, THETA, scaling)
    return np.asarray(apply_rope(jnp.broadcast_to(x, (1, len(positions), 1, D)), cos, sin))[0, :, 0]


def turned(positions, inverse):
    """The complex rotations exp(i p w) [S, D / 2], in float64."""
    return np.exp(1j * np.asarray(positions, np.float64)[:, None] * inverse)


def frequencies(theta=THETA):
    return theta ** (-np.arange(0, D, 2) / D)


def as_complex(x):
    return x[..., : D // 2] + 1j * x[..., D // 2 :]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_depend_on_the_distance_only(kind):
    q, k = np.random.default_rng(0).standard_normal((2, D)).astype(np.float32)
    positions = np.arange(50)
    scores = rotated(q, positions, KINDS[kind]) @ rotated(k, positions, KINDS[kind]).T
    for distance in (-7, 0, 3):
        along = np.diagonal(scores, distance)
        np.testing.assert_allclose(along, along[0], atol=2e-5)
    assert np.ptp(scores[0]) > 0.1


def test_a_pair_turns_by_position_times_frequency():
    x = np.random.default_rng(1).standard_normal(D).astype(np.float32)
    got = as_complex(rotated(x, [0, 1, 13]))
    np.testing.assert_allclose(got, as_complex(x) * turned([0, 1, 13], frequencies()), atol=1e-5)


def test_linear_is_positions_over_the_factor():
    x = np.random.default_rng(2).standard_normal(D).astype(np.float32)
    np.testing.assert_allclose(rotated(x, [0, 8, 40], KINDS["linear"]), rotated(x, [0, 2, 10]), atol=1e-5)


def test_dynamic_is_plain_within_the_context_and_a_larger_base_beyond():
    x = np.random.default_rng(3).standard_normal(D).astype(np.float32)
    inside = np.arange(CONTEXT)
    np.testing.assert_array_equal(rotated(x, inside, KINDS["dynamic"]), rotated(x, inside))
    base = THETA * (FACTOR * 96 / CONTEXT - (FACTOR - 1)) ** (D / (D - 2))
    beyond = as_complex(rotated(x, np.arange(96), KINDS["dynamic"]))
    np.testing.assert_allclose(beyond, as_complex(x) * turned(np.arange(96), frequencies(base)), atol=2e-5)


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_fast_pairs_are_kept_and_slow_ones_stretched(kind: Literal["yarn", "llama3"]):
    """Between the two bounds, in turns within the original context, the frequency falls from w to w / s."""
    theta, dims, context = 1e6, 64, 4096  # wide enough that some pairs lie beyond each bound
    scaling = RopeScaling(kind, FACTOR, context)
    ratio = stretched(dims, theta, scaling)
    turns = context * theta ** (-np.arange(0, dims, 2) / dims) / (2 * np.pi)
    fast = scaling.beta_fast if kind == "yarn" else scaling.high_freq_factor
    slow = scaling.beta_slow if kind == "yarn" else scaling.low_freq_factor
    assert (turns > 2 * fast).sum() > 3
    assert (turns < slow / 2).sum() > 3
    # YaRN's ramp is over whole pairs: a pair next to a bound may be beyond it or within.
    np.testing.assert_allclose(ratio[turns > fast * theta ** (2 / dims)], 1)
    np.testing.assert_allclose(ratio[turns < slow / theta ** (2 / dims)], 1 / FACTOR)
    assert (np.diff(ratio) <= 0).all()
    assert ((ratio > 1 / FACTOR + 1e-3) & (ratio < 1 - 1e-3)).any()


def test_llama3_interpolates_in_turns_of_the_context():
    """Meta's smoothing: (1 - a) w / s + a w with a = (turns - low) / (high - low)."""
    scaling = RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    w = 500_000.0 ** (-np.arange(0, 128, 2) / 128)
    a = np.clip((8192 * w / (2 * np.pi) - 1) / 3, 0, 1)
    np.testing.assert_allclose(stretched(128, 500_000.0, scaling), (1 - a) / 8 + a, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, 0.1 * np.log(40) + 1),
        ({"attention_factor": 1.25}, 1.25),
        ({"mscale": 0.8, "mscale_all_dim": 0.5}, (0.08 * np.log(40) + 1) / (0.05 * np.log(40) + 1)),
    ],
)
def test_yarn_scales_cos_and_sin(options, factor):
    scaling = RopeScaling("yarn", 40.0, CONTEXT, **options)
    assert attention_factor(scaling) == pytest.approx(factor)
    cos, sin = rope_tables(jnp.arange(5)[None], D, THETA, scaling)
    np.testing.assert_allclose(np.hypot(cos, sin), factor, rtol=1e-5)
