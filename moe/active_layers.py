"""A `Transformer` of which some layers train: no gradient of the others is formed, and no room is made for one.

For LISA (2403.17919, algorithm 1) and BAdam (2404.02827). Each run of layers is one scan, forward and backward written
out. Forward, a layer keeps what its backward pass needs but its weights, which are read again there; so what is kept
does not depend on which layers are active. Backward, the carry has gradients [n, ...] of the active layers, and an
inactive one takes the branch in which only the stream's gradient is computed.

Which layers those are is data: another choice compiles nothing. JAX's own gradient of a `cond` in a scan has the right
values too, but keeps what both branches need, with the weights of all layers among it.
Legend: B sequences, S positions, d hidden, L layers of a run, n active ones.
"""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moe.config import LayerKind, ModelConfig, require
from moe.transformer import Block, PerLayer, Shared, TransformerOutput, rematerialised, rms_norm, rotations

# Made again instead of kept, so that of a weight what a layer keeps is the weight itself. Experts' weights are kept
# nevertheless by the dispatchers `auto` and `blocks` without rematerialisation.
VIEWS = ("reshape", "convert_element_type")


def active_forward(
    config: ModelConfig,
    trained: Any,
    frozen: Any,
    index: dict[int, Array],
    tokens: Array,
    segment_ids: Array,
    positions: Array,
    router_state: Any,
    key: Array | None,
) -> TransformerOutput:
    """What a `Transformer` without adapters gives for `frozen` with the values of `trained` in their places.

    Differentiable in `trained` alone, once, in reverse mode. The first three are what `optim.parts.active_layers` lets
    a loss see.

    Args:
      trained: like the model's parameters, but leaves of a run have the n active layers alone, [n, ...]; of the other
        leaves, None is one that does not train.
      frozen: the model's parameters; those that train are not read.
      index: for a run of L layers, index[L] int32 [n] are its active ones, ascending.
      The others: of `Transformer`.

    Raises:
      ValueError: a leaf of a run that is not stacked as `index` says.
    """
    runs = [(kind, len(list(group))) for kind, group in groupby(config.layer_kinds)]
    frozen = jax.lax.stop_gradient(frozen)
    for run, (_, length) in enumerate(runs):
        _check_run(f"runs_{run}", trained, frozen, length, index)
    is_none = lambda leaf: leaf is None  # noqa: E731
    outer = [{name: leaf for name, leaf in tree.items() if not name.startswith("runs_")} for tree in (trained, frozen)]
    outer = jax.tree.map(lambda own, fixed: fixed if own is None else own, *outer, is_leaf=is_none)

    shared = Shared(tokens, segment_ids, positions, rotations(config, positions))
    windows = jnp.array(config.windows, jnp.int32) if config.windows else None
    keys = None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(config.num_layers))
    x = jnp.take(outer["embedding"], tokens, axis=0).astype(config.compute_dtype)
    stats, layer, moe_layer = [], 0, 0
    for run, (kind, length) in enumerate(runs):
        of_run, of_state = slice(layer, layer + length), slice(moe_layer, moe_layer + length)
        state = jax.tree.map(lambda leaf, of=of_state: leaf[of], router_state) if kind == "moe" else {}
        inputs = PerLayer(state, *(None if values is None else values[of_run] for values in (keys, windows)))
        layers = Layers(*_places(index[length], length), frozen[f"runs_{run}"], inputs)
        out: Any = _run(config, kind, trained[f"runs_{run}"], x, layers, shared)
        x, parts = out
        layer, moe_layer = layer + length, moe_layer + length * (kind == "moe")
        stats += [_joined(*parts)] if kind == "moe" else []
    hidden: Any = rms_norm(x, outer["final_norm"]["scale"], config.norm_eps)
    head = outer["embedding"] if config.tie_embeddings else outer["head"]
    stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stats) if stats else None
    return TransformerOutput(hidden, head, stacked, {})


class Layers(NamedTuple):
    """The layers of a run, leaves [L, ...]: whether each is active, its place among the active, frozen weights, and
    what differs between layers."""

    active: Array
    place: Array
    frozen: Any
    inputs: PerLayer


def _check_run(name: str, trained: Any, frozen: Any, length: int, index: dict[int, Array]) -> None:
    require(length in index, "index", sorted(index), f"the active ones of the {length} layers of {name}")
    for leaves, count in ((frozen, length), (trained, index[length].shape[0])):
        for path, leaf in jax.tree_util.tree_leaves_with_path(leaves[name], is_leaf=lambda leaf: leaf is None):
            where, found = name + jax.tree_util.keystr(path), None if leaf is None else leaf.shape
            require(found is not None and found[:1] == (count,), f"{where}.shape", found, f"[{count}, ...]")


