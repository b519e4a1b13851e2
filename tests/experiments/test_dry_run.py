"""Every preset lowers on a simulated mesh of its own size; counts in closed form."""

import pytest

from experiments.dry_run import abstract_state, dry_run, parameter_counts
from experiments.recipes import PRESETS, bench, cluster


@pytest.mark.parametrize("name", PRESETS)
def test_every_recipe_lowers(name):
    config = PRESETS[name]()
    counts = dry_run(config)
    assert counts["devices"] == config.mesh.devices
    assert 0 < counts["active_parameters"] <= counts["parameters"]


def test_bench_counts_are_the_arithmetic_of_its_shape():
    d, layers, experts, width, vocab = 256, 4, 16, 256, 1024
    attention, router, expert, norms = 4 * d * d, d * experts, 3 * d * width, 2 * d
    total = layers * (attention + router + experts * expert + norms) + d + 2 * vocab * d
    active = layers * (attention + router + 2 * expert + norms) + d + vocab * d
    state, _ = abstract_state(bench())
    assert parameter_counts(state.params, bench().model) == (total, active)


def test_sharding_divides_what_a_device_holds():
    """cluster(): experts over expert x fsdp = 32 devices, so a device holds close to 1/32 of the parameters."""
    counts = dry_run(cluster())
    share = counts["parameter_bytes_per_device"] / (4 * counts["parameters"])
    assert 1 / 32 <= share < 1.05 / 32
