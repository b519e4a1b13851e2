"""A model's folder opened: its config, and its tensors under our names, whichever form they have on disk.

Every tensor is accounted for before a number is read: names that the model lacks or does not use, shapes and dtypes
that contradict config.json are refused, all in one error.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from moe.config import ModelConfig, MoEConfig, require
from moe.pretrained.families.deepseek_v3 import DEEPSEEK_V3
from moe.pretrained.families.gpt_oss import GPT_OSS
from moe.pretrained.families.llama import LLAMA
from moe.pretrained.families.mixtral import MIXTRAL
from moe.pretrained.families.olmoe import OLMOE
from moe.pretrained.families.parts import Family
from moe.pretrained.families.qwen import QWEN2, QWEN3
from moe.pretrained.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from moe.pretrained.gguf import open_gguf
from moe.pretrained.layouts import Step, expand
from moe.pretrained.ours import CARRIED, SWITCHYARD, model_tensors, parsed_config
from moe.pretrained.quantized import dequantized
from moe.pretrained.safetensors import Source, TensorInfo, listed, open_safetensors
from moe.pretrained.smollm2 import open_smollm2
from moe.routers.group_limited import GroupLimited
from moe.routing import make_router

FAMILIES: Mapping[str, Family] = MappingProxyType({
    family.name: family
    for family in (LLAMA, QWEN2, QWEN3, MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE, DEEPSEEK_V3, GPT_OSS)
})  # fmt: skip
SMOLLM2 = "smollm2"
FLOATS = tuple(np.dtype(kind) for kind in (np.float32, ml_dtypes.bfloat16, np.float16, np.float64))
DTYPES = ("float32", "bfloat16", "float16", "float64")
QUANTIZED = ("fp8", "mxfp4")  # quant_method of config.json
# Tensors of old checkpoints that are computed from config.json today.
ALWAYS_NEUTRAL = ((r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "RoPE follows from the config"),)
TIED = "lm_head.weight"
# Fields that change how a model is run or trained, not what it computes.
FREE = {"remat", "compute_dtype", "unroll"}
FREE_MOE = {"router", "allow_noncausal", "dispatcher", "block_size"}


class Piece(NamedTuple):
    """A part of a tensor of ours: all of it, or one expert, the number `place` of its first axis."""

    place: tuple[int, ...]
    array: np.ndarray


class Tensors:
    """Our tensors from a source that has them under our names."""

    def __init__(self, source: Source, tensors: Mapping[str, TensorInfo]):
        self.source, self.tensors = source, dict(tensors)

    def pieces(self, name: str, wanted: Callable[[int], bool] = lambda _: True) -> Iterator[Piece]:
        """Reads a tensor. Where it lies as one tensor per expert, these come one by one, and only those `wanted`."""
        del wanted
        yield Piece((), self.source.read(name))

    def read(self, name: str) -> np.ndarray:
        """A whole tensor of ours, in fresh memory or as a view of it."""
        return next(self.pieces(name)).array


class Translated(Tensors):
    """Our tensors from a source that has a family's."""

    def __init__(self, source: Source, steps: Sequence[Step]):
        self._steps = {name: step for step in steps for name in step.ours}
        infos = {}
        for name, step in self._steps.items():
            shape = step.shapes[step.ours.index(name)]
            shape = (len(step.theirs), *shape) if step.stacked else shape
            infos[name] = TensorInfo(source.tensors[step.theirs[0][0]].dtype, shape)
        super().__init__(source, infos)

    def pieces(self, name: str, wanted: Callable[[int], bool] = lambda _: True) -> Iterator[Piece]:
        step = self._steps[name]
        for expert, names in enumerate(step.theirs):
            if not step.stacked or wanted(expert):
                arrays = step.layout.to_ours([self.source.read(each) for each in names], step.shapes)
                yield Piece((expert,) if step.stacked else (), arrays[step.ours.index(name)])

    def read(self, name: str) -> np.ndarray:
        if not self._steps[name].stacked:
            return super().read(name)
        whole = np.empty(self.tensors[name].shape, self.tensors[name].dtype)
        for place, array in self.pieces(name):
            whole[place] = array
        return whole


