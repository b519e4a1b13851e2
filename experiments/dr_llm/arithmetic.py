"""Chains of one to four numbers, and a small decoder that learns them: the base of the small reproduction.

    F n_1 o_1 n_2 ... n_k = a_1 a_2 END        n a digit, o one of + - x, a_1 a_2 the result modulo 100

Two digits, so that few paths are right by luck. The token F is the form: `left` is worked out from the left, `right`
from the right. The base learns both. Searching and routing see `left` alone, so that `right` is known to the base and
new to routers; `long` is `left` with five numbers, new to both.

Questions are split by a hash of their numbers and operators, whatever the form: those of `train` the base learns,
routers learn from `validation`, and `test` is for the end. A sample is a function of (split, seed, form, index) alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array

from experiments.config import OptimizerConfig
from experiments.data.shards import SPLITS
from experiments.dr_llm.quiz import Examiner, Quiz, Rows
from experiments.experiment import StudyProgress
from experiments.finetune import Base
from experiments.overrides import flatten
from experiments.step import make_optimizer
from experiments.stepping import stepped
from experiments.tasks.symbolic import mixed_bits, split_codes
from moe.config import ModelConfig, require
from moe.transformer import Transformer, init_params
from parallel.checkpoint import Checkpoints

BASE, MODULUS = 10, 100
PAD, END, EQUALS = 0, 1, 2
FORMS = ("left", "right")
FIRST_FORM, FIRST_OPERATOR, ZERO = 3, 5, 8
VOCAB = ZERO + BASE
MOST, LONG = 4, 5
WRITTEN = 3  # tokens of an answer, END among them
WIDTH = 2 * LONG + 1 + WRITTEN  # form, 2 k - 1 numbers and operators, =, answer
KINDS: Mapping[str, tuple[str, int, int]] = {  # form, fewest and most numbers
    "left": ("left", 1, MOST), "right": ("right", 1, MOST), "long": ("left", LONG, LONG),
}  # fmt: skip


class Chains(NamedTuple):
    """counts [N], numbers [N, 5] and operators [N, 4], 0 + 1 x 2 being add, subtract and multiply."""

    counts: np.ndarray
    numbers: np.ndarray
    operators: np.ndarray

    @property
    def codes(self) -> np.ndarray:
        """[N] uint64, one for each question."""
        code = np.zeros(len(self.counts), np.uint64)
        for i in range(LONG):
            used = i < self.counts
            operator = self.operators[:, i - 1] + 1 if i else np.zeros_like(self.counts)
            digit = np.where(used, 1 + self.numbers[:, i] + BASE * operator, 0)
            code = code * np.uint64(1 + 4 * BASE) + digit.astype(np.uint64)
        return code


def chains(split: str, seed: int, kind: str, indices: np.ndarray) -> Chains:
    """The samples `indices` of a kind in one split.

    Raises:
      ValueError: an unknown split or kind.
    """
    require(split in SPLITS, "split", split, f"one of {', '.join(SPLITS)}")
    require(kind in KINDS, "kind", kind, f"one of {', '.join(KINDS)}")
    _, fewest, most = KINDS[kind]
    mark = list(KINDS).index(kind)
    size = len(indices)
    found = Chains(np.zeros(size, np.int64), np.zeros((size, LONG), np.int64), np.zeros((size, LONG - 1), np.int64))
    missing, attempt = np.arange(size), 0
    while len(missing):
        draw = lambda what: mixed_bits(seed, mark, indices[missing], attempt, what)  # noqa: B023, E731
        drawn = Chains(
            (fewest + draw(0) % np.uint64(most - fewest + 1)).astype(np.int64),
            np.stack([draw(1 + i) % np.uint64(BASE) for i in range(LONG)], axis=1).astype(np.int64),
            np.stack([draw(9 + i) % np.uint64(3) for i in range(LONG - 1)], axis=1).astype(np.int64),
        )
        for leaf, new in zip(found, drawn):
            leaf[missing] = new
        missing, attempt = missing[split_codes(drawn.codes) != SPLITS.index(split)], attempt + 1
    return found


def answers(form: str, of: Chains) -> np.ndarray:
    """[N]"""
    values = np.zeros(len(of.counts), np.int64)
    for count in np.unique(of.counts):
        rows = of.counts == count
        numbers, operators = of.numbers[rows, :count].T, of.operators[rows, : count - 1].T
        if form == "right":
            total = numbers[-1]
            for number, operator in zip(numbers[-2::-1], operators[::-1]):
                total = _applied(operator, number, total) % MODULUS
        else:
            total = numbers[0]
            for number, operator in zip(numbers[1:], operators):
                total = _applied(operator, total, number) % MODULUS
        values[rows] = total % MODULUS
    return values


def _applied(operator: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.choose(operator, [left + right, left - right, left * right])


def text(form: str, of: Chains) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [N, WIDTH] with the answer, and how many precede the answer, [N]."""
    size = len(of.counts)
    tokens = np.full((size, WIDTH), PAD, np.int32)
    tokens[:, 0] = FIRST_FORM + FORMS.index(form)
    for i in range(LONG):
        tokens[:, 1 + 2 * i] = np.where(i < of.counts, ZERO + of.numbers[:, i], PAD)
        if i < LONG - 1:
            tokens[:, 2 + 2 * i] = np.where(i < of.counts - 1, FIRST_OPERATOR + of.operators[:, i], PAD)
    every, prompt = np.arange(size), 2 * of.counts + 1
    tokens[every, prompt - 1] = EQUALS
    tens, units = divmod(answers(form, of), BASE)
    for place, token in enumerate((ZERO + tens, ZERO + units, END)):
        tokens[every, prompt + place] = token
    return tokens, prompt


