"""FRUGAL: moments for a subspace of each weight, a rule without state for all other directions, every step.

Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training", 2411.07837,
algorithm 1. With gradient G, every T steps a new subspace and fresh moments, and in each step

    g = down(G),  R = G - up(g),  d = inner(g),  direction = s (up(d) + s_free rule(R))

where rule is the sign, R itself, or nothing. Because Adam's first step after a reset is the sign of g, one learning
rate serves both parts. The gradient of every weight is still needed: what is saved is state, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import Array

from optim.checks import require, require_schedule
from optim.subspaces import Axes, Matrices, Subspace, as_matrices, first_choices, next_choices, plain_axes
from optim.whole import whole_model

Rule = Literal["sign", "sgd", "none"]
AtRefresh = Literal["reset", "move", "keep"]
RULES: dict[str, Callable[[Array], Array]] = {"sign": jnp.sign, "sgd": lambda residual: residual}
ROUNDING = 32  # times a type's precision, of a gradient's largest entry


class FrugalState(NamedTuple):
    """`choices` has a subspace's choice in place of each parameter; `inner` is the inner transform's state."""

    count: Any
    choices: Any
    inner: Any


def scale_by_frugal(
    subspace: Subspace | None,
    *,
    update_gap: int = 200,
    inner: optax.GradientTransformation | None = None,
    rule: Rule = "sign",
    stateless_scale: float = 1.0,
    subspace_scale: float = 1.0,
    at_refresh: AtRefresh = "reset",
    seed: int = 0,
    axes: Axes = plain_axes,
) -> optax.GradientTransformation:
    """The direction of FRUGAL for weight matrices; compose it with decay and a learning rate, see `frugal`.

    Args:
      subspace: of `optim.subspaces`; None is density 0, all of every weight by the rule.
      update_gap: T, steps between refreshes; the first step refreshes.
      inner: what has the state, without parameters or decay; by default `optax.scale_by_adam()`.
      rule: of the residual: its sign, itself, or none, which leaves it out.
      stateless_scale, subspace_scale: s_free and s.
      at_refresh: inner state is reset; or moved, up from the old subspace and down to the new one, as the paper allows
        for subspaces of coordinates; or kept as it is, in the old one's terms, as GaLore does.
      seed: of the draws, which are a function of (seed, step, parameter's place).
      axes: (name, leaf) -> which of its axes make matrices.

    Raises:
      ValueError: bad options; at init, parameters that are no matrices, too small for the density, or not real numbers,
        and an inner transform that needs parameters.
    """
    require(rule in (*RULES, "none"), "rule", rule, f"one of {', '.join(RULES)}, none")
    require(at_refresh in get_args(AtRefresh), "at_refresh", at_refresh, "reset, move or keep")
    require(subspace is not None or rule != "none", "rule", rule, "a rule, for density 0")
    require_schedule(update_gap, seed)
    if subspace is not None and not subspace.coordinates:
        require(at_refresh != "move", "at_refresh", at_refresh, "reset or keep: squares of directions do not rotate")
    inner = optax.scale_by_adam() if inner is None else inner

    def init(params: Any) -> FrugalState:
        model = as_matrices(params, axes)
        if subspace is None:
            return FrugalState(jnp.int32(0), (), ())
        choices, lows = first_choices(subspace, model)
        for name, view, low in zip(model.names, model.views, lows, strict=True):
            some = rule != "sign" or subspace.coordinates or low.size < view.size
            require(some, f"{name}: subspace", subspace, "directions left over: the sign of rounding would be large")
        started = inner.init(model.treedef.unflatten(lows))
        try:
            jax.eval_shape(inner.update, model.treedef.unflatten(lows), started)
        except ValueError as error:
            raise ValueError(f"inner = {inner!r}: expected a transform that needs no parameters ({error})") from None
        return FrugalState(jnp.int32(0), model.treedef.unflatten(choices), started)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, FrugalState]:
        del params
        grads, count = as_matrices(updates, axes), optax.safe_increment(state.count)
        if subspace is None:
            free = subspace_scale * stateless_scale
            return grads.leaves([free * RULES[rule](view) for view in grads.views]), state._replace(count=count)
        treedef, fresh = grads.treedef, state.count % update_gap == 0
        before = treedef.flatten_up_to(state.choices)
        choices = next_choices(subspace, before, grads, fresh, jax.random.fold_in(jax.random.key(seed), state.count))
        lows = [subspace.down(choice, view) for choice, view in zip(choices, grads.views, strict=True)]
        low_tree = treedef.unflatten(lows)
        if at_refresh == "reset":
            new = inner.init(jax.tree.map(jnp.zeros_like, low_tree))
        elif at_refresh == "move":
            moved = partial(_moved, subspace, state.inner, before, choices, grads)
            new = jax.lax.cond(fresh, moved, lambda: state.inner)
        else:
            new = state.inner
        kept = jax.tree.map(lambda new, old: jnp.where(fresh, new, old), new, state.inner)
        directions, kept = inner.update(low_tree, kept)
        made = []
        for choice, view, low, direction in zip(
            choices, grads.views, lows, treedef.flatten_up_to(directions), strict=True
        ):
            whole = subspace.up(choice, direction, view.shape)
            if rule != "none":
                residual = view - subspace.up(choice, low, view.shape)
                if not subspace.coordinates:
                    residual = without_rounding(residual, view)
                whole += stateless_scale * RULES[rule](residual)
            made.append(subspace_scale * whole)
        return grads.leaves(made), FrugalState(count, treedef.unflatten(choices), kept)

    return optax.GradientTransformation(init, update)


def without_rounding(residual: Array, grad: Array) -> Array:
    """0 where a residual [N, a, b] is what rounding left of its matrix: a gradient of low rank, as of an expert with
    few tokens, may lie in the subspace whole, and a sign would make a step of the rest. NaN stays."""
    largest = jnp.max(jnp.abs(grad), axis=(1, 2), keepdims=True)
    return jnp.where(jnp.abs(residual) <= ROUNDING * jnp.finfo(grad.dtype).eps * largest, 0, residual)


def _moved(subspace: Subspace, inner: Any, before: list[Any], after: list[Any], grads: Matrices) -> Any:
    """Inner state with every tree that is like the parameters taken up from the old subspaces and down to the new."""

    def like_params(node: Any) -> bool:
        return jax.tree.structure(node) == grads.treedef

    def move(node: Any) -> Any:
        if not like_params(node):
            return node
        lows = grads.treedef.flatten_up_to(node)
        full = [subspace.up(old, low, view.shape) for old, low, view in zip(before, lows, grads.views, strict=True)]
        return grads.treedef.unflatten([subspace.down(new, x) for new, x in zip(after, full, strict=True)])

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
    at_refresh: AtRefresh = "reset",
    seed: int = 0,
    axes: Axes = plain_axes,
) -> optax.GradientTransformation:
    """FRUGAL for a whole model: matrices by `scale_by_frugal`, all else by Adam, decoupled decay, step size.

    Args:
      learning_rate: a number or a schedule, for both parts.
      b1, b2, eps: of both Adams; an `inner` takes the place of the first.
      weight_decay, mask: of `optax.add_decayed_weights`.
      labels: `frugal` or `adam` for each parameter, a tree or a function of the parameters. By default leaves of two
        axes are `frugal`, embedding and head too where they have two; the released code gives those to Adam.
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
        at_refresh=at_refresh,
        seed=seed,
        axes=axes,
    )
    return whole_model("frugal", matrix, adam, learning_rate, weight_decay, mask, labels)
