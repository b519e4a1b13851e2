"""Runs that start from a parent: what they start with, resuming, and refusals before anything is written."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.config import InitConfig, MeshConfig
from experiments.experiment import Preset
from experiments.initial import Parent, Source, check_source, open_source, pretrained_config, read_parent
from experiments.overrides import with_overrides
from experiments.recipes import smoke
from experiments.run import run_folder, select
from experiments.train import START, fit
from moe.pretrained.model import save
from moe.transformer import init_params
from moe.upcycle import upcycled_config
from parallel.mesh import make_mesh

SMOKE = with_overrides(smoke(), ["steps=3", "checkpoint_every=2", "eval_tokens_per_domain=64"])
DENSE = replace(SMOKE, model=replace(SMOKE.model, moe=None, ffn_dim=48))
GOES_ON = replace(DENSE, init=InitConfig("parent:dense"), data=replace(DENSE.data, domains=("chain-4", "chain-5")))
SPLIT = "split(shards=2)"
MOE = replace(
    GOES_ON,
    model=upcycled_config(DENSE.model, SPLIT, 8, 2, dispatcher="einsum"),  # which compiles faster
    init=InitConfig("parent:dense", SPLIT),
)
TIMES = {"step_ms", "tokens_per_second"}


def lines(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def kept(metrics: dict) -> dict:
    return {k: v for k, v in metrics.items() if k not in TIMES}


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    out = tmp_path_factory.mktemp("parent")
    fit(DENSE, out)
    return Parent(DENSE, out)


@pytest.fixture(scope="module")
def whole(parent, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return fit(MOE, out, parent=parent), out


@pytest.mark.slow
def test_an_upcycled_run_starts_where_its_parent_ended_and_says_so(whole):
    metrics = whole[0].metrics
    assert metrics["start_gap"] < 1e-5
    assert metrics["test_ce"] < metrics["start_test_ce"] - 0.02
    assert metrics["val_ce"] < metrics["start_val_ce"] - 0.02
    assert metrics["flops_per_token"] > 0
    assert json.loads((whole[1] / START).read_text()).keys() == {"start_val_ce", "start_test_ce", "start_gap"}


@pytest.mark.slow
def test_stopping_and_going_on_is_bitwise_the_same_and_needs_no_parent_any_more(whole, parent, tmp_path, monkeypatch):
    fit(MOE, tmp_path, steps=2, parent=parent)
    monkeypatch.setattr("experiments.initial.read_parent", lambda *_: pytest.fail("the parent was read again"))
    result = fit(MOE, tmp_path, parent=parent)
    assert lines(tmp_path) == lines(whole[1])
    assert kept(result.metrics) == kept(whole[0].metrics)


@pytest.mark.slow
def test_a_dense_run_goes_on_with_the_parents_parameters_and_a_fresh_optimiser(parent, tmp_path):
    mesh, source = make_mesh(1, 2, 1), open_source(replace(GOES_ON, mesh=MeshConfig(fsdp=2)), parent)
    assert source is not None
    with jax.set_mesh(mesh):
        params, state = source.read(mesh)
    assert state == {}
    assert len(params["runs_0"]["ffn"]["down"].sharding.device_set) == 2
    again = replace(GOES_ON, data=DENSE.data, seed=5)
    result = fit(again, tmp_path, parent=parent, steps=1)
    ended = fit(DENSE, parent.out).metrics  # trained already: evaluates
    assert result.metrics["start_test_ce"] == pytest.approx(ended["test_ce"], rel=1e-6)
    assert "start_gap" not in result.metrics
    assert lines(tmp_path)[0]["step"] == 1


@pytest.mark.slow
def test_on_a_mesh_it_starts_the_same(whole, parent, tmp_path):
    moved = replace(MOE, mesh=replace(MOE.mesh, data=2, expert=2))
    result = fit(moved, tmp_path, parent=parent)
    for got, expected in zip(lines(tmp_path), lines(whole[1]), strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert result.metrics["start_gap"] < 1e-5


@pytest.mark.slow
def test_a_checkpoint_of_another_parent_is_refused(whole, parent):
    other = Parent(replace(DENSE, steps=4), parent.out)
    with pytest.raises(ValueError, match=r"parent\.steps"):
        fit(MOE, whole[1], parent=other)


@pytest.mark.slow
def test_a_parent_that_is_not_finished_is_refused(parent, tmp_path):
    longer = replace(DENSE, checkpoint_every=1)
    fit(longer, tmp_path / "parent", steps=2)
    with pytest.raises(ValueError, match=r"parent steps = 2: expected 3, a finished parent"):
        fit(MOE, tmp_path / "out", parent=Parent(longer, tmp_path / "parent"))
    assert not (tmp_path / "out" / START).exists()


def test_the_first_leaf_that_does_not_fit_is_named():
    model = DENSE.model
    source = Source(model, lambda mesh: (None, None))
    check_source(replace(GOES_ON, model=replace(model, remat="full", context=99)), source)
    for changed, words in (
        (replace(model, ffn_dim=40), r"model\.ffn_dim = 40: expected 48"),
        (replace(model, rope_theta=5e5), r"model\.rope_theta = 500000\.0: expected 10000\.0"),
        (replace(SMOKE.model, ffn_dim=48), r"init\.source 'parent:dense': runs_0\..*\.shape = "),
    ):
        with pytest.raises(ValueError, match=words):
            check_source(replace(GOES_ON, model=changed), source)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["init.upcycle=copy"], "init.upcycle = 'copy': expected an init.source"),
        (["init.source=parent:"], "init.source = 'parent:': expected parent:NAME"),
        (["init.source=parent:a", "init.upcycle=melt"], "upcycle = 'melt': expected one of copy, split, drop"),
        (["init.source=parent:a", "init.upcycle=drop(ratio=2.0)"], "upcycle ratio = 2.0: expected above 0, at most 1"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        with_overrides(SMOKE, settings)
    with pytest.raises(ValueError, match="model.moe = None: expected MoE layers for init.upcycle = copy"):
        replace(DENSE, init=InitConfig("parent:a", "copy"))


def test_a_source_that_is_not_there_is_refused_and_nothing_is_written(parent, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"init.source = 'parent:dense': expected a preset with parents"):
        fit(GOES_ON, out)
    with pytest.raises(ValueError, match=r"moe\.router"):
        fit(with_overrides(MOE, ["model.moe.router=softmax_topk(renormalize=False)"]), out, parent=parent)
    assert not out.exists()


def test_a_preset_has_the_parents_its_arms_ask_for():
    preset = Preset({"a": GOES_ON, "b": SMOKE}, 1, (), parents={"dense": DENSE})
    with pytest.raises(ValueError, match=r"a: init\.source = 'parent:dense': expected a parent out of: none"):
        replace(preset, parents={})
    with pytest.raises(ValueError, match=r"parent dense: init\.source = 'parent:dense': expected no parent of its own"):
        replace(preset, parents={"dense": GOES_ON})
    assert select(preset, ["b"], [], None).parents == {}
    chosen = select(preset, ["a"], ["model.hidden=64", "mesh.data=2", "steps=9"], None)
    asked = chosen.parents["dense"]
    assert (asked.model.hidden, asked.mesh.data, asked.steps) == (64, 2, 3)
    assert chosen.arms["a"].steps == 9  # type: ignore[union-attr]
    assert run_folder(Path("out"), "parent:dense", 1) == Path("out/parents/dense-seed1")


def test_other_models_with_experts_are_parents_too():
    """A source of the same kind is taken as it is, its routers' state included."""
    config = replace(MOE, init=InitConfig("parent:moe"))
    config = with_overrides(config, ["model.moe.router=loss_free"])
    check_source(config, Source(config.model, lambda mesh: (None, None)))
    plain = Source(MOE.model, lambda mesh: (None, None))
    with pytest.raises(ValueError, match=r"init\.source 'parent:moe': bias\.shape = None: expected \(2, 8\)"):
        check_source(config, plain)
    assert open_source(SMOKE, None) is None
    shapes = jax.eval_shape(lambda key: init_params(MOE.model, key), jax.random.key(0))
    assert np.prod(shapes["runs_0"]["moe"]["experts"]["down"].shape) == 2 * 8 * 24 * 32


