"""Adapters as Hugging Face PEFT keeps them: a folder with adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight  [r, in]    A transposed
                                                      .lora_B.weight  [out, r]   B transposed
                                                      .lora_magnitude_vector     [out], DoRA's m

Ours have one rank and one scale. Of a folder whose maps differ (rank_pattern, alpha_pattern) the rank is the largest,
the others are padded with zeros, and a scale that differs is folded into B. Where all are alike, as usual, numbers are
moved and never changed: a float32 folder that is read and written has the same tensors to the bit. One of another type
is widened to float32, which changes no number, and written so.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe.config import ModelConfig, require
from moe.lora.adapters import abstract_adapters
from moe.lora.config import FEED_FORWARD, AdapterConfig
from moe.pretrained.checkpoint import read_object
from moe.pretrained.convert import new_folder
from moe.pretrained.safetensors import SINGLE, SafetensorsFiles, TensorInfo, listed, open_safetensors, write_safetensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model.model.layers."
TENSOR = re.compile(
    r"(?:base_model\.model\.)?model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+?)_proj\.(lora_\w+?)(?:\.weight)?"
)
LEAVES = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "magnitude"}
# Fields of adapter_config.json that change what is computed, with the values under which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "fan_in_fan_out": (False,), "modules_to_save": (None, []), "layer_replication": (None, []),
    "lora_bias": (False,), "target_parameters": (None, []), "trainable_token_indices": (None,), "use_qalora": (False,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the base's weights too
    "use_bdlora": (None,), "alora_invocation_tokens": (None,), "arrow_config": (None,), "megatron_config": (None,),
}  # fmt: skip


class Module(NamedTuple):
    """One adapted map: layer, target, rank, scale."""

    layer: int
    target: str
    rank: int
    scale: float


def read_peft(folder: Path, config: ModelConfig) -> tuple[AdapterConfig, Any]:
    """The adapters of a PEFT folder, for a base of this config; in float32. A layer without an adapter has a zero one.

    Raises:
      ValueError: no such folder or file; a method that is not LoRA, rsLoRA or DoRA; a field that changes what is
        computed and is not built; tensors that are missing, unknown, or do not fit the base (it names the first).
    """
    folder = Path(folder)
    raw = read_object(folder / CONFIG)
    require(raw.get("peft_type") == "LORA", f"{CONFIG} peft_type", raw.get("peft_type"), "LORA")
    for name, neutral in NEUTRAL.items():
        require(raw.get(name, neutral[0]) in neutral, f"{CONFIG} {name}", raw.get(name), f"{neutral[0]!r}")
    for name in ("r", "lora_alpha"):
        _positive(raw.get(name), f"{CONFIG} {name}")
    source = open_safetensors(folder / WEIGHTS)
    found = _by_module(source)
    modules = [_module(raw, layer, target, found[layer, target], source) for layer, target in sorted(found)]
    rank = max(module.rank for module in modules)
    rslora, dora = bool(raw.get("use_rslora")), bool(raw.get("use_dora"))
    scales = [module.scale for module in modules]
    common = max(set(scales), key=scales.count)
    alpha = common * rank**0.5 if rslora else common * rank
    if all((module.rank, module.scale) == (raw["r"], common) for module in modules):
        alpha = float(raw["lora_alpha"])  # not through a root
    targets = tuple(dict.fromkeys(module.target for module in modules))
    dropout = float(raw.get("lora_dropout") or 0.0)
    adapters = AdapterConfig(rank, alpha, rslora=rslora, dora=dora, dropout=dropout, targets=targets)
    return adapters, _tree(config, adapters, modules, found, source, common)


def _by_module(source: SafetensorsFiles) -> dict[tuple[int, str], dict[str, str]]:
    """Names of the tensors by (layer, target) and leaf."""
    found: dict[tuple[int, str], dict[str, str]] = {}
    unknown = []
    for name in source.tensors:
        match = TENSOR.fullmatch(name)
        if match is None or match[3] not in LEAVES:
            unknown.append(name)
            continue
        found.setdefault((int(match[1]), match[2]), {})[LEAVES[match[3]]] = name
    require(not unknown, WEIGHTS, listed(unknown), f"names as {PREFIX}0.self_attn.q_proj.lora_A.weight")
    require(bool(found), WEIGHTS, "no tensors", "adapters of one map or more")
    return found


def _module(
    raw: Mapping[str, Any], layer: int, target: str, names: Mapping[str, str], source: SafetensorsFiles
) -> Module:
    part = "mlp" if target in FEED_FORWARD else "self_attn"
    full = f"model.layers.{layer}.{part}.{target}_proj"
    leaves = {"a", "b", "magnitude"} if raw.get("use_dora") else {"a", "b"}
    require(set(names) == leaves, f"{WEIGHTS} {full}", sorted(names), str(sorted(leaves)))
    rank, alpha = (_patterned(raw, full, *of) for of in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")))
    shapes = {leaf: source.tensors[name].shape for leaf, name in names.items()}
    fits = len(shapes["a"]) == len(shapes["b"]) == 2 and shapes["a"][0] == shapes["b"][1] == rank
    require(fits, f"{WEIGHTS} {full} shapes", (shapes["a"], shapes["b"]), f"[r, in] and [out, r] with r = {rank}")
    return Module(layer, target, int(rank), alpha / rank**0.5 if raw.get("use_rslora") else alpha / rank)


def _patterned(raw: Mapping[str, Any], module: str, pattern: str, default: str) -> float:
    """The module's own value, of the first key that as a regular expression ends its name, or the common one."""
    patterns = raw.get(pattern) or {}
    require(isinstance(patterns, dict), f"{CONFIG} {pattern}", patterns, "an object")
    for key, value in patterns.items():
        try:
            found = re.match(rf"(.*\.)?({key})$", module)
        except re.error as error:
            raise ValueError(f"{CONFIG} {pattern} = {key!r}: expected a regular expression ({error})") from None
        if found:
            return _positive(value, f"{CONFIG} {pattern} {key}")
    return raw[default]