def quiz(split: str, seed: int, kind: str, count: int) -> Quiz:
    """The first `count` distinct questions of a kind in one split; an answer is three tokens."""
    form, drawn, size = KINDS[kind][0], 2 * count, 0
    while size < count:
        of = chains(split, seed, kind, np.arange(drawn))
        _, first = np.unique(of.codes, return_index=True)
        size, drawn = len(first), 2 * drawn
    tokens, prompt = text(form, Chains(*(leaf[np.sort(first)[:count]] for leaf in of)))  # pyright: ignore
    where = prompt[:, None] - 1 + np.arange(WRITTEN, dtype=np.int64)[None]
    targets = np.take_along_axis(tokens, where + 1, axis=1)
    weights, option, question = np.ones(where.shape, np.float32), np.zeros(where.shape, np.int32), np.arange(count)
    lengths = (prompt + WRITTEN - 1).astype(np.int32)
    rows = Rows(tokens[:, :-1], lengths, where.astype(np.int32), targets, weights, option, question.astype(np.int32))
    answered = tuple((form, tuple(answer)) for answer in targets.tolist())
    prompts = np.where(np.arange(WIDTH - WRITTEN)[None] < prompt[:, None], tokens[:, :-WRITTEN], PAD)
    return Quiz(rows, prompts, prompt.astype(np.int32), answered, np.full(count, WRITTEN))


