"""Searches: budgets, resuming, meshes, what each method does on sources that are known; the arms around them."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from experiments import recipes
from experiments.config import MeshConfig
from experiments.experiment import load, preset_of
from experiments.overrides import with_overrides
from experiments.run import run as run_preset
from experiments.scalebio import search as searching
from experiments.scalebio import study
from experiments.scalebio.experiment import EXPERIMENT
from experiments.scalebio.search import balanced, search
from experiments.scalebio.study import Trial, agreement, check, cleanliness, count, mixture
from parallel.mesh import make_mesh

SMOKE = recipes.smoke()
RUN = replace(
    SMOKE, model=replace(SMOKE.model, moe=None, ffn_dim=48), steps=2,
    data=replace(SMOKE.data, corpus="noised(base='synthetic')", seq_len=16), eval_tokens_per_domain=64,
    checkpoint_every=0,
)  # fmt: skip
SEARCHES = ["scalebio()", "scalebio(layers=1, update_gap=2)", "released(layers=1, update_gap=2)", "f2sa()", "soba()",
            "doremi()", "doge()", "rho()", "influence()"]  # fmt: skip


def quiet(step, note):
    pass


def searched(trial, out, devices=1, progress=None):
    sources, validation = trial.corpora()
    method = trial.made(study.tokens_of(sources))
    return search(method, trial.run, sources, validation, make_mesh(data=devices), out, {}, progress)


@pytest.mark.parametrize("spec", SEARCHES)
def test_a_method_stays_within_the_budget_and_uses_it(spec):
    for budget in (30.0, 100.0, 900.0):
        method = Trial(spec, RUN, budget).made([1] * 4)
        spent = method.steps * method.passes
        assert 0.85 * budget <= spent <= budget * (1 + 1e-9), (spec, budget, spent)


@pytest.mark.parametrize(("spec", "weights"), [
    ("uniform()", [0.25] * 4), ("proportional()", [0.4, 0.3, 0.2, 0.1]), ("only(source=2)", [0, 0, 1, 0]),
])  # fmt: skip
def test_fixed_weights_cost_nothing(spec, weights):
    method = Trial(spec, RUN, 30.0).made([4, 3, 2, 1])
    np.testing.assert_allclose(method.weights(()), weights, rtol=1e-6)
    assert method.steps == 0


def test_batches_have_as_many_of_each_source_in_every_pass_and_are_functions_of_the_step():
    trial = Trial(run=replace(RUN, batch_size=16))
    at = balanced(trial.corpora()[0], trial.run)
    one, again, other = at(3), at(3), at(4)
    assert one["domain"].reshape(4, 4).tolist() == [[0, 1, 2, 3]] * 4
    np.testing.assert_array_equal(one["tokens"], again["tokens"])
    assert (one["tokens"] != other["tokens"]).any()


def interrupted(trial, out, at):
    """Stopped by Ctrl-C after `at` steps, then finished."""
    with pytest.raises(KeyboardInterrupt, match=f"after step {at + 1}"):
        searched(trial, out, progress=lambda step, _: os.kill(os.getpid(), signal.SIGINT) if step == at else None)
    return searched(trial, out)


@pytest.mark.parametrize("spec", ["scalebio(layers=1, update_gap=2)", "doremi()", "influence()"])
@pytest.mark.slow
def test_a_search_goes_on_bit_by_bit_after_ctrl_c(spec, tmp_path):
    trial = Trial(spec, RUN, budget=24.0)
    weights, at, path = searched(trial, tmp_path / "whole")
    assert weights.shape == (4,)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    assert (weights >= 0).all()
    assert len(at) == len(path)
    if "influence" not in spec:  # shares of few samples may be equal
        assert np.ptp(weights) > 0
    again, _, path_again = interrupted(trial, tmp_path / "cut", 3)
    np.testing.assert_array_equal(again, weights)
    np.testing.assert_array_equal(path_again, path)


@pytest.mark.slow
def test_one_and_eight_devices_find_the_same(tmp_path):
    trial = Trial("scalebio(layers=1, update_gap=2)", replace(RUN, batch_size=16), budget=18.0)
    one, eight = searched(trial, tmp_path / "1"), searched(trial, tmp_path / "8", devices=8)
    assert np.ptp(one[0]) > 1e-3
    np.testing.assert_allclose(one[0], eight[0], atol=2e-4)


@pytest.mark.slow
def test_passes_are_one_batch(tmp_path):
    trial = Trial("scalebio()", replace(RUN, batch_size=16), budget=18.0)
    one = searched(trial, tmp_path / "1")
    four = searched(replace(trial, run=replace(trial.run, accumulation=4)), tmp_path / "4")
    np.testing.assert_allclose(one[0], four[0], atol=2e-4)


@pytest.mark.slow
def test_weight_goes_to_the_clean_source(tmp_path):
    """Chains that a table of bigrams knows; half of the dirty source's tokens are noise."""
    data = replace(RUN.data, corpus="noised(base='synthetic', levels=(0.0, 0.9))")
    trial = Trial("scalebio(alpha=10.0, lam_rate=0.05)", replace(RUN, data=data), budget=450.0)
    weights, _, _ = searched(trial, tmp_path)
    assert weights[0] > 0.55, weights


