"""Where optimiser state lives and how many bytes it takes, for any Optax transform."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from operator import mul
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optim.checks import require
from optim.subspaces import Indices


def opt_state_shardings(tx: optax.GradientTransformation, params: Any, shardings: Any) -> Any:
    """Shardings for `tx.init(params)`: state of a parameter, found by its path, is split as the parameter is.

    State of the parameter's shape takes its sharding. State of a subspace of its matrices ([N, a, b], see
    `optim.subspaces`) is split along the axes that are whole in it; a projected axis is not, but for columns and rows
    with shards, whose parts are split as it is: its devices share another axis. Indices go with what is below them. All
    else is replicated.

    Args:
      tx: the transform.
      params: arrays or ShapeDtypeStructs.
      shardings: a NamedSharding per parameter, same tree.

    Raises:
      ValueError: the axis of which columns or rows are chosen is split over devices whose number does not divide the
        shards, or not by its first axis alone: every device would hold all that is below, and sum it with the others;
        by the parameter's name. svd, random and gaussian (sums over devices by their nature) and randk, block and
        layers (which choose across everything) are never refused.
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    is_choice = lambda node: isinstance(node, Indices)  # noqa: E731
    known = {
        path: (leaf.shape, sharding.spec)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }
    specs = {path: {tuple(shape): spec} for path, (shape, spec) in known.items()}

    def parameter(path: tuple[Any, ...]) -> tuple[Any, ...] | None:
        inside = (path[i:j] for i in range(len(path)) for j in range(len(path), i, -1))
        return next((part for part in inside if part in known), None)

    def choose(path: tuple[Any, ...], node: Any) -> Any:
        """Of a choice its own sharding; the spec of what is below it is noted."""
        owner = parameter(path)
        if not is_choice(node) or owner is None:
            return node
        index, low, spec = _choice_specs(jax.tree_util.keystr(owner), node, *known[owner], mesh)
        specs[owner].setdefault(low, spec)
        return replace(node, index=NamedSharding(mesh, index))

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        owner = parameter(path)
        if isinstance(leaf, NamedSharding):
            return leaf
        if owner is None:
            return NamedSharding(mesh, P())
        spec = specs[owner].get(leaf.shape)
        return NamedSharding(mesh, _subspace_spec(leaf.shape, *known[owner], mesh) if spec is None else spec)

    chosen = jax.tree_util.tree_map_with_path(choose, jax.eval_shape(tx.init, params), is_leaf=is_choice)
    return jax.tree_util.tree_map_with_path(place, chosen)


def _choice_specs(name: str, choice: Indices, shape: tuple[int, ...], spec: P, mesh: Mesh) -> tuple[P, Any, P]:
    """(spec of the indices, shape of what is below them, its spec) for a parameter of this shape and spec."""
    n, chosen = choice.index.shape[0], choice.index.shape[1:]
    rows, other = choice.axis == "rows", math.prod(shape) // (n * choice.size)
    # Axes of length 1 belong to any part; without them there is one way to cut the shape into N, a and b.
    long = [(size, entry) for size, entry in zip(shape, _padded(spec, shape), strict=True) if size > 1]
    entries = [entry if _devices(entry, mesh) else None for _, entry in long]
    cuts = list(accumulate((size for size, _ in long), mul, initial=1))
    ends = n, n * (choice.size if rows else other)
    if choice.axis == "randk" and n in cuts:
        each = _shared([_joined(entries[: cuts.index(n)][::-1]), None], choice.index.shape, entries, mesh)
        return each, choice.index.shape, each
    if not all(end in cuts for end in ends):
        return P(), choice.index.shape, P()
    begin, middle = map(cuts.index, ends)
    first, last = entries[begin:middle], entries[middle:]
    projected, whole = (first, last) if rows else (last, first)

    devices = {axis: size for entry in projected for axis, size in _devices(entry, mesh).items()}
    total, along = math.prod(devices.values()), _joined(projected)
    helps = "" if along is None else f"shards a multiple of {total}, as {choice.axis}(density, shards={total}), or "
    local = not devices or (along is not None and choice.shards % total == 0)
    require(local, f"{name}: devices along {choice.axis}", devices, f"{helps}a subspace along another axis")

    stacked, places = _joined(entries[:begin][::-1]), (along, None)[-len(chosen) :]
    if rows:
        return P(stacked, *places), (n, *chosen, other), P(stacked, *places, _joined(whole))
    return P(stacked, *places), (n, other, *chosen), P(stacked, _joined(whole), *places)


def _devices(entry: Any, mesh: Mesh) -> dict[str, int]:
    """Mesh axes that really split an axis, and their sizes."""
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return {name: mesh.shape[name] for name in names if mesh.shape[name] > 1}


def _padded(spec: P, shape: tuple[int, ...]) -> list[Any]:
    return [*spec, *[None] * (len(shape) - len(spec))]


def _subspace_spec(low: tuple[int, ...], shape: tuple[int, ...], spec: P, mesh: Mesh) -> P:
    """Of [N, a, b] with one axis shortened, for a parameter of this shape; P() for anything else. Which of its axes
    make N, a and b is not told: the division that leaves most of it whole is taken. Devices along the shortened axis
    then share the longest one that they divide: the sum over them that goes down ends scattered."""
    entries = _padded(spec, shape)
    best, found = 0, None
    for stacked in range(len(shape) - 1):
        for split in range(stacked + 1, len(shape)):
            parts = slice(0, stacked), slice(stacked, split), slice(split, None)
            sizes = [math.prod(shape[part]) for part in parts]
            whole = [mine == size for mine, size in zip(low, sizes)]
            fits = len(low) == 3 and sum(whole) >= 2 and all(mine <= size for mine, size in zip(low, sizes))
            kept = math.prod(size for size, one in zip(sizes, whole) if one)
            if fits and kept > best:
                best = kept
                kinds = entries[:stacked][::-1], entries[stacked:split], entries[split:]  # the last stacked is slowest
                found = [_joined(kind) if one else None for kind, one in zip(kinds, whole)]
    return P() if found is None else _shared(found, low, entries, mesh)


def _shared(found: list[Any], low: tuple[int, ...], entries: Sequence[Any], mesh: Mesh) -> P:
    """`found`, and the devices that split the parameter but not this on the longest axis that they divide."""
    held = {name for entry in found for name in _devices(entry, mesh)}
    left = {name: size for entry in entries for name, size in _devices(entry, mesh).items() if name not in held}
    for axis in sorted(range(len(low)), key=lambda axis: -low[axis]):
        if left and found[axis] is None and low[axis] % math.prod(left.values()) == 0:
            return P(*found[:axis], next(iter(left)) if len(left) == 1 else tuple(left), *found[axis + 1 :])
    return P(*found)


def _joined(entries: Sequence[Any]) -> Any:
    """How the product of axes is split: as the first is, if only that one is."""
    return entries[0] if entries and not any(entries[1:]) else None


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Exact bytes one device holds of a pytree of arrays or ShapeDtypeStructs under the given shardings."""
    sizes = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))
