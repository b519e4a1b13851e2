"""Examples of tasks as batches to train on: which tokens are read, and which of them are the answer.

Answer tokens are those that `experiments.evaluation.scoring` scores: what the prompt and its continuations share is
context. A mixture is a function of (seed, sample index): sample n is sample n // T of task n mod T, so a run on one
task sees the very examples, in their order, that a run on all tasks sees of it.

Legend: B rows, S positions, A answer tokens of a row at most, T tasks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from experiments.evaluation.scoring import bucket, option_requests
from experiments.evaluation.text import Words
from experiments.tasks.example import Example
from moe.config import require


class Batch(NamedTuple):
    """Rows with their answers; leaves NumPy or JAX arrays.

    Attributes:
      tokens, segment_ids: [B, S] int32, what is read; segment 0 is padding.
      where, targets: [B, A] int32: after position `where` the answer goes on with the token `targets`.
      weights: [B, A] float32, 1 for an answer's token and 0 for padding.
      task: [B] int32, which task of the mixture.
    """

    tokens: Any
    segment_ids: Any
    where: Any
    targets: Any
    weights: Any
    task: Any

    def rows(self, rows: slice | np.ndarray) -> Batch:
        return Batch(*(leaf[rows] for leaf in self))


class Row(NamedTuple):
    """One example: `tokens` with the answer and its end, whose first token is at `answer`."""

    tokens: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Tokenized:
    """A task in tokens. `too_long` examples did not fit and are left out."""

    name: str
    rows: tuple[Row, ...]
    too_long: int

    @functools.cached_property
    def shape(self) -> tuple[int, int]:
        """(S, A): the padded length and the most answer tokens."""
        read, written = (len(row.tokens) - 1 for row in self.rows), (len(row.tokens) - row.answer for row in self.rows)
        return bucket(max(read)), max(written)


def tokenized(name: str, examples: Sequence[Example], words: Words, longest: int) -> Tokenized:
    """Prompt, a space, the right answer, and the token that ends it.

    Args:
      longest: the most tokens that are read (the last one is only a target).

    Raises:
      ValueError: no example, or none that fits.
    """
    require(bool(examples), f"task {name}: examples", 0, "at least one")
    rows = [row for example in examples if len((row := _row(example, words)).tokens) - 1 <= longest]
    require(bool(rows), f"task {name}: examples longer than {longest} tokens", len(examples), "at least one that fits")
    return Tokenized(name, tuple(rows), len(examples) - len(rows))


def option_rows(example: Example, words: Words) -> list[Row]:
    """The prompt with each option, or with the answer written, as they are scored: without an end."""
    continuations = example.options or (example.target,)
    wholes = [words.continued(f"{example.prompt} {text}", False) for text in continuations]
    requests = option_requests(words.encode(example.prompt), wholes, None)
    return [Row((*request.inputs, request.targets[-1]), request.where[0] + 1) for request in requests]


def _row(example: Example, words: Words) -> Row:
    right = option_rows(example, words)[example.answer if isinstance(example.answer, int) else 0]
    return Row((*right.tokens, *words.eos[:1]), right.answer)


def mixture(tasks: Sequence[Tokenized], seed: int, step: int, batch_size: int) -> Batch:
    """The rows of samples step * B to (step + 1) * B, padded as the longest row of any task."""
    require(bool(tasks), "tasks", tasks, "one or more")
    samples = np.arange(step * batch_size, (step + 1) * batch_size)
    which = samples % len(tasks)
    chosen = [source_row(tasks[t], seed, n // len(tasks)) for t, n in zip(which.tolist(), samples.tolist())]
    length, answers = (max(task.shape[i] for task in tasks) for i in (0, 1))
    return padded(chosen, which, length, answers)


def source_row(task: Tokenized, seed: int, index: int) -> Row:
    epoch, place = divmod(index, len(task.rows))
    return task.rows[_order(task.name, len(task.rows), seed, epoch)[place]]


@functools.lru_cache(maxsize=64)
def _order(name: str, count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of a task's examples for one pass over them."""
    return np.random.default_rng([seed, epoch, *name.encode()]).permutation(count)


def padded(rows: Sequence[Row], which: np.ndarray, length: int, answers: int) -> Batch:
    """Rows as arrays [B, S = length] and [B, A = answers]."""
    tokens, segment_ids = np.zeros((2, len(rows), length), np.int32)
    where, targets = np.zeros((2, len(rows), answers), np.int32)
    weights = np.zeros((len(rows), answers), np.float32)
    for i, row in enumerate(rows):
        read, count = len(row.tokens) - 1, len(row.tokens) - row.answer
        tokens[i, :read], segment_ids[i, :read] = row.tokens[:-1], 1
        where[i, :count] = np.arange(row.answer - 1, read)
        targets[i, :count], weights[i, :count] = row.tokens[row.answer :], 1.0
    return Batch(tokens, segment_ids, where, targets, weights, which.astype(np.int32))
