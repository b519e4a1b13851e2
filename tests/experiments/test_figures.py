"""Curves are smoothed over steps, however their points are spaced."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments.figures import curves, smooth
from experiments.train import loss_curve


def test_a_constant_stays_and_a_line_stays_a_line_inside():
    steps = np.arange(1.0, 41.0)
    np.testing.assert_allclose(smooth(np.full(40, 3.0), steps, 8), 3.0)
    np.testing.assert_allclose(smooth(steps, steps, 8)[4:-4], steps[4:-4])


def test_window_zero_changes_nothing():
    values = np.array([3.0, 1.0, 2.0])
    np.testing.assert_array_equal(smooth(values, np.array([1.0, 2.0, 4.0]), 0), values)


def test_a_point_weighs_the_steps_it_stands_for():
    # Points for steps 1-3 and 4: their common mean is that of the four steps, not of the two points.
    assert smooth(np.array([2.0, 6.0]), np.array([3.0, 4.0]), 10)[1] == pytest.approx((3 * 2.0 + 6.0) / 4)


def test_noise_does_not_grow_where_points_hold_fewer_steps():
    """350 steps thinned to 200 points hold two steps each, then one: this once drew a jagged end."""
    rng, early, late = np.random.default_rng(0), [], []
    for _ in range(20):
        thin = loss_curve([{"step": i + 1.0, "loss": x} for i, x in enumerate(rng.standard_normal(350))])
        steps = np.array(thin["loss_steps"])
        assert set(np.diff(steps)) == {1.0, 2.0}
        moves = np.diff(smooth(np.array(thin["loss"]), steps, 20))
        early.append(np.var(moves[(steps[1:] > 20) & (steps[1:] <= 280)]))
        late.append(np.var(moves[(steps[1:] > 310) & (steps[1:] <= 340)]))
    assert np.mean(late) < np.mean(early)


def test_curves_draws_the_median_of_seeds():
    runs = [{"loss_steps": [1.0, 2.0, 3.0], "loss": [value] * 3} for value in (1.0, 2.0, 9.0)]
    _, ax = plt.subplots()
    curves(ax, {"arm": runs}, "loss", {"arm": "C0"})
    np.testing.assert_allclose(ax.lines[0].get_ydata(), 2.0)
    plt.close("all")
