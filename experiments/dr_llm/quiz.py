"""Questions with known answers, and whether a model that runs each along its own labels answers them.

Legend: N questions, R rows that are read, S positions, P prompt positions, A answer tokens of a row, L layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.evaluation.scoring import bucket
from experiments.finetune import Base
from moe.depth.execute import forward_along
from moe.depth.paths import Path, labels_of
from moe.depth.scanned import agreed_forward, masked_forward
from moe.generate import Weights, unstacked


class Rows(NamedTuple):
    """What is read, an answer laid after its prompt.

    Attributes:
      tokens: [R, S] int32, of which `lengths` [R] are real.
      where, targets: [R, A] int32: after position `where` the answer goes on with `targets`.
      weights: [R, A] float32, 0 for padding.
      option: [R, A] int32, of which option the target is a part.
      question: [R] int32.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    where: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    option: np.ndarray
    question: np.ndarray

    def take(self, index: np.ndarray) -> Rows:
        return Rows(*(leaf[index] for leaf in self))

    def cropped(self) -> Rows:
        """Without columns that only hold padding, but for one of few widths."""
        return self._replace(tokens=self.tokens[:, : bucket(int(self.lengths.max()))])


@dataclass(frozen=True)
class Quiz:
    """Attributes:
    rows: of all questions.
    prompts, lengths: [N, P] int32 and [N]: what routers read.
    answers: (task, right answer) of each question.
    written: [N], tokens that are generated for an answer.
    options: [N], the right option, the likeliest of which is the model's answer; None: an answer is written greedily.
    """

    rows: Rows
    prompts: np.ndarray
    lengths: np.ndarray
    answers: tuple[tuple[Any, Any], ...]
    written: np.ndarray
    options: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def majority(self) -> float:
        """Share of right answers of who knows each task's commonest answer."""
        commonest: dict[Any, int] = {}
        for (task, _), count in Counter(self.answers).items():
            commonest[task] = max(count, commonest.get(task, 0))
        return sum(commonest.values()) / len(self)


