"""Weights of data domains that move while a small proxy model trains: DoReMi and DoGE.

DoReMi   up where the proxy is still worse than a reference model      (Xie et al., 2305.10429, algorithm 1)
DoGE     up where a domain's gradient also lowers the other domains' loss, or a target's
                                                                       (Fan et al., 2310.15393, algorithms 1 and 2)

Both are exponentiated gradient over S domains, log w += step * score, and hand over the mean of the weights over all
steps. Each is a pair as Optax has it, `init(S) -> state` and `update(..., state) -> (weights [S], state)`.
A domain that a batch lacks keeps its last score, as DoReMi's released code does: left out, its weight would fall behind
by its rarity alone. One not seen so far gets the mean of those that were, so it neither gains nor loses to them (the
released codes begin with 0, below every excess).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from optim.checks import require

MAX_SCORE, NORM_EPS = 5.0, 1e-6  # of DoGE's released code


class DomainState(NamedTuple):
    """`total` [S] sums the weights of `count` updates; `score` [S] is each domain's last, 0 until it is `seen` [S]."""

    log_weights: Array
    total: Array
    score: Array
    seen: Array
    count: Array


class DomainRule(NamedTuple):
    """`init(num_domains) -> DomainState`, `update(..., state) -> (weights [S], DomainState)`."""

    init: Callable[[int], DomainState]
    update: Callable[..., tuple[Array, DomainState]]


def average_weights(state: DomainState) -> Array:
    """Mean of the weights over all updates [S], what is trained with afterwards; the first weights before any."""
    mean = state.total / jnp.maximum(state.count, 1)
    return jnp.where(state.count > 0, mean, jnp.exp(state.log_weights))


def doremi(eta: float = 1.0, smoothing: float = 1e-3) -> DomainRule:
    """DoReMi: `update(excess [S], tokens [S], state)`, the sums of `excess_loss` over all of a step's tokens.

    lambda = excess / tokens; w' = w exp(eta lambda) / sum; w = (1 - c) w' + c / S (algorithm 1; eta = 1 and c = 1e-3
    there, c = 1e-4 in the released code). The proxy then takes its step on sum_i w_i * mean loss of domain i. The
    released code divides token weights by their sum over the batch instead, by which common domains count for more.

    Args:
      eta: step size of the weights.
      smoothing: c, the share of uniform weights mixed in.

    Raises:
      ValueError: bad options, fewer than two domains, other shapes than [S].
    """
    require(_finite(eta) and eta > 0, "eta", eta, "a finite number above 0")
    require_smoothing(smoothing)

    def update(excess: Array, tokens: Array, state: DomainState) -> tuple[Array, DomainState]:
        require_domains_shape("excess", excess, state)
        require_domains_shape("tokens", tokens, state)
        return _move(state, excess / jnp.maximum(tokens, 1), tokens > 0, eta, smoothing)

    return DomainRule(_init, update)


def doge(mu: float = 0.05, smoothing: float = 0.0) -> DomainRule:
    """DoGE: `update(estimate [S], present [S], learning_rate, state)`, the estimate being `generalization` of inner
    products between domains, or plainly those with a target's gradient.

    w = w exp(learning_rate * estimate / mu) / sum (algorithms 1 and 2), with the proxy's own learning rate. The proxy
    then takes its step on sum_j w_j grad l_j. What the released code makes of an estimate first: `released_estimate`.

    Args:
      mu: of the Bregman divergence: the greater, the slower. 0.05 in the released code.
      smoothing: share of uniform weights mixed in: 0 in paper and released code.

    Raises:
      ValueError: bad options, fewer than two domains, other shapes than [S].
    """
    require(_finite(mu) and mu > 0, "mu", mu, "a finite number above 0")
    require_smoothing(smoothing)

    def update(
        estimate: Array, present: Array, learning_rate: float | Array, state: DomainState
    ) -> tuple[Array, DomainState]:
        require_domains_shape("estimate", estimate, state)
        require_domains_shape("present", present, state)
        good = isinstance(learning_rate, Array) or (_finite(learning_rate) and learning_rate >= 0)
        require(good, "learning_rate", learning_rate, "a finite number, at least 0")
        return _move(state, estimate, present, learning_rate / mu, smoothing)

    return DomainRule(_init, update)


