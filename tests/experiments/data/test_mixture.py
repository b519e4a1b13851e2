"""A mixture is a function of the seed and of the weights set at each batch, and a state is all of it."""

import json

import grain
import numpy as np
import pytest

from experiments.data.mixture import Mixture, independent, inverse_cdf, stratified
from experiments.data.pipeline import batch_at, domain_datasets, make_dataset
from experiments.data.synthetic import synthetic_corpus

SEQ, BATCH, SOURCES = 16, 8, 4
CORPUS = synthetic_corpus(num_domains=SOURCES)
P = np.array([0.4, 0.3, 0.2, 0.1])
KEY = np.array([3, 5], np.uint64)
DRAWS = ("independent", "stratified")


def mixture(seed=0, batch=BATCH, **options):
    return Mixture(domain_datasets(CORPUS, "train", SEQ, 0), batch, seed, **options)


def equal(one, other):
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def naive_source(p, u):
    """The definition, one sample at a time."""
    total = 0.0
    for k, share in enumerate(p):
        total += share
        if u < total:
            return k
    raise AssertionError


@pytest.mark.parametrize("draw", DRAWS)
def test_batches_and_their_windows(draw):
    feed = mixture(weights=P, draw=draw)
    assert isinstance(feed, grain.DatasetIterator)
    sources = domain_datasets(CORPUS, "train", SEQ, 0)
    taken = [0] * SOURCES
    for _ in range(20):
        batch = next(feed)
        assert set(batch) == {"tokens", "segment_ids", "positions", "domain"}
        assert batch["domain"].shape == (BATCH,)
        assert batch["tokens"].shape == batch["positions"].shape == batch["segment_ids"].shape == (BATCH, SEQ + 1)
        assert all(leaf.dtype == np.int32 for leaf in batch.values())
        for row, k in enumerate(batch["domain"]):  # each source's windows in its own order, none left out
            expected = sources[k][taken[k]]
            taken[k] += 1
            for name in ("tokens", "segment_ids", "positions"):
                np.testing.assert_array_equal(batch[name][row], expected[name])
    assert feed.get_state() == {"position": 160, "counters": taken, "weights": P.tolist()}


def test_a_draw_is_the_inverse_of_one_uniform_per_sample():
    u = [np.random.Generator(np.random.Philox(key=KEY, counter=n)).random() for n in range(4000)]
    found = independent(P, KEY, 0, 4000)
    assert found.tolist() == [naive_source(P, x) for x in u]
    np.testing.assert_array_equal(np.concatenate([independent(P, KEY, 0, 37), independent(P, KEY, 37, 3963)]), found)
    assert np.abs(np.bincount(found) / 4000 - P).max() < 4 * np.sqrt(0.25 / 4000)
    moved = P + np.array([0.01, -0.01, 0, 0])
    assert 0 < np.mean(independent(moved, KEY, 0, 4000) != found) < 0.02
    assert np.mean(independent(P, KEY + np.uint64(1), 0, 4000) == found) < 0.5


@pytest.mark.parametrize("size", [4, 7, 8, 64])
def test_stratified_batches_have_every_source_in_proportion(size):
    rng = np.random.default_rng(0)
    for p in (P, np.full(4, 0.25), *rng.dirichlet(np.full(4, 0.5), 20)):
        batches = [stratified(p, KEY, start, size) for start in range(0, 50 * size, size)]
        for batch in batches:
            counts = np.bincount(batch, minlength=4)
            assert np.all(counts >= np.floor(size * p - 1e-9))
            assert np.all(counts <= np.ceil(size * p + 1e-9))
        shares = np.bincount(np.concatenate(batches), minlength=4) / (50 * size)
        assert np.abs(shares - p).max() < 5 * 0.5 / size / np.sqrt(50)  # not always the same ones are rounded up
    assert any(np.any(np.diff(batch) < 0) for batch in batches)  # processes get all sources


def test_points_on_a_bound_fall_to_no_source_of_weight_zero():
    points = np.array([0.0, 0.25, 0.5, np.nextafter(1.0, 0.0)])
    assert inverse_cdf(np.array([0.0, 0.5, 0.0, 0.5, 0.0]), points).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("draw", DRAWS)
def test_weight_zero_is_never_drawn(draw):
    feed = mixture(weights=(0, 2, 0, 0), draw=draw)
    assert all(np.all(next(feed)["domain"] == 1) for _ in range(20))
    feed.set_weights((1, 0, 1, 0))
    seen = np.concatenate([next(feed)["domain"] for _ in range(20)])
    assert set(seen.tolist()) == {0, 2}


