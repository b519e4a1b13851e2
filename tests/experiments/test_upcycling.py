"""Experiment upcycling: arms of equal arithmetic, one parent per seed, and the smoke preset from end to end."""

import json
import signal

import pytest
from rich.console import Console

from experiments import run as runner
from experiments.config import PARENT
from experiments.experiment import trained
from experiments.run import run
from experiments.train import FitResult, fit
from experiments.upcycling import experiment
from experiments.upcycling.experiment import KNOWN, LEAST_KNOWN, flops
from moe.upcycle import check

PRESETS = experiment.EXPERIMENT.presets


def made(name):
    preset = PRESETS[name]()
    return preset, trained(preset)


@pytest.mark.parametrize("name", ["smoke", "cpu", pytest.param("cpu-long", marks=pytest.mark.slow)])
def test_arms_are_equal_in_what_the_claims_say(name):
    preset, arms = made(name)
    cost = {arm: flops(config.model) * config.steps for arm, config in arms.items()}
    assert cost["dense_flops"] == pytest.approx(cost["copy"], rel=0.5 / arms["dense_flops"].steps)
    assert cost["drop"] == cost["copy"] > 1.15 * cost["dense"]
    assert cost["dense"] < cost["split"] < (1.03 if name == "smoke" else 1.02) * cost["dense"]
    for arm, config in arms.items():
        parent = preset.parents["dense"].model if preset.parents else arms["dense"].model
        assert config.steps == arms["dense"].steps or arm == "dense_flops"
        assert (config.data, config.optimizer) == (arms["dense"].data, arms["dense"].optimizer)
        assert config.init.source == arms["dense"].init.source
        if config.init.upcycle:
            check(parent, config.model, config.init.upcycle)


def test_parents_never_see_the_domains_the_arms_train_on():
    preset, arms = made("cpu")
    assert preset.parents["dense"].data.domains == KNOWN
    assert {config.data.domains for config in arms.values()} == {LEAST_KNOWN}
    assert not set(KNOWN) & set(LEAST_KNOWN)
    assert len(KNOWN + LEAST_KNOWN) == 9


def quiet(out, **more):
    return run("upcycling", "smoke", out, console=Console(quiet=True), **more)


class Trainer:
    """Stands in for `fit`: numbers instead of training, and what it was asked for."""

    def __init__(self):
        self.calls = []

    def __call__(self, config, out, *, progress=None, loggers=(), profile=None, parent=None):
        self.calls.append((out.parent.name, out.name, parent))
        out.mkdir(parents=True)
        ce = 4.0 - 0.1 * len(self.calls)
        metrics = {"val_ce": ce, "flops_per_token": 1e5, "start_gap": 0.0, "max_violation": 0.1}
        return FitResult(metrics, {"loss_steps": [1.0, 2.0], "loss": [4.2, ce], "domains": ["a"], "domain_ce": [ce]})


def test_every_seed_trains_its_parent_first_and_arms_get_it(tmp_path, monkeypatch):
    trainer = Trainer()
    monkeypatch.setattr(runner, "fit", trainer)
    content = quiet(tmp_path / "out", seeds=2)
    order = [("parents", "dense")] + [("runs", arm) for arm in content["arms"]]
    assert [(folder, name) for folder, name, _ in trainer.calls] == [
        (folder, f"{name}-seed{seed}") for seed in (0, 1) for folder, name in order
    ]
    for folder, name, parent in trainer.calls:
        if folder == "parents":
            assert parent is None
        else:
            seed = int(name[-1])
            assert parent.out == tmp_path / "out" / "parents" / f"dense-seed{seed}"
            assert (parent.config.seed, parent.config.data.domains[0]) == (seed, "chain-0")
    assert content["parents"]["dense"]["val_ce"]["values"] == pytest.approx([3.9, 3.3])
    assert next(iter(content["provenance"]["config"])) == f"{PARENT}dense"
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
    quiet(tmp_path / "out", seeds=2)  # repeated: trains nothing
    assert len(trainer.calls) == 12
    with pytest.raises(ValueError, match=r"--out = .*copy\.optimizer\.learning_rate"):
        quiet(tmp_path / "out", settings=("optimizer.learning_rate=0.5",))


def test_only_the_parents_that_are_asked_for_and_no_claim_that_cannot_be_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "fit", Trainer())
    content = quiet(tmp_path / "out", arms=("drop",))  # a figure without a dense arm too
    assert (list(content["arms"]), content["verdict"]) == (["drop"], "no claim judged")


@pytest.mark.slow
def test_smoke_runs_resumes_and_starts_where_the_parent_ended(tmp_path, monkeypatch):
    """Ctrl-C in the parent and in an arm; the same command goes on, and its numbers are the uninterrupted run's."""
    whole = quiet(tmp_path / "whole", arms=("dense", "split"))
    steps, stops = [], [3, 12]

    def stopped(config, out, *, progress=None, **more):
        def noted(step, total, metrics):
            steps.append(step)
            progress(step, total, metrics)
            if len(steps) in stops:
                signal.raise_signal(signal.SIGINT)

        return fit(config, out, progress=noted, **more)

    monkeypatch.setattr(runner, "fit", stopped)
    for _ in stops:
        with pytest.raises(KeyboardInterrupt, match="saved"):
            quiet(tmp_path / "out", arms=("dense", "split"))
    content = quiet(tmp_path / "out", arms=("dense", "split"))
    drop = lambda metrics: {k: v for k, v in metrics.items() if k not in ("step_ms", "tokens_per_second")}  # noqa: E731
    for kind in ("arms", "parents"):
        for name, metrics in whole[kind].items():
            assert drop(content[kind][name]) == drop(metrics)
    assert content["series"] == whole["series"]
    assert content["arms"]["split"]["start_gap"]["mean"] < 1e-4
    rows = (tmp_path / "out/runs/split-seed0/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 9))