@pytest.mark.slow
def test_an_arm_searches_trains_and_is_taken_up_again(tmp_path, monkeypatch):
    trial = Trial("scalebio(layers=1, update_gap=2)", RUN, budget=12.0)
    told = []
    metrics, series = study.run(trial, 0, tmp_path, lambda step, note: told.append(step))
    assert told == sorted(told)
    assert told[-1] == trial.steps == 14
    assert set(metrics) == {"val_ce", "test_ce", "passes", "p_clean", "kendall_tau"}
    assert metrics["passes"] == 14
    assert metrics["p_clean"] == pytest.approx(series["weights"][0], abs=1e-5)
    assert series["domains"] == ["clean", "noise-30", "noise-60", "noise-90"]
    monkeypatch.setattr(searching, "one_step", None)  # nothing is searched for again
    again, _ = study.run(trial, 0, tmp_path, quiet)
    assert again["test_ce"] == metrics["test_ce"]
    with pytest.raises(ValueError, match="expected a search of the same settings and data"):
        study.run(replace(trial, budget=15.0), 0, tmp_path, quiet)


def test_a_target_is_validation_and_test_and_no_source(tmp_path):
    data = replace(RUN.data, corpus="synthetic", domains=("chain-0", "chain-1", "chain-2"))
    trial = Trial("uniform()", replace(RUN, data=data), target="chain-1")
    sources, validation = trial.corpora()
    assert (sources.domains, validation.domains) == (("chain-0", "chain-2"), ("chain-1",))
    mixed = mixture(trial, sources, np.array([0.3, 0.7]))
    assert (mixed.domains, mixed.weights) == (("chain-0", "chain-1", "chain-2"), (0.3, 0.0, 0.7))
    metrics, series = study.run(trial, 0, tmp_path, quiet)
    assert series["domains"] == ["chain-0", "chain-2"]
    assert "p_clean" not in metrics
    assert metrics["test_ce"] != metrics["val_ce"]


@pytest.mark.parametrize(("name", "clean"), [("clean", 1.0), ("noise-30", 0.7), ("noise-12.5", 0.875)])
def test_cleanliness_is_in_the_name(name, clean):
    assert cleanliness(name) == pytest.approx(clean)


def test_other_names_say_nothing():
    assert np.isnan(cleanliness("legal"))


@pytest.mark.parametrize(("weights", "tau"), [
    ([0.25] * 4, 0.0), ([0.7, 0.2, 0.08, 0.02], 1.0), ([0.1, 0.2, 0.3, 0.4], -1.0), ([0.5, 0.2, 0.1, 0.15], 2 / 3),
])  # fmt: skip
def test_agreement_is_kendalls_tau(weights, tau):
    """Pairs in order less pairs out of order, over all six."""
    assert agreement(np.array(weights), [1.0, 0.7, 0.4, 0.1]) == pytest.approx(tau)