def _places(index: Array, length: int) -> tuple[Array, Array]:
    """Of each of L layers whether it is in index [n], and how many before it are."""
    layers = jnp.arange(length)
    return jnp.any(index[None] == layers[:, None], axis=1), jnp.sum(index[None] < layers[:, None], axis=1)


# --- one run: a scan and its transpose ---


class Given(NamedTuple):
    """In place of an array that a backward pass needs: the backward pass has it, as leaf `number` of its inputs."""

    number: int


jax.tree_util.register_static(Given)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(config: ModelConfig, kind: LayerKind, trained: Any, x: Array, layers: Layers, shared: Shared) -> Any:
    """The stream x [B, S, d] after a run's layers; their statistics [L, ...], split as `_apply` has it."""

    def body(x: Array, layer: Layers) -> Any:
        (x, floats), others = _apply(config, kind, _weights(trained, layer), x, layer.inputs, shared)
        return x, (floats, others)

    return jax.lax.scan(body, x, layers, unroll=_unroll(config, layers))


def _run_fwd(config: ModelConfig, kind: LayerKind, trained: Any, x: Array, layers: Layers, shared: Shared) -> Any:
    def body(x: Array, layer: Layers) -> Any:
        given = weights, inputs, _ = _weights(trained, layer), layer.inputs, shared
        apply = lambda weights, x: _apply(config, kind, weights, x, inputs, shared)  # noqa: E731
        (x, floats), pull, others = jax.vjp(apply, weights, x, has_aux=True)
        numbers = {id(leaf): Given(i) for i, leaf in enumerate(jax.tree.leaves(given))}
        kept = jax.tree.map(lambda leaf: numbers.get(id(leaf), leaf), pull)
        return x, ((floats, others), kept)

    x, (stats, kept) = jax.lax.scan(body, x, layers, unroll=_unroll(config, layers))
    return (x, stats), (kept, trained, layers, shared)


def _run_bwd(config: ModelConfig, kind: LayerKind, residuals: Any, gradients: Any) -> Any:
    del kind
    kept, trained, layers, shared = residuals
    g, (of_stats, _) = gradients
    is_given = lambda leaf: isinstance(leaf, Given)  # noqa: E731

    def body(carry: Any, of_layer: Any) -> Any:
        layer, kept, of_stats = of_layer
        given = jax.tree.leaves((_weights(trained, layer), layer.inputs, shared))
        fill = lambda leaf: given[leaf.number] if is_given(leaf) else leaf  # noqa: E731
        pull = jax.tree.map(fill, kept, is_leaf=is_given)

        def active(g: Array, sums: Any) -> Any:
            of_weights, g = pull((g, of_stats))
            return g, jax.tree.map(lambda all, one: all.at[layer.place].set(one), sums, of_weights)

        def frozen(g: Array, sums: Any) -> Any:
            return pull((g, of_stats))[1], sums  # what is not used is not computed

        return jax.lax.cond(layer.active, active, frozen, *carry), None

    start = g, jax.tree.map(jnp.zeros_like, trained)
    unroll = _unroll(config, layers)
    (g, of_trained), _ = jax.lax.scan(body, start, (layers, kept, of_stats), reverse=True, unroll=unroll)
    return of_trained, g, None, None


_run.defvjp(_run_fwd, _run_bwd)


def _unroll(config: ModelConfig, layers: Layers) -> int:
    return config.unroll or layers.active.shape[0]


def _weights(trained: Any, layer: Layers) -> Any:
    """One layer's: the trained ones if it is active."""
    return jax.tree.map(lambda own, fixed: jnp.where(layer.active, own[layer.place], fixed), trained, layer.frozen)


def _apply(config: ModelConfig, kind: LayerKind, weights: Any, x: Array, inputs: PerLayer, shared: Shared) -> Any:
    """One layer -> ((x, its floating-point statistics), the others); each has None for what the other has."""

    def block(weights: Any, x: Array) -> Any:
        block = rematerialised(Block, config.remat)(config, kind)
        x, (stats, _, _) = block.apply({"params": weights}, x, inputs, shared)
        floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
        floats, others = (jax.tree.map(lambda s: s if floating(s) == f else None, stats) for f in (True, False))  # noqa: B023
        return (x, floats), others

    if config.remat != "none":
        return block(weights, x)
    kept = lambda primitive, *_, **__: primitive.name not in VIEWS  # noqa: E731
    return jax.checkpoint(block, policy=kept, prevent_cse=False)(weights, x)


def _joined(floats: Any, others: Any) -> Any:
    return jax.tree.map(lambda a, b: b if a is None else a, floats, others, is_leaf=lambda leaf: leaf is None)
