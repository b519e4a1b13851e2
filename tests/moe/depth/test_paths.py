"""Labels and paths are two writings of one thing; edits keep the order; executions are counted both ways."""

from itertools import product

import pytest

from moe.depth.paths import (
    check_labels,
    check_path,
    count_executions,
    edits,
    full_path,
    labels_of,
    neighbourhood,
    path_of,
)


def test_labels_and_paths_are_inverse():
    for labels in product((0, 1, 2), repeat=4):
        path = path_of(labels)
        assert list(path) == [layer for layer in range(4) for _ in range(labels[layer])]
        assert labels_of(path, 4) == labels


def test_edits_are_the_papers_actions():
    assert set(edits((0, 1, 2))) == {(1, 2), (0, 2), (0, 1), (2,), (0,), (0, 0, 1, 2), (0, 1, 1, 2), (0, 1, 2, 2)}
    assert set(edits((1, 1))) == {(1,), ()}  # a repeated block is not repeated again
    assert edits(()) == ()


def test_neighbourhoods_grow_to_all_label_vectors():
    assert neighbourhood(3, 0) == ((0, 1, 2),)
    one = neighbourhood(3, 1)
    assert set(one) == {full_path(3), *edits(full_path(3))}
    assert len(one) == 9
    two = {new for old in one for new in edits(old)} | set(one)
    assert set(neighbourhood(3, 2)) == two
    everything = neighbourhood(3, 6)
    assert set(everything) == {path_of(labels) for labels in product((0, 1, 2), repeat=3)}
    assert len(everything) == 27
    assert max(map(len, everything)) == 6


def test_executions_are_counted_both_ways():
    """Three tokens of 4 layers and one of 2, of 4: the paper's number moves with the tokens, the fraction does not."""
    counted = count_executions([4, 2], [3, 1], 4)
    assert counted == (7.0, 8.0, 14 / 16)
    assert count_executions([3, 3], [2, 2], 4).fraction == count_executions([3, 3], [50, 70], 4).fraction == 0.75


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_path((1, 0), 2), r"path = \(1, 0\): expected layers in the order"),
        (lambda: check_path((0, 2), 2), "expected layers 0 to 1"),
        (lambda: check_path((-1, 0), 2), "expected layers 0 to 1"),
        (lambda: check_path((0, 0, 0, 1, 1), 2), "at most 2L = 4"),
        (lambda: labels_of((0, 0, 0), 2), "no layer more than twice"),
        (lambda: check_labels([0, 1, 3], 3), r"labels = \[3\]"),
        (lambda: check_labels([0.5, 1, 1], 3), r"labels = \[0.5\]"),
        (lambda: check_labels([0, 1], 3), r"labels shape = \(2,\): expected \[..., L = 3\]"),
        (lambda: path_of([[1, 1], [1, 1]]), "labels shape"),
        (lambda: neighbourhood(3, -1), "max_edits = -1"),
        (lambda: count_executions([], [], 3), "lengths, tokens"),
        (lambda: count_executions([1], [1, 2], 3), "lengths, tokens"),
        (lambda: count_executions([7], [1], 3), "lengths = "),
        (lambda: count_executions([3], [0], 3), "tokens = "),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
