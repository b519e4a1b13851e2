"""Which samples, or sources, to train on: by loss (RHO-loss) and by influence (LESS).

RHO-loss   the n samples of a larger batch with the greatest loss that a model of held-out data does not share
                                                                   (Mindermann et al., 2206.07137, algorithm 1)
LESS       samples whose Adam steps point along a validation gradient, at several checkpoints
                                                                   (Xia et al., 2402.04333, sections 3 and 4)

Features are rows: `rows` of a tree of gradients [N, ...] are exact, `project` keeps k numbers of each. Then
`influence` sums cosines over checkpoints, `source_scores` and `source_weights` lead from samples to sources.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from optim.checks import require
from optim.domain_weights import domain_sums

BLOCK = 4096  # parameters whose [BLOCK, k] signs exist at a time


def reducible_loss(loss: Array, irreducible: Array) -> Array:
    """RHO-loss's scores [N]: the training loss less that of a model trained on held-out data (algorithm 1).

    Raises:
      ValueError: shapes that differ.
    """
    require(loss.shape == irreducible.shape, "irreducible", irreducible.shape, f"the loss's shape {loss.shape}")
    return loss - irreducible


def top(scores: Array, n: int) -> Array:
    """Indices [n] of the greatest of `scores` [N], the greatest first, the earlier of equal ones first, NaN last. With
    the loss itself as scores it is the selection by loss.

    Raises:
      ValueError: scores that are not [N]; n outside [1, N].
    """
    require(scores.ndim == 1, "scores", scores.shape, "[N]")
    whole = isinstance(n, numbers.Integral) and not isinstance(n, bool)
    require(whole and 1 <= n <= scores.size, "n", n, f"a whole number from 1 to the batch's {scores.size}")
    return jax.lax.top_k(jnp.where(jnp.isnan(scores), -jnp.inf, scores), n)[1]


def adam_directions(
    gradients: Any, mu: Any, nu: Any, count: int | Array, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> Any:
    """Adam's step for each sample alone (section 3.1): m' / sqrt(v' + eps), where m' = (b1 m + (1 - b1) g) / (1 - b1^t)
    and v' = (b2 v + (1 - b2) g^2) / (1 - b2^t). Here t = count + 1, so that the first step is Adam's.

    Args:
      gradients: tree of leaves [N, ...], one for each sample.
      mu, nu: Adam's moments at the checkpoint, leaves [...].
      count: steps those moments have seen.

    Raises:
      ValueError: bad options; leaves that do not fit.
    """
    good = isinstance(count, Array) or (isinstance(count, numbers.Integral) and count >= 0)
    require(good, "count", count, "a whole number, at least 0")
    t = count + 1
    return _adam(gradients, mu, nu, b1, b2, eps, lambda m: m / (1 - b1**t), lambda v: v / (1 - b2**t))


def released_adam_directions(
    gradients: Any, mu: Any, nu: Any, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> Any:
    """`adam_directions` without the correction for bias, as released. It is one factor but for eps, so that cosines
    differ only where v' is no greater than eps."""
    return _adam(gradients, mu, nu, b1, b2, eps, lambda m: m, lambda v: v)


def rows(gradients: Any) -> Array:
    """Features without projection [N, P]: the leaves [N, ...] of a tree, side by side.

    Raises:
      ValueError: leaves that do not share a first axis.
    """
    return jnp.concatenate(_matrices(gradients), axis=1)


def project(gradients: Any, key: Array, k: int) -> Array:
    """Features [N, k] whose inner products have those of `rows` as their mean over keys: signs / sqrt(k), as released.

    The projection is a function of the key and of the leaves' order and sizes alone: the same key must be used for
    training and validation. Its [P, k] signs are drawn block by block, `BLOCK` parameters at a time.

    Raises:
      ValueError: leaves that do not share a first axis; k < 1.
    """
    require(isinstance(k, numbers.Integral) and not isinstance(k, bool) and k >= 1, "k", k, "a whole number above 0")
    parts = [_project(leaf, jax.random.fold_in(key, i), int(k)) for i, leaf in enumerate(_matrices(gradients))]
    return sum(parts[1:], parts[0]) / np.sqrt(k).astype(parts[0].dtype)


def cosines(train: Array, validation: Array) -> Array:
    """Cosines [N, V] of features [N, k] with features [V, k]; 0 for a feature that is 0.

    Raises:
      ValueError: other shapes.
    """
    require(train.ndim == 2 and train.size > 0, "train", train.shape, "[N, k]")
    fits = validation.ndim == 2 and validation.shape[0] > 0 and validation.shape[1] == train.shape[1]
    require(fits, "validation", validation.shape, f"[V, {train.shape[1]}], V at least 1")
    return jnp.matmul(_unit(train), _unit(validation).T, precision=jax.lax.Precision.HIGHEST)


def influence(train: Sequence[Array], validation: Sequence[Array], learning_rates: Sequence[float]) -> Array:
    """LESS's scores [N, V]: sum over checkpoints of learning rate times cosine (section 3).

    The paper has one validation row for each subtask, its mean gradient, and takes the greatest over V; as released,
    each validation sample has its row and the mean over the samples of a subtask comes before that. Learning rates
    divided by their sum, as released, give the same order.

    Args:
      train: features [N, k] of samples (or sources) at each checkpoint, of Adam's directions.
      validation: features [V, k] at each checkpoint, of plain gradients.
      learning_rates: the mean learning rate of each checkpoint's epoch.

    Raises:
      ValueError: no checkpoint, or not as many of each; learning rates that are negative or not finite; other shapes.
    """
    require(len(train) >= 1, "train", len(train), "features of at least one checkpoint")
    require(len(validation) == len(train), "validation", len(validation), f"features of {len(train)} checkpoints")
    good = len(learning_rates) == len(train) and all(np.isfinite(r) and r >= 0 for r in learning_rates)
    require(good, "learning_rates", learning_rates, f"{len(train)} finite numbers, each at least 0")
    rounds = zip(train, validation, learning_rates, strict=True)
    each = [rate * cosines(features, targets) for features, targets, rate in rounds]
    require(len({x.shape for x in each}) == 1, "train", [x.shape for x in each], "the same samples at each checkpoint")
    return sum(each[1:], each[0])


def source_scores(scores: Array, sources: Array, num_sources: int) -> Array:
    """Mean score of each source [S], from scores [N] and source ids [N].

    Raises:
      ValueError: ids outside [0, S), shapes that do not fit; a source without a sample (NaN for it within jit).
    """
    require(scores.ndim == 1, "scores", scores.shape, "[N]")
    total, count = domain_sums(scores, sources, num_sources)
    empty = not isinstance(count, Tracer) and bool((count == 0).any())
    require(not empty, "sources", count, "a sample of each source")
    return total / count


def source_weights(scores: Array, sources: Array, num_sources: int, share: float) -> Array:
    """Weights [S] by counting: each source's part of the top `share` of N samples, rounded to a whole sample, at least
    one. Sources of more samples have more to be chosen from, as in the paper.

    Raises:
      ValueError: as `source_scores`, though a source may have no sample; a share outside (0, 1].
    """
    good = isinstance(share, numbers.Real) and 0 < share <= 1
    require(good, "share", share, "a number in (0, 1]")
    require(scores.ndim == 1 and scores.shape == sources.shape, "sources", sources.shape, f"the scores' {scores.shape}")
    chosen = top(scores, max(1, round(share * scores.size)))
    _, count = domain_sums(scores[chosen], sources[chosen], num_sources)
    return count / chosen.size


def _matrices(gradients: Any) -> list[Array]:
    leaves = jax.tree.leaves(gradients)
    shapes = [leaf.shape for leaf in leaves]
    fits = len(leaves) > 0 and all(len(s) > 0 and s[0] == shapes[0][0] > 0 for s in shapes)
    require(fits, "gradients", shapes, "leaves [N, ...] of one N")
    wide = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in leaves]
    return [leaf.reshape(leaf.shape[0], -1) for leaf in wide]


