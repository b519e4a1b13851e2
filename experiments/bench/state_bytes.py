"""Bytes of optimiser state by the formulas of the papers, from the shapes of parameters alone.

Nothing here asks an optimiser: what `bench optimizers` measures must equal these sums exactly. Moments, projections and
norms are float32; places, cursors and counts of steps int32. With two moments of 4 bytes, for N matrices [a, b]:

    everything      8 for every parameter                                          (AdamW, 1711.05101)
    columns         8 N a k + 4 N k, k = floor(rho b): moments, and which           (FRUGAL, 2411.07837)
    rows            8 N k b + 4 N k, k = floor(rho a)
    randk           8 N k + 4 N k, k = floor(rho a b)
    block           8 n a b + 4 (n + 1), n = round(rho N): which, and the cursor of an order
    low_rank        8 N r max(a, b) + 4 N min(a, b) r: moments, and the projection  (GaLore, 2403.03507)
    with_norms      that and 4 N: the limiter's norms           (Fira, 2410.01623; APOLLO and Mini, r = 1, 2412.05270)
    with_errors     that of low_rank and 4 N a b: what the projection missed        (LDAdam, 2410.16103)
    nothing         0: the sign of the gradient

and 8 for every parameter that is in no matrix. BAdam and LISA have 8 for every parameter of the active layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from experiments.optimizers import layer_labels, matrix_axes, matrix_labels
from optim.subspaces import matrices

OfMatrices = Callable[[int, int, int], int]  # N, a, b -> bytes


class Parameters(NamedTuple):
    """What the formulas ask of a model.

    Attributes:
      total: how many numbers.
      matrices: (N, a, b) of each leaf that is weight matrices.
      layers: (L, numbers in one layer) of each leaf stacked over layers.
    """

    total: int
    matrices: list[tuple[int, int, int]]
    layers: list[tuple[int, int]]

    @property
    def others(self) -> int:
        """Numbers in no matrix: embedding, head, norms, biases, routers."""
        return self.total - sum(math.prod(shape) for shape in self.matrices)

    @property
    def outside(self) -> int:
        """Numbers in no layer: embedding, head, last norm."""
        return self.total - sum(math.prod(shape) for shape in self.layers)


def parameters_of(params: Any) -> Parameters:
    """Of arrays or ShapeDtypeStructs; `experiments.optimizers` says which leaves are matrices, and of which axes."""
    labels, places = (jax.tree.leaves(of(params)) for of in (matrix_labels("matrices"), layer_labels("outside")))
    found = Parameters(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)), [], [])
    for (path, leaf), label, place in zip(jax.tree_util.tree_leaves_with_path(params), labels, places, strict=True):
        if label == "matrices":
            axes = matrix_axes(jax.tree_util.keystr(path), leaf)
            n, a, b = jax.eval_shape(partial(matrices, axes=axes), leaf).shape
            found.matrices.append((n, a, b))
        if place == "layers":
            found.layers.append((leaf.shape[0], math.prod(leaf.shape[1:])))
    return found


def everything(parameters: Parameters) -> int:
    """AdamW, with two counts: Adam's and the schedule's."""
    return 8 * parameters.total + 2 * 4


def on_matrices(of_matrices: OfMatrices, counts: int = 4) -> Callable[[Parameters], int]:
    """A method for matrices and Adam for the others. `counts`: of Adam, the schedule, the method's own steps and, where
    it has an Adam below, of that."""

    def state(parameters: Parameters) -> int:
        return sum(of_matrices(*shape) for shape in parameters.matrices) + 8 * parameters.others + 4 * counts

    return state


def on_layers(active: int, *, others: bool) -> Callable[[Parameters], int]:
    """Moments of the active layers of every stacked leaf, with which they are and a cursor; Adam for the `others`, or
    none. Counts as in `on_matrices`."""

    def state(parameters: Parameters) -> int:
        layers = sum(8 * active * size + 4 * (active + 1) for _, size in parameters.layers)
        return layers + (8 * parameters.outside if others else 0) + 4 * 4

    return state


def columns(density: float) -> OfMatrices:
    return lambda n, a, b: (8 * a + 4) * n * math.floor(density * b)


def rows(density: float) -> OfMatrices:
    return lambda n, a, b: (8 * b + 4) * n * math.floor(density * a)


def randk(density: float) -> OfMatrices:
    return lambda n, a, b: (8 + 4) * n * math.floor(density * a * b)


def block(density: float) -> OfMatrices:
    return lambda n, a, b: 8 * round(density * n) * a * b + 4 * (round(density * n) + 1)


def low_rank(rank: int) -> OfMatrices:
    return lambda n, a, b: 8 * n * rank * max(a, b) + 4 * n * min(a, b) * rank


def of_density(density: float) -> OfMatrices:
    """`low_rank` with r = round(rho min(a, b)), as FRUGAL's svd and random have it."""
    return lambda n, a, b: low_rank(round(density * min(a, b)))(n, a, b)


def with_norms(rank: int) -> OfMatrices:
    return lambda n, a, b: low_rank(rank)(n, a, b) + 4 * n


def with_errors(rank: int) -> OfMatrices:
    return lambda n, a, b: low_rank(rank)(n, a, b) + 4 * n * a * b


def nothing(n: int, a: int, b: int) -> int:
    del n, a, b
    return 0
