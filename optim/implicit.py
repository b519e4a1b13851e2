"""Bilevel problems by what is known of them: the implicit gradient of small ones, SOBA, F2SA.

    min over lam of outer(w*(lam)),   w*(lam) = argmin over w of inner(lam, w)

hypergradient      - (d2 inner / d lam d w) H^-1 grad outer, H the inner Hessian: the reference, for small w
SOBA               w, the linear system's v and lam move at once, by SGD     (Dagreou et al., 2201.13409, section 2)
F2SA               no second derivatives: a penalty whose multiplier grows   (Kwon et al., 2301.10945, algorithm 1)

`outer(w, *batch)` and `inner(lam, w, *batch)` are any functions to a number; lam and w are any trees. The two methods
are pairs: `init(lam, w) -> state`, `step(state, outer_batch, inner_batch) -> state`, batches being tuples of the
functions' further arguments, empty by default.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import cg

from optim.checks import require

MAX_DENSE = 4096  # parameters of a Hessian that is formed: 64 MiB in float32


class BilevelMethod(NamedTuple):
    """`init(lam, w) -> state`, `step(state, outer_batch=(), inner_batch=()) -> state`."""

    init: Callable[[Any, Any], Any]
    step: Callable[..., Any]


class SobaState(NamedTuple):
    """`v`, like `w`, goes to - H^-1 grad outer."""

    lam: Any
    w: Any
    v: Any
    count: Array


class F2saState(NamedTuple):
    """`w` goes to the minimiser of outer + multiplier * inner, `u` to that of inner alone (the paper's y and z)."""

    lam: Any
    w: Any
    u: Any
    multiplier: Array
    count: Array


def hypergradient(outer: Callable[[Any], Array], inner: Callable[[Any, Any], Array], lam: Any, w: Any) -> Any:
    """d outer(w*(lam)) / d lam at w = w*(lam), like lam, with the inner Hessian formed and solved.

    Raises:
      ValueError: functions that do not return a number; more than `MAX_DENSE` parameters, or none.
    """
    _require_numbers(outer, inner, lam, w)
    flat, unravel = ravel_pytree(w)
    require(0 < flat.size <= MAX_DENSE, "w", flat.size, f"at most {MAX_DENSE} parameters: see hypergradient_cg")
    hessian = jax.hessian(lambda x: inner(lam, unravel(x)))(flat)
    solution = jnp.linalg.solve(hessian, ravel_pytree(jax.grad(outer)(w))[0])
    return _implicit(inner, lam, w, unravel(solution))


def hypergradient_cg(
    outer: Callable[[Any], Array],
    inner: Callable[[Any, Any], Array],
    lam: Any,
    w: Any,
    *,
    tol: float = 1e-6,
    maxiter: int = 100,
) -> Any:
    """`hypergradient` by conjugate gradient with Hessian-vector products; H must be positive definite.

    Args:
      tol: of the residual, relative to grad outer.
      maxiter: products at most; it ends there whatever the residual.

    Raises:
      ValueError: functions that do not return a number; bad options.
    """
    _require_numbers(outer, inner, lam, w)
    require(_finite(tol) and tol >= 0, "tol", tol, "a finite number, at least 0")
    _require_count("maxiter", maxiter)
    gradient = lambda x: jax.grad(inner, argnums=1)(lam, x)  # noqa: E731
    product = lambda v: jax.jvp(gradient, (w,), (v,))[1]  # noqa: E731
    return _implicit(inner, lam, w, cg(product, jax.grad(outer)(w), tol=tol, maxiter=maxiter)[0])


def soba(
    outer: Callable[..., Array],
    inner: Callable[..., Array],
    *,
    learning_rate: optax.ScalarOrSchedule,
    lam_learning_rate: optax.ScalarOrSchedule,
) -> BilevelMethod:
    """SOBA. All three directions are taken at the same point, then all three move:

    w by grad_w inner,   v by H v + grad outer,   lam by (d2 inner / d lam d w) v.

    H v and the last are one vector-Jacobian product of grad_w inner. v begins at 0.

    Args:
      learning_rate: of w and v. They diverge above 2 over the greatest eigenvalue of H.
      lam_learning_rate: of lam.

    Raises:
      ValueError: bad learning rates; at init, lam not finite; at a step, functions that do not return a number.
    """
    _require_rate("learning_rate", learning_rate)
    _require_rate("lam_learning_rate", lam_learning_rate)

    def init(lam: Any, w: Any) -> SobaState:
        _require_finite(lam)
        return SobaState(lam, w, jax.tree.map(jnp.zeros_like, w), jnp.int32(0))

    def step(state: SobaState, outer_batch: tuple = (), inner_batch: tuple = ()) -> SobaState:
        lam, w, v, count = state
        _require_numbers(lambda x: outer(x, *outer_batch), lambda a, x: inner(a, x, *inner_batch), lam, w)
        gradient = lambda a, x: jax.grad(inner, argnums=1)(a, x, *inner_batch)  # noqa: E731
        w_direction, pullback = jax.vjp(gradient, lam, w)
        lam_direction, product = pullback(v)
        v_direction = jax.tree.map(jnp.add, product, jax.grad(outer)(w, *outer_batch))
        rate = _at(learning_rate, count)
        return SobaState(
            lam=_descend(lam, _at(lam_learning_rate, count), lam_direction),
            w=_descend(w, rate, w_direction),
            v=_descend(v, rate, v_direction),
            count=count + 1,
        )

    return BilevelMethod(init, step)


def f2sa(
    outer: Callable[..., Array],
    inner: Callable[..., Array],
    *,
    alpha: optax.ScalarOrSchedule,
    gamma: optax.ScalarOrSchedule,
    multiplier: float,
    difference: optax.ScalarOrSchedule,
    xi: float = 1.0,
    inner_steps: int = 1,
) -> BilevelMethod:
    """F2SA. `inner_steps` times u by gamma_k grad inner(u) and w by alpha_k (grad outer(w) + m_k grad inner(w)); then
    lam by xi alpha_k m_k (d inner(w) / d lam - d inner(u) / d lam); then m_k+1 = m_k + difference_k.

    One batch serves a whole step, where the paper draws one for each gradient; hand over those of one inner step and
    let `inner_steps` be 1 to have w, u and lam on the same batch.

    Args:
      alpha: step size of w, and over xi of lam. It must fall as the multiplier grows: alpha_k m_k = gamma_k / 2 is
        what the paper's rates ask for.
      gamma: step size of u.
      multiplier: m_0.
      difference: of multipliers, 0 for a constant one.

    Raises:
      ValueError: bad options; at init, lam not finite; at a step, functions that do not return a number.
    """
    for field, rate in (("alpha", alpha), ("gamma", gamma), ("xi", xi), ("multiplier", multiplier)):
        _require_rate(field, rate)
    good = callable(difference) or isinstance(difference, Array) or (_finite(difference) and difference >= 0)
    require(good, "difference", difference, "a finite number, at least 0, or a schedule")
    _require_count("inner_steps", inner_steps)

    def init(lam: Any, w: Any) -> F2saState:
        _require_finite(lam)
        return F2saState(lam, w, w, jnp.asarray(multiplier, float), jnp.int32(0))

    def step(state: F2saState, outer_batch: tuple = (), inner_batch: tuple = ()) -> F2saState:
        lam, m, count = state.lam, state.multiplier, state.count
        _require_numbers(lambda x: outer(x, *outer_batch), lambda a, x: inner(a, x, *inner_batch), lam, state.w)
        of_outer, of_inner = jax.grad(outer), jax.grad(inner, argnums=1)

        def lower(_: Any, both: tuple[Any, Any]) -> tuple[Any, Any]:
            w, u = both
            pull = jax.tree.map(lambda f, g: f + m * g, of_outer(w, *outer_batch), of_inner(lam, w, *inner_batch))
            return _descend(w, _at(alpha, count), pull), _descend(u, _at(gamma, count), of_inner(lam, u, *inner_batch))

        w, u = jax.lax.fori_loop(0, inner_steps, lower, (state.w, state.u))
        of_lam = lambda x: jax.grad(inner)(lam, x, *inner_batch)  # noqa: E731
        gap = jax.tree.map(lambda a, b: m * (a - b), of_lam(w), of_lam(u))
        lam = _descend(lam, xi * _at(alpha, count), gap)
        return F2saState(lam, w, u, m + _at(difference, count), count + 1)

    return BilevelMethod(init, step)


def _implicit(inner: Callable[[Any, Any], Array], lam: Any, w: Any, solution: Any) -> Any:
    """- (d2 inner / d lam d w) solution, without the mixed derivative itself."""
    gradient = lambda a: jax.grad(inner, argnums=1)(a, w)  # noqa: E731
    (mixed,) = jax.vjp(gradient, lam)[1](solution)
    return jax.tree.map(jnp.negative, mixed)


def _descend(tree: Any, rate: Any, direction: Any) -> Any:
    return jax.tree.map(lambda x, d: (x - rate * d).astype(x.dtype), tree, direction)


def _at(rate: optax.ScalarOrSchedule, count: Array) -> Any:
    return rate(count) if callable(rate) else rate


def _finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _require_rate(field: str, rate: Any) -> None:
    good = callable(rate) or isinstance(rate, Array) or (_finite(rate) and rate > 0)
    require(good, field, rate, "a finite number above 0, or a schedule")


def _require_count(field: str, value: Any) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    require(whole and bool(value >= 1), field, value, "a whole number, at least 1")


def _require_finite(lam: Any) -> None:
    read = [leaf for leaf in jax.tree.leaves(lam) if not isinstance(leaf, Tracer)]
    require(all(bool(jnp.isfinite(leaf).all()) for leaf in read), "lam", lam, "finite numbers")


def _require_numbers(outer: Callable[[Any], Array], inner: Callable[[Any, Any], Array], lam: Any, w: Any) -> None:
    for field, found in (("outer", jax.eval_shape(outer, w)), ("inner", jax.eval_shape(inner, lam, w))):
        require(getattr(found, "shape", None) == (), field, found, "a function to one number")