@pytest.mark.slow
def test_a_released_model_is_upcycled_trained_and_saved_as_another_family(parent, tmp_path):
    """A Llama checkpoint in, a Mixtral checkpoint out, which scores what the run scored."""
    dense = replace(DENSE.model, context=64)
    mesh = make_mesh(1, 1, 1)
    with jax.set_mesh(mesh):
        params, _ = read_parent(parent, mesh)
    save(tmp_path / "llama", dense, params, {}, family="llama")
    config = replace(
        MOE, model=upcycled_config(dense, "copy", 4, 2, dispatcher="einsum"), steps=2,
        init=InitConfig(str(tmp_path / "llama"), "copy"), optimizer=replace(MOE.optimizer, warmup_steps=1),
    )  # fmt: skip
    result = fit(config, tmp_path / "out")
    assert result.metrics["start_gap"] < 1e-5
    assert result.metrics["test_ce"] < result.metrics["start_test_ce"]
    with jax.set_mesh(mesh):
        trained, state = read_parent(Parent(config, tmp_path / "out"), mesh)
    save(tmp_path / "mixtral", config.model, trained, state, family="mixtral")
    again = replace(config, init=InitConfig(str(tmp_path / "mixtral")))
    scores = fit(again, tmp_path / "again", steps=1).metrics
    assert scores["start_test_ce"] == pytest.approx(result.metrics["test_ce"], rel=1e-6)
    assert "start_gap" not in scores
    next((tmp_path / "llama").glob("*.safetensors")).unlink()
    pretrained_config.cache_clear()
    with pytest.raises(ValueError, match="llama"):
        fit(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()
