"""Which directions of a weight an optimiser keeps state for: choosing them, going down to them and up again.

A leaf is seen as N matrices [N, a, b] (`matrices`). A subspace has `k` numbers for each of them, or holds some of the
N whole; what it keeps is small and of fixed shape, so a new choice compiles nothing. `up(down(x))` is the projection
onto it: idempotent, and x minus it is orthogonal to it.

    columns, rows   floor(rho b) columns or floor(rho a) rows drawn at random       (FRUGAL, 2411.07837)
    randk           floor(rho a b) entries drawn at random
    svd             the leading singular vectors of the gradient on the shorter side (GaLore, 2403.03507), of rank r
                    or r = round(rho min(a, b))
    random          as many orthonormal directions drawn at random
    block           round(rho N) whole matrices, in an order                        (FRUGAL)
    layers          some layers, the same in every leaf       (BAdam, 2404.02827; LISA, 2403.17919)

Legend: N matrices, a rows, b columns, k chosen, s parts of an axis (`shards`), r rank, n chosen matrices, rho density.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optim.checks import require

Choice = Any  # what a subspace keeps: arrays
Shape = tuple[int, ...]  # N, a, b
Kind = Literal["columns", "rows", "randk"]
Order = Literal["random", "ascending", "descending", "mirror"]
LayerOrder = Literal["random", "ascending", "descending", "shuffled"]


class MatrixAxes(NamedTuple):
    """How a leaf is N matrices: its first `stacked` axes count them, the next `inputs` are rows, the rest columns.

    The last stacked axis counts slowest: of [L, E, d, f] the L matrices of expert 0 come first, so that N is split over
    devices as E is.
    """

    stacked: int = 0
    inputs: int = 1


def matrices(leaf: Array, axes: MatrixAxes) -> Array:
    """[N, a, b] of a leaf."""
    shape, split = leaf.shape, axes.stacked + axes.inputs
    sizes = (math.prod(shape[: axes.stacked]), math.prod(shape[axes.stacked : split]), math.prod(shape[split:]))
    return leaf.transpose(_turned(leaf.ndim, axes)).reshape(sizes)


def from_matrices(view: Array, shape: tuple[int, ...], axes: MatrixAxes) -> Array:
    """The leaf of this shape again."""
    order = _turned(len(shape), axes)  # its own inverse
    return view.reshape([shape[i] for i in order]).transpose(order)


def _turned(ndim: int, axes: MatrixAxes) -> list[int]:
    return [*range(axes.stacked)[::-1], *range(axes.stacked, ndim)]


class Subspace(Protocol):
    """A rule for directions. A matrix's shape is [N, a, b]; all other shapes follow from it and the rule's options."""

    @property
    def coordinates(self) -> bool:
        """Whether it chooses entries, so that a residual is exactly 0 there."""
        ...

    def init(self, shape: Shape) -> Choice:
        """A choice of the right shapes, before the first `refresh`. ValueError if it would choose nothing."""
        ...

    def refresh(self, choice: Choice, grad: Array, key: Array) -> Choice:
        """A new choice; a function of its arguments alone, so replicas agree."""
        ...

    def down(self, choice: Choice, full: Array) -> Array:
        """What is kept of [N, a, b], in the rule's own shape."""
        ...

    def up(self, choice: Choice, low: Array, shape: Shape) -> Array:
        """[N, a, b] again, 0 outside the subspace."""
        ...


Axes = Callable[[str, Any], MatrixAxes]


def plain_axes(name: str, leaf: Any) -> MatrixAxes:
    """A leaf of two axes is one matrix. ValueError for any other, whose axes must be told."""
    require(leaf.ndim == 2, f"{name}.shape", tuple(leaf.shape), "two axes; give `axes` for stacked or split ones")
    return MatrixAxes()


class Matrices(NamedTuple):
    """A tree's leaves as [N, a, b] in float32 or above, with their names, shapes, axes and the tree's structure."""

    names: list[str]
    views: list[Array]
    shapes: list[tuple[int, ...]]
    axes: list[MatrixAxes]
    treedef: Any

    def leaves(self, views: Sequence[Array]) -> Any:
        """The tree again, of other views."""
        leaves = zip(views, self.shapes, self.axes, strict=True)
        return self.treedef.unflatten([from_matrices(*leaf) for leaf in leaves])


def as_matrices(tree: Any, axes: Axes) -> Matrices:
    """ValueError for a leaf that is not of real numbers, or as `axes` has it."""
    names, views, shapes, seen = [], [], [], []
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    for path, leaf in paths:
        name = jax.tree_util.keystr(path)
        require(jnp.issubdtype(leaf.dtype, jnp.floating), f"{name}.dtype", str(leaf.dtype), "real floating point")
        names.append(name)
        seen.append(axes(name, leaf))
        views.append(matrices(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), seen[-1]))
        shapes.append(leaf.shape)
    return Matrices(names, views, shapes, seen, treedef)


