"""Fira: GaLore, and all that its projection leaves out, scaled as Adam scales what is inside.

Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", 2410.01623, algorithm 1. With
g = down(G), d Adam's direction for g and R = G - up(g),

    direction = up(d) + phi R,  phi_j = norm(d_j) / norm(g_j) for each channel j of the longer side,

the norm of phi R limited in growth (`optim.projected`). The released code has a factor alpha in both uses of `up`; at
alpha = 1, as in the paper, they agree.
"""

from __future__ import annotations

from typing import Any

import optax
from jax import Array

from optim.projected import factors, limit_growth, scale_by_projected_adam
from optim.subspaces import Axes, Choice, Subspace, plain_axes, svd
from optim.whole import whole_model


def scale_by_fira(
    rank: int,
    *,
    update_gap: int = 200,
    growth: float = 1.01,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    subspace: Subspace | None = None,
    seed: int = 0,
    axes: Axes = plain_axes,
) -> optax.GradientTransformation:
    """The direction of Fira for weight matrices.

    Args:
      rank: of the projection, on each matrix's shorter side.
      update_gap: steps between two decompositions; moments stay as they are.
      growth: the most by which the norm of a matrix's phi R grows in a step.
      b1, b2, eps: of Adam in the projection.
      subspace: what projects; by default `subspaces.svd(rank=rank)`.
      seed: of draws, for subspaces that draw.
      axes: as in `optim.frugal.scale_by_frugal`.

    Raises:
      ValueError: as `optim.projected.scale_by_projected_adam`.
    """
    chosen = svd(rank=rank) if subspace is None else subspace

    def combine(grad: Array, choice: Choice, low: Array, direction: Array, norm: Array) -> tuple[Array, Array]:
        residual = grad - chosen.up(choice, low, grad.shape)
        limited, norm = limit_growth(residual * factors(direction, low, grad.shape, "channel"), norm, growth)
        return chosen.up(choice, direction, grad.shape) + limited, norm

    options = {"update_gap": update_gap, "b1": b1, "b2": b2, "eps": eps, "seed": seed, "axes": axes}
    return scale_by_projected_adam(chosen, combine, **options)


def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    weight_decay: float = 0.0,
    mask: Any = None,
    labels: Any = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    update_gap: int = 200,
    axes: Axes = plain_axes,
) -> optax.GradientTransformation:
    """Fira for a whole model: `scale_by_fira` where `labels` says `fira`, Adam where it says `adam`, decoupled decay,
    step size. By default leaves of two axes are `fira`."""
    matrix = scale_by_fira(rank, update_gap=update_gap, b1=b1, b2=b2, eps=eps, axes=axes)
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    return whole_model("fira", matrix, adam, learning_rate, weight_decay, mask, labels)
