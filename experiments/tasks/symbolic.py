"""Four tasks on strings of digits that want different answers to the same question, and the text that precedes them.

    T d_1 ... d_n = a_1 ... a_m END

T is the task's token, d the question, a the answer: `copy` d, `reverse` it, `sort` it, or `add` d_1 + d_2, d_3 + d_4
and so on, modulo 10 (m = n / 2). Nothing but T tells which; tasks that share weights are in each other's way.

A model is pretrained on what the four have in common: the same form with other maps, under tokens of their own
(`PRETRAINING`), none of which is a task. It then knows strings, positions and digits, and not the tasks.

Questions are split by a hash of their digits: one that is tested under any task is trained on under none. Each sample
is a function of (split, seed, task, index) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from experiments.data.shards import SPLITS, split_of
from experiments.tasks.training import Batch
from moe.config import require

BASE = 10
PAD, END, EQUALS = 0, 1, 2
Map = Callable[[np.ndarray], np.ndarray]  # digits [N, n] -> digits [N, m]


def _halves(digits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    middle = digits.shape[1] // 2
    return digits[:, :middle], digits[:, middle:]


def _swapped_pairs(digits: np.ndarray) -> np.ndarray:
    return digits.reshape(len(digits), -1, 2)[:, :, ::-1].reshape(digits.shape)


TASKS: Mapping[str, Map] = {
    "copy": lambda d: d,
    "reverse": lambda d: d[:, ::-1],
    "sort": lambda d: np.sort(d, axis=1),
    "add": lambda d: (d[:, ::2] + d[:, 1::2]) % BASE,
}
PRETRAINING: Mapping[str, Map] = {
    "rotate": lambda d: np.roll(d, -1, axis=1),
    "swap-halves": lambda d: np.concatenate(_halves(d)[::-1], axis=1),
    "swap-pairs": _swapped_pairs,
    "successor": lambda d: (d + 1) % BASE,
    "next-sum": lambda d: (d + np.roll(d, -1, axis=1)) % BASE,
    "larger-of-pairs": lambda d: np.repeat(np.maximum(d[:, ::2], d[:, 1::2]), 2, axis=1),
}
MAPS: Mapping[str, Map] = {**TASKS, **PRETRAINING}
TOKEN = {name: EQUALS + 1 + i for i, name in enumerate(MAPS)}
ZERO = EQUALS + 1 + len(MAPS)  # the token of digit 0
VOCAB = ZERO + BASE


def mixed_bits(*parts: np.ndarray | int) -> np.ndarray:
    """uint64 hashes of tuples of whole numbers, elementwise (the finaliser of SplitMix64, Steele et al. 2014)."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in parts:
            state = (state ^ np.asarray(part, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
                state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(state)


def split_codes(questions: np.ndarray) -> np.ndarray:
    """Index into SPLITS of questions, given as numbers: a twentieth is validation, another test."""
    shares = mixed_bits(questions, 1).astype(np.float64) / 2.0**64
    return np.array([SPLITS.index(split_of(share)) for share in shares.tolist()], np.int64)


def questions(split: str, seed: int, name: str, indices: np.ndarray, digits: int) -> np.ndarray:
    """Digits [N, n] of the samples `indices` of a map in one split.

    Raises:
      ValueError: an unknown split or map; n that is not even, or not from 2 to 18.
    """
    require(split in SPLITS, "split", split, f"one of {', '.join(SPLITS)}")
    require(name in MAPS, "task", name, f"one of {', '.join(MAPS)}")
    require(digits % 2 == 0 and 2 <= digits <= 18, "digits", digits, "an even number from 2 to 18")
    found, missing, attempt = np.zeros(len(indices), np.uint64), np.arange(len(indices)), 0
    while len(missing):
        drawn = mixed_bits(seed, TOKEN[name], indices[missing], attempt) % np.uint64(BASE**digits)
        found[missing] = drawn
        missing, attempt = missing[split_codes(drawn) != SPLITS.index(split)], attempt + 1
    powers = np.array([BASE**i for i in reversed(range(digits))], np.uint64)
    return (found[:, None] // powers[None] % np.uint64(BASE)).astype(np.int32)


def batch(
    split: str, seed: int, names: Sequence[str], first: int, count: int, digits: int, whole: bool = False
) -> Batch:
    """Samples `first` to `first + count` of a mixture: sample n is sample n // T of map n mod T.

    Args:
      whole: every token after the first is an answer's: pretraining on the text itself.

    Returns:
      Rows of S = 2 n + 2 tokens with at most A = n + 1 answer tokens, END among them; S = A if `whole`.
    """
    require(bool(names), "tasks", names, "one or more")
    samples = np.arange(first, first + count)
    which = samples % len(names)
    tokens = np.full((count, 2 * digits + 3), PAD, np.int32)
    answered = np.zeros(tokens.shape, bool)
    for t, name in enumerate(names):
        rows = which == t
        asked = questions(split, seed, name, samples[rows] // len(names), digits)
        answer = MAPS[name](asked)
        width = answer.shape[1]
        sides = (TOKEN[name], EQUALS, END)
        task, equals, end = (np.full((len(asked), 1), token, np.int32) for token in sides)
        text = np.concatenate([task, asked + ZERO, equals, answer + ZERO, end], axis=1)
        tokens[rows, : text.shape[1]] = text
        answered[rows, 1 if whole else digits + 2 : digits + 3 + width] = True
    start = 1 if whole else digits + 2
    width = tokens.shape[1] - start
    where = np.broadcast_to(np.arange(start - 1, start - 1 + width, dtype=np.int32), (count, width))
    read = (tokens[:, :-1] != PAD).astype(np.int32)
    weights = answered[:, start:].astype(np.float32)
    return Batch(tokens[:, :-1], read, where, tokens[:, start:], weights, which.astype(np.int32))
