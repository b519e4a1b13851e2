"""Baselines by their definitions."""

import itertools

import numpy as np
import pytest

from moe.depth.static import (
    block_influence,
    early_exit,
    least_influence,
    majority_path,
    random_skip,
    shuffled_labels,
)


def test_random_skip_leaves_out_as_many_blocks_evenly():
    paths = [random_skip(6, 2, seed) for seed in range(300)]
    assert all(len(path) == 4 and list(path) == sorted(set(path)) for path in paths)
    skipped = np.bincount([layer for path in paths for layer in set(range(6)) - set(path)], minlength=6)
    assert abs(skipped - 100).max() < 40
    assert random_skip(6, 2, 5) == random_skip(6, 2, 5)


def test_shuffled_labels_keep_each_questions_counts():
    labels = np.random.default_rng(0).choice(3, (50, 8), p=[0.2, 0.7, 0.1])
    shuffled = shuffled_labels(labels, 1)
    np.testing.assert_array_equal(np.sort(shuffled, axis=1), np.sort(labels, axis=1))
    assert (shuffled != labels).any(axis=1).mean() > 0.5
    assert len({tuple(np.argsort(row, kind="stable")) for row in shuffled}) > 10  # rows apart


def test_majority_path():
    labels = np.array([[0, 1, 2, 0], [0, 1, 2, 1], [1, 1, 2, 2], [1, 0, 0, 2]])
    assert majority_path(labels) == (0, 1, 2, 2, 3, 3)
    assert majority_path(np.array([[0, 2]])) == (1, 1)


def test_early_exit():
    assert early_exit(4, 2) == (0, 1)
    assert early_exit(4, 0) == ()


def test_influence_is_one_minus_the_cosine_of_a_blocks_ends(any_model, tokens):
    lengths = np.array([12, 5, 9, 1])
    got = block_influence(any_model.config, any_model.params, any_model.router_state, tokens, lengths)
    stream = [np.asarray(x, np.float64) for x in any_model.stream(tokens, (0, 1, 2))]
    real = np.arange(12)[None] < lengths[:, None]
    for layer, (a, b) in enumerate(itertools.pairwise(stream)):
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        np.testing.assert_allclose(got[layer], (1 - cosine[real]).mean(), atol=1e-5)


def test_blocks_of_the_least_influence_go_first():
    assert least_influence([0.3, 0.1, 0.2, 0.5], 2) == (0, 3)
    assert least_influence([0.3, 0.1, 0.2, 0.5], 0) == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_skip(3, 4, 0), "skipped = 4"),
        (lambda: least_influence([0.1, 0.2], 3), "skipped = 3"),
        (lambda: early_exit(3, 4), "executed = 4"),
        (lambda: majority_path(np.zeros((0, 3), int)), "labels shape"),
        (lambda: majority_path(np.array([[1, 4]])), r"labels = \[4\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
