"""From one form of a checkpoint to another, tensor by tensor and bit by bit, with NumPy alone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moe.config import ModelConfig, require
from moe.pretrained.checkpoint import FAMILIES, Checkpoint, open_checkpoint, released_config, same_model
from moe.pretrained.layouts import Step, expand
from moe.pretrained.ours import CARRIED, SWITCHYARD, written_config
from moe.pretrained.safetensors import TensorInfo, write_safetensors

Progress = Callable[[int, int], None]
# Files of data beside the weights that a converted model needs as well, or must not go without.
BESIDE = re.compile(
    r"tokenizer.*\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|"
    r"generation_config\.json|chat_template.*|(LICENSE|NOTICE|USE_POLICY|README).*"
)


class OurTensors(Protocol):
    """Tensors under our names."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> np.ndarray: ...


def convert(
    source: str | Path, target: Path, *, to: str | None = None, progress: Progress | None = None
) -> tuple[str, ...]:
    """Writes a model in another form; what it holds of tensors at once is one layer's experts.

    Args:
      source: as `open_checkpoint` takes it.
      target: a folder that does not exist; after an error it still does not.
      to: the form to write, a family or `switchyard`. By default `switchyard`, and for a model in that form the family
        it came from.
      progress: called as (bytes done, bytes in all).

    Returns:
      What the user must know, one sentence each.

    Raises:
      ValueError: as `open_checkpoint`; an existing target; a family that cannot hold the model.
    """
    target = Path(target)
    require(not target.exists(), "target", str(target), "a path that does not exist")
    require_family(to or SWITCHYARD)
    model = open_checkpoint(source)
    if to is None:
        came_from = (model.raw or {}).get("model_type")
        to = SWITCHYARD if model.family != SWITCHYARD else came_from
        require(to is not None, "to", None, f"one of {', '.join(FAMILIES)}: the model came from no family")
    assert to is not None
    raw = model.raw if model.raw is not None and _remembers(model, to) else None
    carried = dict(model.carried) if raw is not None else {}
    notes = model.notes
    if len(carried) < len(model.carried):
        notes += (f"tensors that are not used are left out, since {to} does not have them: {len(model.carried)}",)
    with new_folder(target) as folder:
        write_model(folder, model.config, model.tensors, to, raw=raw, source=model, carried=carried, progress=progress)
        if Path(source).is_dir():
            for path in sorted(Path(source).iterdir()):
                if path.is_file() and BESIDE.fullmatch(path.name):
                    shutil.copyfile(path, folder / path.name)
    return notes


def require_family(name: str) -> None:
    """ValueError unless a checkpoint can be written as `name`."""
    known = name == SWITCHYARD or name in FAMILIES
    require(known, "family", name, f"one of {', '.join((*FAMILIES, SWITCHYARD))}")


def _remembers(model: Checkpoint, to: str) -> bool:
    """Whether the config.json that the model came with is right for the family that is written."""
    assert model.raw is not None
    return to in (SWITCHYARD, model.raw["model_type"]) and same_model(model.config, model.raw)


def write_model(
    folder: Path,
    config: ModelConfig,
    tensors: OurTensors,
    to: str,
    *,
    raw: Mapping[str, Any] | None = None,
    source: Checkpoint | None = None,
    carried: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """config.json and safetensors of a family, or of ours, from tensors under our names.

    Args:
      folder: to write into.
      raw: the released form's config.json if there is one; else it is made from `config`.
      source, carried: tensors to write besides: their names -> those in `source`.

    Raises:
      ValueError: the family cannot hold the model.
    """
    carried = carried or {}
    if to == SWITCHYARD:
        text = written_config(config, raw)
        infos = dict(tensors.tensors)
        arrays = (tensors.read(name) for name in tuple(infos))
        renamed = {f"{CARRIED}{name}": name_there for name, name_there in carried.items()}
    else:
        family = FAMILIES[to]
        text = released_config(family, config) if raw is None else raw
        steps = expand(to, family.entries(text), tensors.tensors, config.num_layers)
        infos = {}
        for step in steps:
            dtype = tensors.tensors[step.ours[0]].dtype
            infos |= {name: TensorInfo(dtype, shape) for name, shape in step.their_shapes().items()}
        if raw is None:
            text = {**text, "torch_dtype": tensors.tensors["embedding"].dtype.name}
        arrays, renamed = their_arrays(steps, tensors), dict(carried)
    there = {} if source is None else source.tensors.source.tensors
    infos |= {name: there[name_there] for name, name_there in renamed.items()}

    def everything() -> Iterator[np.ndarray]:
        yield from arrays
        for name in renamed.values():
            assert source is not None
            yield source.tensors.source.read(name)

    write_safetensors(folder, infos, everything(), progress=progress)
    (folder / "config.json").write_text(json.dumps(text, indent=2, ensure_ascii=False) + "\n", "utf-8")


def their_arrays(steps: Sequence[Step], ours: OurTensors) -> Iterator[np.ndarray]:
    """The arrays of a family in the order of `Step.their_shapes`; not more than the tensors of one step are held."""
    for step in steps:
        whole = [ours.read(name) for name in step.ours]
        for expert, _ in enumerate(step.theirs):
            parts = step.layout.to_theirs([array[expert] for array in whole] if step.stacked else whole)
            while parts:
                yield parts.pop(0)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name at the end, or is gone after an error."""
    made = [path for path in target.parents if not path.exists()]
    staged = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        staged.mkdir(parents=True)
        yield staged
        os.replace(staged, target)
    except BaseException:  # KeyboardInterrupt too
        shutil.rmtree(staged, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
