"""Depth routers, taught by labels while execution follows the labels (Dr.LLM, 2510.12773).

The base and the labels stay, so what routers read is computed once; an epoch meets the small networks alone.

Legend: n questions, B rows, L layers, W windows, d hidden.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.config import OptimizerConfig
from experiments.dr_llm.quiz import Quiz
from experiments.dr_llm.supervision import Supervision
from experiments.finetune import Base
from experiments.step import make_optimizer
from moe.config import require
from moe.depth.losses import effective_number_weights, focal_loss
from moe.depth.policy import DepthPolicy
from moe.depth.router import DepthConfig, init_routers, stacked_logits
from moe.depth.scanned import decide, forced_windows


@dataclass(frozen=True)
class RouterTraining:
    """The paper's. AdamW, cosine to zero.

    Attributes:
      warmup: share of the steps (the paper's 500 are 8% of 25 epochs of 4000 questions).
      gamma, beta: of the focal loss, and of its class weights.
    """

    epochs: int = 25
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.08
    gamma: float = 2.0
    beta: float = 0.999

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "at least 1")
        require(0.0 <= self.warmup < 1.0, "training.warmup", self.warmup, "a share of the steps")

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        config = OptimizerConfig(
            learning_rate=self.learning_rate, warmup_steps=round(self.warmup * steps), final_fraction=0.0,
            weight_decay=self.weight_decay, b2=0.999,
        )  # fmt: skip
        return make_optimizer(config, steps)


def windows_of(
    base: Base, depth: DepthConfig, quiz: Quiz, taught: Supervision, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """What routers read of the kept questions along their labels: pooled [n, L, W, d] and valid [n, W]."""
    parts = []
    for first in range(0, len(taught.questions), size):
        chosen = _padded(np.arange(first, min(first + size, len(taught.questions))), size)
        questions = taught.questions[chosen]
        prompts = jnp.asarray(quiz.prompts[questions]), jnp.asarray(quiz.lengths[questions])
        parts.append(jax.device_get(forced_windows(base.config, depth, base.params, base.router_state, *prompts,
                                                   taught.labels[chosen])))  # fmt: skip
    pooled, valid = (np.concatenate(leaves)[: len(taught.questions)] for leaves in zip(*parts))
    return pooled, valid


def train_routers(
    base: Base, depth: DepthConfig, training: RouterTraining, quiz: Quiz, taught: Supervision, size: int, seed: int
) -> Any:
    """Routers [L, ...] after `epochs` passes over the kept questions, in another order each time."""
    config = base.config
    pooled, valid = windows_of(base, depth, quiz, taught, size)
    batch = min(training.batch_size, len(pooled))
    per_epoch = len(pooled) // batch
    weights = tuple(class_weights(taught.class_counts, training.beta).tolist())
    tx = training.optimizer(training.epochs * per_epoch)
    routers = init_routers(depth, config.hidden, config.num_layers, jax.random.key(seed))
    state = routers, tx.init(routers)
    epoch = jax.jit(functools.partial(_epoch, depth, tx, training.gamma, weights))
    data = jnp.asarray(pooled), jnp.asarray(valid), jnp.asarray(taught.labels)
    for number in range(training.epochs):
        order = np.random.default_rng([seed, number]).permutation(len(pooled))
        state = epoch(state, data, order[: per_epoch * batch].reshape(per_epoch, batch))
    return state[0]


def class_weights(counts: np.ndarray, beta: float) -> np.ndarray:
    """Effective-number weights [3] of mean 1 over the classes that occur; 0 for the others, which no label is."""
    weights = np.zeros(len(counts))
    weights[counts > 0] = effective_number_weights(counts[counts > 0], beta)
    return weights


def _epoch(
    depth: DepthConfig, tx: Any, gamma: float, weights: tuple[float, ...], state: Any, data: Any, order: Array
) -> Any:
    """Steps over the rows `order` [steps, B] of data (pooled, valid, labels)."""

    def step(state: Any, rows: Array) -> tuple[Any, None]:
        routers, moments = state
        pooled, valid, labels = (leaf[rows] for leaf in data)
        loss = lambda routers: focal_loss(stacked_logits(depth, routers, pooled, valid), labels, gamma, weights)  # noqa: E731
        updates, moments = tx.update(jax.grad(loss)(routers), moments, routers)
        return (optax.apply_updates(routers, updates), moments), None

    return jax.lax.scan(step, state, order)[0]


def decided(base: Base, depth: DepthConfig, routers: Any, knob: float, quiz: Quiz, size: int) -> np.ndarray:
    """The routers' labels [N, L] of all questions, from their prompts alone."""
    parts, policy = [], DepthPolicy(knob)
    for first in range(0, len(quiz), size):
        chosen = _padded(np.arange(first, min(first + size, len(quiz))), size)
        prompts = jnp.asarray(quiz.prompts[chosen]), jnp.asarray(quiz.lengths[chosen])
        found = decide(base.config, depth, base.params, base.router_state, routers, policy, *prompts)
        parts.append(np.asarray(found.labels))
    return np.concatenate(parts)[: len(quiz)]


def quality(
    base: Base, depth: DepthConfig, routers: Any, quiz: Quiz, taught: Supervision, size: int
) -> dict[str, float]:
    """How often routers give the labels of questions they were not taught, execution following the labels."""
    pooled, valid = windows_of(base, depth, quiz, taught, size)
    logits = jax.jit(stacked_logits, static_argnums=0)(depth, routers, pooled, valid)
    guessed = np.asarray(jnp.argmax(logits, axis=-1))
    return {"macro_f1": macro_f1(guessed, taught.labels), "layer_accuracy": float(np.mean(guessed == taught.labels))}


def macro_f1(guessed: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes that occur, as label or guess, of 2 hits / (labels + guesses)."""
    scores = []
    for one in range(3):
        hits, total = np.sum((guessed == one) & (labels == one)), np.sum(guessed == one) + np.sum(labels == one)
        if total:
            scores.append(2.0 * hits / total)
    return float(np.mean(scores))


def _padded(index: np.ndarray, size: int) -> np.ndarray:
    """As many again, so that one shape is compiled."""
    return np.resize(index, size)
