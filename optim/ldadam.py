"""LDAdam: Adam in a subspace that moves every step, and its moments with it; what the subspace misses comes back later.

Robert et al., "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics", 2410.16103. The equations are
those of the released code (IST-DASLab/LDAdam at f3c5daf); the paper's own listing was not at hand to compare. For
a >= b, with gradient G, error E, projection P [b, r], moments m and v [a, r] after t steps, and m', v' those corrected
for Adam's bias; a < b is the same transposed:

    A  = G + E
    B  = q m' P^T + (1 - q) A
    P+ = orthonormal columns of B^T B P              one power iteration; at the first step singular vectors of G
    Q  = P^T P+
    m  <- m Q
    v  <- (1 - b2^t) |(v' - m'^2) Q^2 + (m' Q)^2|    squares of each entry: v' - m'^2 is taken for a variance
    m, v, d = Adam's step for A P+
    E  <- A - A P+ P+^T + b1 / (1 - b1) (m_before P^T - m_before Q P+^T)
    direction = d P+^T

Nothing of it depends on the signs of P's columns, so a decomposition may choose them. With S_t = m P^T after step t, no
gradient is lost: S_1 + ... + S_t + b1 / (1 - b1) S_t + E is the sum of the gradients.

Differences: the released code projects a square matrix from the left; it keeps E in the gradient's buffer and so in its
precision, where clipping by norm sees both. Here E is state, in float32 and of the parameter's size.

Trap, of both: where a gradient's rank is below r (an expert with fewer tokens), Adam divides rounding noise by its own
size in the directions left over. With entries about 1 that was 0.7 of the first step's norm, with 1e-4 under 0.01; eps
sets the scale.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from optim.checks import require
from optim.subspaces import Axes, as_matrices, decomposed, first_choices, plain_axes, svd
from optim.whole import whole_model


class LDAdamState(NamedTuple):
    """In place of each parameter: `projection` [N, min(a, b), r], `mu` and `nu` [N, a, r] or [N, r, b], `error` of the
    parameter's shape; no tree of errors without feedback."""

    count: Any
    projection: Any
    mu: Any
    nu: Any
    error: Any


def scale_by_ldadam(
    rank: int,
    *,
    interpolation: float = 0.908,
    error_feedback: bool = True,
    b1: float = 0.908,
    b2: float = 0.99,
    eps: float = 1e-8,
    axes: Axes = plain_axes,
) -> optax.GradientTransformation:
    """The direction of LDAdam for weight matrices. Nothing is drawn, so there is no seed.

    Args:
      rank: of the projection, on each matrix's shorter side.
      interpolation: q, the momentum's share of what the projection follows.
      error_feedback: whether what is projected away is added to the next gradient. At a small rank its 4 bytes a
        parameter are more than all other state; without it they are saved, and what is projected away is lost.
      b1, b2, eps: of Adam in the projection.
      axes: as in `optim.frugal.scale_by_frugal`.

    Raises:
      ValueError: bad options; parameters that are no matrices or have a shorter side below the rank, by name.
    """
    if isinstance(interpolation, float | int):
        require(0 <= interpolation < 1, "interpolation", interpolation, "at least 0 and below 1")
    subspace = svd(rank=rank)

    def init(params: Any) -> LDAdamState:
        model = as_matrices(params, axes)
        choices, lows = first_choices(subspace, model)
        unflatten = model.treedef.unflatten
        zeros = lambda: unflatten(jax.tree.map(jnp.zeros_like, lows))  # noqa: E731
        error = model.leaves([jnp.zeros_like(view) for view in model.views]) if error_feedback else None
        return LDAdamState(jnp.int32(0), unflatten(choices), zeros(), zeros(), error)

    def leading(projection: Array, mixed: Array) -> Array:
        return subspace.refresh(projection, mixed, jax.random.key(0))  # singular vectors are not drawn

    def step(count: Array, seen: Array, projection: Array, mu: Array, nu: Array) -> tuple[Array, ...]:
        """(direction, projection, mu, nu, error) of matrices [N, a, b]."""
        wide = seen.shape[1] < seen.shape[2]
        turn = lambda x: x.mT if wide else x  # noqa: E731
        seen, mu, nu = turn(seen), turn(mu), turn(nu)  # [N, long, short], [N, long, r]
        reached = lambda decay, steps: (1 - decay**steps).astype(seen.dtype)  # noqa: E731
        passed, after = jnp.maximum(count, 1), optax.safe_increment(count)  # at 0 moments are 0: never divided by 0
        before, bias, bias2 = mu @ projection.mT, reached(b1, passed), reached(b2, passed)
        mixed = interpolation / bias * before + (1 - interpolation) * seen
        moved = jax.lax.cond(count == 0, leading, iterated, projection, mixed)
        rotation = projection.mT @ moved
        mean, carried = mu / bias, mu @ rotation
        square = (nu / bias2 - mean**2) @ rotation**2 + (carried / bias) ** 2
        low = seen @ moved
        mu, nu = b1 * carried + (1 - b1) * low, b2 * bias2 * jnp.abs(square) + (1 - b2) * low**2
        direction = mu / reached(b1, after) / (jnp.sqrt(nu / reached(b2, after)) + eps)
        # A P+ P+^T and m Q P+^T are in the new momentum: one product of full size for the two
        error = seen + (b1 * before - mu @ moved.mT) / (1 - b1)
        return turn(direction @ moved.mT), moved, turn(mu), turn(nu), turn(error)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, LDAdamState]:
        del params
        grads = as_matrices(updates, axes)
        treedef, views = grads.treedef, grads.views
        if state.error is not None:
            views = [view + error for view, error in zip(views, as_matrices(state.error, axes).views, strict=True)]
        kept = [treedef.flatten_up_to(tree) for tree in (state.projection, state.mu, state.nu)]
        made = [step(state.count, *leaf) for leaf in zip(views, *kept, strict=True)]
        directions, *lows, errors = ([leaf[i] for leaf in made] for i in range(5))
        projection, mu, nu = map(treedef.unflatten, lows)
        error = None if state.error is None else grads.leaves(errors)
        following = LDAdamState(optax.safe_increment(state.count), projection, mu, nu, error)
        return grads.leaves(directions), following

    return optax.GradientTransformation(init, update)


def iterated(projection: Array, mixed: Array) -> Array:
    """One power iteration from directions [N, b, r] to the leading right singular ones of matrices [N, a, b]."""
    return decomposed(jnp.linalg.qr, mixed.mT @ (mixed @ projection))[0]


def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    weight_decay: float = 0.0,
    mask: Any = None,
    labels: Any = None,
    interpolation: float = 0.908,
    error_feedback: bool = True,
    b1: float = 0.908,
    b2: float = 0.99,
    eps: float = 1e-8,
    axes: Axes = plain_axes,
) -> optax.GradientTransformation:
    """LDAdam for a whole model: `scale_by_ldadam` where `labels` says `ldadam`, Adam where it says `adam`, decoupled
    decay, step size. By default leaves of two axes are `ldadam`."""
    matrix = scale_by_ldadam(
        rank, interpolation=interpolation, error_feedback=error_feedback, b1=b1, b2=b2, eps=eps, axes=axes
    )
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    return whole_model("ldadam", matrix, adam, learning_rate, weight_decay, mask, labels)
