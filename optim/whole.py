"""From a direction for weight matrices to an optimiser of a whole model."""

from __future__ import annotations

from typing import Any

import jax
import optax


def whole_model(
    label: str,
    matrix: optax.GradientTransformation,
    adam: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    mask: Any,
    labels: Any,
) -> optax.GradientTransformation:
    """`matrix` where `labels` says `label`, `adam` where it says `adam`, then decoupled decay and the step size.

    Args:
      weight_decay, mask: of `optax.add_decayed_weights`.
      labels: a tree or a function of the parameters. None: leaves of two axes have the label.
    """

    def by_axes(params: Any) -> Any:
        return jax.tree.map(lambda leaf: label if leaf.ndim == 2 else "adam", params)

    return optax.chain(
        optax.partition({label: matrix, "adam": adam}, by_axes if labels is None else labels),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
