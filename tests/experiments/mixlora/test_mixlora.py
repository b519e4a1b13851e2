"""The mixlora experiment: equal sizes, what is shared and resumed, which tasks count, and the paper's sizes."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from experiments import finetune, recipes
from experiments.experiment import Study, studies
from experiments.finetune import answered
from experiments.mixlora.experiment import EXPERIMENT, arms, main_methods, other_methods, tuning
from experiments.mixlora.study import Trial, run, study
from experiments.mixlora.worlds import Packaged, Symbolic
from experiments.run import run as run_preset
from experiments.tasks import symbolic
from experiments.train import read_lines
from moe.lora import presets
from moe.lora.adapters import parameter_count

PRESETS = EXPERIMENT.presets
SMALL = Symbolic(tasks=("copy", "reverse"), digits=4, pretraining_steps=4, pretraining_batch=8, test_rows=16)
WORLD = replace(SMALL, model=replace(SMALL.model, hidden=32, num_layers=2, head_dim=8, ffn_dim=48))
TRIAL = Trial(presets.mixlora(1, 2.0), presets.lora(5, 10.0), 0.01, WORLD, tuning(3e-3, 3, 8), margin=-1.0)
QUIET = lambda step, note: None  # noqa: E731


LATER = ("cpu-long", "gpu", "paper")  # long to lower


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LATER else n for n in PRESETS])
@pytest.mark.slow_after(1)
def test_every_preset_lowers_and_its_methods_are_of_one_size(name):
    """A method once, whatever its rate and loss. MixDoRA is a fifth smaller: a magnitude for each expert and output."""
    made = PRESETS[name]()
    for claim in made.claims:
        assert set(claim.arms) <= made.arms.keys()
    distinct: dict[str, tuple[str, Study]] = {}
    for arm, one in studies(made).items():
        assert one.steps > 0
        assert json.loads(json.dumps(one.settings)) == dict(one.settings)
        shapes = {key: value for key, value in one.settings.items() if key.startswith(("adapters", "world"))}
        distinct.setdefault(json.dumps(shapes), (arm, one))
    groups: dict[str, dict[str, int]] = {}
    for arm, one in distinct.values():
        assert one.count is not None
        counts = one.count()
        assert counts["adapter_bytes"] == 4 * counts["trainable_parameters"]
        assert 0 < counts["trainable_parameters"] < counts["frozen_parameters"]
        if "mixdora" not in arm:
            groups.setdefault("smollm2" if "smollm2" in arm else "", {})[arm] = counts["trainable_parameters"]
    for sizes in groups.values():
        wanted = next(size for arm, size in sizes.items() if "mixlora" in arm)
        assert all(abs(size - wanted) <= 0.1 * wanted for size in sizes.values())


def test_the_papers_model_has_the_papers_number_of_parameters():
    """LLaMA2-7B: 202M and 200M in adapters (sheet, measured), besides MixLoRA's routers."""
    config = PRESETS["paper"]().arms["lora"].settings
    shape = recipes.dense_shape(4096, 32, 32, 32, 11_008, 32_000)
    assert config["world.model.hidden"] == 4096
    maps = 32 * (4 * 8192 + 8 * 3 * 15_104) * 16
    assert parameter_count(shape, presets.mixlora()) == maps + 32 * 4096 * 8
    assert parameter_count(shape, presets.lora()) == 32 * (4 * 8192 + 3 * 15_104) * 80
    assert config["adapters.rank"] in (80, 81)
    assert (config["adapters.dropout"], config["tuning.optimizer.learning_rate"]) == (0.05, 2e-4)


@pytest.mark.slow
def test_pieces_are_shared_kept_and_the_same_after_ctrl_c(tmp_path):
    whole = run(TRIAL, 0, tmp_path / "a" / "mixlora", QUIET)
    shared = tmp_path / "a" / "shared-seed0"
    assert len(list(shared.iterdir())) == 1 + 2 + 3  # the base; the reference alone; the method alone and together
    stamps = {path: path.stat().st_mtime_ns for path in shared.rglob("_CHECKPOINT_METADATA")}
    assert len(stamps) == 6
    lora = replace(TRIAL, adapters=TRIAL.reference, balance_weight=0.0)
    told = []
    metrics, _ = run(lora, 0, tmp_path / "a" / "lora", lambda step, note: told.append((step, note)))
    assert len(list(shared.iterdir())) == 7  # only LoRA on both was missing
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert "max_violation" not in metrics
    assert [step for step, note in told if "copy + reverse" in note] == [13, 14, 15, 16, 17, 18]
    assert [step for step, _ in told] == sorted(step for step, _ in told)
    assert study(lora).steps == 18

    def stop(step, note):
        if "copy + reverse" in note and step == 14:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(TRIAL, 0, tmp_path / "b" / "mixlora", stop)
    again = run(TRIAL, 0, tmp_path / "b" / "mixlora", QUIET)
    assert again == whole
    both = [sorted(path.name for path in (tmp_path / name / "shared-seed0").iterdir()) for name in "ab"]
    assert set(both[1]) < set(both[0])


