"""RHO-loss and LESS as searches: they select samples, and the sources' shares of what was selected are the weights.

Legend: K sources, B sequences.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments.scalebio.problem import (
    FORWARD,
    Method,
    Metrics,
    Model,
    Problem,
    begun,
    flat,
    losses_of,
    mean_loss,
    trained,
)
from experiments.step import Batch
from moe.config import require
from optim import selection


class Rho(NamedTuple):
    """A model of validation data, the model that selects, how often each source was selected [K], finished steps."""

    holdout: Model
    model: Model
    chosen: Array
    step: Array


def rho(problem: Problem, share: float = 0.25) -> Method:
    """RHO-loss: a model of validation data gives the irreducible loss, for a third of the budget; then of each batch
    the `share` with the highest reducible loss trains a model: two forward passes, one pass over the share.
    """
    require_share(share)
    passes = 2 * FORWARD + share
    holdout_steps, steps = problem.affordable(1.0, 1 / 3), problem.affordable(passes, 2 / 3)
    holdout_tx, tx = problem.optimizer(holdout_steps), problem.optimizer(steps)
    keep = max(1, round(share * problem.run.batch_size))

    def init(params: Any) -> Rho:
        return Rho(begun(holdout_tx, params), begun(tx, params), jnp.zeros(problem.num_sources), jnp.int32(0))

    def first(state: Rho, batch: Batch, validation: Batch) -> tuple[Rho, Array]:
        del batch
        holdout, loss = trained(problem, holdout_tx, state.holdout, validation)
        return state._replace(holdout=holdout), loss

    def second(state: Rho, batch: Batch, validation: Batch) -> tuple[Rho, Array]:
        del validation
        own, irreducible = (sequence_means(problem, of.params, batch) for of in (state.model, state.holdout))
        index = selection.top(selection.reducible_loss(own, irreducible), keep)
        kept = {name: leaf[index] for name, leaf in batch.items()}
        model, loss = trained(problem, tx, state.model, kept)
        chosen = state.chosen + jnp.bincount(kept["domain"], length=problem.num_sources)
        return state._replace(model=model, chosen=chosen), loss

    def step(state: Rho, batch: Batch, validation: Batch) -> tuple[Rho, Metrics]:
        is_first = state.step < holdout_steps
        state, loss = jax.lax.cond(is_first, first, second, state, flat(batch), flat(validation))
        return state._replace(step=state.step + 1), {"loss": loss}

    total = holdout_steps + steps
    return Method(init, step, lambda state: shares(state.chosen), total, (holdout_steps + steps * passes) / total)


def require_share(share: float) -> None:
    require(0 < share <= 1, "method: share", share, "above 0, at most 1")


def sequence_means(problem: Problem, params: Any, batch: Batch) -> Array:
    """Mean loss of each sequence [B]."""
    nll, mask = losses_of(problem, params, batch)
    return jnp.sum(nll * mask, 1) / jnp.maximum(jnp.sum(mask, 1), 1)


def shares(counts: Array) -> Array:
    """Counts [K] over their sum; uniform before there are any."""
    total = counts.sum()
    return jnp.where(total > 0, counts / jnp.maximum(total, 1), 1 / counts.shape[0])


class Influence(NamedTuple):
    """A model that warms up; scores and sources of the samples that were looked at, -inf elsewhere; finished steps."""

    model: Model
    scores: Array
    sources: Array
    step: Array


def influence(problem: Problem, share: float = 0.25) -> Method:
    """LESS with one checkpoint, no projection and samples' gradients unclipped: after a warm-up on uniform weights, for
    half of the budget, cosines of Adam's directions for single samples with the gradient of a batch of validation data.
    Two passes a step."""
    require_share(share)
    warm_steps, steps = problem.affordable(1.0, 0.5), problem.affordable(2.0, 0.5)
    tx, rows, of = problem.optimizer(warm_steps), problem.run.batch_size, problem.run.optimizer

    def init(params: Any) -> Influence:
        unseen = jnp.full((steps, rows), -jnp.inf), jnp.zeros((steps, rows), jnp.int32)
        return Influence(begun(tx, params), *unseen, jnp.int32(0))

    def first(state: Influence, batch: Batch, validation: Batch) -> tuple[Influence, Array]:
        del validation
        model, loss = trained(problem, tx, state.model, batch)
        return state._replace(model=model), loss

    def second(state: Influence, batch: Batch, validation: Batch) -> tuple[Influence, Array]:
        grad = functools.partial(jax.value_and_grad(functools.partial(mean_loss, problem)), state.model.params)
        adam: Any = adam_state(state.model.opt_state)
        lifted = lambda tree: jax.tree.map(lambda leaf: leaf[None], tree)  # noqa: E731
        loss, aim = grad(validation)
        target = selection.rows(lifted(aim))

        def score(sample: Batch) -> Array:
            gradient, moments = lifted(grad(lifted(sample))[1]), (adam.mu, adam.nu, adam.count)
            own = selection.adam_directions(gradient, *moments, b1=of.b1, b2=of.b2)
            return selection.cosines(selection.rows(own), target)[0, 0]

        row = state.step - warm_steps
        scores = state.scores.at[row].set(jax.lax.map(score, batch))
        sources = state.sources.at[row].set(batch["domain"])
        return state._replace(scores=scores, sources=sources), loss

    def step(state: Influence, batch: Batch, validation: Batch) -> tuple[Influence, Metrics]:
        is_first = state.step < warm_steps
        state, loss = jax.lax.cond(is_first, first, second, state, flat(batch), flat(validation))
        return state._replace(step=state.step + 1), {"loss": loss}

    def weights(state: Influence) -> Array:
        scores, sources = state.scores.reshape(-1), state.sources.reshape(-1)
        best = selection.top(scores, max(1, round(share * scores.size)))
        member = jax.nn.one_hot(sources[best], problem.num_sources) * jnp.isfinite(scores[best])[:, None]
        return shares(member.sum(0))

    total = warm_steps + steps
    return Method(init, step, weights, total, (warm_steps + 2 * steps) / total)


def adam_state(opt_state: Any) -> optax.ScaleByAdamState:
    """The one there is. ValueError otherwise."""
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(node)]
    require(len(found) == 1, "run.optimizer.name", len(found), "an optimiser with one Adam in it, for influence")
    return found[0]
