"""GaLore: Adam in the leading singular directions of the gradient; nothing else of it is used.

Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", 2403.03507, algorithm 2. As
published, moments stay as they are when the directions change, on a basis that is no longer theirs: from the second
window on the trajectory depends on the signs of singular vectors, which a decomposition may choose. The released Adam's
eps is not corrected for bias: here it counts by sqrt(1 - b2^t) less, which only shows while it matters.
`optax.contrib.galore` reduces the longer side instead.
"""

from __future__ import annotations

from typing import Any

import optax

from optim.frugal import scale_by_frugal
from optim.subspaces import Axes, Subspace, plain_axes, svd
from optim.whole import whole_model


def scale_by_galore(
    rank: int,
    *,
    update_gap: int = 200,
    scale: float = 0.25,
    inner: optax.GradientTransformation | None = None,
    subspace: Subspace | None = None,
    axes: Axes = plain_axes,
) -> optax.GradientTransformation:
    """The direction of GaLore for weight matrices: FRUGAL on singular directions, without a rule for the rest.

    Args:
      rank: of the projection, on each matrix's shorter side.
      update_gap: steps between two decompositions.
      scale: of the direction (alpha of the paper).
      inner: by default `optax.scale_by_adam(eps=1e-6)`, the released eps.
      subspace: what projects; by default `subspaces.svd(rank=rank)`.
      axes: as in `scale_by_frugal`.

    Raises:
      ValueError: as `scale_by_frugal`; a rank above a matrix's shorter side, by the parameter's name.
    """
    inner = optax.scale_by_adam(eps=1e-6) if inner is None else inner
    options = {"update_gap": update_gap, "inner": inner, "subspace_scale": scale, "axes": axes}
    subspace = svd(rank=rank) if subspace is None else subspace
    return scale_by_frugal(subspace, rule="none", at_refresh="keep", **options)


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    update_gap: int = 200,
    scale: float = 0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    mask: Any = None,
    labels: Any = None,
    axes: Axes = plain_axes,
) -> optax.GradientTransformation:
    """GaLore for a whole model: `scale_by_galore` where `labels` says `galore`, Adam where it says `adam`, decoupled
    decay, step size. By default leaves of two axes are `galore`."""
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    matrix = scale_by_galore(rank, update_gap=update_gap, scale=scale, inner=adam, axes=axes)
    return whole_model("galore", matrix, adam, learning_rate, weight_decay, mask, labels)