@dataclass(frozen=True)
class Checkpoint:
    """A model that was opened.

    Attributes:
      family: a name of FAMILIES, or `switchyard`.
      config: of the model.
      raw: config.json of the released form, which one of ours remembers; None if it never had one.
      tensors: under our names.
      carried: their names of tensors that are not used -> names in `tensors.source`.
      notes: what a command must tell its user, one sentence each.
    """

    family: str
    config: ModelConfig
    raw: Mapping[str, Any] | None
    tensors: Tensors
    carried: Mapping[str, str]
    notes: tuple[str, ...] = ()


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Opens `smollm2`, a .gguf file, or a folder with config.json and safetensors.

    Raises:
      ValueError: no such model; a family or a setting that is not built; files that are missing or broken; tensors that
        config.json contradicts.
    """
    if str(source) == SMOLLM2:
        opened = open_smollm2()
        return _open_released(opened.config, opened)
    path = Path(source)
    if path.suffix == ".gguf":
        opened = open_gguf(path)
        return _open_released(opened.config, opened)
    raw = read_json(path)
    family_of(raw)
    config_of(raw)  # before any file of weights
    files = open_safetensors(path)
    if raw["model_type"] == SWITCHYARD:
        return _open_ours(raw, files)
    quantization = _quantization(raw)
    opened = dequantized(files, weight_block_size=quantization.get("weight_block_size"))
    if opened is not files:
        gone = ("quantization_config", "torch_dtype", "dtype")
        raw = {name: value for name, value in raw.items() if name not in gone} | {"torch_dtype": "bfloat16"}
    else:
        require(not quantization, "config.json quantization_config", quantization, "none: no tensor is quantised")
    return _open_released(raw, opened)


def read_json(folder: Path) -> dict[str, Any]:
    """config.json of a folder. ValueError if there is none, or it is no object."""
    require(folder.is_dir(), "model", str(folder), f"{SMOLLM2}, or a folder with config.json and safetensors")
    return read_object(folder / "config.json")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError if there is no such file, or it is no object."""
    require(path.is_file(), path.name, str(path), "an existing file")
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): expected an object") from None
    require(isinstance(raw, dict), str(path), raw, "an object")
    return raw


def family_of(raw: Mapping[str, Any]) -> Family | None:
    """The family that config.json names, None for ours. ValueError for one that is not built, or another head."""
    name = raw.get("model_type")
    if name == SWITCHYARD:
        return None
    known = isinstance(name, str) and name in FAMILIES
    require(known, "config.json model_type", name, f"one of {', '.join((*FAMILIES, SWITCHYARD))}")
    family = FAMILIES[str(name)]
    classes = raw.get("architectures")
    ok = classes is None or classes == [family.architecture]
    require(ok, "config.json architectures", classes, f"[{family.architecture!r}], a language model")
    return family