def _project(matrix: Array, key: Array, k: int) -> Array:
    """[N, p] times the signs [p, k] of this key, a block at a time."""
    block = min(BLOCK, matrix.shape[1])
    blocks = -(-matrix.shape[1] // block)
    padded = jnp.pad(matrix, ((0, 0), (0, blocks * block - matrix.shape[1])))

    def add(i: Array, total: Array) -> Array:
        signs = jax.random.rademacher(jax.random.fold_in(key, i), (block, k), matrix.dtype)
        part = jax.lax.dynamic_slice_in_dim(padded, i * block, block, axis=1)
        return total + jnp.matmul(part, signs, precision=jax.lax.Precision.HIGHEST)

    return jax.lax.fori_loop(0, blocks, add, jnp.zeros((matrix.shape[0], k), matrix.dtype))


def _unit(features: Array) -> Array:
    norm = jnp.linalg.norm(features, axis=1, keepdims=True)
    return jnp.where(norm > 0, features / jnp.where(norm > 0, norm, 1), 0)


def _adam(gradients: Any, mu: Any, nu: Any, b1: float, b2: float, eps: float, first: Any, second: Any) -> Any:
    for field, value in (("b1", b1), ("b2", b2)):
        require(isinstance(value, numbers.Real) and 0 <= value < 1, field, value, "a number in [0, 1)")
    require(isinstance(eps, numbers.Real) and np.isfinite(eps) and eps > 0, "eps", eps, "a finite number above 0")
    shapes = [leaf.shape for leaf in jax.tree.leaves(gradients)]
    for field, moment in (("mu", mu), ("nu", nu)):
        found = [leaf.shape for leaf in jax.tree.leaves(moment)]
        same = jax.tree.structure(moment) == jax.tree.structure(gradients)
        require(same and found == [s[1:] for s in shapes], field, found, f"leaves like {shapes} without the first axis")

    def direction(g: Array, m: Array, v: Array) -> Array:
        m, v = first(b1 * m[None] + (1 - b1) * g), second(b2 * v[None] + (1 - b2) * g * g)
        return m / jnp.sqrt(v + eps)

    return jax.tree.map(direction, gradients, mu, nu)
