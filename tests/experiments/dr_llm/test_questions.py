"""Chains against plain Python, splits, and judging against greedy writing and the evaluation's scorer."""

import operator
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.dr_llm import arithmetic
from experiments.dr_llm import quiz as quizzes
from experiments.dr_llm.arithmetic import Arithmetic, chains, quiz
from experiments.dr_llm.packaged import option_quiz
from experiments.dr_llm.quiz import Examiner, evaluator
from experiments.evaluation.scoring import Scorer, option_requests
from experiments.evaluation.text import ByteWords
from experiments.finetune import Base
from experiments.tasks.example import Example
from moe.config import ModelConfig
from moe.depth.execute import forward_along, generate_along
from moe.depth.paths import labels_of
from moe.generate import Generator, unstacked
from moe.transformer import init_params

SIGNS = (operator.add, operator.sub, operator.mul)


def small(vocab, layers=3):
    config = ModelConfig(vocab_size=vocab, hidden=32, num_layers=layers, num_heads=2, num_kv_heads=2, head_dim=16,
                         ffn_dim=48, moe=None, tie_embeddings=True, init_std=0.5)  # fmt: skip
    return Base(config, init_params(config, jax.random.key(3)), {})


def read(tokens):
    """A question's tokens as (form, numbers, operators, answer)."""
    words = [int(t) for t in tokens if t != arithmetic.PAD]
    form = arithmetic.FORMS[words[0] - arithmetic.FIRST_FORM]
    middle = words[1 : words.index(arithmetic.EQUALS)]
    numbers = [w - arithmetic.ZERO for w in middle[::2]]
    assert words[-1] == arithmetic.END
    assert len(words) == len(middle) + 5
    tens, units = (w - arithmetic.ZERO for w in words[-3:-1])
    return form, numbers, [w - arithmetic.FIRST_OPERATOR for w in middle[1::2]], 10 * tens + units


@pytest.mark.parametrize("kind", arithmetic.KINDS)
def test_answers_are_those_of_exact_whole_numbers(kind):
    of = chains("train", 5, kind, np.arange(400))
    tokens, prompt = arithmetic.text(arithmetic.KINDS[kind][0], of)
    seen = set()
    for row, size in zip(tokens, prompt):
        form, numbers, signs, answer = read(row)
        assert form == arithmetic.KINDS[kind][0]
        assert size == 2 * len(numbers) + 1
        if form == "left":
            value = numbers[0]
            for sign, number in zip(signs, numbers[1:]):
                value = SIGNS[sign](value, number)
        else:
            value = numbers[-1]
            for sign, number in zip(signs[::-1], numbers[-2::-1]):
                value = SIGNS[sign](number, value)
        assert answer == value % 100
        seen.add(len(numbers))
    _, fewest, most = arithmetic.KINDS[kind]
    assert seen == set(range(fewest, most + 1))


def test_no_question_is_in_two_splits_under_any_form():
    world = Arithmetic(steps=30, batch=64, search_questions=300, test_questions=300)
    keys = lambda tokens: {(tuple(read(row)[1]), tuple(read(row)[2])) for row in tokens}  # noqa: E731
    whole = lambda q: np.concatenate([q.rows.tokens, np.full((len(q), 1), arithmetic.PAD)], axis=1)  # noqa: E731
    ended = lambda q: [[*row[: n + 2], arithmetic.END] for row, n in zip(whole(q).tolist(), q.lengths)]  # noqa: E731
    trained = set().union(*(keys(world.training_rows(0, step)[0]) for step in range(30)))
    searched = keys(ended(world.quiz("search", 0)))
    tested = set().union(*(keys(ended(world.quiz(name, 0))) for name in ("test", "right", "long")))
    assert len(searched) == 300  # distinct ones
    assert len(trained) > 500
    assert not searched & tested
    assert not trained & (searched | tested)


def test_training_marks_the_last_token_of_each_prompt():
    tokens, before = Arithmetic(batch=64).training_rows(0, 3)
    assert tokens.shape == (64, 12)
    assert (tokens[np.arange(64), before] == arithmetic.EQUALS).all()
    assert (tokens[np.arange(64), before + 3] == arithmetic.END).all()


def written_quiz(base, labels):
    """A quiz whose gold answers are what the model writes along `labels`, on every second question."""
    asked = quiz("test", 0, "left", len(labels))
    prompts = [row[:n].tolist() for row, n in zip(asked.prompts, asked.lengths)]
    model = type("Model", (), {"config": base.config, "params": base.params, "router_state": {}})()
    steps = np.stack(list(generate_along(Generator(model), prompts, labels, max_new_tokens=3)), axis=1)
    other = (steps + 1) % base.config.vocab_size
    gold = np.where(np.arange(len(labels))[:, None] % 2 == 0, steps, other).astype(np.int32)
    tokens = asked.rows.tokens.copy()
    for place in range(2):
        tokens[np.arange(len(labels)), asked.lengths + place] = gold[:, place]
    return replace(asked, rows=asked.rows._replace(tokens=tokens, targets=gold))


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.slow
def test_right_is_what_the_model_writes_along_the_labels(mixed):
    base = small(arithmetic.VOCAB)
    labels = np.random.default_rng(0).integers(0, 3, (24, 3))
    labels[:8] = (1, 0, 2)  # some that agree
    examiner = Examiner(base, written_quiz(base, labels), 16, mixed)
    np.testing.assert_array_equal(examiner.right(labels), np.arange(24) % 2 == 0)


