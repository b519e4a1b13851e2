"""The experiment's arms: what is weighted, what is tuned, what the claims compare."""

import math

import pytest
from rich.console import Console

from experiments.experiment import load, preset_of
from experiments.loss_reweighting.experiment import EXPERIMENT, METHODS, RATES
from experiments.run import run


@pytest.mark.parametrize("name", EXPERIMENT.presets)
def test_claims_compare_arms_that_are_there(name):
    preset = preset_of(load("loss-reweighting"), name)
    for claim in preset.claims:
        assert set(claim.arms) <= set(preset.arms), claim
    assert all(arm.reweighting.strategy for arm in preset.arms.values())


def test_the_verdict_is_on_the_tuned_row():
    preset = preset_of(load("loss-reweighting"), "cpu")
    assert set(preset.tuning.values) == set(METHODS)
    assert {arm for claim in preset.claims for arm in claim.arms} <= set(METHODS)
    for name in METHODS:
        same = preset.arms[f"{name}_same"]
        assert same.optimizer.learning_rate == RATES[1]
        assert same.reweighting == preset.arms[name].reweighting
        assert same.reweighting.warm_r == math.inf


@pytest.mark.slow
def test_smoke_ends_in_a_table_and_a_figure(tmp_path):
    content = run("loss-reweighting", "smoke", tmp_path / "out", console=Console(quiet=True))
    assert (tmp_path / "out/figure.png").stat().st_size > 10_000
    assert set(content["tuning"]["arms"]) == set(METHODS)
    losses = {name: of["test_ce"]["mean"] for name, of in content["arms"].items()}
    assert len({round(losses[name], 6) for name in METHODS}) == len(METHODS)  # every method trains another model
