"""What APOLLO and Fira share: Adam in a projection of each matrix, whose size there scales what is outside of it.

With g = down(G) and d Adam's direction for g, what Adam never computed is a gradient times norm(d) / norm(g), for each
channel of the longer side or for the whole matrix; its norm may grow by 1% a step (the limiter of Fira, 2410.01623). As
both are released, the limiter sees directions before Adam's correction for bias, which follows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from optim.checks import require_schedule
from optim.subspaces import Axes, Choice, Subspace, as_matrices, first_choices, next_choices

EPS = 1e-8  # of the norms that divide
Granularity = Literal["channel", "tensor"]
# (gradient [N, a, b], choice, low gradient, low direction, norms before [N]) -> (direction [N, a, b], norms)
Combine = Callable[[Array, Choice, Array, Array, Array], tuple[Array, Array]]


class ProjectedState(NamedTuple):
    """`choices` has a projection in place of each parameter, `norms` [N] the limiter's last norm of each matrix."""

    count: Any
    choices: Any
    adam: Any
    norms: Any


def scale_by_projected_adam(
    subspace: Subspace, combine: Combine, *, update_gap: int, b1: float, b2: float, eps: float, seed: int, axes: Axes
) -> optax.GradientTransformation:
    """What `combine` makes of Adam below, times Adam's correction for bias. Moments stay as they are at a refresh.

    Raises:
      ValueError: an update_gap below 1; parameters that are no matrices or have no such subspace, by name.
    """
    require_schedule(update_gap, seed)
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def init(params: Any) -> ProjectedState:
        model = as_matrices(params, axes)
        choices, lows = first_choices(subspace, model)
        norms = model.treedef.unflatten([jnp.zeros(view.shape[0], view.dtype) for view in model.views])
        unflatten = model.treedef.unflatten
        return ProjectedState(jnp.int32(0), unflatten(choices), adam.init(unflatten(lows)), norms)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ProjectedState]:
        del params
        grads, count = as_matrices(updates, axes), optax.safe_increment(state.count)
        treedef, key = grads.treedef, jax.random.fold_in(jax.random.key(seed), state.count)
        before = treedef.flatten_up_to(state.choices)
        choices = next_choices(subspace, before, grads, state.count % update_gap == 0, key)
        lows = [subspace.down(choice, view) for choice, view in zip(choices, grads.views, strict=True)]
        directions, moments = adam.update(treedef.unflatten(lows), state.adam)
        correction = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        made, norms = [], []
        of_leaf = treedef.flatten_up_to(directions), treedef.flatten_up_to(state.norms)
        for view, choice, low, direction, norm in zip(grads.views, choices, lows, *of_leaf, strict=True):
            corrected = correction.astype(view.dtype)
            whole, norm = combine(view, choice, low, direction / corrected, norm)
            made.append(corrected * whole)
            norms.append(norm)
        following = ProjectedState(count, treedef.unflatten(choices), moments, treedef.unflatten(norms))
        return grads.leaves(made), following

    return optax.GradientTransformation(init, update)


def factors(direction: Array, low: Array, shape: tuple[int, ...], granularity: Granularity) -> Array:
    """norm(d) / norm(g) [N, a, 1], [N, 1, b] or [N, 1, 1], of d and g [N, a, r] or [N, r, b] below matrices
    [N, a, b]."""
    along = (1, 2) if granularity == "tensor" else (2 if shape[1] >= shape[2] else 1)
    norm = lambda x: jnp.sqrt(jnp.sum(x * x, axis=along, keepdims=True))  # noqa: E731
    return norm(direction) / (norm(low) + EPS)


def limit_growth(direction: Array, before: Array, growth: float) -> tuple[Array, Array]:
    """Directions [N, a, b] shrunk to `growth` times the norm before [N] where they exceed it, and their norms. The
    first step, before which the norm is 0, is not limited."""
    norm = jnp.sqrt(jnp.sum(direction * direction, axis=(1, 2)))
    excess = jnp.where(before > 0, jnp.maximum(norm / (before + EPS), growth) / growth, 1.0)
    return direction / excess[:, None, None], norm / excess