def first_choices(subspace: Subspace, model: Matrices) -> tuple[list[Choice], list[Array]]:
    """A choice for each leaf and zeros of what is below it. ValueError names the leaf that cannot have one."""
    choices, lows = [], []
    for name, view in zip(model.names, model.views, strict=True):
        try:
            choice = subspace.init(view.shape)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
        choices.append(jax.tree.map(lambda leaf: leaf.astype(view.dtype) if floating(leaf) else leaf, choice))  # noqa: B023
        lows.append(jnp.zeros_like(subspace.down(choices[-1], view)))
    return choices, lows


def next_choices(subspace: Subspace, before: list[Choice], grads: Matrices, fresh: Array, key: Array) -> list[Choice]:
    """New choices if `fresh`, each leaf with a key of its own; else those of before, and nothing is computed."""
    keep = lambda choice, *_: choice  # noqa: E731
    return [
        jax.lax.cond(fresh, subspace.refresh, keep, choice, view, jax.random.fold_in(key, i))
        for i, (choice, view) in enumerate(zip(before, grads.views, strict=True))
    ]


def _chosen(density: float, size: int, what: str) -> int:
    count = math.floor(density * size + 1e-9)
    require(count > 0, "density", density, f"enough for at least one of {size} {what}")
    return count


@partial(jax.tree_util.register_dataclass, data_fields=["index"], meta_fields=["axis", "size", "shards"])
@dataclass(frozen=True)
class Indices:
    """Which places of an axis, for each matrix: int32 [N, k], or with s > 1 shards [N, s, k / s] inside each part.

    `size` is the axis' length: b for columns, a for rows, a b for randk.
    """

    index: Any
    axis: Kind
    size: int
    shards: int = 1