def _positive(value: Any, field: str) -> float:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    require(ok, field, value, "a positive number")
    return value


def _tree(
    config: ModelConfig,
    adapters: AdapterConfig,
    modules: list[Module],
    found: Mapping[tuple[int, str], Mapping[str, str]],
    source: SafetensorsFiles,
    common: float,
) -> Any:
    shapes = abstract_adapters(config, adapters)
    tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    places = layer_places(config)
    number = len(places)
    for module in modules:
        require(module.layer < number, f"{WEIGHTS} layer", module.layer, f"layers 0 to {number - 1} of the base")
        run, place = places[module.layer]
        part = "ffn" if module.target in FEED_FORWARD else "attention"
        held = tree.get(run, {}).get(part, {}).get(f"lora_{module.target}")
        full = f"layers.{module.layer}.{module.target}_proj"
        require(held is not None, f"{WEIGHTS} {full}", "adapted", "a map that the base has")
        for leaf, name in found[module.layer, module.target].items():
            array = source.read(name).astype(np.float32)
            array = array.T if leaf != "magnitude" else array
            target = held[leaf][place, 0]
            if leaf == "b" and module.scale != common:
                array = array * np.float32(module.scale / common)
            wanted = list(target.shape)
            if leaf != "magnitude":
                wanted[leaf == "a"] = module.rank
            require(list(array.shape) == wanted, f"{WEIGHTS} {name} shape", array.T.shape,
                    f"{tuple(wanted[::-1])}, as the base has it")  # fmt: skip
            target[tuple(slice(0, size) for size in array.shape)] = array
    if adapters.dora:  # a map without an adapter in some layer would have no magnitude
        absent = [f"layers.{i}.{t}" for i in range(number) for t in adapters.targets if (i, t) not in found]
        require(not absent, f"{WEIGHTS} DoRA", f"none at {listed(absent)}", "each target in every layer")
    return jax.tree.map(jnp.asarray, tree)


def layer_places(config: ModelConfig) -> list[tuple[str, int]]:
    """Of every layer, bottom to top, its run and its place in it."""
    runs = [len(list(group)) for _, group in groupby(config.layer_kinds)]
    return [(f"runs_{run}", place) for run, length in enumerate(runs) for place in range(length)]


