"""Bilevel optimisation by a penalty, with first-order gradients alone: weights of data sources (ScaleBiO).

Pan et al., "ScaleBiO: Scalable Bilevel Optimization for LLM Data Reweighting", 2406.19976. Source i has the mean loss
l_i, its weight is p_i, p = softmax(lam):

    min_lam L1(w*(lam)),  w*(lam) = argmin_w L2(lam, w),  L2(lam, w) = sum_i p_i l_i(w)             L1: of validation
    min_{lam, w} max_u  L1(w) + alpha (L2(lam, w) - L2(lam, u))                                     the penalty
    d/dlam_i = alpha p_i (g_i - sum_k p_k g_k),  g = l(w) - l(u)                                    its gradient

u follows the weighted data alone, w the validation data too; a source gains weight where that makes w worse at it than
u, that is, where validation data pulls against it least. Per step: two forward-backward passes over a training batch,
one over a validation batch.

`penalty_bilevel` takes sources' means over the whole batch, and the weights of sources that a batch lacks are shared
out among those it has: identical sources then have a gradient in lam of exactly 0 whatever is missing. The models still
see less of a source that is often missing than its weight says: draw batches with all sources in them.
`released_bilevel` is as the authors' code: means over each pass, and a missing source drops out, so that weights do not
sum to 1, and lam of rare sources drifts.

Adam is invariant to its gradient's scale: with it alpha is nothing to u and lam, it only weighs L1 against L2 in w.
L1(w) is trained on: it is no estimate of generalisation.

Legend: S sources, A passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer

from optim.checks import require
from optim.parts import Part, whole

Loss = Callable[[Any, Any], tuple[Array, Array]]  # (parameters, batch) -> sums and counts of what was summed
Coefficients = Callable[[Array, Array], Array]  # (p [S], counts [A, S]) -> what the sums [A, S] are multiplied by


class BilevelState(NamedTuple):
    """lam [S], the logits of the weights; w and u, two models alike; optimiser states; finished steps."""

    lam: Array
    w: Any
    u: Any
    opt_lam: Any
    opt_w: Any
    opt_u: Any
    step: Array


Init = Callable[..., BilevelState]
Step = Callable[..., tuple[BilevelState, dict[str, Array]]]


class Bilevel(NamedTuple):
    """`init(params, num_sources, lam=None) -> state`: both models begin as copies of `params`, lam as zeros.

    `step(state, batch, validation, other=None) -> (state, metrics)`: `other` is u's own training batch where the method
    is not `paired`. Leaves of batches lead with the A passes. Metrics: weights [S], loss_w and loss_u [S] (means; 0 for
    a source that is missing), present [S] bool, outer_loss, gap (L2 of w minus that of u), grad_norm_w, grad_norm_u.

    Raises (init): ValueError for fewer than two sources, a lam that is not finite or not [S].
    Raises (step): ValueError for losses of other shapes than sums [S] and counts [S], scalars for the outer one; for an
    `other` that is there when paired or missing when not.
    """

    init: Init
    step: Step


def weights_of(lam: Array) -> Array:
    """p [S]."""
    return jax.nn.softmax(lam)


def shared_out(p: Array, counts: Array) -> Array:
    """Weight over count for each source, over all passes; a missing source's weight goes to the others."""
    total = counts.sum(axis=0)
    kept = jnp.where(total > 0, p, 0)
    one = kept / jnp.maximum(kept.sum(), jnp.finfo(p.dtype).tiny) / jnp.maximum(total, 1)
    return jnp.broadcast_to(one[None], counts.shape)


def dropped(p: Array, counts: Array) -> Array:
    """The released code's: the mean over passes of sum_i p_i l_i, where sources that a pass lacks are left out."""
    return p[None] / jnp.maximum(counts, 1) / counts.shape[0]


def penalty_bilevel(
    outer_loss: Loss,
    inner_loss: Loss,
    *,
    alpha: optax.ScalarOrSchedule,
    w_opt: optax.GradientTransformation,
    u_opt: optax.GradientTransformation,
    lam_opt: optax.GradientTransformation,
    part: Part = whole,
    paired: bool = True,
    lam_decay: bool = False,
) -> Bilevel:
    """The paper's method.

    Args:
      outer_loss: of validation data, (parameters, batch) -> (sum, count), float32 scalars.
      inner_loss: of training data, (parameters, batch) -> (sums [S], counts [S]) by source, over all devices.
      alpha: of the penalty, above 0; or a schedule.
      w_opt, u_opt, lam_opt: each descends its own gradient.
      part: what of a model is trained at a step, see `optim.parts`; by default all of it. w and u have the same, so
        that their difference holds no drift of layers that only one of them moved.
      paired: both models see one training batch, as in the released code, so that g has no noise of different samples.
      lam_decay: `lam_opt` may decay lam, which is a pull towards uniform weights.

    Raises:
      ValueError: alpha that is not a finite number above 0, a `lam_opt` that decays unasked.
    """
    parts = part, part
    return _bilevel(outer_loss, inner_loss, shared_out, alpha, w_opt, u_opt, lam_opt, parts, paired, lam_decay)


