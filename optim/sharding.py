"""Where optimiser state lives and how many bytes it takes, for any Optax transform."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def opt_state_shardings(tx: optax.GradientTransformation, params: Any, shardings: Any) -> Any:
    """Shardings for `tx.init(params)`: state shaped like its parameter takes that sharding, all else is replicated.

    Args:
      tx: the transform.
      params: arrays or ShapeDtypeStructs.
      shardings: a NamedSharding per parameter, same tree.
    """
    replicated = NamedSharding(jax.tree.leaves(shardings)[0].mesh, P())

    def place(leaf: Any, param: Any, sharding: NamedSharding) -> NamedSharding:
        return sharding if leaf.shape == param.shape else replicated

    state = jax.eval_shape(tx.init, params)
    return optax.tree_utils.tree_map_params(
        tx, place, state, params, shardings, transform_non_params=lambda _: replicated
    )


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Exact bytes one device holds of a pytree of arrays or ShapeDtypeStructs under the given shardings."""
    sizes = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))
