"""Batches of tasks: the answer's tokens are those that are scored, and a mixture is a function of the sample index."""

import numpy as np
import pytest

from experiments.evaluation.scoring import option_requests
from experiments.evaluation.text import ByteWords
from experiments.tasks.example import Example
from experiments.tasks.training import mixture, padded, tokenized

CHOICES = [Example(f"Is {n} even?", ("no", "yes"), 1 - n % 2) for n in range(20)]
WRITTEN = [Example(f"Double {n}:", (), str(2 * n)) for n in range(0, 2000, 137)]


class Joining(ByteWords):
    """Bytes, but a colon and the blank after it are one token: the boundary lies inside of a prompt's last token."""

    def encode(self, text):
        return [256 if pair == ": " else ord(pair[0]) for pair in split_pairs(text)]

    def continued(self, text, chat):
        return self.encode(text)


def split_pairs(text):
    while text:
        size = 2 if text.startswith(": ") else 1
        yield text[:size]
        text = text[size:]


@pytest.mark.parametrize("words", [ByteWords(), Joining()], ids=["bytes", "joined"])
@pytest.mark.parametrize("example", [CHOICES[3], WRITTEN[2], Example("Which:", ("yes", "yesterday"), 1)])
def test_the_answer_is_what_is_scored_and_its_end(words, example):
    (row,) = tokenized("t", [example], words, 100).rows
    options = example.options or (example.target,)
    wholes = [words.continued(f"{example.prompt} {option}", False) for option in options]
    scored = option_requests(words.encode(example.prompt), wholes, 0)[options.index(example.target)]
    made = padded([row], np.zeros(1), 40, 20)
    kept = made.weights[0] > 0
    assert made.where[0][kept].tolist() == [*scored.where, scored.where[-1] + 1]
    assert made.targets[0][kept].tolist() == [*scored.targets, *words.eos]
    read = made.tokens[0][made.segment_ids[0] > 0].tolist()
    assert read == [*scored.inputs, scored.targets[-1]]
    assert made.tokens[0][made.segment_ids[0] == 0].sum() == 0


def test_a_longer_prompt_is_left_out_and_counted():
    words, longest = ByteWords(), 17  # start, prompt, blank, answer
    made = tokenized("t", WRITTEN, words, longest)
    sizes = [len(words.encode(f"{e.prompt} {e.target}")) for e in WRITTEN]
    assert made.too_long == sum(size > longest for size in sizes) > 0
    assert [len(row.tokens) for row in made.rows] == [size + 1 for size in sizes if size <= longest]
    with pytest.raises(ValueError, match="task t: examples longer than 3 tokens = "):
        tokenized("t", WRITTEN, words, 3)
    with pytest.raises(ValueError, match="task t: examples = 0"):
        tokenized("t", [], words, 3)


def test_a_mixture_holds_every_tasks_own_samples_in_order():
    tasks = [tokenized(name, examples, ByteWords(), 100) for name, examples in (("a", CHOICES), ("b", WRITTEN))]
    mixed = [mixture(tasks, 7, step, 6) for step in range(15)]
    for t, task in enumerate(tasks):
        alone = [mixture([task], 7, step, 5) for step in range(9)]
        texts = lambda batches, rows: [  # noqa: E731
            tuple(b.tokens[i][b.segment_ids[i] > 0]) for b in batches for i in rows(b)
        ]
        in_mixture = texts(mixed, lambda b: np.flatnonzero(b.task == t))  # noqa: B023
        assert in_mixture == texts(alone, lambda b: range(5))
        epoch = len(task.rows)
        assert len(set(in_mixture[:epoch])) == epoch  # each example once, then again in another order
        assert set(in_mixture[epoch : 2 * epoch]) <= set(in_mixture[:epoch])
        assert in_mixture[epoch : 2 * epoch] != in_mixture[: len(in_mixture[epoch : 2 * epoch])]
    shapes = {tuple(leaf.shape for leaf in made) for made in mixed}
    assert len(shapes) == 1  # one program for all
    other = mixture(tasks, 8, 0, 6)
    assert not np.array_equal(other.tokens, mixed[0].tokens)
