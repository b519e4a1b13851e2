"""Where optimiser state lives and how many bytes it takes, for any Optax transform."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def opt_state_shardings(tx: optax.GradientTransformation, params: Any, shardings: Any) -> Any:
    """Shardings for `tx.init(params)`: state of a parameter, found by its path, is split as the parameter is.

    State of the parameter's shape takes its sharding. State of a subspace of its matrices ([N, a, b], see
    `optim.subspaces`) is split along the axes that are whole in it; a projected axis is not. All else is replicated.

    Args:
      tx: the transform.
      params: arrays or ShapeDtypeStructs.
      shardings: a NamedSharding per parameter, same tree.
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    known = {
        path: (leaf.shape, sharding.spec)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        inside = (path[i:j] for i in range(len(path)) for j in range(len(path), i, -1))
        shape, spec = next((known[part] for part in inside if part in known), ((), P()))
        return NamedSharding(mesh, spec if leaf.shape == shape else _subspace_spec(leaf.shape, shape, spec))

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, params))


def _subspace_spec(low: tuple[int, ...], shape: tuple[int, ...], spec: P) -> P:
    """Of [N, a, b] with one axis shortened, for a parameter of this shape; P() for anything else. Which of its axes
    make N, a and b is not told: the division that leaves most of it whole is taken."""
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    best, found = 0, P()
    for stacked in range(len(shape) - 1):
        for split in range(stacked + 1, len(shape)):
            parts = slice(0, stacked), slice(stacked, split), slice(split, None)
            sizes = [math.prod(shape[part]) for part in parts]
            whole = [mine == size for mine, size in zip(low, sizes)]
            fits = len(low) == 3 and sum(whole) >= 2 and all(mine <= size for mine, size in zip(low, sizes))
            kept = math.prod(size for size, one in zip(sizes, whole) if one)
            if fits and kept > best:
                best = kept
                found = P(*(_joined(entries[part]) if one else None for part, one in zip(parts, whole)))
    return found


def _joined(entries: list[Any]) -> Any:
    """How the product of axes is split: as the first is, if only that one is."""
    return entries[0] if entries and not any(entries[1:]) else None


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Exact bytes one device holds of a pytree of arrays or ShapeDtypeStructs under the given shardings."""
    sizes = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))