@dataclass(frozen=True)
class Examiner:
    """Compares a base model's answers with the gold answers.

    Attributes:
      base: the frozen model.
      quiz: its questions.
      batch_size: most rows of a pass.
      mixed: whether different paths go in one pass, in which every block runs twice and no row is alone (right for
        small models, where passes are dear); else one path at a time, and what is skipped is not run.
    """

    base: Base
    quiz: Quiz
    batch_size: int
    mixed: bool = True

    def right(self, labels: np.ndarray) -> np.ndarray:
        """[N] bool: question n along labels[n], [N, L]."""
        return self.rewards([(n, tuple(row)) for n, row in enumerate(np.asarray(labels).tolist())])

    def rewards(self, asked: Sequence[tuple[int, tuple[int, ...]]]) -> np.ndarray:
        """[n] bool, whether each (question, labels) gives the right answer; equal labels go together."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, (_, labels) in enumerate(asked):
            groups.setdefault(labels, []).append(place)
        passes, others = [], []
        for places in groups.values():
            if not self.mixed or len(places) * 4 >= self.batch_size:
                passes.append((places, False))
            else:
                others += places
        found = np.zeros(len(asked), bool)
        for places, mixed in [*passes, *([(others, True)] if others else [])]:
            questions = np.array([asked[place][0] for place in places])
            labels = np.array([asked[place][1] for place in places], np.int32)
            found[places] = self._judged(questions, labels, mixed)
        return found

    def along(self, question: int, path: Path) -> bool:
        """The same along any path, as those of the released search, which may run a block more than twice."""
        part = self.quiz.rows.take(np.flatnonzero(self.quiz.rows.question == question))
        rows = jnp.asarray(part.tokens), jnp.asarray(part.lengths)
        hidden = forward_along(self.base.config, self._weights, path, *rows)
        hits, nats = _scores(hidden, jnp.transpose(self._weights.head), part.where, part.targets)
        return bool(self._answers(np.array([question]), np.zeros(len(part.tokens), int), part, hits, nats)[0])

    @cached_property
    def _weights(self) -> Weights:
        return unstacked(self.base.config, self.base.params, self.base.router_state)

    def _judged(self, questions: np.ndarray, labels: np.ndarray, mixed: bool) -> np.ndarray:
        """[n] bool of questions [n] along labels [n, L], `batch_size` rows at a time, padded to a power of two."""
        rows = self.quiz.rows
        if len(rows.tokens) == len(self.quiz):
            place, index = np.arange(len(questions)), questions
        else:
            pairs = [(i, row) for i, n in enumerate(questions) for row in np.flatnonzero(rows.question == n)]
            place, index = np.array(pairs).T
        hits, nats, least = [], [], max(1, self.batch_size // 4) if self.mixed else 1  # few sizes are compiled
        for first in range(0, len(index), self.batch_size):
            count = len(index[first : first + self.batch_size])
            size = min(self.batch_size, max(least, 1 << (count - 1).bit_length()))
            chosen = np.resize(np.arange(first, first + count), size)
            part, of_part = rows.take(index[chosen]).cropped(), labels[place[chosen]]
            found = _judge(self.base, part, of_part if mixed else of_part[0], mixed)
            hits.append(found[0][:count])
            nats.append(found[1][:count])
        part = rows.take(index)
        return self._answers(questions, place, part, np.concatenate(hits), np.concatenate(nats))

    def _answers(self, questions: np.ndarray, place: np.ndarray, part: Rows, hits: Any, nats: Any) -> np.ndarray:
        """From each row's tokens, [R, A], to each place's answer."""
        hits, nats = np.asarray(hits), np.asarray(nats, np.float64)
        if self.quiz.options is None:
            return np.all(hits | (part.weights == 0), axis=1)
        counted = part.weights > 0
        scores = np.zeros((len(questions), part.option.max() + 1))
        asked = np.zeros(scores.shape, bool)
        at = np.broadcast_to(place[:, None], counted.shape)[counted], part.option[counted]
        np.add.at(scores, at, nats[counted])
        asked[at] = True
        return np.where(asked, scores, np.inf).argmin(axis=1) == self.quiz.options[questions]


def _judge(base: Base, rows: Rows, labels: np.ndarray, mixed: bool) -> tuple[np.ndarray, np.ndarray]:
    forward = masked_forward if mixed else agreed_forward
    config, params, state = base
    out = forward(config, params, state, jnp.asarray(rows.tokens), jnp.asarray(rows.lengths), labels)
    hits, nats = _scores(out.hidden, out.head, rows.where, rows.targets)
    return np.asarray(hits), np.asarray(nats)


@jax.jit
def _scores(hidden: Array, head: Array, where: Array, targets: Array) -> tuple[Array, Array]:
    """Whether each target [R, A] is the likeliest token, and its nats."""
    of_answer = jnp.take_along_axis(hidden, where[..., None], axis=1)
    logits = jnp.einsum("rad,vd->rav", of_answer, head.astype(hidden.dtype)).astype(jnp.float32)
    log_p = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.argmax(logits, axis=-1) == targets, jax.nn.logsumexp(logits, axis=-1) - log_p


def evaluator(examiner: Examiner, first: int) -> Any:
    """`moe.depth.search.search_all`'s evaluation, question 0 of the search being question `first` of the quiz."""
    layers = examiner.base.config.num_layers

    def evaluate(pairs: Sequence[tuple[int, Path]]) -> list[float]:
        plain = [i for i, (_, path) in enumerate(pairs) if _has_labels(path)]
        asked = [(first + pairs[i][0], labels_of(pairs[i][1], layers)) for i in plain]
        found = dict(zip(plain, examiner.rewards(asked).tolist()))
        return [
            float(found[i] if i in found else examiner.along(first + question, path))
            for i, (question, path) in enumerate(pairs)
        ]

    return evaluate


def _has_labels(path: Path) -> bool:
    return all(path.count(layer) <= 2 for layer in set(path))
