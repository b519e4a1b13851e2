"""The shared runner around a `fit` that trains nothing: order, resuming, refusals, and what result.json holds."""

import errno
import json
import math
import os
import platform
import socket
import sys
from dataclasses import replace
from types import ModuleType

import pytest
from rich.console import Console

from experiments import recipes
from experiments import run as runner
from experiments.claims import Claim
from experiments.data.synthetic import synthetic_corpus
from experiments.experiment import Experiment, Preset
from experiments.output import write_json
from experiments.run import run
from experiments.train import FitResult

NAME = "fake_package.study"
WEIGHTS = {"low": 0.1, "mid": 0.2, "high": 0.3}


def claim(arm: str, baseline: str) -> Claim:
    return Claim(f"{arm} over {baseline}", "val_ce", arm, baseline, "difference", "higher", 0.05, "0.1 in the paper")


def smoke() -> Preset:
    base = replace(recipes.smoke(), steps=3, eval_tokens_per_domain=64)
    arms = {name: replace(base, balance=replace(base.balance, weight=weight)) for name, weight in WEIGHTS.items()}
    return Preset(arms, seeds=2, claims=(claim("high", "low"), claim("mid", "low")))


def draw(content, path):
    path.write_text(content["verdict"])


class FakeFit:
    """Writes a folder as the real one does, returns numbers that depend on the arm and the seed."""

    def __init__(self, points=4):
        self.calls, self.failing, self.points, self.seen = [], None, points, []

    def __call__(self, config, out, *, steps=None, progress=None, loggers=(), profile=None):
        arm = next(name for name, weight in WEIGHTS.items() if weight == config.balance.weight)
        self.calls.append((arm, config.seed))
        self.seen.append((loggers, profile))
        assert out.name == f"{arm}-seed{config.seed}"
        out.mkdir(parents=True, exist_ok=True)
        for step in range(1, config.steps + 1):
            progress(step, config.steps, {"loss": 1.0})
        if self.failing == len(self.calls):
            raise KeyboardInterrupt("stopped after step 3; the state is saved")
        curve = [float(i) for i in range(self.points)]
        series = {"loss_steps": curve, "loss": curve, "domains": ["a", "b"], "layer_mi": [0.5, 0.25]}
        return FitResult({"val_ce": config.balance.weight + config.seed, "step_ms": 5.0}, series)


@pytest.fixture
def fit(monkeypatch):
    module = ModuleType(NAME)
    module.EXPERIMENT = Experiment("study", "A study", "none", {"smoke": smoke}, draw)
    monkeypatch.setitem(sys.modules, "fake_package", ModuleType("fake_package"))
    monkeypatch.setitem(sys.modules, NAME, module)
    fake = FakeFit()
    monkeypatch.setattr(runner, "fit", fake)
    return fake


def quiet(out, **more):
    return run(NAME, "smoke", out, console=Console(quiet=True), **more)


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


EVERY = [(arm, seed) for seed in (0, 1) for arm in WEIGHTS]


def test_seeds_are_the_outer_loop_and_everything_is_passed_on(fit, tmp_path):
    quiet(tmp_path / "out", loggers=("tensorboard",), profile=(2, 3))
    assert fit.calls == EVERY
    assert set(fit.seen) == {(("tensorboard",), (2, 3))}
    assert (tmp_path / "out" / "figure.png").read_text() == "holds"


def test_result_has_what_report_and_figures_read(fit, tmp_path):
    out = tmp_path / "out"
    content = quiet(out)
    assert json.loads((out / "result.json").read_text()) == content
    assert list(content) == ["experiment", "preset", "claim", "arms", "verdict", "provenance", "series"]
    assert (content["experiment"], content["preset"], content["verdict"]) == ("study", "smoke", "holds")
    assert list(content["arms"]) == list(WEIGHTS)
    mid = content["arms"]["mid"]["val_ce"]
    assert mid == {"mean": pytest.approx(0.7), "std": pytest.approx(math.sqrt(0.5)), "values": [0.2, 1.2]}
    first = content["claim"][0]
    assert (first["metric"], first["compared"], first["claimed"]) == ("val_ce", "high - low", ">= 0.05")
    assert (first["paper"], first["verdict"]) == ("0.1 in the paper", "holds")
    assert first["measured"]["values"] == pytest.approx([0.2, 0.2])
    assert [len(runs) for runs in content["series"].values()] == [2, 2, 2]
    made = content["provenance"]
    wanted = {"commit", "date", "python", "packages", "hardware", "corpus_hash", "seeds", "wall_seconds", "config"}
    assert wanted <= made.keys()
    assert made["corpus_hash"] == synthetic_corpus().content_hash
    assert made["config"]["high"]["balance.weight"] == 0.3


