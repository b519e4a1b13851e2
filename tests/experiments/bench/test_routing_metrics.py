"""The whole command on a tiny shape; the switch changes the metrics and nothing else; the interval by its formula."""

import os
from dataclasses import replace
from json import loads
from math import comb
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.bench import routing_metrics
from experiments.bench.batch import random_batch
from experiments.bench.routing_metrics import Side, median_interval
from experiments.bench.shape import StepShape
from experiments.config import BalanceConfig

TINY = StepShape(
    hidden=16, layers=2, heads=2, head_dim=8, experts=4, top_k=2, expert_dim=8, vocab=32, batch=4, seq=16
)  # fmt: skip
METRICS = {
    "router_entropy", "top_score", "max_violation_sequence", "max_violation_microbatch", "max_violation",
    "dead_experts", "drop_rate", "load_p5", "load_p50", "load_p95",
}  # fmt: skip


def plain():
    return TINY.run_config()


def loss_free_ema():
    """A router that keeps a state, a scope that keeps one, and two accumulation passes."""
    config = TINY.run_config()
    model = replace(config.model, moe=replace(config.model.moe, router="loss_free"))
    return replace(config, model=model, balance=BalanceConfig(scope="ema"), accumulation=2)


@pytest.mark.slow
def test_whole_command(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    console = Console(record=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115
    result = routing_metrics.main(out, 6, shape=TINY, least_pairs=6, console=console)
    assert loads(out.read_text()) == result
    assert set(result) == {
        "benchmark", "shape", "pairs", "ratio", "ratio_interval_95", "flops_ratio", "step_ms", "compiled_flops",
        "verdict", "samples", "load_average_before", "provenance",
    }  # fmt: skip
    on, off = (result["samples"][name] for name in ("with", "without"))
    ratios = np.divide(on["seconds"], off["seconds"])
    assert len(ratios) == 6
    assert result["ratio"] == pytest.approx(float(np.median(ratios)))
    assert result["ratio_interval_95"] == pytest.approx([min(ratios), max(ratios)])  # 2 / 2**6 < 5%
    assert result["verdict"] == {
        "upper end below 1.05": max(ratios) < 1.05,
        "FLOPs below +1%": result["flops_ratio"] < 1.01,
    }
    assert result["flops_ratio"] > 1.0
    # The steps are real, and both sides do the same work: they learn the same batch from the same start.
    assert on["loss"] == off["loss"]
    assert on["loss"][-1] < on["loss"][0]
    assert str(tmp_path) not in out.read_text()
    text = console.export_text()
    assert "with / without" in text
    assert "upper end below 1.05: " in text
    assert "FLOPs below +1%: " in text


@pytest.mark.parametrize("make", [plain, loss_free_ema])
@pytest.mark.slow
def test_without_metrics_the_new_state_is_the_same(make) -> None:
    config = make()
    leaves = {name: leaf.reshape(config.accumulation, -1, TINY.seq + 1) for name, leaf in random_batch(TINY).items()}
    on, off = (Side.of(config, leaves, routing_metrics) for routing_metrics in (True, False))
    for _ in range(2):
        (_, reported), (_, kept) = on.run(), off.run()
    assert set(reported) - set(kept) == METRICS
    assert set(kept) - set(reported) == set()
    assert off.flops < on.flops
    for part in ("params", "router_state", "method_state", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(on.state, part), getattr(off.state, part))
    if make is loss_free_ema:  # and both kinds of state have moved
        assert all(np.any(leaf) for leaf in jax.tree.leaves((off.state.router_state, off.state.method_state)))


@pytest.mark.parametrize("n", range(50, 101))
def test_interval_is_between_the_ranks_of_the_sign_test(n: int) -> None:
    below = np.cumsum([comb(n, i) for i in range(n + 1)]) / 2**n  # P(X <= i)
    rank = int(np.argmax(below >= 0.025))  # the largest j with P(X < j) < 2.5%
    values = np.random.default_rng(n).permutation(n) + 1.0  # a value is its own rank
    assert median_interval(values) == (rank, n + 1 - rank)
    known = {50: (18, 33), 100: (40, 61)}  # tables of the sign test
    assert known.get(n, (rank, n + 1 - rank)) == (rank, n + 1 - rank)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pairs = 49: expected at least 50"):
        routing_metrics.main(tmp_path / "result.json", 49)
    with pytest.raises(ValueError, match="json = "):
        routing_metrics.main(tmp_path / "missing" / "result.json")
    assert list(tmp_path.iterdir()) == []
