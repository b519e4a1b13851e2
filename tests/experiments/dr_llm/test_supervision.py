"""Searched supervision from hand-made answers, in chunks that survive an interrupt; routers that learn a rule."""

import jax
import numpy as np
import pytest

from experiments.dr_llm.arithmetic import FIRST_OPERATOR, VOCAB, quiz
from experiments.dr_llm.routers import RouterTraining, class_weights, decided, macro_f1, quality, train_routers
from experiments.dr_llm.supervision import SearchConfig, Supervision, searched, supervision
from experiments.finetune import Base
from moe.config import ModelConfig
from moe.depth.policy import NEUTRAL
from moe.depth.router import DepthConfig
from moe.transformer import init_params

FULL = (0, 1, 2, 3)
RIGHT = [  # of each question, the paths that answer it
    {FULL, (0, 1, 2), (0, 2)},  # shorter: block 1 and 3 are not needed
    {FULL},  # nothing to teach
    set(),  # nor here
    {(0, 1, 1, 2, 3), (0, 1, 2, 3, 3, 0)},  # a repeat repairs it
    {FULL, (0, 0, 1, 2, 3)},  # longer: nothing to teach
    {(1, 2, 3), (0, 1, 1, 2, 3)},
]
TAUGHT = {0: (1, 0, 1, 0), 3: (1, 2, 1, 1), 5: (0, 1, 1, 1)}


def evaluations(asked):
    def evaluate(first):
        def call(pairs):
            asked.extend((first + question, path) for question, path in pairs)
            return [float(path in RIGHT[first + question]) for question, path in pairs]

        return call

    return evaluate


@pytest.mark.parametrize("config", [SearchConfig(chunk=4), SearchConfig("uct", max_edits=2, budget=10_000, chunk=2)])
def test_the_shortest_path_that_helps_is_taught(config, tmp_path):
    asked = []
    found = searched(config, 4, len(RIGHT), 0, tmp_path, evaluations(asked))
    np.testing.assert_array_equal(found.default, [FULL in right for right in RIGHT])
    np.testing.assert_array_equal(found.any, [bool(right) for right in RIGHT])
    assert found.evaluations.sum() == len(asked) == len(set(asked))
    taught = supervision(found)
    if config.kind == "exhaustive":  # the tree search stops at the first path that repairs an answer
        assert {int(n): tuple(row) for n, row in zip(taught.questions, taught.labels.tolist())} == TAUGHT
    else:
        assert taught.questions.tolist() == list(TAUGHT)
        assert taught.labels[0].tolist() == list(TAUGHT[0])
    assert taught.fixed.tolist() == [False, True, True]
    assert taught.class_counts.sum() == 3 * 4
    assert taught.class_counts[0] == (taught.labels == 0).sum()


def test_the_released_chain_may_leave_labels():
    """Its paths are counted as they are, also beyond two."""
    config = SearchConfig("released", budget=30)
    assert config.most_evaluations(4) == 31


def test_an_interrupted_search_goes_on_with_its_chunk(tmp_path):
    config, asked, told = SearchConfig(chunk=2, max_edits=1), [], []
    whole = searched(config, 4, 6, 0, tmp_path / "whole", evaluations([]))

    def interrupted(first):
        if first == 4:
            raise KeyboardInterrupt
        return evaluations(asked)(first)

    with pytest.raises(KeyboardInterrupt):
        searched(config, 4, 6, 0, tmp_path / "cut", interrupted, told.append)
    assert told == [2, 4]
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["000000.npz", "000002.npz"]
    assert {question for question, _ in asked} == {0, 1, 2, 3}
    asked.clear()
    again = searched(config, 4, 6, 0, tmp_path / "cut", evaluations(asked), told.append)
    assert {question for question, _ in asked} == {4, 5}
    for name, value in vars(whole).items():
        np.testing.assert_array_equal(getattr(again, name), value)
    asked.clear()
    searched(config, 4, 6, 0, tmp_path / "cut", evaluations(asked))
    assert not asked


def test_nothing_to_teach_is_an_error(tmp_path):
    found = searched(SearchConfig(), 4, 1, 0, tmp_path, lambda first: lambda pairs: [0.0] * len(pairs))
    with pytest.raises(ValueError, match="searched questions kept = 0"):
        supervision(found)


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("kind = 'beam'", {"kind": "beam"}), ("budget = 0", {"budget": 0}), ("chunk = 0", {"chunk": 0}),
        ("max_edits = 0", {"max_edits": 0}), ("max_edits = -1", {"kind": "uct", "max_edits": -1}),
    ],
)  # fmt: skip
def test_a_search_that_cannot_be_is_refused(field, settings):
    with pytest.raises(ValueError, match=f"search.{field}"):
        SearchConfig(**settings)
    SearchConfig("uct", max_edits=0, budget=1, chunk=1)


def test_class_weights_have_mean_one_over_the_classes_that_occur():
    numbers = (1 - 0.9 ** np.array([4.0, 2.0])) / (1 - 0.9)
    want = (1 / numbers) / np.mean(1 / numbers)
    np.testing.assert_allclose(class_weights(np.array([4, 0, 2]), 0.9), [want[0], 0.0, want[1]])
    np.testing.assert_array_equal(class_weights(np.array([0, 9, 0]), 0.999), [0.0, 1.0, 0.0])


def test_macro_f1_by_hand():
    labels = np.array([[0, 0, 1, 1], [1, 1, 1, 2]])
    guessed = np.array([[0, 1, 1, 1], [1, 1, 0, 1]])
    # skip: 1 hit of 2 labels, 2 guesses; execute: 4 of 5, 6; repeat: 0 of 1, 0.
    assert macro_f1(guessed, labels) == pytest.approx((2 / 4 + 8 / 11 + 0) / 3)
    assert macro_f1(labels, labels) == 1.0
    assert macro_f1(np.ones((2, 2), int), np.ones((2, 2), int)) == 1.0  # classes that never occur do not count


@pytest.mark.parametrize("reads", ["residual", "embedding"])
@pytest.mark.slow
def test_routers_learn_a_rule_and_tell_it_for_new_questions(reads):
    """Questions with a product skip block 1 and repeat block 2, the others do the reverse."""
    config = ModelConfig(vocab_size=VOCAB, hidden=32, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=16,
                         ffn_dim=48, moe=None, tie_embeddings=True, init_std=0.5)  # fmt: skip
    base = Base(config, init_params(config, jax.random.key(0)), {})
    times = FIRST_OPERATOR + 2
    rule = lambda q: np.where((q.prompts == times).any(axis=1)[:, None], [[1, 0, 2]], [[1, 2, 0]])  # noqa: E731
    taught, new = quiz("validation", 0, "left", 200), quiz("test", 0, "left", 100)
    labels = Supervision(np.arange(200), rule(taught), np.zeros(200, bool))
    depth, training = DepthConfig(hidden=32, reads=reads), RouterTraining(epochs=25)
    routers = train_routers(base, depth, training, taught, labels, 64, 0)
    held_out = Supervision(np.arange(100), rule(new), np.zeros(100, bool))
    told = quality(base, depth, routers, new, held_out, 64)
    assert told["layer_accuracy"] > 0.9
    assert told["macro_f1"] > 0.85
    free = decided(base, depth, routers, NEUTRAL, new, 64)
    assert np.mean(free == rule(new)) > 0.9
    assert (decided(base, depth, routers, 0.5, new, 64) == 1).all()
    assert (decided(base, depth, routers, -1.0, new, 64) == 0).all()
    again = train_routers(base, depth, training, taught, labels, 64, 0)
    jax.tree.map(np.testing.assert_array_equal, routers, again)
