"""APOLLO: the raw gradient, each channel scaled as Adam would scale it in a small random projection.

Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", 2412.05270, algorithm 1. With g the projection of the
gradient G and d Adam's direction for g,

    channel   G_j norm(d_j) / norm(g_j), j along the longer side
    tensor    G norm(d) / norm(g)                                  (APOLLO-Mini, with rank 1)

times sqrt(alpha), its norm allowed to grow by 1% a step (the limiter of Fira, 2410.01623). As released, the limiter
sees directions before Adam's correction for bias, and the correction follows it.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from optim.checks import require
from optim.frugal import by_axes
from optim.subspaces import Axes, Subspace, as_matrices, first_choices, gaussian, next_choices, plain_axes

EPS = 1e-8  # of the norms that divide
Granularity = Literal["channel", "tensor"]


class ApolloState(NamedTuple):
    """`choices` has a projection in place of each parameter, `norms` [N] the limiter's last norm of each matrix."""

    count: Any
    choices: Any
    adam: Any
    norms: Any


def scale_by_apollo(
    rank: int,
    *,
    granularity: Granularity = "channel",
    update_gap: int = 200,
    scale: float = 1.0,
    growth: float = 1.01,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    subspace: Subspace | None = None,
    seed: int = 0,
    axes: Axes = plain_axes,
) -> optax.GradientTransformation:
    """The direction of APOLLO for weight matrices.

    Args:
      rank: of the projection, on each matrix's shorter side.
      granularity: one factor for each channel of the longer side, or for each matrix.
      update_gap: steps between two draws of the projection; moments stay as they are.
      scale: alpha of the paper; the direction has its root.
      growth: the most by which the norm of a matrix's direction grows in a step.
      b1, b2, eps: of Adam in the projection.
      subspace: what projects; by default `subspaces.gaussian(rank=rank)`, as published.
      seed: of the draws, which are a function of (seed, step, parameter's place).
      axes: as in `optim.frugal.scale_by_frugal`.

    Raises:
      ValueError: bad options; parameters that are no matrices or have a shorter side below the rank, by name.
    """
    require(granularity in ("channel", "tensor"), "granularity", granularity, "channel or tensor")
    if isinstance(update_gap, int):
        require(update_gap >= 1, "update_gap", update_gap, "at least 1")
    projection = gaussian(rank=rank) if subspace is None else subspace
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def init(params: Any) -> ApolloState:
        model = as_matrices(params, axes)
        choices, lows = first_choices(projection, model)
        norms = model.treedef.unflatten([jnp.zeros(view.shape[0], view.dtype) for view in model.views])
        unflatten = model.treedef.unflatten
        return ApolloState(jnp.int32(0), unflatten(choices), adam.init(unflatten(lows)), norms)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ApolloState]:
        del params
        grads, count = as_matrices(updates, axes), optax.safe_increment(state.count)
        treedef, key = grads.treedef, jax.random.fold_in(jax.random.key(seed), state.count)
        before = treedef.flatten_up_to(state.choices)
        choices = next_choices(projection, before, grads, state.count % update_gap == 0, key)
        lows = [projection.down(choice, view) for choice, view in zip(choices, grads.views, strict=True)]
        directions, moments = adam.update(treedef.unflatten(lows), state.adam)
        corrected = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        made, norms = [], []
        for view, low, direction, norm in zip(
            grads.views, lows, treedef.flatten_up_to(directions), treedef.flatten_up_to(state.norms), strict=True
        ):
            factor = factors(direction / corrected, low, view.shape, granularity)
            limited, norm = limit_growth(view * factor, norm, growth)
            made.append(math.sqrt(scale) * corrected * limited)
            norms.append(norm)
        following = ApolloState(count, treedef.unflatten(choices), moments, treedef.unflatten(norms))
        return grads.leaves(made), following

    return optax.GradientTransformation(init, update)


def factors(direction: Array, low: Array, shape: tuple[int, ...], granularity: Granularity) -> Array:
    """norm(d) / norm(g) [N, a, 1], [N, 1, b] or [N, 1, 1], of d and g below matrices [N, a, b]."""
    along = (1, 2) if granularity == "tensor" else (2 if shape[1] >= shape[2] else 1)
    norm = lambda x: jnp.sqrt(jnp.sum(x * x, axis=along, keepdims=True))  # noqa: E731
    return norm(direction) / (norm(low) + EPS)


def limit_growth(direction: Array, before: Array, growth: float) -> tuple[Array, Array]:
    """Directions [N, a, b] shrunk to `growth` times the norm before [N] where they exceed it, and their norms. The
    first step, before which the norm is 0, is not limited."""
    norm = jnp.sqrt(jnp.sum(direction * direction, axis=(1, 2)))
    excess = jnp.where(before > 0, jnp.maximum(norm / (before + EPS), growth) / growth, 1.0)
    return direction / excess[:, None, None], norm / excess


def apollo(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    weight_decay: float = 0.0,
    mask: Any = None,
    labels: Any = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    granularity: Granularity = "channel",
    update_gap: int = 200,
    scale: float = 1.0,
    seed: int = 0,
    axes: Axes = plain_axes,
) -> optax.GradientTransformation:
    """APOLLO for a whole model: `scale_by_apollo` where `labels` says `apollo`, Adam where it says `adam`, decoupled
    decay, step size. By default leaves of two axes are `apollo`."""
    matrix = scale_by_apollo(
        rank, granularity=granularity, update_gap=update_gap, scale=scale, b1=b1, b2=b2, eps=eps, seed=seed, axes=axes
    )
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    return optax.chain(
        optax.partition({"apollo": matrix, "adam": adam}, by_axes("apollo") if labels is None else labels),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def apollo_mini(
    learning_rate: optax.ScalarOrSchedule, scale: float = 128.0, **options: Any
) -> optax.GradientTransformation:
    """APOLLO-Mini: rank 1, one factor for each matrix, scale 128; `options` of `apollo`."""
    return apollo(learning_rate, 1, granularity="tensor", scale=scale, **options)