def write_peft(folder: Path, config: ModelConfig, adapters: AdapterConfig, tree: Any, base: str = "") -> None:
    """Writes plain adapters (no experts) as a PEFT folder that `PeftModel.from_pretrained` loads.

    Args:
      folder: one that does not exist; after an error it still does not.
      base: what adapter_config.json says of the base model, a name or nothing.

    Raises:
      ValueError: experts, which PEFT has no form for; a folder that is there; maps of a latent attention.
    """
    require(adapters.experts is None, "adapters.experts", adapters.experts, "none: PEFT has no mixtures")
    foreign = [target for target in adapters.targets if "_" in target]
    require(not foreign, "adapters.targets", foreign, "q, k, v, o, gate, up or down")
    tensors: dict[str, np.ndarray] = {}
    for layer, (run, place) in enumerate(layer_places(config)):
        for target in adapters.targets:
            part, their = ("ffn", "mlp") if target in FEED_FORWARD else ("attention", "self_attn")
            held = tree.get(run, {}).get(part, {}).get(f"lora_{target}")
            if held is None:
                continue
            prefix = f"{PREFIX}{layer}.{their}.{target}_proj"
            tensors[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(np.asarray(held["a"])[place, 0].T)
            tensors[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(np.asarray(held["b"])[place, 0].T)
            if adapters.dora:
                tensors[f"{prefix}.lora_magnitude_vector"] = np.asarray(held["magnitude"])[place, 0]
    tensors = dict(sorted(tensors.items()))
    raw = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base or None, "r": adapters.rank,
        "lora_alpha": _whole(adapters.alpha), "lora_dropout": adapters.dropout, "use_rslora": adapters.rslora,
        "use_dora": adapters.dora, "target_modules": [f"{target}_proj" for target in adapters.targets],
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    }  # fmt: skip
    with new_folder(Path(folder)) as made:
        infos = {name: TensorInfo(array.dtype, array.shape) for name, array in tensors.items()}
        write_safetensors(made, infos, tensors.values())
        os.replace(made / SINGLE, made / WEIGHTS)
        (made / CONFIG).write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", "utf-8")


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def stack_adapters(found: list[tuple[AdapterConfig, Any]], *, pad: bool = True) -> tuple[AdapterConfig, Any]:
    """Adapters as the experts of each map, [L, E, ...], for a mixture over the same maps: LoRA-Mixer's plug-and-play.

    Ranks are padded with zeros to the largest; scales are folded into B, so that that of the result is 1. A map that
    one of them lacks is a zero expert there. The result's config holds no experts: it is the caller's to say how they
    are mixed (`replace(config, experts=...)`); the routers are to be made (`moe.lora.adapters.with_routers`).

    Raises:
      ValueError: no adapters; DoRA or mixtures among them; different ranks and `pad = False`.
    """
    require(bool(found), "adapters", [], "one or more")
    for config, _ in found:
        require(config.experts is None and not config.dora, "adapters", config, "plain LoRA or rsLoRA")
    ranks = {config.rank for config, _ in found}
    require(pad or len(ranks) == 1, "adapters.rank", sorted(ranks), "one rank, or padding allowed")
    rank = max(ranks)
    targets = tuple(dict.fromkeys(target for config, _ in found for target in config.targets))
    modules: dict[tuple[str, ...], dict[str, np.ndarray]] = {}
    for i, (config, tree) in enumerate(found):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            *keys, name = (str(part.key) for part in path)
            array = np.asarray(leaf)[:, 0] * (np.float32(config.scale) if name == "b" else 1)
            axis = 2 if name == "a" else 1
            array = np.pad(array, [(0, rank - config.rank if i == axis else 0) for i in range(3)])
            held = modules.setdefault(tuple(keys), {})
            stack = held.setdefault(name, np.zeros((array.shape[0], len(found), *array.shape[1:]), array.dtype))
            require(stack[:, 0].shape == array.shape, f"adapters[{i}] {'.'.join(keys)}.{name}", array.shape,
                    f"{stack[:, 0].shape}, as the others have it: adapters of one base")  # fmt: skip
            stack[:, i] = array
    tree: dict[str, Any] = {}
    for keys, leaves in modules.items():
        inner = tree
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = {name: jnp.asarray(array) for name, array in leaves.items()}
    return AdapterConfig(rank, float(rank), targets=targets), tree