def domain_sums(values: Array, domains: Array, num_domains: int, mask: Array | None = None) -> tuple[Array, Array]:
    """Sums [S] and numbers [S] of `values` [B, ...] by domain; over devices or micro-batches both add up.

    Args:
      domains: whole numbers [B] or [B, ...], one for each row or each value. Outside [0, S) they raise where they can
        be read, and are dropped within jit.
      mask: like `values`; False is neither summed nor counted, whatever stands there.

    Raises:
      ValueError: shapes that do not fit, a domain outside [0, S), S < 2.
    """
    require_num_domains(num_domains)
    fits = 0 < domains.ndim <= values.ndim and domains.shape == values.shape[: domains.ndim]
    require(fits, "domains", domains.shape, f"a leading part of the values' shape {values.shape}")
    require(jnp.issubdtype(domains.dtype, jnp.integer), "domains", domains.dtype, "whole numbers")
    inside = isinstance(domains, Tracer) or domains.size == 0 or bool(jnp.all((domains >= 0) & (domains < num_domains)))
    require(inside, "domains", domains, f"each within [0, {num_domains})")
    require(mask is None or mask.shape == values.shape, "mask", getattr(mask, "shape", None), f"{values.shape}")
    keep = jnp.ones(values.shape, bool) if mask is None else mask.astype(bool)
    rows = lambda x: x.reshape(domains.size, -1).sum(1)  # noqa: E731
    ids = domains.reshape(-1)
    by_domain = lambda x: jax.ops.segment_sum(rows(x), ids, num_domains)  # noqa: E731
    return by_domain(jnp.where(keep, values, 0)), by_domain(keep.astype(values.dtype))


def excess_loss(
    proxy: Array, reference: Array, domains: Array, num_domains: int, mask: Array | None = None
) -> tuple[Array, Array]:
    """Sums [S] of max(proxy - reference, 0) over tokens and numbers of tokens [S], from losses per token [B, T].

    Raises:
      ValueError: as `domain_sums`; losses of different shapes.
    """
    require(proxy.shape == reference.shape, "reference", reference.shape, f"the proxy's shape {proxy.shape}")
    return domain_sums(jnp.maximum(proxy - reference, 0), domains, num_domains, mask)


def inner_products(gradients: Any, targets: Any) -> Array:
    """<gradient of domain i, gradient of target j> [S, T] of trees with leaves [S, ...] and [T, ...], leaf by leaf.

    Raises:
      ValueError: trees that differ, or leaves that differ after the first axis.
    """
    left, right = jax.tree.flatten(gradients), jax.tree.flatten(targets)
    require(left[1] == right[1] and len(left[0]) > 0, "targets", right[1], f"the tree {left[1]}")
    total = 0
    for i, (g, t) in enumerate(zip(left[0], right[0], strict=True)):
        fits = g.ndim > 0 and t.ndim > 0 and g.shape[1:] == t.shape[1:]
        fits = fits and (g.shape[0], t.shape[0]) == (left[0][0].shape[0], right[0][0].shape[0])
        require(fits, f"leaf {i} of targets", t.shape, f"[T, ...] like the gradients' {g.shape}")
        g, t = g.reshape(g.shape[0], -1), t.reshape(t.shape[0], -1)
        wide = jnp.promote_types(jnp.promote_types(g.dtype, t.dtype), jnp.float32)
        total = total + jnp.matmul(g.astype(wide), t.astype(wide).T, precision=jax.lax.Precision.HIGHEST)
    return jnp.asarray(total)