@pytest.mark.parametrize("draw", DRAWS)
def test_equal_seeds_and_weights_give_equal_batches(draw):
    one, other, third = mixture(draw=draw), mixture(draw=draw), mixture(seed=1, draw=draw)
    different = 0
    for step in range(10):
        for feed in (one, other, third):
            feed.set_weights(np.roll(P, step // 3))
        batch = next(one)
        equal(batch, next(other))
        different += np.any(batch["domain"] != next(third)["domain"])
    assert different > 5


@pytest.mark.parametrize("draw", DRAWS)
def test_a_state_is_all_of_it(draw):
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(SOURCES), 12) * rng.uniform(0.1, 10, (12, 1))  # of no particular sum
    feed = mixture(draw=draw, weights=weights[0])
    states, seen = [], []
    for given in weights:
        states.append(json.dumps(feed.get_state()))  # before the weights are set: the old ones are in it
        seen.append(next(feed))
        feed.set_weights(given)
    for start in (0, 1, 5, 11):
        again = mixture(draw=draw)
        again.set_state(json.loads(states[start]))
        assert again.get_state() == json.loads(states[start])
        for step in range(start, 12):
            equal(next(again), seen[step])
            again.set_weights(weights[step])


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_share_out_a_batch(draw, processes):
    whole = mixture(draw=draw, weights=P)
    parts = [mixture(draw=draw, weights=P, process_index=i, process_count=processes) for i in range(processes)]
    for _ in range(5):
        batch, local = next(whole), [next(part) for part in parts]
        equal(batch, {name: np.concatenate([rows[name] for rows in local]) for name in batch})
    assert all(part.get_state() == whole.get_state() for part in parts)


def test_one_source_is_the_dataset_of_its_own():
    feed = Mixture(domain_datasets(synthetic_corpus(num_domains=1), "train", SEQ, 3), BATCH, seed=9)
    source = domain_datasets(synthetic_corpus(num_domains=1), "train", SEQ, 3)[0]
    for step in range(3):
        equal(next(feed), batch_at(source, step * BATCH, BATCH))


def test_it_has_the_windows_of_a_run():
    """The first pass over a source is the same set of windows that `make_dataset` reads, in the same order but for the
    reach of a shuffle run."""
    feed, run = mixture(batch=64, weights=(1, 0, 0, 0)), make_dataset(CORPUS, "train", SEQ, 0, (1, 0, 0, 0))
    count = 1024
    ours = np.concatenate([next(feed)["tokens"] for _ in range(count // 64)])
    theirs = batch_at(run, 0, count)["tokens"]
    assert sorted(row.tobytes() for row in ours) == sorted(row.tobytes() for row in theirs)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1, 1, 1), r"weights = \[1.0, 1.0, 1.0\]: expected 4 numbers"),
        ((1, 1, 1, -1), "weights = .*: expected finite numbers, 0 or more and not all 0"),
        ((1, 1, 1, float("nan")), "weights = .*: expected finite"),
        ((1, 1, 1, float("inf")), "weights = .*: expected finite"),
        ((0, 0, 0, 0), "weights = .*: expected finite numbers, 0 or more and not all 0"),
    ],
)
def test_bad_weights_change_nothing(weights, message):
    feed, other = mixture(weights=P), mixture(weights=P)
    with pytest.raises(ValueError, match=message):
        feed.set_weights(weights)
    with pytest.raises(ValueError, match=message):
        feed.set_state(feed.get_state() | {"weights": weights})
    equal(next(feed), next(other))
    with pytest.raises(ValueError, match=message):
        mixture(weights=weights)


def test_other_bad_input():
    with pytest.raises(ValueError, match=r"draw = 'random': expected one of independent, stratified"):
        mixture(draw="random")
    with pytest.raises(ValueError, match=r"batch_size = 3: expected at least the 4 sources"):
        mixture(batch=3, draw="stratified")
    assert next(mixture(batch=3))["domain"].shape == (3,)
    with pytest.raises(ValueError, match=r"batch_size = 8: expected divisible by the 3 processes"):
        mixture(process_count=3)
    with pytest.raises(ValueError, match=r"sources = 0"):
        Mixture([], 8, 0)
    with pytest.raises(ValueError, match=r"sources\[1\] = 0: expected samples"):
        Mixture([domain_datasets(CORPUS, "train", SEQ, 0)[0], grain.MapDataset.source([])], 8, 0)
    feed = mixture()
    state = feed.get_state()
    for wrong in ({"counters": [0, 0]}, {"position": 8}, {"counters": [1, -1, 0, 0]}):
        with pytest.raises(ValueError, match="state: counters"):
            feed.set_state(state | wrong)
    with pytest.raises(ValueError, match=r"state = \['position'\]"):
        feed.set_state({"position": 0})
    feed.close()
    with pytest.raises(ValueError, match="closed"):
        next(feed)
