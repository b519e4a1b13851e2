"""Log-probabilities of chosen tokens: of every token of a window, or of an option after its prompt.

Only the positions that are asked for meet the output head, so no [B, S, V] logits exist. Rows are padded to a few
lengths, so that few programs are compiled.

Legend: B rows of a pass, S positions, d hidden width, V vocabulary, R requests (a position and the token it predicts).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from experiments.evaluation.text import Windows
from kernels.cross_entropy import token_nll
from moe.config import ModelConfig, require
from moe.transformer import Transformer

Advance = Callable[[int], None]  # told how many tokens a pass has read
_FINE, _COARSE = 32, 128


def bucket(length: int) -> int:
    """The padded length: multiples of 32 to 128, of 128 to 1024, then powers of two."""
    if length <= 1024:
        step = _FINE if length <= _COARSE else _COARSE
        return max(step, -(-length // step) * step)
    return 1 << (length - 1).bit_length()


@partial(jax.jit, static_argnames="config")
def _hidden(config: ModelConfig, params: Any, router_state: Any, tokens: Array, segment_ids: Array, positions: Array):
    """[B * S, d]"""
    out: Any = Transformer(config).apply({"params": params}, tokens, segment_ids, positions, router_state, None)
    return out.hidden.reshape(-1, out.hidden.shape[-1])


@jax.jit
def _nll(hidden: Array, head: Array, where: Array, targets: Array) -> Array:
    """[R] of hidden [B * S, d] at where [R]."""
    return token_nll(hidden[where], head.astype(hidden.dtype), targets)


@dataclass(frozen=True)
class Request:
    """Wanted of one row: nll of `targets` after the positions `where` of `inputs`; `tag` says whose they are."""

    inputs: tuple[int, ...]
    where: tuple[int, ...]
    targets: tuple[int, ...]
    tag: Any


class Scorer:
    """Scores with one model.

    Args:
      batch_size: B, rows of one pass.
    """

    def __init__(self, config: ModelConfig, params: Any, router_state: Any, batch_size: int):
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        self.config, self.params, self.router_state, self.batch_size = config, params, router_state, batch_size
        self.head = params["embedding"] if config.tie_embeddings else params["head"]

    def hidden(self, tokens: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray) -> Array:
        """[B * S, d]"""
        return _hidden(self.config, self.params, self.router_state, tokens, segment_ids, positions)

    def nll(self, tokens: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray, where: np.ndarray,
            targets: np.ndarray) -> np.ndarray:
        """nats [R], float64, of targets [R] at the flat positions where [R] of one pass [B, S]."""
        hidden = self.hidden(tokens, segment_ids, positions)
        size = max(32, 1 << (len(where) - 1).bit_length())
        padded = (np.pad(x, (0, size - len(x))).astype(np.int32) for x in (where, targets))
        return np.asarray(_nll(hidden, self.head, *padded))[: len(where)].astype(np.float64)

    def total_nll(self, text: Windows, advance: Advance = lambda tokens: None) -> float:
        """Sum of nats over all tokens that count."""
        total = 0.0
        for first in range(0, len(text.tokens), self.batch_size):
            part = [x[first : first + self.batch_size] for x in text[:4]]
            count = len(part[0])
            tokens, targets, segments, positions = (np.pad(x, ((0, self.batch_size - count), (0, 0))) for x in part)
            where = np.flatnonzero(segments.ravel())
            total += self.nll(tokens, segments, positions, where, targets.ravel()[where]).sum()
            advance(tokens[:count].size)
        return total

    def run(self, requests: Sequence[Request], advance: Advance = lambda tokens: None) -> dict[Any, float]:
        """Sum of nats for each tag. Requests with the same inputs share a row; rows are passed shortest first."""
        shared: dict[tuple[int, ...], list[Request]] = {}
        for request in requests:
            shared.setdefault(request.inputs, []).append(request)
        rows = sorted(shared.items(), key=lambda row: len(row[0]))
        sums: dict[Any, float] = {}
        while rows:
            length = bucket(len(rows[0][0]))
            batch = [row for row in rows[: self.batch_size] if bucket(len(row[0])) == length]
            rows = rows[len(batch) :]
            sums |= self._pass(batch, length)
            advance(sum(len(inputs) for inputs, _ in batch))
        return sums

    def _pass(self, batch: list[tuple[tuple[int, ...], list[Request]]], length: int) -> dict[Any, float]:
        tokens, segments = np.zeros((2, self.batch_size, length), np.int32)
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
        where, targets, owners = [], [], []
        for i, (inputs, asked) in enumerate(batch):
            tokens[i, : len(inputs)], segments[i, : len(inputs)] = inputs, 1
            for request in asked:
                where += [i * length + position for position in request.where]
                targets += request.targets
                owners += [request.tag] * len(request.where)
        nll = self.nll(tokens, segments, positions, np.array(where), np.array(targets))
        sums: dict[Any, float] = {}
        for tag, value in zip(owners, nll.tolist()):
            sums[tag] = sums.get(tag, 0.0) + value
        return sums


def option_requests(prompt: Sequence[int], wholes: Sequence[Sequence[int]], tag: Any) -> list[Request]:
    """One request for each option of a prompt; its tag is (tag, index).

    A tokenizer may join the prompt's last characters with an option's first. What the prompt and all its continuations
    begin with is context, what follows in each continuation is scored: then sums compare the same text.

    Args:
      prompt: its tokens.
      wholes: tokens of the prompt with each option.
    """
    require(len(prompt) > 0, "prompt", list(prompt), "at least one token")
    shared = min(_common(prompt, whole) for whole in wholes)
    require(shared > 0, "prompt", list(prompt), "a beginning that all options share")
    requests = []
    for i, whole in enumerate(wholes):
        require(len(whole) > shared, f"option {i}", list(whole), "tokens beyond the prompt's")
        requests.append(Request(tuple(whole[:-1]), tuple(range(shared - 1, len(whole) - 1)), tuple(whole[shared:]),
                                (tag, i)))
    return requests


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
