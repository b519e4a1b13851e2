"""Searches against each other and against rules written out, on rewards that are functions of the path."""

import itertools
import math
import random

import pytest

from moe.depth import search as searches
from moe.depth.paths import edits, full_path, labels_of, neighbourhood
from moe.depth.search import Node, correct, exhaustive, released_chain, score, search, search_all, uct

L = 5


def rewarding(*paths):
    """1 for these paths, 0 for others; notes what it was asked."""
    asked = []

    def evaluate(batch):
        asked.extend(batch)
        return [float(path in paths) for path in batch]

    return evaluate, asked


def nodes(root):
    yield root
    for child in root.children:
        yield from nodes(child)


def random_rewards(seed, num_layers, share, default):
    def evaluate(paths):
        return [
            float(random.Random(f"{seed} {path}").random() < share) if path != full_path(num_layers) else default
            for path in paths
        ]

    return evaluate


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("default", [0.0, 1.0])
def test_with_the_budget_of_enumeration_uct_finds_its_shortest_correct_path(seed, default):
    evaluate = random_rewards(seed, L, 0.1, default)
    want = search(exhaustive(L, 2), evaluate)
    size = len(want.rewards)
    got = search(uct(L, budget=size - 1, seed=seed, max_edits=2, stop_at_first=False), evaluate)
    assert got.rewards == want.rewards
    assert want.best is not None
    assert len(got.best) == len(want.best)
    assert correct(got.rewards[got.best])
    assert len(got.best) == min(len(path) for path, reward in want.rewards.items() if reward == 1.0)
    more = search(uct(L, budget=10 * size, seed=seed, max_edits=2, stop_at_first=False), evaluate)
    assert more.rewards == want.rewards  # the space is exhausted, not searched again


def test_questions_share_the_space_they_may_try(monkeypatch):
    made = []
    monkeypatch.setattr(searches, "neighbourhood", lambda *sizes: made.append(sizes) or neighbourhood(*sizes))
    searches._space.cache_clear()
    for seed in range(3):
        search(uct(6, budget=5, seed=seed, max_edits=2), rewarding()[0])
    assert made == [(6, 2)]


def test_the_whole_space_is_reached_without_a_bound_on_edits():
    got = search(uct(3, budget=1000, stop_at_first=False), rewarding()[0])
    assert set(got.rewards) == {
        tuple(layer for layer in range(3) for _ in range(labels[layer]))
        for labels in itertools.product((0, 1, 2), repeat=3)
    }


@pytest.mark.parametrize("kind", [uct, released_chain])
@pytest.mark.parametrize("seed", range(5))
def test_visits_are_own_evaluations_and_the_childrens(kind, seed):
    result = search(kind(12, budget=60, seed=seed), random_rewards(seed, 12, 0.0, 0.0))
    for node in nodes(result.root):
        assert node.visits == node.own + sum(child.visits for child in node.children)
        assert node.own >= 1
        assert len(node.path) <= 24
        assert list(node.path) == sorted(node.path)


def test_uct_has_a_tree_and_the_released_search_a_chain():
    nothing = rewarding()[0]
    tree = list(nodes(search(uct(28, budget=50), nothing).root))
    assert len(tree) == 51
    assert len({node.path for node in tree}) == 51
    assert sum(len(node.children) > 1 for node in tree) >= 5
    assert max(depth_of(node) for node in tree) >= 3
    chain = list(nodes(search(released_chain(28, budget=105), nothing).root))
    assert [len(node.children) for node in chain] == [1] * (len(chain) - 1) + [0]
    assert len(chain) > 50


def depth_of(node):
    return 0 if node.parent is None else 1 + depth_of(node.parent)


def test_every_child_is_one_action_from_its_parent():
    for node in nodes(search(uct(8, budget=80), rewarding()[0]).root):
        for child in node.children:
            assert child.path in edits(node.path)
            labels_of(child.path, 8)


def test_the_score_is_the_papers():
    root = Node((0, 1, 2, 3), visits=9, own=1)
    child = Node((0, 1, 3), root, visits=4, rewards=3.0)
    want = 3.0 / 4 + 1.8 * math.sqrt(math.log(9) / 4) - 3.0 * 3 / 4
    assert math.isclose(score(child, 1.8, 3.0 / 4), want)


