"""The experiment end to end: policies at equal executions, interrupts, counts."""

import json
import os
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.dr_llm import arithmetic, study
from experiments.dr_llm.experiment import EXPERIMENT
from experiments.dr_llm.supervision import SearchConfig, Supervision
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


@pytest.mark.slow
def test_smoke_runs_and_goes_on_after_interrupts(tmp_path, monkeypatch):
    """Ctrl-C in the base's training and between chunks of a search: the same numbers, nothing done twice."""
    whole = quiet(tmp_path / "whole")
    assert (tmp_path / "whole/figure.png").stat().st_size > 10_000
    read = json.loads((tmp_path / "whole/result.json").read_text())  # after 20 steps nothing is known: all is dropped
    assert read["series"]["full"][0]["dropped"] == ["right"]
    assert np.isnan([read["arms"]["router"][key]["mean"] for key in ("change_right", "other_tasks_change")]).all()
    assert np.isnan(read["arms"]["full"]["accuracy_right"]["mean"])
    assert {one["metric"]: one["verdict"] for one in read["claim"]}["other_tasks_change"] == "does not hold"
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


def test_kinds_that_the_base_does_not_know_are_dropped_and_named(at, monkeypatch):
    """Known is 5 points above the commonest answer on validation questions, at full depth."""
    world = replace(at.trial.world, others=("right", "long"))
    other = study.Place(replace(at.trial, world=world), 0, at.shared)
    other.base, asked = at.base, []

    class Given(arithmetic.Examiner):
        def right(self, labels):
            assert labels.shape == (32, 3) and (labels == 1).all()  # noqa: PT018
            asked.append(self.quiz)
            most = round(self.quiz.majority * 32)
            return np.arange(32) < most + (2 if len(asked) == 1 else 1)  # 32 questions: 6.25 and 3.1 points

    monkeypatch.setattr(arithmetic, "Examiner", Given)
    assert other.others == ("right",)
    for kind, given in zip(world.others, asked, strict=True):
        np.testing.assert_array_equal(given.prompts, arithmetic.quiz("validation", 0, kind, 32).prompts)
    monkeypatch.setattr(study, "place", lambda *_: other)
    full = replace(other.trial, policy="full")
    metrics, series = study.run(full, 0, at.shared / "arm", lambda done, note: None)
    assert (series["used"], series["dropped"]) == (["left"], ["long"])
    assert set(series["accuracy_and_majority"]) == {"right", "long"}
    assert np.isfinite(metrics["accuracy_right"])
    assert np.isnan(metrics["accuracy_long"])


def test_another_model_at_the_same_place_has_pieces_of_its_own(at, monkeypatch, tmp_path):
    folders = []
    monkeypatch.setattr(study, "searched", lambda *args: folders.append(args[4].name))
    monkeypatch.setattr(study, "save_routers", lambda folder, *_: folders.append(folder.stem))
    monkeypatch.setattr(study, "train_routers", lambda *_: None)
    monkeypatch.setattr(study, "load_routers", lambda *_, **__: (None, None))
    changed = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].add(1), at.base.params)
    other_norm = replace(at.base.config, norm_eps=1e-3)
    for base in (at.base, at.base._replace(params=changed), at.base._replace(config=other_norm), at.base):
        place = study.Place(at.trial, 0, tmp_path / f"{len(folders)}" / "shared-seed0")
        place.base, place.taught = base, Supervision(np.arange(1), np.ones((1, 3), np.int32), np.ones(1, bool))
        place.found("search")
        place.routers("residual")
    found = list(zip(folders[::2], folders[1::2], strict=True))
    assert found[0] == found[3]
    for names in zip(*found[:3], strict=True):
        assert len(set(names)) == 3


def test_one_process_alone(at, monkeypatch):
    study.check(at.trial)
    monkeypatch.setattr(study.jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="processes = 2"):
        study.study(at.trial).check()


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
    with pytest.raises(ValueError, match="search.kind = 'released'"):
        replace(trial, search=SearchConfig("released"))
    with pytest.raises(ValueError, match="world.source"):
        EXPERIMENT.presets["paper"]().arms["full"].check()
    assert full_path(8) in SearchConfig().steps(8, 0).send(None)
