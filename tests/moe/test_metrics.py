"""Routing metrics in closed form."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe.metrics import max_violation, mutual_information, pass_metrics, step_metrics
from tests.moe.test_losses import B, E, K, L, S, random_logits, stats_of


def test_max_violation_is_zero_when_balanced_and_e_over_k_minus_one_at_worst():
    assert float(max_violation(jnp.full((4,), 7.0))) == 0.0
    assert float(max_violation(jnp.array([8.0, 0.0, 0.0, 0.0]))) == pytest.approx(3.0)
    assert float(max_violation(jnp.zeros(4))) == pytest.approx(-1.0)  # no tokens: finite, visibly not a balance


@pytest.mark.parametrize("domains", [2, 4])
def test_mutual_information_of_independence_and_of_a_bijection(domains):
    independent = jnp.outer(jnp.ones(domains), jnp.array([1.0, 2.0, 3.0, 4.0]))
    assert float(mutual_information(independent)) == pytest.approx(0.0, abs=1e-6)
    assert float(mutual_information(5 * jnp.eye(domains))) == pytest.approx(np.log(domains), rel=1e-5)


def test_mutual_information_equals_the_textbook_sum():
    counts = np.random.default_rng(0).integers(0, 20, size=(3, 5)).astype(np.float64)
    p = counts / counts.sum()
    rows, columns = p.sum(1, keepdims=True), p.sum(0, keepdims=True)
    ratio = np.where(p > 0, p / (rows * columns), 1.0)
    expected = float((p * np.log(ratio)).sum())
    assert float(mutual_information(jnp.asarray(counts, jnp.float32))) == pytest.approx(expected, rel=1e-4)


def test_entropy_and_top_score_of_uniform_and_of_certain_routers():
    uniform = pass_metrics(stats_of(jnp.zeros((L, B, S, E))), 2)
    assert float(uniform["router_entropy"]) == pytest.approx(np.log(E), rel=1e-5)
    assert float(uniform["top_score"]) == pytest.approx(K / E, rel=1e-5)
    certain = pass_metrics(stats_of(jnp.zeros((L, B, S, E)).at[..., 1].set(100.0)), 2)
    assert float(certain["router_entropy"]) == pytest.approx(0.0, abs=1e-5)
    assert float(certain["top_score"]) == pytest.approx(1.0, rel=1e-5)


def test_violation_grows_as_the_scope_shrinks():
    stats = stats_of(random_logits())
    metrics = pass_metrics(stats, 4)
    whole = step_metrics(stats.counts.sum(axis=1), stats.dropped.sum())["max_violation"]
    assert metrics["max_violation_sequence"] > metrics["max_violation_microbatch"] > whole


def test_step_metrics_count_dead_experts_and_load_percentiles():
    counts = jnp.array([[0.0, 0.0, 4.0, 4.0], [2.0, 2.0, 2.0, 2.0]])
    metrics = step_metrics(counts, jnp.float32(4.0))
    assert float(metrics["dead_experts"]) == 2
    assert float(metrics["drop_rate"]) == pytest.approx(4 / 16)
    assert float(metrics["max_violation"]) == pytest.approx(0.5)
    assert float(metrics["load_p50"]) == pytest.approx(1.0)
    assert float(metrics["load_p95"]) == pytest.approx(2.0)


def test_dropped_assignments_are_counted_against_the_router_choice():
    kept = jnp.ones((B * S, K), bool).at[:5, 0].set(False)
    stats = stats_of(random_logits(), kept=kept)
    assert float(stats.dropped.sum()) == 5 * L
