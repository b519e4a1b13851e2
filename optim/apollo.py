"""APOLLO: the raw gradient, each channel scaled as Adam would scale it in a small random projection.

Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", 2412.05270, algorithm 1. With g the projection of the
gradient G and d Adam's direction for g,

    channel   G_j norm(d_j) / norm(g_j), j along the longer side
    tensor    G norm(d) / norm(g)                                  (APOLLO-Mini, with rank 1)

times sqrt(alpha), its norm limited in growth (`optim.projected`).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from optim.checks import require
from optim.projected import Granularity, factors, limit_growth, scale_by_projected_adam
from optim.subspaces import Axes, Choice, Subspace, gaussian, plain_axes
from optim.whole import whole_model


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

    def combine(grad: Array, choice: Choice, low: Array, direction: Array, norm: Array) -> tuple[Array, Array]:
        del choice
        limited, norm = limit_growth(grad * factors(direction, low, grad.shape, granularity), norm, growth)
        return jnp.sqrt(scale) * limited, norm

    projection = gaussian(rank=rank) if subspace is None else subspace
    options = {"update_gap": update_gap, "b1": b1, "b2": b2, "eps": eps, "seed": seed, "axes": axes}
    return scale_by_projected_adam(projection, combine, **options)


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
    return whole_model("apollo", matrix, adam, learning_rate, weight_decay, mask, labels)


def apollo_mini(
    learning_rate: optax.ScalarOrSchedule, scale: float = 128.0, **options: Any
) -> optax.GradientTransformation:
    """APOLLO-Mini: rank 1, one factor for each matrix, scale 128; `options` of `apollo`."""
    return apollo(learning_rate, 1, granularity="tensor", scale=scale, **options)