@pytest.mark.parametrize(("change", "field"), [
    ({"method": "nothing()"}, "method"), ({"method": "scalebio(beta=1)"}, "method"),
    ({"method": "scalebio(alpha=-1.0)"}, "alpha"), ({"method": "scalebio(layers=3)"}, "active"),
    ({"method": "only(source=4)"}, "method: source"), ({"budget": 0.0}, "budget"), ({"target": "moon"}, "target"),
    ({"budget": 2.0}, "budget"), ({"method": "scalebio(lam_rate=-0.1)"}, "lam_rate"),
    ({"method": "rho(share=2.0)"}, "share"),
    ({"run": with_overrides(RUN, ["reweighting.strategy=lin_upper"])}, "run.reweighting.strategy"),
    ({"run": with_overrides(RUN, ["data.weights=1,0,0,0"])}, "run.data.weights"),
    ({"run": with_overrides(RUN, ["model.vocab_size=32"])}, "model.vocab_size"),
    ({"run": replace(RUN, batch_size=6)}, "run.batch_size"),
    ({"run": replace(RUN, model=SMOKE.model)}, "run.model.moe"),
    ({"run": replace(RUN, data=replace(RUN.data, domains=("clean",)))}, "run.data.domains"),
    ({"run": replace(RUN, data=replace(RUN.data, seq_len=100_000), eval_tokens_per_domain=100_000)}, "data.seq_len"),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_is_made(change, field):
    with pytest.raises(ValueError, match=rf"{field} = "):
        check(replace(Trial("scalebio()", RUN), **change))


def test_settings_reach_the_fresh_model_and_the_search():
    changed = with_overrides(Trial("scalebio()", RUN, budget=30.0), ["budget=60", "run.steps=5"])
    assert (changed.budget, changed.run.steps, changed.steps) == (60.0, 5, 65)
    longer = with_overrides(Trial("uniform()", RUN, budget=30.0, longer=True), ["budget=60"])
    assert (longer.steps, longer.fresh_steps) == (62, 62)


def test_search_state_is_counted_per_device():
    trial = Trial("scalebio()", RUN)
    whole = count(trial)["search_state_bytes_per_device"]
    parameters = count(trial)["parameters"]
    assert abs(whole - 2 * 12 * parameters) < 400
    lisa = count(replace(trial, method="scalebio(layers=1)"))["search_state_bytes_per_device"]
    assert lisa < whole
    split = replace(RUN, mesh=MeshConfig(fsdp=4))
    assert count(replace(trial, run=split))["search_state_bytes_per_device"] < 0.4 * whole
    assert "search_steps" not in count(replace(trial, method="uniform()"))


def test_presets_name_arms_that_their_claims_compare():
    for name in EXPERIMENT.presets:
        preset = preset_of(load("scalebio"), name)
        for claim in preset.claims:
            assert set(claim.arms) <= set(preset.arms), (name, claim)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smoke", "smollm2", "gpu", "paper"])
def test_presets_are_counted(name):
    for arm in preset_of(load("scalebio"), name).arms.values():
        assert all(value > 0 for value in arm.count().values())


@pytest.mark.slow
def test_smoke_ends_in_a_table_and_a_figure(tmp_path):
    content = run_preset("scalebio", "smoke", tmp_path / "out", console=Console(quiet=True))
    assert (tmp_path / "out/figure.png").stat().st_size > 10_000
    spent = {name: of["passes"]["mean"] for name, of in content["arms"].items()}
    assert all(value <= 13 for value in spent.values())
    assert spent["uniform"] == 4


@pytest.mark.slow
def test_on_quadratics_the_claims_hold(tmp_path):
    content = run_preset("scalebio", "quadratic", tmp_path / "out", console=Console(quiet=True))
    assert content["verdict"] == "holds"
    assert (tmp_path / "out/figure.png").stat().st_size > 10_000
    assert content["arms"]["penalty"]["outer_gap"]["mean"] < 1e-2

