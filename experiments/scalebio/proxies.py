"""DoReMi and DoGE as searches: a proxy model trains on sources whose weights move with it; their mean is the result.

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
    descended,
    flat,
    losses_of,
    mean_loss,
    trained,
)
from experiments.step import Batch
from optim import domain_weights
from optim.adamw import warmup_cosine


class DoReMi(NamedTuple):
    """The reference, the proxy, the weights' state, finished steps."""

    reference: Model
    proxy: Model
    rule: domain_weights.DomainState
    step: Array


def doremi(problem: Problem, eta: float = 1.0, smoothing: float = 1e-3) -> Method:
    """DoReMi: a reference model on uniform weights, then a proxy that is trained as long: a pass a step for the
    first, a pass and the reference's forward for the second."""
    each = problem.affordable(2 + FORWARD)
    tx, rule = problem.optimizer(each), domain_weights.doremi(eta, smoothing)

    def init(params: Any) -> DoReMi:
        return DoReMi(begun(tx, params), begun(tx, params), rule.init(problem.num_sources), jnp.int32(0))

    def first(state: DoReMi, batch: Batch) -> tuple[DoReMi, Array]:
        reference, loss = trained(problem, tx, state.reference, batch)
        return state._replace(reference=reference), loss

    def second(state: DoReMi, batch: Batch) -> tuple[DoReMi, Array]:
        of_reference, domains = losses_of(problem, state.reference.params, batch)[0], batch["domain"]

        def loss_of(params: Any) -> tuple[Array, domain_weights.DomainState]:
            nll, mask = losses_of(problem, params, batch)
            now = jax.lax.stop_gradient(nll)
            excess = domain_weights.excess_loss(now, of_reference, domains, problem.num_sources, mask > 0)
            weights, rule_state = rule.update(*excess, state.rule)
            sums, counts = domain_weights.domain_sums(nll, domains, problem.num_sources, mask > 0)
            return jnp.dot(weights, sums / jnp.maximum(counts, 1)), rule_state

        (loss, rule_state), grads = jax.value_and_grad(loss_of, has_aux=True)(state.proxy.params)
        return state._replace(proxy=descended(tx, state.proxy, grads), rule=rule_state), loss

    def step(state: DoReMi, batch: Batch, validation: Batch) -> tuple[DoReMi, Metrics]:
        del validation
        state, loss = jax.lax.cond(state.step < each, first, second, state, flat(batch))
        return state._replace(step=state.step + 1), {"loss": loss}

    return Method(init, step, average, 2 * each, 1 + FORWARD / 2)


class DoGE(NamedTuple):
    """The proxy, the weights' state, finished steps."""

    proxy: Model
    rule: domain_weights.DomainState
    step: Array


def doge(problem: Problem, mu: float = 0.05) -> Method:
    """DoGE with a target: inner products of validation's gradient with every source's, each from its own samples; the
    released form of the estimate, over the mean norm and clipped. A pass over all sources and one over validation."""
    steps, of = problem.affordable(2.0), problem.run.optimizer
    tx, rule = problem.optimizer(steps), domain_weights.doge(mu)
    rate = warmup_cosine(of.learning_rate, of.warmup_steps, steps, of.final_fraction)

    def init(params: Any) -> DoGE:
        return DoGE(begun(tx, params), rule.init(problem.num_sources), jnp.int32(0))

    def step(state: DoGE, batch: Batch, validation: Batch) -> tuple[DoGE, Metrics]:
        grad = functools.partial(jax.value_and_grad(functools.partial(mean_loss, problem)), state.proxy.params)
        losses, grads = jax.lax.map(grad, grouped(flat(batch), problem.num_sources))
        aim = jax.tree.map(lambda leaf: leaf[None], grad(flat(validation))[1])
        present, norms = jnp.ones(problem.num_sources, bool), jax.vmap(optax.tree.norm)(grads)
        estimate = domain_weights.inner_products(grads, aim)[:, 0]
        estimate = domain_weights.released_estimate(estimate, norms, present)
        weights, rule_state = rule.update(estimate, present, rate(state.step), state.rule)
        mixed = jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1), grads)
        return DoGE(descended(tx, state.proxy, mixed), rule_state, state.step + 1), {"loss": jnp.mean(losses)}

    return Method(init, step, average, steps, 2.0)


def grouped(batch: Batch, num_sources: int) -> Batch:
    """Leaves [B, ...] as [K, B / K, ...] by source, of which the batch has as many samples each."""
    order = jnp.argsort(batch["domain"], stable=True)
    return {name: leaf[order].reshape(num_sources, -1, *leaf.shape[1:]) for name, leaf in batch.items()}


def average(state: Any) -> Array:
    return domain_weights.average_weights(state.rule)