def released_bilevel(
    outer_loss: Loss,
    inner_loss: Loss,
    *,
    alpha: optax.ScalarOrSchedule,
    w_opt: optax.GradientTransformation,
    u_opt: optax.GradientTransformation,
    lam_opt: optax.GradientTransformation,
    part: Part = whole,
    part_u: Part = whole,
) -> Bilevel:
    """As the authors' preview code, 2003pro/ScaleBiO of July 2024: see the module for what it counts otherwise.

    There w and u draw layers apart (`part`, `part_u`), always see one batch, and lam has PyTorch's AdamW with its
    silent decay of 0.01: `lam_opt = optax.adamw(1e-2, weight_decay=0.01)`. alpha grows by a factor at each outer round:
    a schedule. Arguments and errors as in `penalty_bilevel`; lam may decay.
    """
    parts = part, part_u
    return _bilevel(outer_loss, inner_loss, dropped, alpha, w_opt, u_opt, lam_opt, parts, True, True)


def _bilevel(
    outer_loss: Loss, inner_loss: Loss, coefficients: Coefficients, alpha: optax.ScalarOrSchedule,
    w_opt: optax.GradientTransformation, u_opt: optax.GradientTransformation, lam_opt: optax.GradientTransformation,
    parts: tuple[Part, Part], paired: bool, lam_decay: bool,
) -> Bilevel:  # fmt: skip
    if not callable(alpha):
        require(math.isfinite(alpha) and bool(alpha > 0), "alpha", alpha, "a finite number above 0")
    require(lam_decay or not _decays(lam_opt), "lam_opt", lam_opt, "no weight decay, unless lam_decay asks for it")
    part_w, part_u = parts

    def init(params: Any, num_sources: int, lam: Any = None) -> BilevelState:
        require(num_sources >= 2, "num_sources", num_sources, "at least 2: one source has nothing to weigh")
        lam = jnp.zeros(num_sources) if lam is None else jnp.asarray(lam, float)
        require(lam.shape == (num_sources,), "lam.shape", lam.shape, f"[S = {num_sources}]")
        if not isinstance(lam, Tracer):
            require(bool(jnp.all(jnp.isfinite(lam))), "lam", lam.tolist(), "finite logits")
        w, u, step = jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, params), jnp.int32(0)
        started = lam_opt.init(lam), w_opt.init(part_w.take(w, step)), u_opt.init(part_u.take(u, step))
        return BilevelState(lam, w, u, *started, step)

    def step(state: BilevelState, batch: Any, validation: Any, other: Any = None) -> Any:
        lam, now = state.lam, state.step
        expected = "none: w and u see the same batch" if paired else "u's own batch, for a method that is not paired"
        require(paired is (other is None), "other", "a batch" if paired else None, expected)
        other = batch if other is None else other
        strength, p = jnp.asarray(alpha(now) if callable(alpha) else alpha), weights_of(lam)
        trained_w, trained_u = part_w.take(state.w, now), part_u.take(state.u, now)
        frozen_w, frozen_u = jax.lax.stop_gradient((state.w, state.u))
        view_w: Any = lambda trained: part_w.view(frozen_w, trained, now)  # noqa: E731
        view_u: Any = lambda trained: part_u.view(frozen_u, trained, now)  # noqa: E731
        counts_w, counts_u = (
            _counts(inner_loss, seen, view(trained), "inner_loss", lam.shape)
            for seen, view, trained in ((batch, view_w, trained_w), (other, view_u, trained_u))
        )
        outer_counts = _counts(outer_loss, validation, view_w(trained_w), "outer_loss", ())
        outer_total = jnp.maximum(outer_counts.sum(), 1)

        inner_u = strength * coefficients(p, counts_u)
        grads_u, sums_u = _gradient(lambda t, one: inner_loss(view_u(t), one)[0], trained_u, other, inner_u)
        inner_w = strength * coefficients(p, counts_w)
        grads_w, sums_w = _gradient(lambda t, one: inner_loss(view_w(t), one)[0], trained_w, batch, inner_w)
        each = jnp.broadcast_to(1 / outer_total, outer_counts.shape)
        outer_grads, outer = _gradient(lambda t, one: outer_loss(view_w(t), one)[0], trained_w, validation, each)
        grads_w = jax.tree.map(jnp.add, grads_w, outer_grads)

        def gap_of(lam: Array) -> Array:
            of_w, of_u = (jnp.sum(coefficients(weights_of(lam), counts) * sums)
                          for counts, sums in ((counts_w, sums_w), (counts_u, sums_u)))  # fmt: skip
            return of_w - of_u

        gap, grad_lam = jax.value_and_grad(gap_of)(lam)
        updates, opt_lam = lam_opt.update(strength * grad_lam, state.opt_lam, lam)
        moved_lam: Any = optax.apply_updates(lam, updates)
        moved_w, opt_w = w_opt.update(grads_w, state.opt_w, trained_w)
        moved_u, opt_u = u_opt.update(grads_u, state.opt_u, trained_u)
        new = BilevelState(
            lam=moved_lam,
            w=part_w.put(state.w, optax.apply_updates(trained_w, moved_w), now),
            u=part_u.put(state.u, optax.apply_updates(trained_u, moved_u), now),
            opt_lam=opt_lam,
            opt_w=opt_w,
            opt_u=opt_u,
            step=now + 1,
        )
        mean = lambda sums, counts: sums.sum(axis=0) / jnp.maximum(counts.sum(axis=0), 1)  # noqa: E731
        return new, {
            "weights": p,
            "loss_w": mean(sums_w, counts_w),
            "loss_u": mean(sums_u, counts_u),
            "present": (counts_w.sum(axis=0) > 0) & (counts_u.sum(axis=0) > 0),
            "outer_loss": jnp.sum(outer) / outer_total,
            "gap": gap,
            "grad_norm_w": optax.tree.norm(grads_w),
            "grad_norm_u": optax.tree.norm(grads_u),
        }

    return Bilevel(init, step)


