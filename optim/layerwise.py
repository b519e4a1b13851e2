"""BAdam and LISA: Adam for some layers at a time, the others frozen, moments for the active ones alone.

BAdam   one block of layers after another, everything else frozen      (Luo et al., 2404.02827, algorithm 1)
LISA    gamma layers drawn anew each window; embeddings and head always (Pan et al., 2403.17919, algorithm 1)

Leaves that are stacked over layers [L, ...] have slots for the active ones: the state is really small, and another
choice compiles nothing. Moments begin anew with each choice. `badam` and `lisa` take the gradient of all layers;
`adam_of_part` is both without it, for steps that differentiate the active layers alone (`optim.parts.active_layers`).
Traps of the released code: BAdam's first block is active one step less than the others; LISA's never gives up the
moments of layers that were active before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim.checks import require_schedule
from optim.frugal import scale_by_frugal
from optim.subspaces import Axes, LayerOrder, MatrixAxes, layers


def scale_by_layers(
    active: int,
    *,
    update_gap: int,
    order: LayerOrder = "random",
    inner: optax.GradientTransformation | None = None,
    seed: int = 0,
    axes: Axes | None = None,
) -> optax.GradientTransformation:
    """`inner`'s direction for the active layers of leaves [L, ...], zero for the others.

    Args:
      active: layers at a time.
      update_gap: steps between two choices.
      order: see `optim.subspaces.Layers`.
      inner: by default `optax.scale_by_adam()`; it needs no parameters.
      seed: of the draws.
      axes: how each layer of a leaf is a matrix, which only matters to where its moments lie on a mesh: they are split
        along the first axis of its rows and of its columns. By default rows are the axis after the layers'.

    Raises:
      ValueError: bad options; at init, a leaf with fewer layers.
    """
    stacked = lambda name, leaf: MatrixAxes(1, min(1, leaf.ndim - 1))  # noqa: E731
    subspace, axes = layers(active, order, seed), stacked if axes is None else axes
    return scale_by_frugal(subspace, update_gap=update_gap, inner=inner, rule="none", axes=axes)


def badam(
    learning_rate: optax.ScalarOrSchedule,
    labels: Any,
    *,
    active: int = 1,
    update_gap: int = 50,
    order: LayerOrder = "shuffled",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    seed: int = 0,
    axes: Axes | None = None,
) -> optax.GradientTransformation:
    """BAdam. `labels` says `layers` for leaves stacked over layers, `frozen` for all others (or `adam`, to train those
    too); no decay, which frozen layers must not have. 50 steps a block is the released default."""
    return _whole(learning_rate, labels, active, update_gap, order, b1, b2, eps, seed, axes)


def lisa(
    learning_rate: optax.ScalarOrSchedule,
    labels: Any,
    *,
    active: int = 2,
    update_gap: int = 20,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    seed: int = 0,
    axes: Axes | None = None,
) -> optax.GradientTransformation:
    """LISA. `labels` says `layers` for leaves stacked over layers, `adam` for embeddings, head and what else is always
    trained; no decay, which frozen layers must not have. 2 layers and 20 steps are what the authors use."""
    return _whole(learning_rate, labels, active, update_gap, "random", b1, b2, eps, seed, axes)


def _whole(
    learning_rate: optax.ScalarOrSchedule, labels: Any, active: int, update_gap: int, order: LayerOrder, b1: float,
    b2: float, eps: float, seed: int, axes: Axes | None,
) -> optax.GradientTransformation:  # fmt: skip
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    matrix = scale_by_layers(active, update_gap=update_gap, order=order, inner=adam, seed=seed, axes=axes)
    parts = optax.partition({"layers": matrix, "adam": adam, "frozen": optax.set_to_zero()}, labels)
    return optax.chain(parts, optax.scale_by_learning_rate(learning_rate))


class RestartedState(NamedTuple):
    """Steps done, and the inner transform's state."""

    count: Any
    inner: Any


def restarted(inner: optax.GradientTransformation, update_gap: int) -> optax.GradientTransformation:
    """`inner` with fresh state every `update_gap` steps, the first one included; it needs no parameters.

    Raises:
      ValueError: a bad gap.
    """
    require_schedule(update_gap, 0)

    def init(params: Any) -> RestartedState:
        return RestartedState(jnp.int32(0), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, RestartedState]:
        del params
        fresh, begun = state.count % update_gap == 0, inner.init(jax.tree.map(jnp.zeros_like, updates))
        kept = jax.tree.map(lambda new, old: jnp.where(fresh, new, old), begun, state.inner)
        updates, kept = inner.update(updates, kept)
        return updates, RestartedState(optax.safe_increment(state.count), kept)

    return optax.GradientTransformation(init, update)


def adam_of_part(
    learning_rate: optax.ScalarOrSchedule,
    labels: Any,
    *,
    update_gap: int = 20,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any = None,
) -> optax.GradientTransformation:
    """The optimiser of what `optim.parts.active_layers` takes, with the same `labels` and `update_gap`: step for step
    `lisa` or `badam`, without the other layers' gradients.

    Its first step must be one where a window begins. Decay, of `optax.add_decayed_weights`, is of what trains alone.
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    of_part = labels if callable(labels) else lambda trained: jax.tree.map(_label_of, labels, trained)
    return optax.chain(
        optax.partition({"layers": restarted(adam, update_gap), "adam": adam}, of_part),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _label_of(label: str, trained: Any) -> str | None:
    return None if trained is None else label
