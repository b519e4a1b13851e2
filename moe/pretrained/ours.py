"""Our own form of a checkpoint: one tensor per layer, flat names, and a config.json with every field of ModelConfig.

A stacked leaf `runs_1/attention/wq` [L, d, H, D] of the parameters is `layers.{i}.attention.wq` [d, H, D] for each
layer i of that run; the routers' state `bias` [L, E] is `layers.{i}.moe.state.bias` [E] of each MoE layer i; leaves
outside of layers have their path as a name.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from itertools import groupby
from typing import Any, NamedTuple

import jax
import numpy as np

from moe.config import ModelConfig, require
from moe.pretrained.safetensors import TensorInfo
from moe.transformer import abstract_params, init_router_state

SWITCHYARD = "switchyard"  # model_type of our config.json
CARRIED = "carried."  # before the names of tensors that we do not use and keep for the way back


class Leaf(NamedTuple):
    """One leaf of the trees (params, router_state).

    Attributes:
      path: of the leaf, `jax.tree_util` keys.
      shape, dtype: of the whole leaf.
      names: our names of its layers, bottom to top where `stacked`, else one name.
    """

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    names: tuple[str, ...]
    stacked: bool

    def info(self) -> TensorInfo:
        """Of each name."""
        return TensorInfo(self.dtype, self.shape[1:] if self.stacked else self.shape)


@functools.lru_cache(maxsize=64)
def abstract_model(config: ModelConfig) -> tuple[Any, Any]:
    """Shapes and dtypes of a Transformer's parameters and router state; nothing is allocated."""
    return abstract_params(config), jax.eval_shape(functools.partial(init_router_state, config))


@functools.lru_cache(maxsize=64)
def model_leaves(config: ModelConfig) -> tuple[Leaf, ...]:
    """The leaves of (params, router_state), in the order of `jax.tree`."""
    runs, layer = {}, 0
    for run, (_, group) in enumerate(groupby(config.layer_kinds)):
        length = len(list(group))
        runs[f"runs_{run}"] = range(layer, layer + length)
        layer += length
    mixtures = [i for i, kind in enumerate(config.layer_kinds) if kind == "moe"]
    leaves = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_model(config)):
        part, *rest = (jax.tree_util.keystr((key,), simple=True) for key in path)
        if part == "1":
            of_layers, rest = mixtures, ["moe", "state", *rest]
        elif rest[0] in runs:
            of_layers, rest = runs[rest[0]], rest[1:]
        else:
            of_layers = None
        name = ".".join(rest)
        names = (name,) if of_layers is None else tuple(f"layers.{i}.{name}" for i in of_layers)
        leaves.append(Leaf(path, leaf.shape, np.dtype(leaf.dtype), names, of_layers is not None))
    return tuple(leaves)


def model_tensors(config: ModelConfig) -> dict[str, TensorInfo]:
    """Every tensor of the model under our names, in the dtype of fresh parameters."""
    return {name: leaf.info() for leaf in model_leaves(config) for name in leaf.names}


# --- config.json ---


def written_config(config: ModelConfig, origin: Mapping[str, Any] | None) -> dict[str, Any]:
    """Our config.json; `origin` is that of the released form which the checkpoint came from."""
    return {"model_type": SWITCHYARD, "model": dataclasses.asdict(config), "origin": origin}


def parsed_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The model of our config.json. ValueError for a field that is missing, unknown or of another type."""
    return _parsed(ModelConfig, raw.get("model"), "config.json model")


def _parsed(cls: type, raw: Any, field: str) -> Any:
    require(isinstance(raw, Mapping), field, raw, f"an object with the fields of {cls.__name__}")
    known = typing.get_type_hints(cls)
    for what, names in (("no further fields", raw.keys() - known), ("all fields", known.keys() - raw.keys())):
        require(not names, field, ", ".join(sorted(names)), f"{what} than those of {cls.__name__}")
    return cls(**{name: _value(hint, raw[name], f"{field}.{name}") for name, hint in known.items()})


def _value(hint: Any, value: Any, field: str) -> Any:
    """A value of JSON as the type of a field of a config: a number, text, true or false, a tuple, a config or None."""
    if isinstance(hint, types.UnionType):
        choices = [part for part in typing.get_args(hint) if part is not type(None)]
        return None if value is None else _value(choices[0], value, field)
    if dataclasses.is_dataclass(hint):
        return _parsed(typing.cast(type, hint), value, field)
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        require(isinstance(value, list), field, value, "a list")
        return tuple(_value(inner, each, field) for each in value)
    kind = str if typing.get_origin(hint) is typing.Literal else hint
    ok = type(value) is kind or (kind is float and type(value) is int)
    require(ok, field, value, f"a value of type {kind.__name__}")
    return float(value) if kind is float else value