def generalization(products: Array, present: Array) -> Array:
    """DoGE's estimate W_j = <g_j, sum_i g_i> [S] of `inner_products(g, g)` [S, S], itself included.

    Of domains that the batch lacks the others stand in: their part is (S - 1) / (n - 1) times that of the n - 1 others
    present, W_j's mean if it is chance which they are. For absent j it means nothing (`doge` keeps the last).

    Raises:
      ValueError: other shapes than [S, S] and [S].
    """
    return jnp.diagonal(products) + generalization_to_others(products, present)


def generalization_to_others(products: Array, present: Array) -> Array:
    """<g_j, sum_{i != j} g_i> [S], as the released code has it where the targets are the training domains."""
    size = products.shape[0] if products.ndim == 2 else 0
    require(products.ndim == 2 and products.shape[1] == size >= 2, "products", products.shape, "[S, S] with S >= 2")
    require(present.shape == (size,), "present", present.shape, f"[{size}]")
    there = present.astype(bool)
    off = jnp.where(there[None] & ~jnp.eye(size, dtype=bool), products, 0).sum(1)
    return off * (size - 1) / jnp.maximum(there.sum() - 1, 1)


def released_estimate(estimate: Array, norms: Array, present: Array) -> Array:
    """What DoGE's released code makes of an estimate [S]: over the mean norm of the domains' gradients, then clipped to
    [0, 5]. The paper has neither; a domain that harms the others can then only fall behind.

    Args:
      estimate: `generalization_to_others`, or inner products with a target.
      norms: of the domains' gradients [S].

    Raises:
      ValueError: shapes that differ.
    """
    require(estimate.ndim == 1 and norms.shape == estimate.shape, "norms", norms.shape, f"{estimate.shape}, [S]")
    require(present.shape == estimate.shape, "present", present.shape, f"{estimate.shape}")
    there = present.astype(bool)
    mean = jnp.where(there, norms, 0).sum() / jnp.maximum(there.sum(), 1)
    return jnp.clip(estimate / (mean + NORM_EPS), 0, MAX_SCORE)


def require_num_domains(num_domains: Any) -> None:
    whole = isinstance(num_domains, int | np.integer) and not isinstance(num_domains, bool)
    require(whole and bool(num_domains >= 2), "num_domains", num_domains, "a whole number, at least 2")


def require_smoothing(smoothing: Any) -> None:
    require(_finite(smoothing) and 0 <= smoothing < 1, "smoothing", smoothing, "a number in [0, 1)")


def require_domains_shape(field: str, value: Array, state: DomainState) -> None:
    require(value.shape == state.score.shape, field, value.shape, f"{state.score.shape}, one number for each domain")


def _finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _init(num_domains: int) -> DomainState:
    require_num_domains(num_domains)
    zeros = jnp.zeros(num_domains)
    return DomainState(zeros - math.log(num_domains), zeros, zeros, zeros.astype(bool), jnp.int32(0))


def _move(
    state: DomainState, score: Array, present: Array, step: float | Array, smoothing: float
) -> tuple[Array, DomainState]:
    """One step of exponentiated gradient. Logarithms are what is kept: a weight that is too small for its type is not
    lost."""
    there = present.astype(bool)
    seen = state.seen | there
    score = jnp.where(there, score, state.score).astype(state.score.dtype)
    mean = jnp.where(seen, score, 0).sum() / jnp.maximum(seen.sum(), 1)
    log_weights = jax.nn.log_softmax(state.log_weights + step * jnp.where(seen, score, mean))
    if smoothing > 0:
        uniform = math.log(smoothing / score.size)
        log_weights = jnp.logaddexp(log_weights + math.log1p(-smoothing), uniform)
    log_weights = log_weights.astype(state.log_weights.dtype)
    weights = jnp.exp(log_weights)
    return weights, DomainState(log_weights, state.total + weights, score, seen, state.count + 1)