@dataclass(frozen=True)
class Arithmetic:
    """Attributes:
    pretraining, steps, batch: of the base; three quarters of each batch are `left`.
    search_questions, test_questions: most questions that are searched for supervision, and that are tested.
    others: kinds that routers have not seen, for which the change of accuracy is told; one that the base does not know
      by `margin` above its commonest answer, on as many validation questions, is dropped and named.
    size: most rows of a pass of search.
    """

    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            vocab_size=VOCAB, hidden=64, num_layers=8, num_heads=4, num_kv_heads=4, head_dim=16, ffn_dim=176,
            moe=None, tie_embeddings=True, init_std=0.1,
        )
    )
    pretraining: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=3e-3, warmup_steps=100, weight_decay=0.01)
    )
    steps: int = 1200
    batch: int = 128
    search_questions: int = 768
    test_questions: int = 384
    others: tuple[str, ...] = ("right", "long")
    margin: float = 0.05
    size: int = 512

    def check(self) -> None:
        for kind in self.others:
            require(kind in KINDS and kind != "left", "world.others", kind, f"some of {', '.join(KINDS)}, not left")
        require(self.batch % 4 == 0, "world.batch", self.batch, "a multiple of 4")

    def config(self) -> ModelConfig:
        return self.model

    @property
    def mixed(self) -> bool:
        return True

    def passing(self, base: Base, seed: int) -> tuple[tuple[str, ...], dict[str, tuple[float, float]]]:
        """The one task, that the base knows it is a claim; and (accuracy, share of the commonest answer) of `others`,
        on the validation split."""
        shares = {}
        for kind in self.others:
            asked = quiz("validation", seed, kind, self.test_questions)
            full = np.ones((len(asked), self.model.num_layers), int)
            right = Examiner(base, asked, self.size, self.mixed).right(full)
            shares[kind] = (round(float(right.mean()), 4), round(asked.majority, 4))
        return ("left",), shares

    @property
    def longest(self) -> int:
        return WIDTH - 1

    def search_seed(self, seed: int) -> int:
        """Every seed has its own base and its own questions."""
        return seed

    def quiz(self, name: str, seed: int) -> Quiz:
        """`search`, `test`, or a kind of `others`."""
        if name == "search":
            return quiz("validation", seed, "left", self.search_questions)
        return quiz("test", seed, "left" if name == "test" else name, self.test_questions)

    def base(self, seed: int, folder: Path, progress: StudyProgress) -> Base:
        """The model of a seed, trained in `folder` unless it is there. KeyboardInterrupt once it is saved."""
        tx = make_optimizer(self.pretraining, self.steps)
        mark = flatten(self) | {"seed": seed}
        with Checkpoints(folder / "checkpoints", fingerprint=mark) as saved:
            params = jax.jit(partial(init_params, self.model))(jax.random.key(seed))
            state = BaseState(jnp.int32(0), params, tx.init(params))
            if saved.latest() is not None:
                state = saved.restore(state)
            one = lambda state, step: _train_step(self.model, tx, state, *self.training_rows(seed, step))  # noqa: E731
            state = stepped(state, one, self.steps, saved, folder, progress=partial(self.told, progress))
        return Base(self.model, state.params, {})

    def told(self, progress: StudyProgress, step: int, metrics: dict[str, float]) -> None:
        if step % 50 == 0:
            progress(step, f"base: step {step} of {self.steps}, loss {metrics['loss']:.3f}")

    def training_rows(self, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [B, S] of one step, and the positions [B] before the answers."""
        parts = []
        for form, share in zip(FORMS, (3, 1)):
            size = self.batch * share // 4
            parts.append(text(form, chains("train", seed, form, np.arange(step * size, (step + 1) * size))))
        tokens, prompt = (np.concatenate(leaves) for leaves in zip(*parts))
        return tokens[:, : 2 * MOST + 1 + WRITTEN], (prompt - 1).astype(np.int32)


@struct.dataclass
class BaseState:
    """What a checkpoint of the base holds: finished steps, parameters, moments."""

    step: Array
    params: Any
    opt_state: Any


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _train_step(
    config: ModelConfig, tx: Any, state: BaseState, tokens: Array, before: Array
) -> tuple[BaseState, dict[str, Array]]:
    """One step on tokens [B, S + 1], of which only the answers, after position `before` [B], are learned:
    prompts are random."""

    def loss_of(params: Any) -> Array:
        read = tokens[:, :-1]
        positions = jnp.broadcast_to(jnp.arange(read.shape[1], dtype=jnp.int32)[None], read.shape)
        segments = (positions < before[:, None] + WRITTEN).astype(jnp.int32)
        out: Any = Transformer(config).apply({"params": params}, read, segments, positions, {}, None)
        where = before[:, None] + jnp.arange(WRITTEN)[None]
        of_answer = jnp.take_along_axis(out.hidden, where[..., None], axis=1)
        logits = jnp.einsum("bad,vd->bav", of_answer, out.head)
        targets = jnp.take_along_axis(tokens, where + 1, axis=1)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return BaseState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), {"loss": loss}