def test_scores_steer_the_search():
    """Rewards of paths that repeat a block draw visits to them; exploration spreads visits; lambda decides lengths."""

    def evaluate(paths):
        return [0.5 if len(set(path)) < len(path) else 0.0 for path in paths]

    def share(**options):
        root = search(uct(8, budget=120, seed=3, length_weight=0.0, random_child=0.0, **options), evaluate).root
        return sum(child.visits for child in root.children if len(child.path) > 8) / root.visits

    assert share(exploration=0.2) > 0.8
    assert share(exploration=50.0) < 0.5

    def mean_length(length_weight):
        rewards = search(uct(8, budget=120, length_weight=length_weight), rewarding()[0]).rewards
        return sum(map(len, rewards)) / len(rewards)

    assert mean_length(30.0) + 2 < mean_length(-30.0)


def test_a_wrong_default_stops_at_the_first_correct_path():
    one_edit = neighbourhood(L, 1)[1:]
    evaluate, asked = rewarding(*one_edit)
    result = search(uct(L, budget=50), evaluate)
    assert len(asked) == 2
    assert result.best == asked[1]
    assert not result.default_correct


def test_a_correct_default_is_searched_for_shorter_paths():
    shorter = (0, 1, 4)
    evaluate, asked = rewarding(full_path(L), (0, 1, 2, 4), shorter)
    result = search(uct(L, budget=400, max_edits=2), evaluate)
    assert result.default_correct
    assert result.best == shorter
    assert len(asked) == len(set(asked)) > 10


def test_nothing_correct_is_no_path():
    evaluate, asked = rewarding()
    result = search(uct(L, budget=20), evaluate)
    assert result.best is None
    assert len(asked) == 21


def test_the_budget_is_exact_and_draws_are_a_function_of_the_seed():
    first, again, other = (search(uct(20, budget=33, seed=seed), rewarding()[0]).rewards for seed in (1, 1, 2))
    assert len(first) == 34
    assert list(first) == list(again) != list(other)


def test_the_released_search_stops_as_released():
    """At a path that repairs a wrong default; else at a correct path two blocks shorter, but at none that is one."""
    everything = lambda paths: [1.0] * len(paths)  # noqa: E731
    for seed in range(20):
        result = search(released_chain(20, seed=seed), everything)
        *before, last = result.rewards
        assert len(last) <= 18
        assert all(len(path) > 18 for path in before)
    for seed in range(5):
        result = search(released_chain(20, seed=seed), lambda paths: [float(path != full_path(20)) for path in paths])
        assert len(result.rewards) == 2


def test_the_released_search_repeats_without_a_bound_and_does_nothing_at_times():
    walks = [list(nodes(search(released_chain(4, budget=40, seed=seed), rewarding()[0]).root)) for seed in range(40)]
    assert any(max(map(node.path.count, node.path), default=0) > 2 for walk in walks for node in walk)
    assert any(child.path == node.path for walk in walks for node in walk for child in node.children)
    assert any(node.path == () for walk in walks for node in walk)
    assert max(len(node.path) for walk in walks for node in walk) <= 8


def test_questions_searched_in_step_are_each_searched_alone():
    batches = []
    rules = [random_rewards(i, 9, 0.02, float(i % 2)) for i in range(6)]

    def evaluate(pairs):
        batches.append(len(pairs))
        return [rules[i]([path])[0] for i, path in pairs]

    together = search_all([uct(9, budget=30, seed=i) for i in range(6)], evaluate)
    for i, result in enumerate(together):
        alone = search(uct(9, budget=30, seed=i), rules[i])
        assert (alone.rewards, alone.best) == (result.rewards, result.best)
    assert batches[0] == 6
    assert len(batches) == 31


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: search(uct(3), None), "evaluate = None: expected a function that compares answers with gold"),
        (lambda: search(exhaustive(3, 1), lambda paths: [None] * len(paths)), "search needs gold answers"),
        (lambda: search(uct(3), lambda paths: [float("nan")]), "search needs gold answers"),
        (lambda: search(uct(3), lambda paths: [2.0]), "0 to 1"),
        (lambda: search(exhaustive(3, 1), lambda paths: [1.0]), "rewards = 1: expected one for each of 9 paths"),
        (lambda: search(uct(3, budget=-1), rewarding()[0]), "budget = -1"),
        (lambda: search(uct(3, widening=0.0), rewarding()[0]), "widening = 0.0"),
        (lambda: search(uct(3, random_child=1.5), rewarding()[0]), "random_child = 1.5"),
        (lambda: search(released_chain(3, budget=0), rewarding()[0]), "budget = 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_jax_is_needed():
    import subprocess
    import sys

    code = "import sys; import moe.depth.search; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