@pytest.mark.slow
def test_a_task_that_is_not_learnt_is_left_out_and_named(tmp_path, monkeypatch):
    real = Symbolic.scored

    def scored(self, base, adapters, tree, task, split, seed):
        found = real(self, base, adapters, tree, task, split, seed)
        return found._replace(accuracy=0.5 if task == "reverse" else 0.0)

    monkeypatch.setattr(Symbolic, "scored", scored)
    metrics, series = run(replace(TRIAL, margin=0.05), 0, tmp_path / "arm", QUIET)
    assert (metrics["tasks_used"], metrics["single_accuracy"], metrics["multi_accuracy"]) == (1.0, 0.5, 0.5)
    assert (series["dropped"], series["single"], series["multi"]) == (["copy"], [None, 0.5], [None, 0.5])
    assert len(series["validation"]["majority"]) == 2
    with pytest.raises(ValueError, match=r"^world.tasks = .*one that is learnt"):
        run(replace(TRIAL, margin=0.6), 0, tmp_path / "arm", QUIET)


def test_the_same_examples_alone_and_together():
    one, all_ = (WORLD.batches(names, 3, 4) for names in (["reverse"], ["copy", "reverse"]))
    together = np.concatenate([all_(step).tokens[all_(step).task == 1] for step in range(4)])
    assert np.array_equal(np.concatenate([one(step).tokens for step in range(2)]), together)


@pytest.mark.slow
def test_the_base_learns_what_it_is_pretrained_on_and_no_task(tmp_path):
    world = replace(SMALL, pretraining_steps=150, pretraining_batch=32, test_rows=64)
    base = world.base(0, tmp_path / "base", QUIET)
    again = world.base(0, tmp_path / "base", QUIET)
    assert all(np.array_equal(a, b) for a, b in zip(*(np.asarray(m.params["embedding"]) for m in (base, again))))
    rows = symbolic.batch("test", 0, ["successor"], 0, 64, world.digits)
    known = answered(base, None, None, rows, 64)
    asked = answered(base, None, None, symbolic.batch("test", 0, ["reverse"], 0, 64, world.digits), 64)
    guessing = world.digits * np.log(10)
    assert known.nats.mean() < 0.95 * guessing < asked.nats.mean()
    assert asked.right.mean() < 0.1


@pytest.mark.parametrize(("world", "named"), [
    (Symbolic(tasks=("paste",)), "world.tasks = 'paste'"),
    (Packaged(tasks=("chain-sum",)), "world.tasks = 'chain-sum'"),
    (Packaged(tasks=("sarcasm",), source=""), "world.source = ''")])  # fmt: skip
def test_a_world_that_is_not_there_is_refused_first(world, named):
    with pytest.raises(ValueError, match=named):
        study(replace(TRIAL, world=world)).check()


def test_settings_are_set(tmp_path):
    one = study(TRIAL).override
    assert one is not None
    changed = one(["tuning.steps=5", "world.test_rows=8", "adapters.alpha=4"])
    assert changed.steps == 3 * 5 * 2
    assert changed.settings["world.test_rows"] == 8
    with pytest.raises(ValueError, match="--set = 'nothing'"):
        one(["nothing=1"])


def test_sizes_are_equal_on_the_model_that_is_set_too(monkeypatch):
    """Grouped queries and a wide feed-forward, unlike what ranks were matched on when the preset was made."""
    shape = recipes.dense_shape(1024, 2, 16, 2, 8192, 1000)
    monkeypatch.setattr(finetune, "pretrained_config", lambda source: shape)
    size = parameter_count(shape, presets.mixlora(16, 32.0))
    ranks = {}
    for name in ("lora", "mixlora", "dora"):
        arm = PRESETS["gpu"]().arms[name]
        assert isinstance(arm, Study)
        assert arm.override is not None
        settings = arm.override(["world.source=there"]).settings
        ranks[name] = settings["adapters.rank"], arm.settings["adapters.rank"]
        assert settings["adapters.alpha"] == 2 * settings["adapters.rank"]
        assert parameter_count(shape, presets.lora(settings["reference.rank"])) == pytest.approx(size, rel=0.02)
        assert arm.override(["world.source=there", "adapters.rank=3"]).settings["adapters.rank"] == 3
    assert ranks["mixlora"] == (16, 16)
    assert ranks["lora"][0] != ranks["lora"][1]
    for name in ("lora", "dora"):
        made = getattr(presets, name)(ranks[name][0])
        assert parameter_count(shape, made) == pytest.approx(size, rel=0.02)


@pytest.mark.slow
def test_smoke_ends_in_a_table_and_a_figure(tmp_path):
    content = run_preset("mixlora", "smoke", tmp_path / "out", console=Console(quiet=True))
    assert (tmp_path / "out" / "figure.png").stat().st_size > 10_000
    assert set(content["arms"]) == set(main_methods())
    assert all(claim["verdict"] for claim in content["claim"])
    assert "single_accuracy" not in content["arms"]["mixlora_no_aux"]
    for arm in (content["arms"][name] for name in ("lora", "mixlora")):
        drop = arm["single_accuracy"]["mean"] - arm["multi_accuracy"]["mean"]
        assert arm["multi_task_drop"]["mean"] == pytest.approx(drop)
    lines = [read_lines(path) for path in (tmp_path / "out/runs/shared-seed0").rglob("metrics.jsonl")]
    assert {len(rows) for rows in lines} == {3, 6, 8}  # one task, both, the base


def test_methods_are_those_that_are_named():
    made = arms(Symbolic(), 2, tuning(3e-3, 1, 8), main_methods() | other_methods())
    assert set(made) == {"lora", "mixlora", "mixlora_no_aux", "dora", "mixdora", "loramoe", "mola", "hydralora"}
    assert made["mixlora"].settings["balance_weight"] == 0.01
    without = dict(made["mixlora"].settings) | {"balance_weight": 0.0, "alone": False}
    assert made["mixlora_no_aux"].settings == without
    assert 3 * made["mixlora_no_aux"].steps == 2 * made["mixlora"].steps