def test_result_names_no_path_of_the_machine_and_no_host(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "secret-host")
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    monkeypatch.setattr(runner, "open_corpus", lambda config: synthetic_corpus())
    corpus = tmp_path / "home" / "my-corpus"
    quiet(tmp_path / "out", settings=(f"data.corpus={corpus}",))
    text = (tmp_path / "out" / "result.json").read_text()
    for hidden in (str(tmp_path), str(runner.Path(runner.__file__).parents[1]), "secret-host"):
        assert hidden not in text
    assert json.loads(text)["provenance"]["config"]["low"]["data.corpus"] == "my-corpus"


def test_names_of_models_and_folders_stay_and_their_places_do_not(tmp_path):
    settings = {
        "init.source": "parent:dense", "world.source": str(tmp_path / "llama"), "world.model.source_of": "a/b",
        "folders": [str(tmp_path / "one"), str(tmp_path / "two")], "data.corpus": "packaged", "source": "",
        "rival": None,
    }  # fmt: skip
    changed = {"world.source": "llama", "folders": ["one", "two"]}
    assert runner.without_places(settings) == settings | changed


def test_repeating_the_command_trains_nothing_again(fit, tmp_path):
    first = quiet(tmp_path / "out")
    again = quiet(tmp_path / "out")
    assert fit.calls == EVERY
    assert {k: v for k, v in again.items() if k != "provenance"} == {
        k: v for k, v in first.items() if k != "provenance"
    }


def test_ctrl_c_in_the_middle_then_the_same_call_completes(fit, tmp_path):
    fit.failing = 3
    with pytest.raises(KeyboardInterrupt, match="saved"):
        quiet(tmp_path / "out")
    assert not (tmp_path / "out" / "result.json").exists()
    content = quiet(tmp_path / "out")
    assert fit.calls == [*EVERY[:3], *EVERY[2:]]  # the run that was cut short is handed to fit again, the others not
    assert content["arms"]["high"]["val_ce"]["values"] == [0.3, 1.3]


def test_provenance_is_that_of_the_training(fit, tmp_path, monkeypatch):
    """Time counts what was interrupted and not what a repeated command waits; the commit is the one that trained."""
    monkeypatch.setattr("experiments.run.git_commit", lambda: "first")
    fit.failing = 3
    with pytest.raises(KeyboardInterrupt):
        quiet(tmp_path / "out")
    spent = json.loads((tmp_path / "out" / runner.WALL).read_text())["wall_seconds"]
    assert spent > 0
    write_json(tmp_path / "out" / runner.WALL, {"wall_seconds": 3600.0})
    made = quiet(tmp_path / "out")["provenance"]
    assert made["wall_seconds"] == pytest.approx(3600.0, abs=60)
    assert made["commit"] == "first"
    monkeypatch.setattr("experiments.run.git_commit", lambda: "second")
    assert quiet(tmp_path / "out")["provenance"]["commit"] == "first"
    assert quiet(tmp_path / "out", seeds=3)["provenance"]["commit"] == "first second"


def test_more_seeds_reuse_what_is_finished(fit, tmp_path):
    quiet(tmp_path / "out", seeds=1)
    assert fit.calls == EVERY[:3]
    content = quiet(tmp_path / "out", seeds=3)
    assert fit.calls == [*EVERY, *((arm, 2) for arm in WEIGHTS)]
    assert content["provenance"]["seeds"] == 3
    assert content["arms"]["low"]["val_ce"]["values"] == [0.1, 1.1, 2.1]


def test_a_subset_of_arms_drops_the_claims_it_cannot_judge(fit, tmp_path):
    content = quiet(tmp_path / "two", arms=("low", "mid"))
    assert {arm for arm, _ in fit.calls} == {"low", "mid"}
    assert [row["compared"] for row in content["claim"]] == ["mid - low"]
    content = quiet(tmp_path / "one", arms=("low",))
    assert (content["claim"], content["verdict"]) == ([], "no claim judged")


