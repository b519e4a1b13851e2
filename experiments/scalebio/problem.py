"""What weights of a corpus' domains are searched for: a dense language model, its losses by source, and a budget.

Legend: A passes, B sequences of one, S positions, K sources (the corpus' domains).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments.config import RunConfig
from experiments.step import Batch, make_optimizer, targets_of
from experiments.weighted_loss import token_losses
from moe.active_layers import active_forward
from moe.config import require
from moe.transformer import Transformer
from optim.bilevel import Loss
from optim.domain_weights import domain_sums
from optim.parts import ActiveLayers

FORWARD = 1 / 3  # of a forward-backward pass
Metrics = dict[str, Array]


class Method(NamedTuple):
    """A search. `init(params) -> state`, `step(state, batch, validation) -> (state, metrics)`, `weights(state) -> [K]`.

    Batches have leaves [A, B, ...], of every source as many samples. `steps` of `passes` forward-backward passes over a
    batch each; none for fixed weights, whose state is nothing.
    """

    init: Callable[[Any], Any]
    step: Callable[[Any, Batch, Batch], tuple[Any, Metrics]]
    weights: Callable[[Any], Array]
    steps: int
    passes: float


@dataclass(frozen=True)
class Problem:
    """Attributes:
      run: whose model, data and optimiser these are. Dense: a loss is a function of parameters and batch alone.
      tokens: of each source's training split.
      budget: forward-backward passes over one batch that a method has.
    """

    run: RunConfig
    tokens: tuple[int, ...]
    budget: float

    def __post_init__(self) -> None:
        require(self.run.model.moe is None, "run.model.moe", self.run.model.moe, "none: a search is of a dense model")
        plain = not self.run.reweighting.strategy
        require(plain, "run.reweighting.strategy", self.run.reweighting.strategy, "none: sources are weighed here")
        require(not self.run.data.weights, "run.data.weights", self.run.data.weights, "none: they are what is found")
        require(self.num_sources >= 2, "run.data.domains", self.num_sources, "at least 2 domains to weigh")

    @property
    def num_sources(self) -> int:
        return len(self.tokens)

    @property
    def inner(self) -> Loss:
        """(parameters, batch [B, ...]) -> nats [K] and tokens [K] by source."""
        return functools.partial(source_losses, self)

    @property
    def outer(self) -> Loss:
        """(parameters, batch [B, ...]) -> nats and tokens."""
        return functools.partial(summed_loss, self)

    def affordable(self, passes: float, share: float = 1.0) -> int:
        """Steps of so many passes that a share of the budget pays for. ValueError if that is none."""
        steps = int(share * self.budget / passes + 1e-6)
        require(steps >= 1, "budget", self.budget, f"at least {passes / share:.3g} passes, for a step of this method")
        return steps

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """The run's own, its schedule over these steps."""
        return make_optimizer(self.run.optimizer, steps)


def losses_of(problem: Problem, params: Any, batch: Batch) -> tuple[Array, Array]:
    """Negative log-likelihoods and weights [B, S] of next tokens; `params` may be a view of `optim.parts`."""
    config = problem.run.model
    inputs = batch["tokens"][:, :-1], batch["segment_ids"][:, :-1], batch["positions"][:, :-1]
    out: Any
    if isinstance(params, ActiveLayers):
        out = active_forward(config, *params, *inputs, {}, None)
    else:
        out = Transformer(config).apply({"params": params}, *inputs, {}, None)
    targets, weights = targets_of(batch)
    return token_losses(out, targets), weights


def source_losses(problem: Problem, params: Any, batch: Batch) -> tuple[Array, Array]:
    nll, weights = losses_of(problem, params, batch)
    return domain_sums(nll, batch["domain"], problem.num_sources, weights > 0)


def summed_loss(problem: Problem, params: Any, batch: Batch) -> tuple[Array, Array]:
    nll, weights = losses_of(problem, params, batch)
    return jnp.sum(nll * weights), jnp.sum(weights)


def mean_loss(problem: Problem, params: Any, batch: Batch) -> Array:
    total, count = summed_loss(problem, params, batch)
    return total / jnp.maximum(count, 1)


def mixed_loss(problem: Problem, weights: Array, params: Any, batch: Batch) -> Array:
    """sum_k weights[k] (mean loss of source k)."""
    sums, counts = source_losses(problem, params, batch)
    return jnp.dot(weights, sums / jnp.maximum(counts, 1))


def flat(batch: Batch) -> Batch:
    """Leaves [A, B, ...] as one pass [A B, ...], for methods without accumulation."""
    return {name: leaf.reshape(-1, *leaf.shape[2:]) for name, leaf in batch.items()}


class Model(NamedTuple):
    """Parameters and their optimiser's state."""

    params: Any
    opt_state: Any


def begun(tx: optax.GradientTransformation, params: Any) -> Model:
    params = jax.tree.map(jnp.copy, params)
    return Model(params, tx.init(params))


def descended(tx: optax.GradientTransformation, model: Model, grads: Any) -> Model:
    updates, opt_state = tx.update(grads, model.opt_state, model.params)
    return Model(optax.apply_updates(model.params, updates), opt_state)


def trained(problem: Problem, tx: optax.GradientTransformation, model: Model, batch: Batch) -> tuple[Model, Array]:
    """A step on the mean loss of all samples alike."""
    loss, grads = jax.value_and_grad(functools.partial(mean_loss, problem))(model.params, batch)
    return descended(tx, model, grads), loss