def test_paths_without_labels_are_judged_too():
    """A block three times, as in the released search; and the others as labels say."""
    base = small(arithmetic.VOCAB)
    asked = quiz("test", 0, "left", 6)
    path, weights = (0, 1, 1, 1, 2), unstacked(*base)
    hidden = forward_along(base.config, weights, path, asked.prompts, asked.lengths)
    last = np.asarray(hidden)[np.arange(6), asked.lengths - 1]
    first = (last @ np.asarray(weights.head)).argmax(-1).astype(np.int32)
    rows = asked.rows
    only = rows._replace(targets=np.stack([first] * 3, axis=1), weights=np.tile(np.float32([[1, 0, 0]]), (6, 1)))
    examiner = Examiner(base, replace(asked, rows=only), 8)
    pairs = [(0, path), (1, path), (2, (0, 1, 2))]
    found = evaluator(examiner, 3)(pairs)
    assert found[:2] == [1.0, 1.0]
    assert found[2] == float(examiner.right(np.ones((6, 3), int))[5])
    wrong = replace(asked, rows=only._replace(targets=only.targets + 1))
    assert evaluator(Examiner(base, wrong, 8), 3)(pairs[:2]) == [0.0, 0.0]


EXAMPLES = [
    Example("Good?", ("yes", "no"), 0), Example("Is it so, then?", ("no", "nought", "never"), 2),
    Example("b", ("x", "y"), 1), Example("Which one?", ("a", "bb", "a c"), 1),
]  # fmt: skip


@pytest.mark.parametrize("mixed", [True, False])
def test_options_are_scored_as_the_evaluation_scores_them(mixed):
    base, words, kept, asked = small(256), ByteWords(), [], []
    for i, example in enumerate(EXAMPLES):
        prompt = words.encode(example.prompt)
        wholes = [words.continued(f"{example.prompt} {option}", False) for option in example.options]
        kept.append(("task", example, prompt, option_requests(prompt, wholes, i)))
        asked += option_requests(prompt, wholes, i)
    nats = Scorer(*base, 4).run(asked)
    likeliest = [min(range(len(e.options)), key=lambda o: nats[i, o]) for i, e in enumerate(EXAMPLES)]
    made = option_quiz(kept)
    assert len(made.rows.tokens) < sum(len(e.options) for e in EXAMPLES)  # x and y share a row
    right = Examiner(base, made, 4, mixed).right(np.ones((4, 3), int))
    np.testing.assert_array_equal(right, [c == e.answer for c, e in zip(likeliest, EXAMPLES)])
    for option in range(2):  # whichever is gold
        other = replace(made, options=np.full(4, option))
        found = Examiner(base, other, 4, mixed).right(np.ones((4, 3), int))
        np.testing.assert_array_equal(found, [c == option for c in likeliest])
    np.testing.assert_array_equal(made.lengths, [1 + len(e.prompt) for e in EXAMPLES])


def test_majority_is_of_each_task():
    made = replace(quiz("test", 0, "left", 5), answers=(("a", 1), ("a", 1), ("a", 0), ("b", 0), ("b", 1)))
    assert made.majority == 3 / 5


def test_labels_of_equal_rows_go_together_and_give_the_same():
    """The program that skips and the one that runs all blocks twice."""
    base, asked = small(arithmetic.VOCAB), quiz("test", 0, "left", 16)
    pairs = [(n, labels_of(path, 3)) for path in ((0, 1, 2), (0, 2), (1, 1, 2)) for n in range(16)]
    rewards = [Examiner(base, asked, 16, mixed).rewards(pairs) for mixed in (True, False)]
    np.testing.assert_array_equal(*rewards)


def test_as_many_equal_labels_as_others_still_run_without_masks(monkeypatch):
    base, asked, seen, judge = small(arithmetic.VOCAB), quiz("test", 0, "left", 8), [], quizzes._judge

    def noted(base, rows, labels, mixed):
        seen.append((mixed, labels.tolist()))
        return judge(base, rows, labels, mixed)

    monkeypatch.setattr(quizzes, "_judge", noted)
    labels = np.array([[1, 0, 1]] * 4 + [[1, 1, 1], [0, 1, 1], [1, 1, 2], [1, 1, 0]])
    Examiner(base, asked, 16).right(labels)
    assert seen == [(False, [1, 0, 1]), (True, labels[4:].tolist())]