def config_of(raw: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json, of any family. ValueError names the field that is wrong or not built."""
    family = family_of(raw)
    if family is None:
        return parsed_config(raw)
    for name in ("torch_dtype", "dtype"):
        dtype = raw.get(name)
        ok = dtype is None or (isinstance(dtype, str) and dtype.removeprefix("torch.") in DTYPES)
        require(ok, f"config.json {name}", dtype, f"one of {', '.join(DTYPES)}")
    _quantization(raw)
    return family.read(raw)


def _quantization(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    found = raw.get("quantization_config") or {}
    require(isinstance(found, Mapping), "config.json quantization_config", found, "an object")
    method = found.get("quant_method")
    known = not found or method in QUANTIZED
    require(known, "config.json quantization_config.quant_method", method, f"one of {', '.join(QUANTIZED)}")
    return found


# --- tensors ---


def _open_released(raw: Mapping[str, Any], source: Source) -> Checkpoint:
    family, config = family_of(raw), config_of(raw)
    assert family is not None
    steps = expand(family.name, family.entries(raw), model_tensors(config), config.num_layers)
    wanted = {name: shape for step in steps for name, shape in step.their_shapes().items()}
    carried, notes = {}, []
    for pattern, why in (*ALWAYS_NEUTRAL, *family.neutral(raw)):
        found = [name for name in source.tensors if name not in wanted and re.fullmatch(pattern, name)]
        carried |= {name: name for name in found}
        notes += [f"tensors that are not used ({why}): {len(found)}"] if found else []
    if config.tie_embeddings and TIED in source.tensors:
        _check_tied(source)
        carried[TIED] = TIED
    check_tensors({name: info for name, info in source.tensors.items() if name not in carried}, wanted)
    for step in steps:
        _check_one_dtype(step, source)
    return Checkpoint(family.name, config, raw, Translated(source, steps), carried, source.notes + tuple(notes))


def _open_ours(raw: Mapping[str, Any], source: Source) -> Checkpoint:
    config, origin = parsed_config(raw), raw.get("origin")
    require(origin is None or isinstance(origin, Mapping), "config.json origin", origin, "null or an object")
    if origin is not None:
        require(family_of(origin) is not None, "config.json origin", origin, "the config.json of a released family")
    carried = {name.removeprefix(CARRIED): name for name in source.tensors if name.startswith(CARRIED)}
    own = {name: info for name, info in source.tensors.items() if not name.startswith(CARRIED)}
    check_tensors(own, {name: info.shape for name, info in model_tensors(config).items()})
    return Checkpoint(SWITCHYARD, config, origin, Tensors(source, own), carried, source.notes)


def check_tensors(found: Mapping[str, TensorInfo], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError that lists the tensors that are missing, unused, of another shape, or not of floating point."""
    both = [name for name in wanted if name in found]
    shapes = [f"{n} {list(found[n].shape)} (not {list(wanted[n])})" for n in both if found[n].shape != wanted[n]]
    kinds = [f"{name} {found[name].dtype}" for name in both if found[name].dtype not in FLOATS]
    wrong = {
        "missing": [name for name in wanted if name not in found],
        "there, with no place in the model": [name for name in found if name not in wanted],
        "of another shape than the config's": shapes,
        f"of a dtype other than {', '.join(DTYPES)}": kinds,
    }
    text = [f"tensors {what}: {listed(names)}" for what, names in wrong.items() if names]
    if text:
        raise ValueError(f"config.json and the tensors contradict each other; {'; '.join(text)}")


def _check_one_dtype(step: Step, source: Source) -> None:
    """What is one tensor in our form must have one dtype."""
    dtypes = {name: str(source.tensors[name].dtype) for names in step.theirs for name in names}
    require(len(set(dtypes.values())) == 1, f"dtypes of what is {step.ours[0]}", dtypes, "one dtype")


def _check_tied(source: Source) -> None:
    """A tied head that the file has too is read as the embedding, as the config says, only if it is the embedding."""
    embedding = "model.embed_tokens.weight"
    same = source.tensors.get(embedding) == source.tensors[TIED]
    same = same and source.read(embedding).tobytes() == source.read(TIED).tobytes()
    require(same, "config.json tie_word_embeddings", True, f"false: {TIED} is not {embedding}")


# --- from our config to a family's ---


def released_config(family: Family, config: ModelConfig) -> dict[str, Any]:
    """config.json of a model that was never released. ValueError names what the family cannot say."""
    raw = {"model_type": family.name, "architectures": [family.architecture], **family.write(config)}
    again = family.read(raw)
    for field in sorted(dataclasses.fields(ModelConfig), key=lambda field: field.name != "latent"):
        mine: Any = getattr(config, field.name)
        theirs: Any = getattr(again, field.name)
        if field.name == "moe" and mine is not None and theirs is not None:
            _check_moe(family, mine, theirs)
        elif field.name == "windows":
            same = (mine if any(mine or ()) else ()) == theirs
            require(same, "model.windows", mine, f"{theirs!r}, which is all that {family.name} can say")
        elif field.name not in FREE | {"first_dense", "moe_every", "dense_layers", "ffn_dim"}:
            require(mine == theirs, f"model.{field.name}", mine, f"{theirs!r}, which is all that {family.name} can say")
    same = config.layer_kinds == again.layer_kinds
    require(same, "model.dense_layers", config.layer_kinds, f"{again.layer_kinds}, all that {family.name} can say")
    dense = "dense" in config.layer_kinds
    require(not dense or config.ffn_dim == again.ffn_dim, "model.ffn_dim", config.ffn_dim,
            f"{again.ffn_dim}, which is all that {family.name} can say")
    return raw


def _check_moe(family: Family, mine: MoEConfig, theirs: MoEConfig) -> None:
    for field in dataclasses.fields(MoEConfig):
        value, other = getattr(mine, field.name), getattr(theirs, field.name)
        if field.name not in FREE_MOE:
            require(value == other, f"model.moe.{field.name}", value, f"{other!r}, which is all {family.name} can say")
    same = router_of(mine) == router_of(theirs)
    require(same, "model.moe.router", mine.router, f"{theirs.router}, which is all that {family.name} can say")


def router_of(moe: MoEConfig) -> Any:
    """The router, equal for configs that choose and weigh alike."""
    router = make_router(moe)
    if not isinstance(router, GroupLimited):
        return router
    if router.groups == router.kept_groups:  # a choice among all groups is none
        return replace(router, groups=1, kept_groups=1, group_score="max")
    two = router.group_score == "topk" and router.top_k == 2 * router.kept_groups
    return replace(router, group_score="top2") if two else router


def same_model(config: ModelConfig, raw: Mapping[str, Any]) -> bool:
    """Whether a remembered config.json still says what our config does."""
    told = config_of(raw)
    free = {name: getattr(config, name) for name in FREE}
    if told.moe is not None and config.moe is not None and router_of(told.moe) == router_of(config.moe):
        free["moe"] = replace(told.moe, **{name: getattr(config.moe, name) for name in FREE_MOE})
    return replace(told, **free) == config
