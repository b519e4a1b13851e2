"""Tiny checkpoints of the released families with the logits Hugging Face's models compute from them (`makers/`).

Every tensor is drawn from its name in the file, so the golden file holds no weights: `write_checkpoint` makes the
checkpoint again, with the released names (one tensor per expert where the release has it so). NumPy and safetensors.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from safetensors.numpy import save_file

FILE = Path(__file__).with_name("language_models.npz")


def _load_inputs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_inputs", Path(__file__).with_name("inputs.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


inputs = _load_inputs()


def _load() -> dict[str, np.ndarray]:
    if not FILE.exists():  # while the maker writes the first one
        return {}
    with np.load(FILE) as found:
        return dict(found)


_GOLDEN = _load()
CASES = tuple(key.removesuffix("/config") for key in _GOLDEN if key.endswith("/config"))


def config(case: str) -> dict[str, Any]:
    """The case's config.json."""
    return json.loads(str(_GOLDEN[f"{case}/config"]))


def tensors(case: str) -> dict[str, tuple[int, ...]]:
    """Name in the file -> shape, in the order of the file."""
    return {name: tuple(shape) for name, shape in json.loads(str(_GOLDEN[f"{case}/tensors"])).items()}


def tokens(case: str) -> np.ndarray:
    """[B, S] int32."""
    return _GOLDEN[f"{case}/tokens"]


def logits(case: str) -> np.ndarray:
    """[B, S, V] float32, from float32 weights by eager attention and experts."""
    return _GOLDEN[f"{case}/logits"]


def digest(case: str) -> str:
    """What `digest_of` gave for the tensors that the logits were computed from."""
    return str(_GOLDEN[f"{case}/digest"])


def weight(case: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor by its name in the file; scales that keep routers' margins clear and let every bias be felt."""
    seed = f"language_models/{case}/{name}"
    if "norm" in name:
        return 1.0 + inputs.draw(seed, shape, 0.3)
    if name.endswith((*inputs.WIDE, "sinks")):
        return inputs.draw(seed, shape, 1.0)
    if name.endswith("e_score_correction_bias"):
        return inputs.draw(seed, shape, 0.2)
    if name.endswith("experts.gate_up_proj"):  # gpt-oss: some values pass the clamp at 7
        return inputs.draw(seed, shape, 1.5)
    return inputs.draw(seed, shape, 0.5 if name.endswith(("bias", "embed_tokens.weight")) else 0.25)


def digest_of(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(f"{name} {arrays[name].shape} {arrays[name].dtype}\n".encode())
        total.update(arrays[name].tobytes())
    return total.hexdigest()


def write_checkpoint(case: str, folder: Path, shards: int = 1) -> None:
    """config.json and model.safetensors, or `shards` files and their index, into folder."""
    write_files(case, str(_GOLDEN[f"{case}/config"]), tensors(case), folder, shards)


def write_files(case: str, config_text: str, shapes: Mapping[str, tuple[int, ...]], folder: Path, shards: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config_text)
    arrays = {name: weight(case, name, shape) for name, shape in shapes.items()}
    if shards == 1:
        save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, files = list(arrays), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        held = names[shard::shards]  # strided: one layer's tensors lie in different files
        save_file({name: arrays[name] for name in held}, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": sum(a.nbytes for a in arrays.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
