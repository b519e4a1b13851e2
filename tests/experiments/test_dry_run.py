"""Every preset lowers on a simulated mesh of its own size; counts in closed form."""

import functools
from dataclasses import replace

import pytest

from experiments import dry_run as module
from experiments.bench.shape import StepShape
from experiments.dry_run import abstract_state, parameter_counts
from experiments.experiment import load, names, trained
from experiments.recipes import PRESETS, cluster
from moe.routing import make_router

dry_run = functools.cache(module.dry_run)
EXPERIMENTS = {name: load(name) for name in [*names(), "template"]}


@pytest.mark.parametrize("name", PRESETS)
def test_every_recipe_lowers(name):
    config = PRESETS[name]()
    counts = dry_run(config)
    assert counts["devices"] == config.mesh.devices
    assert 0 < counts["active_parameters"] <= counts["parameters"]


@pytest.mark.parametrize(
    ("name", "preset"), [(name, preset) for name in EXPERIMENTS for preset in EXPERIMENTS[name].presets]
)
def test_every_preset_of_every_experiment_lowers(name, preset):
    """One arm per model, mesh and accumulation is lowered: the balance loss changes no shape."""
    made = EXPERIMENTS[name].presets[preset]()
    assert made.arms
    assert made.seeds >= 1
    distinct = {}
    for arm, config in trained(made).items():
        same = replace(config, steps=1, seed=0, balance=replace(config.balance, weight=0.0, scope="none"))
        distinct.setdefault(same, arm)
        if config.model.moe is not None:
            make_router(config.model.moe)
    for arm in distinct.values():
        counts = dry_run(trained(made)[arm])
        assert counts["devices"] == trained(made)[arm].mesh.devices
        assert 0 < counts["active_parameters"] <= counts["parameters"]
    for claim in made.claims:
        assert set(claim.arms) <= made.arms.keys()


def test_the_paper_preset_is_as_large_as_the_paper_says():
    """global-batch-lbl: 3.4B parameters on 64 devices."""
    config = EXPERIMENTS["global-batch-lbl"].presets["paper"]().arms["global"]
    state, _ = abstract_state(config)
    total, active = parameter_counts(state.params, config.model)
    assert 3.3e9 < total < 3.5e9
    assert 0.4e9 < active < 0.6e9
    assert config.mesh.devices == 64


def test_bench_counts_are_the_arithmetic_of_its_shape():
    d, layers, experts, width, vocab = 256, 4, 16, 256, 1024
    attention, router, expert = 4 * d * d, d * experts, 3 * d * width
    norms = 2 * d + 2 * 64  # before attention and FFN; of queries and keys per head
    total = layers * (attention + router + experts * expert + norms) + d + 2 * vocab * d
    active = layers * (attention + router + 2 * expert + norms) + d + vocab * d
    config = StepShape().run_config()
    state, _ = abstract_state(config)
    assert parameter_counts(state.params, config.model) == (total, active)


def test_sharding_divides_what_a_device_holds():
    """cluster(): experts over expert x fsdp = 32 devices, so a device holds close to 1/32 of the parameters."""
    counts = dry_run(cluster())
    share = counts["parameter_bytes_per_device"] / (4 * counts["parameters"])
    assert 1 / 32 <= share < 1.05 / 32
