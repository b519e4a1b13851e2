"""The loss of depth routers: focal cross-entropy with class weights.

    L = -mean a_y (1 - p_y)^gamma log p_y              focal loss (Lin et al., 1708.02002, Eq. 5; Dr.LLM 2510.12773)
    a_c = C w_c / sum w,  w_c = (1 - beta) / (1 - beta^n_c)   effective numbers of samples (Cui et al., 1901.05555)

With the paper's beta = 0.999 and counts (4399, 120956, 1457) the weights are 0.916, 0.905, 1.179: nearly none, because
1 / (1 - beta) = 1000 is less than every count. They rebalance from beta = 0.9999 on.

Legend: C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe.config import require


def focal_loss(logits: Array, labels: Array, gamma: float, class_weights: Sequence[float] | np.ndarray) -> Array:
    """The focal loss, a mean over all labels, in float32. gamma = 0 is weighted cross-entropy.

    Args:
      logits: [..., C].
      labels: [...] int, below C.
      gamma: 0 or more; a label of probability p weighs (1 - p)^gamma.
      class_weights: [C].

    Raises:
      ValueError: a negative gamma, or another number of weights than of logits.
    """
    require(gamma >= 0.0, "gamma", gamma, "0 or more")
    classes = logits.shape[-1]
    require(len(class_weights) == classes, "class_weights", len(class_weights), f"{classes} weights")
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    log_p = jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    # Kept above 0, where a power below 1 has no finite slope.
    miss = jnp.maximum(-jnp.expm1(log_p), jnp.finfo(jnp.float32).tiny)
    weights = jnp.asarray(class_weights, jnp.float32)[labels]
    return -jnp.mean(weights * miss**gamma * log_p)


def effective_numbers(counts: Sequence[int] | np.ndarray, beta: float) -> np.ndarray:
    """(1 - beta^n) / (1 - beta) for each count n, float64: nearly n for beta near 1, at most 1 / (1 - beta) for any n.

    Raises:
      ValueError: a class without samples, beta outside of [0, 1).
    """
    n = np.asarray(counts, np.float64)
    require(n.size > 0 and bool(np.all(n > 0)), "counts", list(counts), "at least one sample of every class")
    require(0.0 <= beta < 1.0, "beta", beta, "0 or more, below 1")
    return (1.0 - beta**n) / (1.0 - beta)


def effective_number_weights(counts: Sequence[int] | np.ndarray, beta: float) -> np.ndarray:
    """Class weights, the inverse effective numbers scaled to mean 1; beta = 0 weighs all classes alike."""
    weights = 1.0 / effective_numbers(counts, beta)
    return weights / weights.mean()
