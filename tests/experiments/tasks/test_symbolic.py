"""The conflicting tasks: right answers by plain Python, splits that never meet, samples that know no batches."""

import numpy as np
import pytest

from experiments.data.shards import SPLITS
from experiments.tasks import symbolic
from experiments.tasks.symbolic import END, EQUALS, MAPS, PAD, PRETRAINING, TASKS, TOKEN, VOCAB, ZERO, batch

DIGITS = 6
ANSWERS = {  # of a question as a list, without NumPy
    "copy": list,
    "reverse": lambda d: list(reversed(d)),
    "sort": sorted,
    "add": lambda d: [(d[i] + d[i + 1]) % 10 for i in range(0, len(d), 2)],
    "rotate": lambda d: [*d[1:], d[0]],
    "swap-halves": lambda d: [*d[len(d) // 2 :], *d[: len(d) // 2]],
    "swap-pairs": lambda d: [d[i ^ 1] for i in range(len(d))],
    "successor": lambda d: [(x + 1) % 10 for x in d],
    "next-sum": lambda d: [(d[i] + d[(i + 1) % len(d)]) % 10 for i in range(len(d))],
    "larger-of-pairs": lambda d: [max(d[i], d[i ^ 1]) for i in range(len(d))],
}


def read(made, row):
    """(task token, question, answer) of a row, from what is read and what is to be written."""
    line = made.tokens[row][made.segment_ids[row] > 0].tolist()
    equals = line.index(EQUALS)
    written = made.targets[row][made.weights[row] > 0].tolist()
    assert written[-1] == END
    return line[0], [t - ZERO for t in line[1:equals]], [t - ZERO for t in written[:-1]]


@pytest.mark.parametrize("name", MAPS)
def test_answers_are_right_and_where_they_are_predicted(name):
    made = batch("train", 0, [name], 0, 32, DIGITS)
    for row in range(32):
        token, question, answer = read(made, row)
        assert token == TOKEN[name]
        assert len(question) == DIGITS
        assert answer == ANSWERS[name](question)
        text = [*made.tokens[row].tolist(), END if made.segment_ids[row].all() else PAD]
        after = [text[w + 1] for w in made.where[row]]  # what follows a position is its target
        kept = made.weights[row] > 0
        assert np.array_equal(np.array(after)[kept], made.targets[row][kept])
        assert (made.where[row] >= DIGITS + 1).all()  # nothing of the question is an answer


def test_tasks_are_unlike_each_other_and_unlike_what_was_pretrained():
    questions = symbolic.questions("train", 0, "copy", np.arange(500), DIGITS)
    for task in TASKS:
        for other in MAPS.keys() - {task}:
            a, b = MAPS[task](questions), MAPS[other](questions)
            assert a.shape != b.shape or (a == b).all(axis=1).mean() < 0.05
    assert not TASKS.keys() & PRETRAINING.keys()
    assert sorted(TOKEN.values()) == list(range(EQUALS + 1, ZERO))
    assert ZERO + symbolic.BASE == VOCAB


def test_no_question_is_in_two_splits_whatever_the_task():
    seen = {
        split: {tuple(row) for name in TASKS for row in symbolic.questions(split, 0, name, np.arange(2000), 4).tolist()}
        for split in SPLITS
    }
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]
    sizes = np.bincount(symbolic.split_codes(np.arange(10_000, dtype=np.uint64)), minlength=3) / 10_000
    assert np.allclose(sizes, [0.9, 0.05, 0.05], atol=0.01)


def test_a_sample_is_a_function_of_its_index_alone():
    whole = batch("train", 3, list(TASKS), 0, 32, DIGITS)
    parts = [batch("train", 3, list(TASKS), first, 8, DIGITS) for first in range(0, 32, 8)]
    for leaf, pieces in zip(whole, zip(*parts)):
        assert np.array_equal(leaf, np.concatenate(pieces))
    for t, name in enumerate(TASKS):  # alone, a task has the samples it has in the mixture
        alone, rows = batch("train", 3, [name], 0, 8, DIGITS), whole.task == t
        assert np.array_equal(alone.tokens, whole.tokens[rows])
    other = batch("train", 4, list(TASKS), 0, 32, DIGITS)
    assert not np.array_equal(other.tokens, whole.tokens)
    assert len({tuple(row) for row in batch("train", 3, ["copy"], 0, 500, DIGITS).tokens.tolist()}) > 490


def test_digits_are_uniform():
    digits = symbolic.questions("train", 0, "copy", np.arange(4000), DIGITS)
    share = np.stack([np.bincount(column, minlength=10) for column in digits.T]) / 4000
    assert np.abs(share - 0.1).max() < 0.025


def test_pretraining_predicts_every_token_after_the_first():
    made = batch("train", 0, list(PRETRAINING), 0, 12, DIGITS, whole=True)
    assert made.where.shape == made.tokens.shape
    assert (made.weights > 0).sum() == (made.segment_ids > 0).sum()
    for row in range(12):
        kept = made.segment_ids[row] > 0
        assert np.array_equal(made.where[row], np.arange(made.tokens.shape[1]))
        assert np.array_equal(made.targets[row][kept], [*made.tokens[row][kept][1:], END])


@pytest.mark.parametrize(("wrong", "named"), [
    (("all", 0, ["copy"], 0, 4, 6), "split"), (("train", 0, ["paste"], 0, 4, 6), "task"),
    (("train", 0, [], 0, 4, 6), "tasks"), (("train", 0, ["copy"], 0, 4, 5), "digits"),
    (("train", 0, ["copy"], 0, 4, 20), "digits")])
def test_what_cannot_be_made_is_refused(wrong, named):
    with pytest.raises(ValueError, match=f"^{named} = "):
        batch(*wrong)
