"""FRUGAL: moments for a subspace of each weight, a rule without state for all other directions, every step.

Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training", 2411.07837,
algorithm 1. With gradient G, every T steps a new subspace and fresh moments, and in each step

    g = down(G),  R = G - up(g),  d = inner(g),  direction = s (up(d) + s_free rule(R))

where rule is the sign or R itself. Because Adam's first step after a reset is the sign of g, one learning rate serves
both parts. The gradient of every weight is still needed: what is saved is state, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from optim.checks import require
from optim.subspaces import MatrixAxes, Subspace, matrices

Rule = Literal["sign", "sgd"]
RULES: dict[str, Callable[[Array], Array]] = {"sign": jnp.sign, "sgd": lambda residual: residual}
Axes = Callable[[str, Any], MatrixAxes]


class FrugalState(NamedTuple):
    """`choices` has a subspace's choice in place of each parameter; `inner` is the inner transform's state."""

    count: Any
    choices: Any
    inner: Any


def plain_axes(name: str, leaf: Any) -> MatrixAxes:
    """A leaf of two axes is one matrix. ValueError for any other, whose axes must be told."""
    require(leaf.ndim == 2, f"{name}.shape", tuple(leaf.shape), "two axes; give `axes` for stacked or split ones")
    return MatrixAxes()


def scale_by_frugal(
    subspace: Subspace | None,
    *,
    update_gap: int = 200,
    inner: optax.GradientTransformation | None = None,
    rule: Rule = "sign",
    stateless_scale: float = 1.0,
    subspace_scale: float = 1.0,
    reset: bool = True,
    seed: int = 0,
    axes: Axes = plain_axes,
) -> optax.GradientTransformation:
    """The direction of FRUGAL for weight matrices; compose it with decay and a learning rate, see `frugal`.

    Args:
      subspace: of `optim.subspaces`; None is density 0, all of every weight by the rule.
      update_gap: T, steps between refreshes; the first step refreshes.
      inner: what has the state, without parameters or decay; by default `optax.scale_by_adam()`.
      rule: of the residual, its sign or itself.
      stateless_scale, subspace_scale: s_free and s.
      reset: inner state begins anew at a refresh; False moves it: up from the old subspace, down to the new one, as
        the paper allows for subspaces of coordinates.
      seed: of the draws, which are a function of (seed, step, parameter's place).
      axes: (name, leaf) -> which of its axes make matrices.

    Raises:
      ValueError: bad options; at init, parameters that are no matrices, too small for the density, or not real numbers,
        and an inner transform that needs parameters.
    """
    require(rule in RULES, "rule", rule, f"one of {', '.join(RULES)}")
    if isinstance(update_gap, int):
        require(update_gap >= 1, "update_gap", update_gap, "at least 1")
    if subspace is not None and not subspace.coordinates:
        noise = subspace.density == 1 and rule == "sign"
        require(not noise, "density", subspace.density, "below 1: the sign of a residual that is rounding alone")
        require(reset, "reset", reset, "True: moments of singular directions have no meaning in new ones")
    inner = optax.scale_by_adam() if inner is None else inner

    def named_views(tree: Any) -> tuple[list[str], list[Array], list[tuple[int, ...]], Any]:
        """Names, matrices [N, a, b] in at least float32, leaf shapes and the structure."""
        paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
        names, views = [], []
        for path, leaf in paths:
            name = jax.tree_util.keystr(path)
            require(jnp.issubdtype(leaf.dtype, jnp.floating), f"{name}.dtype", str(leaf.dtype), "real floating point")
            names.append(name)
            views.append(matrices(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), axes(name, leaf)))
        return names, views, [leaf.shape for _, leaf in paths], treedef

    def init(params: Any) -> FrugalState:
        names, views, _, treedef = named_views(params)
        if subspace is None:
            return FrugalState(jnp.int32(0), (), ())
        choices, lows = [], []
        for name, view in zip(names, views, strict=True):
            try:
                choices.append(subspace.init(view.shape))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            lows.append(jnp.zeros_like(subspace.down(choices[-1], view)))
        started = inner.init(treedef.unflatten(lows))
        try:
            jax.eval_shape(inner.update, treedef.unflatten(lows), started)
        except ValueError as error:
            raise ValueError(f"inner = {inner!r}: expected a transform that needs no parameters ({error})") from None
        return FrugalState(jnp.int32(0), treedef.unflatten(choices), started)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, FrugalState]:
        del params
        _, views, shapes, treedef = named_views(updates)
        if subspace is None:
            free = [subspace_scale * stateless_scale * RULES[rule](view) for view in views]
            made = [direction.reshape(shape) for direction, shape in zip(free, shapes, strict=True)]
            return treedef.unflatten(made), state._replace(count=optax.safe_increment(state.count))
        fresh, key = state.count % update_gap == 0, jax.random.fold_in(jax.random.key(seed), state.count)
        before = treedef.flatten_up_to(state.choices)
        choices = [
            jax.lax.cond(fresh, subspace.refresh, lambda choice, *_: choice, choice, view, jax.random.fold_in(key, i))
            for i, (choice, view) in enumerate(zip(before, views, strict=True))
        ]
        lows = [subspace.down(choice, view) for choice, view in zip(choices, views, strict=True)]
        low_tree = treedef.unflatten(lows)
        if reset:
            new = inner.init(jax.tree.map(jnp.zeros_like, low_tree))
        else:
            new = _moved(subspace, state.inner, before, choices, views, treedef)
        kept = jax.tree.map(lambda new, old: jnp.where(fresh, new, old), new, state.inner)
        directions, kept = inner.update(low_tree, kept)
        made = []
        for choice, view, low, direction, shape in zip(
            choices, views, lows, treedef.flatten_up_to(directions), shapes, strict=True
        ):
            residual = view - subspace.up(choice, low, view.shape)
            whole = subspace.up(choice, direction, view.shape) + stateless_scale * RULES[rule](residual)
            made.append((subspace_scale * whole).reshape(shape))
        following = FrugalState(optax.safe_increment(state.count), treedef.unflatten(choices), kept)
        return treedef.unflatten(made), following

    return optax.GradientTransformation(init, update)


def _moved(
    subspace: Subspace, inner: Any, before: list[Any], after: list[Any], views: list[Array], treedef: Any
) -> Any:
    """Inner state with every tree that is like the parameters taken up from the old subspaces and down to the new."""

    def like_params(node: Any) -> bool:
        return jax.tree.structure(node) == treedef

    def move(node: Any) -> Any:
        if not like_params(node):
            return node
        lows = treedef.flatten_up_to(node)
        full = [subspace.up(old, low, view.shape) for old, low, view in zip(before, lows, views, strict=True)]
        return treedef.unflatten([subspace.down(new, x) for new, x in zip(after, full, strict=True)])

    return jax.tree.map(move, inner, is_leaf=like_params)


def frugal(
    learning_rate: optax.ScalarOrSchedule,
    subspace: Subspace | None,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any = None,
    labels: Any = None,
    update_gap: int = 200,
    inner: optax.GradientTransformation | None = None,
    rule: Rule = "sign",
    stateless_scale: float = 1.0,
    subspace_scale: float = 1.0,
    reset: bool = True,
    seed: int = 0,
    axes: Axes = plain_axes,
) -> optax.GradientTransformation:
    """FRUGAL for a whole model: matrices by `scale_by_frugal`, all else by Adam, decoupled decay, step size.

    Args:
      learning_rate: a number or a schedule, for both parts.
      b1, b2, eps: of both Adams; an `inner` takes the place of the first.
      weight_decay, mask: of `optax.add_decayed_weights`.
      labels: `frugal` or `adam` for each parameter, a tree or a function of the parameters. By default the released
        code's rule for a plain pytree: leaves of two axes are `frugal`.
      The others: as in `scale_by_frugal`.
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    matrix = scale_by_frugal(
        subspace,
        update_gap=update_gap,
        inner=adam if inner is None else inner,
        rule=rule,
        stateless_scale=stateless_scale,
        subspace_scale=subspace_scale,
        reset=reset,
        seed=seed,
        axes=axes,
    )
    return optax.chain(
        optax.partition({"frugal": matrix, "adam": adam}, _by_axes if labels is None else labels),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _by_axes(params: Any) -> Any:
    return jax.tree.map(lambda leaf: "frugal" if leaf.ndim == 2 else "adam", params)
