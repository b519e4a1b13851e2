"""Adapters of a whole model: made, counted, laid beside a base.

The base is `params`, an argument that nothing differentiates; adapters are a tree of their own, the variable collection
`adapters`, with the layers of a run stacked as the base's are: `runs_0/attention/lora_q/a` [L, E, in, r].
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe.config import ModelConfig, require
from moe.lora.config import AdapterConfig
from moe.lora.dense import COLLECTION
from moe.transformer import Transformer, abstract_params, init_router_state


@dataclass(frozen=True)
class Adapted:
    """A base with adapters beside it: `moe.generate.Model`. Several may hold the same `params`."""

    config: ModelConfig
    params: Any
    router_state: Any
    adapter_config: AdapterConfig
    adapters: Any


def init_adapters(config: ModelConfig, adapters: AdapterConfig, params: Any, key: Array) -> Any:
    """Fresh adapters of a base: B is zero, and a magnitude (DoRA) is its map's own, so nothing changes yet; routers are
    drawn. A function of the key.

    Raises:
      ValueError: a target that no layer has (`matched_modules`), a rank that does not fit.
    """
    matched_modules(config, adapters)
    return _init(config, adapters, params, key)


@partial(jax.jit, static_argnums=(0, 1))
def _init(config: ModelConfig, adapters: AdapterConfig, params: Any, key: Array) -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    zeros = jnp.zeros((1 if mesh.empty else mesh.size, 8), jnp.int32)  # shapes only; what they give is compiled away
    labels = None if adapters.experts is None else zeros[:, 0]  # a router that chose nothing cannot fail
    _, made = Transformer(config, adapters).apply(
        {"params": params}, zeros, zeros, zeros, init_router_state(config), None, labels,
        rngs={COLLECTION: key}, mutable=[COLLECTION],
    )  # fmt: skip
    return made[COLLECTION]


@lru_cache(maxsize=64)
def abstract_adapters(config: ModelConfig, adapters: AdapterConfig) -> Any:
    """Shapes and dtypes of `init_adapters`."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(partial(_init, config, adapters), abstract_params(config), key)


def matched_modules(config: ModelConfig, adapters: AdapterConfig) -> dict[str, int]:
    """How many maps of the model each target has matched, and the routers by site (`router_ffn`).

    Raises:
      ValueError: a target that matched none; it says what there is instead.
    """
    found: Counter[str] = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_adapters(config, adapters)):
        *_, module, name = (str(getattr(part, "key", part)) for part in path)
        if name in ("b", "weight"):
            found[module.removeprefix("lora_")] += leaf.shape[0]
    for target in adapters.targets:
        there = ", ".join(f"{name} ({number})" for name, number in found.items() if not name.startswith("router_"))
        moe = "" if config.num_moe_layers == 0 else f"; {config.num_moe_layers} layers' feed-forward is a mixture"
        require(target in found, "adapters.targets", target, f"maps of the model; matched were: {there or 'none'}{moe}")
    return dict(found)


def with_routers(config: ModelConfig, adapters: AdapterConfig, experts: Any, params: Any, key: Array) -> Any:
    """Experts as they are (`moe.lora.peft.stack_adapters`), with fresh routers: what router training starts from.

    Raises:
      ValueError: experts of other maps or shapes than `adapters` says; all of them zero, which leaves a router nothing
        to learn from.
    """
    fresh = init_adapters(config, adapters, params, key)
    given = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(experts)}
    require(any(np.any(leaf) for name, leaf in given.items() if name.endswith("['b']")), "experts", "all zero",
            "trained experts: a router learns from their differences")  # fmt: skip

    def own(path: Any, leaf: Array) -> Array:
        return leaf if path[-1].key == "weight" else given.get(jax.tree_util.keystr(path), leaf)

    made = jax.tree_util.tree_map_with_path(own, fresh)
    known = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(fresh)}
    require(given.keys() <= known, "experts", sorted(given.keys() - known)[:1], f"maps out of {adapters.targets}")
    require_adapters(config, adapters, made)
    return made


def parameter_count(config: ModelConfig, adapters: AdapterConfig) -> int:
    """Trainable parameters: of the maps' adapters and the routers."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_adapters(config, adapters)))


def require_adapters(config: ModelConfig, adapters: AdapterConfig, tree: Any) -> None:
    """ValueError unless the tree has the leaves and shapes of these adapters on this base; it names the first that is
    not: another base, number of experts or rank."""
    shapes = lambda tree: {  # noqa: E731
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    got, wanted = shapes(tree), shapes(abstract_adapters(config, adapters))
    for name in wanted | got:
        require(got.get(name) == wanted.get(name), f"adapters {name}.shape", got.get(name), str(wanted.get(name)))
