"""What a result file leaves out when it would grow beyond its limit, and in which order."""

import json

import numpy as np
import pytest

from experiments.series import LIMIT, busiest_layer, maps_of_busiest_layer, size, within_limit

LAYERS, DOMAINS, EXPERTS = 3, 9, 16


def one(seed: int, points: int = 200, layers: int = LAYERS, experts: int = EXPERTS) -> dict:
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.ones(experts), (layers, DOMAINS)).round(4)
    curves = {name: rng.random(points).round(5).tolist() for name in ("loss", "balance_loss", "max_violation")}
    mi = (0.01 * rng.random(layers)).round(5)
    mi[1] = 0.5
    return {
        "domains": [f"domain-{i}" for i in range(DOMAINS)],
        "domain_ce": rng.random(DOMAINS).round(5).tolist(),
        "domain_expert": share.tolist(),
        "layer_mi": mi.tolist(),
        "loss_steps": [float(i + 1) for i in range(points)],
        **curves,
    }


def many(arms: int, seeds: int, **shape) -> dict:
    return {f"arm{a}": [one(100 * a + s, **shape) for s in range(seeds)] for a in range(arms)}


def test_what_fits_is_left_alone():
    series = many(3, 2)
    assert size(series) < LIMIT
    assert within_limit(series) is series


def test_curves_are_thinned_first_and_keep_their_last_point():
    series = many(11, 2)
    cut = within_limit(series)
    assert size(cut) <= LIMIT
    for arm, runs in series.items():
        for before, after in zip(runs, cut[arm]):
            assert after["domain_expert"] == before["domain_expert"]
            assert after["loss_steps"] == before["loss_steps"][1::2]
            assert after["loss"] == before["loss"][1::2]
            assert after["loss_steps"][-1] == 200.0


def test_eleven_arms_of_five_seeds_fit():
    """The long preset: later seeds lose their heat maps, every run keeps its curves, seed 0 all its layers."""
    series = many(11, 5)
    cut = within_limit(series)
    assert size(cut) <= LIMIT
    for arm, runs in cut.items():
        assert ["domain_expert" in run for run in runs] == [True, False, False, False, False]
        assert runs[0]["domain_expert"] == series[arm][0]["domain_expert"]
        assert all(len(run["loss"]) == len(run["loss_steps"]) >= 25 for run in runs)
        assert [run["layer_mi"] for run in runs] == [run["layer_mi"] for run in series[arm]]


def test_twenty_layers_of_sixty_four_experts_keep_the_busiest_layer():
    """The paper's shape: the figure still finds its layer under the same index."""
    series = many(3, 1, layers=20, experts=64)
    cut = within_limit(series)
    assert size(cut) <= LIMIT
    layer = busiest_layer(cut)
    assert layer == busiest_layer(series) == 1
    for arm, runs in cut.items():
        maps = runs[0]["domain_expert"]
        assert maps[layer] == series[arm][0]["domain_expert"][layer]
        assert [m is None for m in maps] == [i != layer for i in range(20)]


def test_lists_that_happen_to_be_as_long_as_a_curve_are_not_thinned():
    series = {"a": [one(0, points=DOMAINS) | {"domain_ce": [1.0] * DOMAINS}]}
    cut = within_limit(series, limit=size(series) - 1)["a"][0]
    assert len(cut["loss"]) == 5
    assert cut["domain_ce"] == [1.0] * DOMAINS
    assert len(cut["domains"]) == DOMAINS


def test_curves_of_an_odd_length_keep_their_last_point_too():
    cut = within_limit(series := {"a": [one(0, points=11)]}, limit=size(series) - 1)["a"][0]
    assert cut["loss_steps"] == [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]


def test_the_busiest_layer_is_that_of_all_arms_and_seeds_together():
    runs = {"a": [{"layer_mi": [0.0, 0.3, 0.2]}, {"layer_mi": [0.0, 0.1, 0.3]}], "b": [{"layer_mi": [0.3, 0.1, 0.2]}]}
    assert busiest_layer(runs) == 2


def test_what_cannot_be_thinned_is_refused_with_its_size():
    series = {"a": [{"loss_steps": [], "own": [[0.5] * 1000] * 100}]}
    with pytest.raises(ValueError, match=f"series = {len(json.dumps(series))}"):
        within_limit(series)


def test_a_dense_arm_beside_routed_ones_does_not_keep_all_their_maps():
    routed = {"layer_mi": [0.1, 0.3], "domain_expert": [[[1.0, 0.0]], [[0.5, 0.5]]]}
    series = {"dense": [{"loss": [1.0]}], "moe": [routed]}
    assert busiest_layer(series) == 1
    assert maps_of_busiest_layer(series)["moe"][0]["domain_expert"] == [None, [[0.5, 0.5]]]