def _passes(batch: Any) -> int:
    return jax.tree.leaves(batch)[0].shape[0]


def _gradient(sums: Callable[[Any, Any], Array], trained: Any, batch: Any, scale: Array) -> tuple[Any, Array]:
    """(d sum_a scale[a] . sums(trained, batch[a]) / d trained, the sums [A, ...])."""

    def one_pass(part: tuple[Any, Array]) -> tuple[Any, Array]:
        one, weight = part

        def total(trained: Any) -> tuple[Array, Array]:
            found = sums(trained, one)
            return jnp.sum(weight * found), found

        return jax.grad(total, has_aux=True)(trained)

    first = jax.tree.map(lambda leaf: leaf[0], (batch, scale))
    if _passes(batch) == 1:
        grads, found = one_pass(first)
        return grads, found[None]

    def add(acc: Any, part: Any) -> tuple[Any, Array]:
        grads, found = one_pass(part)
        return jax.tree.map(jnp.add, acc, grads), found

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one_pass, first)[0])
    return jax.lax.scan(add, zeros, (batch, scale))


def _counts(loss: Loss, batch: Any, seen: Any, name: str, shape: tuple[int, ...]) -> Array:
    """[A, *shape]. Counts do not depend on the parameters: all else that the loss computes is dead code here."""
    first = jax.tree.map(lambda leaf: leaf[0], batch)
    shapes = [leaf.shape for leaf in jax.eval_shape(loss, seen, first)]
    require(shapes == [shape, shape], name, shapes, f"sums and counts of shapes {[shape, shape]}")
    if _passes(batch) == 1:
        return loss(seen, first)[1][None]
    return jax.lax.map(lambda one: loss(seen, one)[1], batch)


def _decays(tx: optax.GradientTransformation) -> bool:
    """Whether it moves parameters whose gradient is 0, in any of a hundred steps: a schedule may begin with 0."""
    ones = jnp.ones(2)

    def step(state: Any, _: None) -> tuple[Any, Array]:
        updates, state = tx.update(jnp.zeros(2), state, ones)
        return state, jnp.any(updates != 0)  # type: ignore[operator]

    with jax.ensure_compile_time_eval():
        return bool(jnp.any(jax.lax.scan(step, tx.init(ones), length=100)[1]))


def check_sources(source: Any, num_sources: int) -> None:
    """ValueError for a batch [B] whose sources are not 0 to S - 1; it names the first."""
    ids = np.asarray(source)
    bad = ids[(ids < 0) | (ids >= num_sources)]
    require(ids.size > 0, "source ids", ids.tolist(), "at least one sample")
    require(bad.size == 0, "source id", int(bad[0]) if bad.size else None, f"0 to {num_sources - 1}")
