"""Released models in memory: read onto one device or a mesh, and written as any family that can hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from moe.config import ModelConfig, require
from moe.pretrained.checkpoint import Tensors, config_of, open_checkpoint, read_json
from moe.pretrained.convert import convert, new_folder, require_family, write_model
from moe.pretrained.ours import SWITCHYARD, Leaf, abstract_model, model_leaves
from moe.pretrained.safetensors import TensorInfo
from parallel.sharding import tree_shardings

__all__ = ["Pretrained", "convert", "load", "read_config", "save"]
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
ALIGNMENT = 64  # bytes; a buffer that begins so becomes a CPU array without a copy
Span = tuple[tuple[int, int], ...]  # [begin, end) of every axis
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Pretrained:
    """A model that was read; `moe.generate.Model`.

    Attributes:
      family: of the source, `llama` ... or `switchyard`.
      config: with `compute_dtype` as asked for.
      params, router_state: of a `Transformer`.
      notes: what a command must tell its user, one sentence each.
    """

    family: str
    config: ModelConfig
    params: Any
    router_state: Any
    notes: tuple[str, ...] = ()


def read_config(folder: Path) -> tuple[str, ModelConfig]:
    """The family and the model that a folder's config.json names; no tensor is looked at.

    Raises:
      ValueError: no config.json; a family that is not built; a field that is wrong or not built.
    """
    raw = read_json(Path(folder))
    config = config_of(raw)
    return raw["model_type"], config


def load(
    source: str | Path, *, mesh: Mesh | None = None, dtype: str = "float32", progress: Progress | None = None
) -> Pretrained:
    """Reads a model, a leaf of its parameters at a time, each device's part into that device alone.

    Args:
      source: `smollm2`, a .gguf file, or a folder of Hugging Face's form or ours.
      mesh: where parameters lie, by `parallel.sharding`; None puts all on the first device.
      dtype: of the parameters and of the activations, float32 or bfloat16; the routers' state stays float32.
      progress: called as (bytes done, bytes in all).

    Raises:
      ValueError: as `open_checkpoint`.
    """
    require(dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
    model = open_checkpoint(source)
    config = replace(model.config, compute_dtype=dtype)
    shapes = abstract_model(model.config)
    leaves = model_leaves(model.config)
    if mesh is None:
        shardings = [SingleDeviceSharding(jax.local_devices()[0])] * len(leaves)
    else:
        shardings = jax.tree.leaves([tree_shardings(tree, mesh) for tree in shapes])
    total = sum(int(np.prod(leaf.shape)) for leaf in leaves)
    done, arrays = 0, []
    for leaf, sharding in zip(leaves, shardings, strict=True):
        kind = DTYPES[dtype] if _is_parameter(leaf) else leaf.dtype
        arrays.append(_read_leaf(model.tensors, leaf, sharding, kind))
        done += int(np.prod(leaf.shape))
        if progress is not None:
            progress(done, total)
    params, router_state = jax.tree.unflatten(jax.tree.structure(shapes), arrays)
    return Pretrained(model.family, config, params, router_state, model.notes)


def _is_parameter(leaf: Leaf) -> bool:
    return leaf.path[0].idx == 0


def _read_leaf(tensors: Tensors, leaf: Leaf, sharding: Sharding, dtype: np.dtype) -> jax.Array:
    """One array over its devices. Devices with the same part share a buffer; experts of no device here are not read."""
    spans = {
        device: tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(leaf.shape).items()
        if index is not None
    }
    buffers = {span: _aligned(tuple(end - begin for begin, end in span), dtype) for span in set(spans.values())}
    for layer, name in enumerate(leaf.names):
        before = (layer,) if leaf.stacked else ()
        axis = len(before)

        def wanted(expert: int, axis: int = axis) -> bool:
            return any(span[axis][0] <= expert < span[axis][1] for span in buffers)

        for place, array in tensors.pieces(name, wanted):
            _put((*before, *place), array, buffers)
    shards = [jax.device_put(buffers[span], device) for device, span in spans.items()]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _put(place: tuple[int, ...], array: np.ndarray, buffers: Mapping[Span, np.ndarray]) -> None:
    """The part of `array`, which is leaf[place], that each buffer holds."""
    for span, buffer in buffers.items():
        first, rest = span[: len(place)], span[len(place) :]
        if all(begin <= i < end for i, (begin, end) in zip(place, first, strict=True)):
            inside = tuple(i - begin for i, (begin, _) in zip(place, first, strict=True))
            buffer[(*inside, ...)] = array[tuple(slice(begin, end) for begin, end in rest)]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)


# --- writing ---


class Trees:
    """The leaves of (params, router_state) as tensors under our names, brought to the host one layer at a time."""

    def __init__(self, config: ModelConfig, params: Any, router_state: Any, dtype: np.dtype | None):
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[Any, int | None]] = {}
        trees = params, router_state
        found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}
        wanted = {jax.tree_util.keystr(leaf.path): leaf for leaf in model_leaves(config)}
        for path in wanted | found:
            shapes = [tuple(tree[path].shape) if path in tree else None for tree in (found, wanted)]
            require(shapes[0] == shapes[1], f"(params, router_state){path}.shape", shapes[0], f"{shapes[1]}")
        for path, leaf in wanted.items():
            kind = dtype if dtype is not None and _is_parameter(leaf) else np.dtype(found[path].dtype)
            for layer, name in enumerate(leaf.names):
                self.tensors[name] = TensorInfo(kind, leaf.info().shape)
                self._places[name] = found[path], layer if leaf.stacked else None

    def read(self, name: str) -> np.ndarray:
        array, layer = self._places[name]
        return np.asarray(array if layer is None else array[layer]).astype(self.tensors[name].dtype, copy=False)


def save(
    folder: Path,
    config: ModelConfig,
    params: Any,
    router_state: Any,
    *,
    family: str = SWITCHYARD,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes parameters as a checkpoint of a family, or of ours; config.json says what the family can say.

    Args:
      folder: one that does not exist; after an error it still does not.
      config, params, router_state: of a `Transformer`; on one process.
      family: `switchyard`, or a released one.
      dtype: of the parameters, float32 or bfloat16; None leaves it as it is. The routers' state is never rounded.
      progress: called as (bytes done, bytes in all).

    Raises:
      ValueError: a family that cannot hold the model; parameters of another shape than the config's.
    """
    folder = Path(folder)
    require(dtype is None or dtype in DTYPES, "dtype", dtype, f"none, or one of {', '.join(DTYPES)}")
    require_family(family)
    require(not folder.exists(), "folder", str(folder), "a path that does not exist")
    require(jax.process_count() == 1, "processes", jax.process_count(), "1, to save a checkpoint of a family")
    trees = Trees(config, params, router_state, None if dtype is None else DTYPES[dtype])
    with new_folder(folder) as made:
        write_model(made, config, trees, family, progress=progress)