def test_another_mesh_may_go_on_other_settings_may_not(fit, tmp_path):
    out = tmp_path / "out"
    quiet(out)
    quiet(out, settings=("mesh.data=2", "checkpoint_every=1"))
    before = files(out)
    with pytest.raises(ValueError, match=r"--out = .*low\.steps: 3 there, 4 asked for"):
        quiet(out, settings=("steps=4",))
    with pytest.raises(ValueError, match=r"--out = .*model\.moe\.expert_dim"):
        quiet(out, settings=("model.moe.expert_dim=16",))
    assert files(out) == before
    assert fit.calls == EVERY


def test_the_same_folder_with_other_text_is_another_corpus(fit, tmp_path, monkeypatch):
    quiet(tmp_path / "out")
    monkeypatch.setattr(runner, "open_corpus", lambda config: synthetic_corpus(seed=1))
    with pytest.raises(ValueError, match=r"--out = .*low\.corpus_hash"):
        quiet(tmp_path / "out")


def test_a_manifest_that_is_no_json_is_named(fit, tmp_path):
    (tmp_path / runner.MANIFEST).write_text('{"half')
    with pytest.raises(ValueError, match="--out = .*readable manifest"):
        quiet(tmp_path)


def test_a_foreign_directory_is_left_alone(fit, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"--out = .*thesis\.tex"):
        quiet(tmp_path)
    assert files(tmp_path) == ["thesis.tex"]
    assert fit.calls == []


@pytest.mark.parametrize("below", [(), ("deeper",), ("deeper", "still")])
def test_out_that_is_a_file_or_below_one_is_refused(fit, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="--out = .*director"):
        quiet(tmp_path.joinpath("file", *below))
    assert (tmp_path / "file").read_text() == "mine"
    assert fit.calls == []


@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_is_noticed_before_training_and_leaves_nothing(fit, tmp_path, monkeypatch, there):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "a" / "b"
    if there:
        out.mkdir(parents=True)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="--out = .*No space left"):
        quiet(out)
    assert files(tmp_path) == before
    assert fit.calls == []


def test_what_does_not_exist_lists_what_does(fit, tmp_path):
    out, console = tmp_path / "out", Console(quiet=True)
    with pytest.raises(ValueError, match="experiment = 'nope': expected one of .*global-batch-lbl"):
        run("nope", "smoke", out, console=console)
    with pytest.raises(ValueError, match=r"experiment = 'no\.such\.module'"):
        run("no.such.module", "smoke", out, console=console)
    with pytest.raises(ValueError, match="preset = 'tiny': expected one of smoke"):
        run(NAME, "tiny", out, console=console)
    with pytest.raises(ValueError, match="arm = 'best': expected one of low, mid, high"):
        quiet(out, arms=("low", "best"))
    with pytest.raises(ValueError, match="seeds = 0"):
        quiet(out, seeds=0)
    assert not out.exists()


def test_what_an_experiment_fails_to_import_is_not_called_a_missing_experiment(fit, tmp_path, monkeypatch):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "broken.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_package_anywhere"):
        run("pack.broken", "smoke", tmp_path / "out", console=Console(quiet=True))


def test_long_curves_are_thinned_to_the_limit_and_the_rest_is_kept(fit, tmp_path):
    fit.points = 4096
    content = quiet(tmp_path / "out")
    assert len(json.dumps(content["series"])) <= 200_000
    one = content["series"]["mid"][1]
    assert len(one["loss"]) == len(one["loss_steps"]) >= 32
    assert one["loss_steps"][-1] == 4095.0
    assert (one["domains"], one["layer_mi"]) == (["a", "b"], [0.5, 0.25])
    stored = json.loads((tmp_path / "out/runs/mid-seed1/result.json").read_text())
    assert len(stored["series"]["loss"]) == 4096


def test_bad_settings_are_refused_before_anything_is_written(fit, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="log = 'printer'"):
        quiet(out, loggers=("printer",))
    for setting, words in (
        ("model.vocab_size=16", r"model\.vocab_size = 16"),
        ("model.moe.router=no.such:router", r"moe\.router"),
        ("optimizer.name=no.such:optimizer", r"optimizer\.name"),
        ("mesh.data=3", "batch_size = 8"),
    ):
        with pytest.raises(ValueError, match=words):
            quiet(out, settings=(setting,))
    with pytest.raises(ValueError, match="expected at most 8 devices"):
        quiet(out, settings=("mesh.data=16", "batch_size=16"))
    assert not out.exists()
