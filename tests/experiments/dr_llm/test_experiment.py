"""The experiment end to end: policies at equal executions, interrupts, counts."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from experiments.dr_llm import arithmetic, study
from experiments.dr_llm.experiment import EXPERIMENT
from experiments.dr_llm.supervision import SearchConfig
from experiments.run import plan_table, run
from moe.depth.paths import full_path

SETTLED = ("accuracy", "executions", "fraction", "macro_f1", "evaluations", "labels_skip")


@pytest.fixture(autouse=True)
def _fresh():
    study.place.cache_clear()
    yield
    study.place.cache_clear()


def quiet(out):
    study.place.cache_clear()
    return run("dr-llm", "smoke", out, console=Console(quiet=True))


def test_smoke_runs_and_goes_on_after_interrupts(tmp_path, monkeypatch):
    """Ctrl-C in the base's training and between chunks of a search: the same numbers, nothing done twice."""
    whole = quiet(tmp_path / "whole")
    assert (tmp_path / "whole/figure.png").stat().st_size > 10_000
    steps, train = [], arithmetic._train_step

    def counted(config, tx, state, tokens, before):
        steps.append(int(state.step))
        if len(steps) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return train(config, tx, state, tokens, before)

    monkeypatch.setattr(arithmetic, "_train_step", counted)
    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt, match="after step 7"):
        quiet(out)
    asked, evaluator = [], study.evaluator

    def interrupted(examiner, first):
        asked.append((len(examiner.quiz), first))
        if asked == [(32, 0)] * 3 + [(64, 0), (64, 32)]:
            raise KeyboardInterrupt
        return evaluator(examiner, first)

    monkeypatch.setattr(study, "evaluator", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quiet(out)
    assert steps == list(range(20))
    again = quiet(out)
    assert steps == list(range(20))
    assert asked[5:] == [(64, 32), (64, 0), (64, 32), (32, 0)]  # the last three with one edit
    for arm, metrics in whole["arms"].items():
        for name in set(metrics) & set(SETTLED):
            assert again["arms"][arm][name] == metrics[name], (arm, name)


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """A place with a small base whose routers' decisions are given."""
    arm = EXPERIMENT.presets["smoke"]().arms["full"]
    trial = arm.run.args[0]
    place = study.Place(trial, 0, tmp_path_factory.mktemp("shared") / "shared-seed0")
    labels = np.ones((32, 3), np.int32)
    labels[:20, 1] = 0
    labels[:5, 2] = 0
    labels[30:, 0] = 2
    place._held["labels", "residual", -0.5, "test"] = labels
    return place


@pytest.mark.parametrize("policy", ["shuffled", "random", "shortgpt", "early_exit"])
def test_other_policies_run_as_many_blocks_as_the_routers(at, policy):
    made = study.labels_for(at, policy)
    assert made.shape == (32, 3)
    assert made.sum() == 32 * 3 - 25 + 2
    routers = study.labels_for(at, "router")
    assert not np.array_equal(made, routers)
    if policy == "shuffled":
        np.testing.assert_array_equal(np.sort(made, axis=1), np.sort(routers, axis=1))
    if policy == "early_exit":
        assert (np.diff(made, axis=1) <= 0).all()
    if policy == "shortgpt":
        assert len({tuple(row) for row in made.tolist()}) == 2
        assert (made[:, at.influence.argsort()[1:]].min(axis=0) == 1).all()


def test_no_block_is_left_out_where_routers_run_more_than_all(at):
    key = "labels", "residual", -0.5, "test"
    more = np.full((32, 3), 2, np.int32)
    other = study.Place(at.trial, 0, at.shared)
    other._held[key] = more
    assert (study.labels_for(other, "random") == 1).all()


def test_full_depth_counts_three_tokens_for_each_question(at):
    metrics, _ = study.outcome(at, at.full("test"), "test")
    assert metrics["executions"] == 3 * 3
    assert metrics["saved_layers_paper"] == metrics["saved_fraction"] == 0.0
    half = at.full("test")
    half[:16, 0] = 0
    metrics, _ = study.outcome(at, half, "test")
    assert metrics["saved_layers_paper"] == pytest.approx(3 * 0.5)
    assert metrics["saved_fraction"] == pytest.approx(0.5 / 3)


def test_bounds_are_at_least_the_model(at):
    """Enumeration sees the full path; a bound's accuracy is the share with some right path."""
    metrics, _ = study.bound(at, "")
    found = at.found("test")
    full = at.accuracy(at.full("test"), "test")
    assert metrics["accuracy"] == found.any.mean() >= full == found.default.mean()
    assert metrics["fixed"] == pytest.approx(metrics["accuracy"] - full)
    assert metrics["evaluations"] == SearchConfig().most_evaluations(3)


def test_counts_in_closed_form():
    made = EXPERIMENT.presets["paper"]().arms["full"].count()
    assert made["router_parameters"] == 28 * (128 * 3072 + 515)  # 11.0M, as in the paper
    made = EXPERIMENT.presets["cpu"]().arms["router"].count()
    assert made["paths_per_question"] == 222
    assert made["router_parameters"] == 8 * (128 * 64 + 515)
    assert plan_table(EXPERIMENT.presets["gpu"]().arms).row_count == 5


@pytest.mark.parametrize("preset", ["cpu", "cpu-long", "gpu", "paper"])
def test_arms_are_settings_that_can_be_set(preset):
    made = EXPERIMENT.presets[preset]()
    arm = next(iter(made.arms.values()))
    changed = arm.override(["training.gamma=0.5"])
    assert changed.settings["training.gamma"] == 0.5
    assert changed.settings["policy"] == "full"
    with pytest.raises(ValueError, match="training.gamma"):
        arm.override(["training.gama=0.5"])


def test_bad_input_is_named():
    trial = EXPERIMENT.presets["cpu"]().arms["full"].run.args[0]
    with pytest.raises(ValueError, match="policy = 'best'"):
        replace(trial, policy="best")
    with pytest.raises(ValueError, match="skips"):
        replace(trial, skips=(9,))
    with pytest.raises(ValueError, match="knobs"):
        replace(trial, knobs=(1.5,))
    with pytest.raises(ValueError, match="world.source"):
        EXPERIMENT.presets["paper"]().arms["full"].check()
    assert full_path(8) in SearchConfig().steps(8, 0).send(None)
