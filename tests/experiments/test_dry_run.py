"""Every preset lowers on a simulated mesh of its own size; counts in closed form."""

import functools
from dataclasses import replace

import pytest

from experiments import dry_run as module
from experiments.bench.shape import StepShape
from experiments.config import InitConfig, ReweightingConfig
from experiments.dry_run import abstract_state, parameter_counts
from experiments.experiment import load, names, trained
from experiments.recipes import PRESETS, cluster

dry_run = functools.cache(module.dry_run)
EXPERIMENTS = {name: load(name) for name in [*names(), "template"]}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.slow_after(2)
def test_every_recipe_lowers(name):
    config = PRESETS[name]()
    counts = dry_run(config)
    assert counts["devices"] == config.mesh.devices
    assert 0 < counts["active_parameters"] <= counts["parameters"]


PRESETS_OF_ALL = [(name, preset) for name in EXPERIMENTS for preset in EXPERIMENTS[name].presets]


def lower_distinct(name, preset, alike):
    """Lowers one arm of each kind: `alike(config)` leaves out what changes no shape."""
    made = EXPERIMENTS[name].presets[preset]()
    assert made.arms
    assert made.seeds >= 1
    distinct = {}
    for arm, config in trained(made).items():
        quiet = replace(config.balance, weight=0.0, scope="none")
        rate = replace(config.optimizer, learning_rate=1.0)
        same = replace(config, steps=1, seed=0, init=InitConfig(), balance=quiet, optimizer=rate)
        distinct.setdefault(alike(same), arm)
    for arm in distinct.values():
        counts = dry_run(trained(made)[arm])
        assert counts["devices"] == trained(made)[arm].mesh.devices
        assert 0 < counts["active_parameters"] <= counts["parameters"]
    for claim in made.claims:
        assert set(claim.arms) <= made.arms.keys()


def any_router(config):
    """And any weights of samples."""
    moe, config = config.model.moe, replace(config, reweighting=ReweightingConfig())
    if moe is None:
        return config
    plain = replace(moe, router="softmax_topk", policy="dropless", allow_noncausal=False)
    return replace(config, model=replace(config.model, moe=plain))


LATER = [  # as the others, and long to lower
    *(("upcycling", preset) for preset in ("cpu", "gpu", "paper")),
    *(("frugal", preset) for preset in ("cpu-long", "moe", "smollm2", "gpu", "paper")),
]
SOON = [one for one in PRESETS_OF_ALL if one not in LATER]


@pytest.mark.parametrize(("name", "preset"), SOON)
@pytest.mark.slow_after(3)
def test_every_preset_lowers(name, preset):
    """One arm per shape of model, mesh and accumulation; the slow suite lowers every router and score, and LATER."""
    lower_distinct(name, preset, any_router)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "preset"), PRESETS_OF_ALL)
def test_every_arm_of_every_preset_lowers(name, preset):
    lower_distinct(name, preset, lambda config: config)


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
