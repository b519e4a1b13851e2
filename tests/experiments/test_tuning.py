"""Tuning: every value of every arm at a seed of its own, the best one in the arm's runs, all of it in the result."""

import json
import math
import sys
from dataclasses import replace
from types import ModuleType

import pytest
from rich.console import Console

from experiments import recipes, report
from experiments import run as runner
from experiments.claims import Claim
from experiments.experiment import Experiment, Preset, Tuning
from experiments.run import run
from experiments.train import FitResult, NotFinite

NAME = "fake_package.tuned"
BEST = {"a": 1e-2, "b": 1e-3}  # the weights of the arms name them to the fit below
RATES = (1e-3, 1e-2, 1e-1)


def preset(values=RATES):
    base = replace(recipes.smoke(), steps=3, eval_tokens_per_domain=64)
    weights = {"a": 0.1, "b": 0.2}
    arms = {name: replace(base, balance=replace(base.balance, weight=weight)) for name, weight in weights.items()}
    claim = Claim("a over b", "test_ce", "a", "b", "difference", "higher", 0.0, "none")
    return Preset(arms, 2, (claim,), tuning=Tuning("optimizer.learning_rate", {"a": values, "b": values}))


class FakeFit:
    """Validation loss is the distance from the best rate, in decades; a rate of 0.1 is not finite for `b`."""

    def __init__(self):
        self.calls = []

    def __call__(self, config, out, *, progress=None, loggers=(), profile=None):
        arm, rate = "a" if config.balance.weight == 0.1 else "b", config.optimizer.learning_rate
        self.calls.append((arm, rate, config.seed))
        out.mkdir(parents=True, exist_ok=True)
        if arm == "b" and rate == 1e-1:
            raise NotFinite("loss = nan at step 2")
        loss = abs(math.log10(rate / BEST[arm]))
        return FitResult({"val_ce": loss, "test_ce": 1.0 if arm == "a" else 0.5}, {"loss_steps": [1.0], "loss": [loss]})


@pytest.fixture
def fit(monkeypatch):
    module = ModuleType(NAME)
    draw = lambda content, path: path.write_text(content["verdict"])  # noqa: E731
    presets = {"smoke": preset, "lost": lambda: preset((1e-1,))}
    module.EXPERIMENT = Experiment("tuned", "A study", "none", presets, draw)
    monkeypatch.setitem(sys.modules, "fake_package", ModuleType("fake_package"))
    monkeypatch.setitem(sys.modules, NAME, module)
    fake = FakeFit()
    monkeypatch.setattr(runner, "fit", fake)
    return fake


def quiet(out, name="smoke", **more):
    return run(NAME, name, out, console=Console(quiet=True), **more)


TRIED = [(arm, rate, 1000) for arm in ("a", "b") for rate in RATES]
CHOSEN = [(arm, BEST[arm], seed) for seed in (0, 1) for arm in ("a", "b")]


def test_every_value_is_tried_at_a_seed_of_its_own_and_the_best_is_run(fit, tmp_path):
    content = quiet(tmp_path)
    assert fit.calls == TRIED + CHOSEN
    assert content["tuning"] == {
        "field": "optimizer.learning_rate",
        "metric": "val_ce",
        "arms": {"a": {"0.001": 1.0, "0.01": 0.0, "0.1": 1.0}, "b": {"0.001": 0.0, "0.01": 1.0, "0.1": None}},
    }
    made = content["provenance"]["config"]
    assert {arm: made[arm]["optimizer.learning_rate"] for arm in made} == BEST
    assert list(content["arms"]) == ["a", "b"]
    assert content["verdict"] == "holds"
    json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity


def test_repeating_the_command_trains_nothing_and_chooses_the_same(fit, tmp_path):
    first = quiet(tmp_path)
    again = quiet(tmp_path)
    assert fit.calls == TRIED + CHOSEN
    assert first["tuning"] == again["tuning"]


def test_only_the_arms_that_run_are_tuned(fit, tmp_path):
    content = quiet(tmp_path, arms=("b",), seeds=1)
    assert fit.calls == [call for call in TRIED if call[0] == "b"] + [("b", 1e-3, 0)]
    assert list(content["tuning"]["arms"]) == ["b"]


def test_the_table_of_the_report_marks_what_was_chosen(fit, tmp_path):
    text = "\n".join(report.tuning_part(quiet(tmp_path)))
    assert "| val_ce at optimizer.learning_rate = | 0.001 | 0.01 | 0.1 |" in text
    assert "| a | 1 | 0 chosen | 1 |" in text
    assert "| b | 0 chosen | 1 | not finite |" in text


def test_bad_input(fit, tmp_path):
    with pytest.raises(ValueError, match=r"--set = 'optimizer.learning_rate': expected another field"):
        quiet(tmp_path / "set", settings=("optimizer.learning_rate=0.1",))
    with pytest.raises(ValueError, match=r"b: optimizer.learning_rate = \[0.1\]: expected a value that trains"):
        quiet(tmp_path / "lost", "lost")


def test_another_grid_is_another_experiment(fit, tmp_path):
    quiet(tmp_path)
    sys.modules[NAME].EXPERIMENT.presets["smoke"] = lambda: preset((1e-3, 1e-2))
    with pytest.raises(ValueError, match=r"--out = .*tuning\.a"):
        quiet(tmp_path)