@dataclass(frozen=True)
class Coordinates:
    """Columns, rows or entries, drawn without replacement for each matrix. Keeps `Indices`; 4 k bytes for a matrix.

    Below it is [N, a, k], [N, k, b] or [N, k]. `shards` > 1, for columns and rows, draws k / s from each of s equal
    parts of the axis, and below it is [N, a, s, k / s] or [N, s, k / s, b]: on an axis split over devices, whose number
    divides s, every device then has its share of them and goes down and up with what it holds.
    """

    density: float
    kind: Kind
    shards: int = 1
    coordinates = True

    def __post_init__(self) -> None:
        most = 1 if self.kind == "randk" else math.inf
        require(1 <= self.shards <= most, "shards", self.shards, "at least 1, and 1 for randk")

    def _sizes(self, shape: Shape) -> tuple[int, int]:
        """How many there are, and how many are chosen."""
        _, a, b = shape
        size = {"columns": b, "rows": a, "randk": a * b}[self.kind]
        names = {"columns": "columns", "rows": "rows", "randk": "entries"}[self.kind]
        count = _chosen(self.density, size, names)
        even = size % self.shards == 0 and count % self.shards == 0
        require(even, "shards", self.shards, f"a divisor of {size} {names} and of the {count} chosen")
        return size, count

    def init(self, shape: Shape) -> Indices:
        size, count = self._sizes(shape)
        each = (count,) if self.shards == 1 else (self.shards, count // self.shards)
        index = jnp.broadcast_to(jnp.arange(each[-1], dtype=jnp.int32), (shape[0], *each))
        return Indices(index, self.kind, size, self.shards)

    def refresh(self, choice: Indices, grad: Array, key: Array) -> Indices:
        size, count = self._sizes(grad.shape)
        part, share = size // self.shards, count // self.shards

        def draw(key: Array) -> Array:
            each = jax.random.split(key, self.shards)
            inside = jax.vmap(lambda key: jnp.sort(jax.random.permutation(key, part)[:share]))(each)
            return inside.astype(jnp.int32)

        drawn = jax.vmap(draw)(jax.random.split(key, grad.shape[0]))
        return replace(choice, index=drawn.reshape(choice.index.shape))

    def down(self, choice: Indices, full: Array) -> Array:
        n, a, b = full.shape
        if self.kind == "randk":
            return jnp.take_along_axis(full.reshape(n, a * b), choice.index, axis=1)
        parts = () if self.shards == 1 else (self.shards,)
        take = partial(jnp.take_along_axis, mode="promise_in_bounds")
        if self.kind == "rows":
            return take(full.reshape(n, *parts, -1, b), choice.index[..., None], axis=-2)
        return take(full.reshape(n, a, *parts, -1), choice.index[:, None], axis=-1)

    def up(self, choice: Indices, low: Array, shape: Shape) -> Array:
        if self.kind == "randk":  # the transpose of a gather of distinct places puts each number back
            (full,) = jax.linear_transpose(partial(self.down, choice), jax.ShapeDtypeStruct(shape, low.dtype))(low)
            return full
        # A gather by each place's rank among the chosen fuses with what follows; a scatter runs on one core (CPU).
        axis, spread = (-1, 1) if self.kind == "columns" else (-2, -1)
        k = choice.index.shape[-1]
        place = jnp.expand_dims(_places(choice.index, choice.size // choice.shards), spread)
        found = jnp.take_along_axis(low, jnp.minimum(place, k - 1), axis=axis, mode="promise_in_bounds")
        return jnp.where(place < k, found, 0).reshape(shape)


def _places(index: Array, size: int) -> Array:
    """[..., size]: where each of `size` places stands in distinct indices [..., k], k where it does not."""
    k = index.shape[-1]
    one = lambda index: jnp.full(size, k, jnp.int32).at[index].set(jnp.arange(k, dtype=jnp.int32))  # noqa: E731
    return jnp.vectorize(one, signature="(k)->(n)")(index)


def decomposed(decompose: Callable[[Array], Any], stack: Array) -> Any:
    """`decompose` of each of [N, a, b]; on CPU one after another. There jaxlib spreads a batch over the very threads
    that run the program, and waits on one of them: as many such calls at a time as threads would wait for ever."""
    one_by_one = lambda x: jax.lax.map(decompose, x)  # noqa: E731
    return jax.lax.platform_dependent(stack, cpu=one_by_one, default=decompose)


@dataclass(frozen=True)
class LowRank:
    """Orthonormal directions of the shorter side, singular vectors of the gradient or random ones. Keeps float32
    [N, min(a, b), r]; for a >= b they multiply from the right, as GaLore has it."""

    size: float | int
    kind: Literal["svd", "random", "gaussian"]
    coordinates = False

    def rank(self, shape: Shape) -> int:
        short = min(shape[1:])
        rank = round(self.size * short) if isinstance(self.size, float) else self.size
        name = "density" if isinstance(self.size, float) else "rank"
        require(1 <= rank <= short, name, self.size, f"a rank of 1 to {short} for a matrix {tuple(shape[1:])}")
        return rank

    def init(self, shape: Shape) -> Array:
        short, rank = min(shape[1:]), self.rank(shape)
        return jnp.broadcast_to(jnp.eye(short, rank)[None], (shape[0], short, rank))

    def refresh(self, choice: Array, grad: Array, key: Array) -> Array:
        short, rank = choice.shape[1:]
        if self.kind == "random":
            normal = jax.random.normal(key, (choice.shape[0], short, rank), choice.dtype)
            q, r = decomposed(jnp.linalg.qr, normal)
            return q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None, :]
        if self.kind == "gaussian":
            return jax.random.normal(key, (choice.shape[0], short, rank), choice.dtype) / math.sqrt(rank)
        left, _, right = decomposed(partial(jnp.linalg.svd, full_matrices=False), grad)
        return jnp.swapaxes(right, 1, 2)[..., :rank] if grad.shape[1] >= grad.shape[2] else left[..., :rank]

    def down(self, choice: Array, full: Array) -> Array:
        if full.shape[1] >= full.shape[2]:
            return full @ choice
        return jnp.swapaxes(choice, 1, 2) @ full

    def up(self, choice: Array, low: Array, shape: Shape) -> Array:
        if shape[1] >= shape[2]:
            return low @ jnp.swapaxes(choice, 1, 2)
        return choice @ low


class BlockChoice(NamedTuple):
    """Which matrices [n] int32, and where in the order the next choice begins."""

    index: Array
    cursor: Array


class Whole:
    """What block and layers share: some of the N matrices, whole."""

    coordinates = True

    def down(self, choice: BlockChoice, full: Array) -> Array:
        return full[choice.index]

    def up(self, choice: BlockChoice, low: Array, shape: Shape) -> Array:
        place, last = _places(choice.index, shape[0]), low.shape[0] - 1
        return jnp.where((place <= last)[:, None, None], low[jnp.minimum(place, last)], 0)


@dataclass(frozen=True)
class Block(Whole):
    """n = round(rho N) of a leaf's matrices, whole: at each refresh the next ones of an order, or for `random` any.
    `mirror` goes from both ends to the middle. Experts are matrices too: of [L, E, d, f] a block is one expert of one
    layer.

    The released code counts matrices over the whole model; here a leaf has its own share, so that state has one size.
    """

    density: float
    order: Order = "random"

    def count(self, total: int) -> int:
        count = round(self.density * total)
        require(1 <= count <= total, "density", self.density, f"1 to {total} of {total} matrices, not {count}")
        odd = self.order == "mirror" and count % 2 == 1
        require(not odd, "order", self.order, f"an even number of active matrices, not {count}")
        return count

    def init(self, shape: Shape) -> BlockChoice:
        return BlockChoice(jnp.arange(self.count(shape[0]), dtype=jnp.int32), jnp.int32(0))

    def refresh(self, choice: BlockChoice, grad: Array, key: Array) -> BlockChoice:
        total, count = grad.shape[0], choice.index.shape[0]
        forward = np.arange(total)
        places = {"ascending": forward, "descending": forward[::-1], "mirror": mirrored(total)}
        if self.order == "random":
            order, begin = jax.random.permutation(key, total), 0
        else:
            order, begin = jnp.asarray(places[self.order]), choice.cursor
        index = jnp.sort(order[(begin + jnp.arange(count)) % total]).astype(jnp.int32)
        return BlockChoice(index, (choice.cursor + count) % total)


@dataclass(frozen=True)
class Layers(Whole):
    """`active` of the N = L layers on a leaf's first axis; every leaf has the same ones at the same step.

    ascending, descending   in turn
    shuffled                in turn, in an order drawn anew for each round
    random                  drawn anew each time
    """

    active: int
    order: LayerOrder = "random"
    seed: int = 0

    def init(self, shape: Shape) -> BlockChoice:
        require(1 <= self.active <= shape[0], "active", self.active, f"1 to {shape[0]} layers")
        even = self.order != "shuffled" or shape[0] % self.active == 0
        require(even, "active", self.active, f"a divisor of {shape[0]} layers, for shuffled")
        return BlockChoice(jnp.arange(self.active, dtype=jnp.int32), jnp.int32(0))

    def refresh(self, choice: BlockChoice, grad: Array, key: Array) -> BlockChoice:
        del key  # it differs between leaves
        total, at = grad.shape[0], choice.cursor  # layers chosen so far
        rounds = {"shuffled": at // total, "random": at // self.active}
        if self.order in rounds:
            drawn = jax.random.fold_in(jax.random.key(self.seed), rounds[self.order])
            order = jax.random.permutation(drawn, total)
        else:
            order = jnp.arange(total) if self.order == "ascending" else jnp.arange(total)[::-1]
        begin = 0 if self.order == "random" else at % total
        index = jnp.sort(order[(begin + jnp.arange(self.active)) % total]).astype(jnp.int32)
        return BlockChoice(index, at + self.active)


def mirrored(total: int) -> np.ndarray:
    """0, total - 1, 1, total - 2, ..."""
    ends = np.stack([np.arange(total), np.arange(total)[::-1]], axis=1)
    return ends.reshape(-1)[:total]


def columns(density: float, shards: int = 1) -> Coordinates:
    """See the module."""
    return Coordinates(_share(density), "columns", shards)


def rows(density: float, shards: int = 1) -> Coordinates:
    """See the module."""
    return Coordinates(_share(density), "rows", shards)


def randk(density: float) -> Coordinates:
    """See the module. Flat int32 places: 4 bytes an entry, where the released code has 16."""
    return Coordinates(_share(density), "randk")


def svd(density: float | None = None, *, rank: int | None = None) -> LowRank:
    """See the module; one of the two."""
    return LowRank(_size(density, rank), "svd")


def random(density: float | None = None, *, rank: int | None = None) -> LowRank:
    """See the module; one of the two."""
    return LowRank(_size(density, rank), "random")


def gaussian(*, rank: int) -> LowRank:
    """Normal directions of variance 1 / r, which keep a vector's length on average: APOLLO's. No projection."""
    return LowRank(_size(None, rank), "gaussian")


def block(density: float, order: Order = "random") -> Block:
    """See the module."""
    require(order in get_args(Order), "order", order, f"one of {', '.join(get_args(Order))}")
    return Block(_share(density), order)


def layers(active: int, order: LayerOrder = "random", seed: int = 0) -> Layers:
    """See `Layers`."""
    require(order in get_args(LayerOrder), "order", order, f"one of {', '.join(get_args(LayerOrder))}")
    require(isinstance(active, int) and active >= 1, "active", active, "at least 1")
    require(isinstance(seed, int), "seed", seed, "a whole number: draws are a function of it")
    return Layers(active, order, seed)


def _share(density: float) -> float:
    require(0 < density <= 1, "density", density, "above 0, at most 1; for 0 take no subspace")
    return float(density)


def _size(density: float | None, rank: int | None) -> float | int:
    if rank is None:
        require(density is not None, "density", None, "a density or a rank")
        return _share(density or 0.0)
    require(density is None, "density", density, f"none beside rank = {rank}")
    require(isinstance(rank, int) and rank >= 1, "rank", rank, "at least 1")
    return rank
