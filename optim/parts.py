"""What of the parameters trains at a step: all of it, or some layers of leaves that are stacked over layers.

    trained = take(params, step)
    gradient of loss(view(params, trained, step)) with respect to trained
    params = put(params, trained, step)

An optimiser's state and the gradient are trees like `trained`: for what does not train at a step there is neither. A
transform of full gradients (`optim.layerwise.lisa`) has small state too, but needs a gradient of everything.

Legend: L layers on a leaf's first axis, n active ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from optim.checks import require, require_schedule
from optim.subspaces import BlockChoice, LayerOrder, layers


class Part(NamedTuple):
    """Pure functions; step is int32, traced or not.

    Attributes:
      take: (params, step) -> what trains.
      view: (params, trained, step) -> what a loss gets in place of params. A gradient with respect to `trained` through
        it is of nothing else.
      put: (params, trained, step) -> params with the trained values written back; in place where params are donated.
    """

    take: Callable[[Any, Any], Any]
    view: Callable[[Any, Any, Any], Any]
    put: Callable[[Any, Any, Any], Any]


class ActiveLayers(NamedTuple):
    """Parameters of which some layers train, as a loss sees them.

    Attributes:
      trained: like the parameters, but [n, ...] of stacked leaves and None for what never trains.
      frozen: the parameters, without gradient; those that train are to be read from `trained`.
      index: index[L] int32 [n], for every L: which of L layers are active, ascending.
    """

    trained: Any
    frozen: Any
    index: dict[int, Array]


_trained = lambda params, trained, step: trained  # noqa: E731
whole = Part(lambda params, step: params, _trained, _trained)  # everything trains


def active_layers(labels: Any, active: int, update_gap: int, *, order: LayerOrder = "random", seed: int = 0) -> Part:
    """`active` layers at a time of leaves [L, ...], and all others always: LISA (2403.17919), BAdam (2404.02827).

    Which layers those are is a function of (seed, step // update_gap, L): the ones of `optim.layerwise.scale_by_layers`
    with these options. Leaves of another L have `active` layers of their own.

    Args:
      labels: as in `optim.layerwise.lisa`: `layers` for leaves stacked over layers, `adam` for those always trained,
        `frozen` for those never trained; a tree like the parameters or a function of them.
      active, order, seed: see `optim.subspaces.Layers`.
      update_gap: steps between two choices.

    Raises:
      ValueError: bad options; when used, an unknown label, a stacked leaf with fewer layers.
    """
    require_schedule(update_gap, seed)
    chosen = layers(active, order, seed)

    def leaves_of(params: Any) -> tuple[list[tuple[Any, str]], Any]:
        """Leaves with their labels, and the tree's structure."""
        named, treedef = jax.tree_util.tree_flatten_with_path(params)
        of_leaves = treedef.flatten_up_to(labels(params) if callable(labels) else labels)
        for (path, leaf), label in zip(named, of_leaves, strict=True):
            name = jax.tree_util.keystr(path)
            require(label in ("layers", "adam", "frozen"), f"{name}: label", label, "layers, adam or frozen")
            if label == "layers":
                require(leaf.ndim >= 1 and leaf.shape[0] >= active, f"{name}: active", active, _at_most(leaf))
        return [(leaf, label) for (_, leaf), label in zip(named, of_leaves, strict=True)], treedef

    def index_of(leaves: list[tuple[Any, str]], step: Any) -> dict[int, Array]:
        begin = jnp.asarray(step, jnp.int32) // update_gap * active  # layers chosen before

        def drawn(total: int) -> Array:
            before, like = chosen.init((total, 0, 0)), jnp.zeros((total, 0, 0))
            return chosen.refresh(BlockChoice(before.index, begin), like, jax.random.key(seed)).index

        return {total: drawn(total) for total in sorted({leaf.shape[0] for leaf, label in leaves if label == "layers"})}

    def take(params: Any, step: Any) -> Any:
        leaves, treedef = leaves_of(params)
        index = index_of(leaves, step)

        def part(leaf: Array, label: str) -> Array | None:
            if label == "layers":
                return leaf.at[index[leaf.shape[0]]].get(mode="promise_in_bounds")
            return leaf if label == "adam" else None

        return treedef.unflatten([part(*leaf) for leaf in leaves])

    def view(params: Any, trained: Any, step: Any) -> ActiveLayers:
        return ActiveLayers(trained, jax.lax.stop_gradient(params), index_of(leaves_of(params)[0], step))

    def put(params: Any, trained: Any, step: Any) -> Any:
        leaves, treedef = leaves_of(params)
        index = index_of(leaves, step)

        def written(leaf: Array, label: str, new: Any) -> Array:
            if label == "layers":
                return leaf.at[index[leaf.shape[0]]].set(new, mode="promise_in_bounds", unique_indices=True)
            return new if label == "adam" else leaf

        parts = treedef.flatten_up_to(trained)
        return treedef.unflatten([written(*leaf, new) for leaf, new in zip(leaves, parts, strict=True)])

    return Part(take, view, put)


def _at_most(leaf: Any) -> str:
    return f"1 to {leaf.shape[0]} layers" if leaf.ndim else "a leaf stacked over layers"
