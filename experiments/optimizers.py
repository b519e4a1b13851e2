"""The optimisers of `optim/` on our transformer: `optimizer.name` is one of these functions, with options as in a call,

    adamw
    frugal(subspace='columns(density=0.25)', update_gap=50)
    galore(rank=32, scale=0.25)

or an import path `package.module:factory` of the same form. Every factory gets the config and the number of steps, and
returns clipping by global norm, then the method with the config's warmup-cosine rate, and decoupled decay where the
method allows it. Matrices of attention and feed-forward layers, experts one by one, are the method's; gate and up are
one [d, 2f]. Embedding, head, norms, biases and routers are Adam's, but for BAdam and LISA, which have whole layers.
Blocks, BAdam's and LISA's layers are a share of each run of equal layers: of one with two layers a quarter is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import optax

import optim.adamw
import optim.apollo
import optim.fira
import optim.frugal
import optim.galore
import optim.layerwise
import optim.ldadam
from experiments.config import OptimizerConfig
from moe.config import require
from moe.routing import from_spec
from optim.adamw import decay_mask, warmup_cosine
from optim.subspaces import MatrixAxes
from parallel.sharding import path_name

Factory = Callable[..., optax.GradientTransformation]

# Leaves that are matrices, by the end of their path: which of their axes count matrices, which are rows; the rest are
# columns.
MATRICES: tuple[tuple[str, MatrixAxes], ...] = (
    (r"attention/w[qkv]", MatrixAxes(1, 1)),  # [L, d, heads, D]
    (r"attention/wo", MatrixAxes(1, 2)),  # [L, heads, D, d]
    (r"attention/w(q|kv)_down", MatrixAxes(1, 1)),  # [L, d, r]
    (r"attention/w[qkv]_up", MatrixAxes(1, 1)),  # [L, r, heads, D]
    (r"ffn/(gate_up|down)", MatrixAxes(1, 1)),  # [L, d, 2f], [L, f, d]
    (r"experts/(gate_up|down)", MatrixAxes(2, 1)),  # [L, E, d, 2f], [L, E, f, d]: a matrix is one expert's
)


def _axes_of(name: str) -> MatrixAxes | None:
    """By a path with slashes; None for what is no weight matrix."""
    return next((axes for pattern, axes in MATRICES if re.search(rf"(^|/){pattern}$", name)), None)


def matrix_axes(name: str, leaf: Any = None) -> MatrixAxes:
    """How the leaf of this `keystr` is matrices. ValueError for one that is none of ours."""
    del leaf
    found = _axes_of(name.strip("[']").replace("']['", "/"))
    if found is None:
        raise ValueError(f"parameter = {name!r}: expected the path of a weight matrix, as in MATRICES")
    return found


def matrix_labels(method: str) -> Callable[[Any], Any]:
    """(params) -> `method` for weight matrices, `adam` for all else."""
    which = lambda path, _: method if _axes_of(path_name(path)) else "adam"  # noqa: E731
    return lambda params: jax.tree_util.tree_map_with_path(which, params)


def layer_labels(others: str) -> Callable[[Any], Any]:
    """(params) -> `layers` for what is stacked over layers, `others` for embedding, head and last norm."""
    which = lambda path, _: "layers" if str(path[0].key).startswith("runs_") else others  # noqa: E731
    return lambda params: jax.tree_util.tree_map_with_path(which, params)


def layer_axes(name: str, leaf: Any) -> MatrixAxes:
    """How each layer of a leaf is a matrix, with the axes that a mesh splits first among rows and columns."""
    split_last = re.search(r"\['(wo|down)'\]$", name) is not None and leaf.ndim == 4  # [L, heads, D, d], [L, E, f, d]
    return MatrixAxes(1, 2 if split_last else min(1, leaf.ndim - 1))


def _rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    return warmup_cosine(config.learning_rate, config.warmup_steps, steps, config.final_fraction)


def _clipped(config: OptimizerConfig, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)


def _on_matrices(method: Factory, label: str) -> Factory:
    """The factory of a method for matrices; its options are those of `method`."""

    def factory(config: OptimizerConfig, steps: int, **options: Any) -> optax.GradientTransformation:
        moments = {"b1": config.b1, "b2": config.b2}
        decay = {"weight_decay": config.weight_decay, "mask": decay_mask}
        places = {"labels": matrix_labels(label), "axes": matrix_axes}
        return _clipped(config, method(_rate(config, steps), **{**moments, **decay, **places, **options}))

    return factory


def adamw(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The baseline: two moments of everything."""
    moments = {"b1": config.b1, "b2": config.b2}
    rate = _rate(config, steps)
    return optim.adamw.adamw(rate, **moments, weight_decay=config.weight_decay, clip_norm=config.clip_norm)


def frugal(
    config: OptimizerConfig, steps: int, *, subspace: str = "columns(density=0.25)", inner: str = "adam", **options: Any
) -> optax.GradientTransformation:
    """FRUGAL. `subspace` is a call of `optim.subspaces`, or `none` for density 0; `inner` is adam, lion or momentum;
    the options are those of `optim.frugal.frugal`: update_gap, rule, stateless_scale, at_refresh, ..."""
    inners: dict[str, Callable[[], Any]] = {
        "adam": lambda: None,
        "lion": lambda: optax.scale_by_lion(config.b1, config.b2),
        "momentum": lambda: optax.trace(config.b1),
    }
    require(inner in inners, "optimizer.name: inner", inner, f"one of {', '.join(inners)}")
    chosen = None if subspace == "none" else from_spec(subspace, "optim.subspaces:{}", "optimizer.name: subspace")
    method = _on_matrices(optim.frugal.frugal, "frugal")
    return method(config, steps, subspace=chosen, inner=inners[inner](), **options)


galore = _on_matrices(optim.galore.galore, "galore")  # rank, update_gap, scale
fira = _on_matrices(optim.fira.fira, "fira")  # rank, update_gap
apollo = _on_matrices(optim.apollo.apollo, "apollo")  # rank, granularity, update_gap, scale
ldadam = _on_matrices(optim.ldadam.ldadam, "ldadam")  # rank, interpolation, error_feedback
apollo_mini = _on_matrices(optim.apollo.apollo_mini, "apollo")  # scale, update_gap


def badam(
    config: OptimizerConfig, steps: int, *, others: str = "frozen", **options: Any
) -> optax.GradientTransformation:
    """BAdam, with the options of `optim.layerwise.badam`: active, update_gap, order; no decay. `others`: whether
    embedding, head and last norm are `frozen` or trained by `adam`."""
    require(others in ("frozen", "adam"), "optimizer.name: others", others, "frozen or adam")
    shared = {"b1": config.b1, "b2": config.b2, "axes": layer_axes}
    return _clipped(config, optim.layerwise.badam(_rate(config, steps), layer_labels(others), **shared, **options))


def lisa(config: OptimizerConfig, steps: int, **options: Any) -> optax.GradientTransformation:
    """LISA, with the options of `optim.layerwise.lisa`: active, update_gap; no decay."""
    shared = {"b1": config.b1, "b2": config.b2, "axes": layer_axes}
    return _clipped(config, optim.layerwise.lisa(_rate(config, steps), layer_labels("adam"), **shared, **options))
