"""How a tensor of ours and those of a released checkpoint hold the same numbers, and the maps between their names.

A layout is a small invertible object: it moves numbers and never changes them, so it works on any dtype. A name map is
a list of entries (our name, their names, layout); `{i}` is a layer, `{e}` an expert. Which entries a model uses follows
from which of our names it has, see `expand`.

Legend: d hidden, f width, H heads, D head width, E experts, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from moe.pretrained.safetensors import TensorInfo, listed

Shape = tuple[int, ...]
Arrays = list[np.ndarray]


class Layout(Protocol):
    """Between the arrays of one entry, ours and theirs; may return views."""

    def their_shapes(self, ours: Sequence[Shape]) -> list[Shape]: ...

    def to_ours(self, theirs: Sequence[np.ndarray], shapes: Sequence[Shape]) -> Arrays:
        """`shapes` are those of the result."""
        ...

    def to_theirs(self, ours: Sequence[np.ndarray]) -> Arrays: ...


@dataclass(frozen=True)
class Same:
    """No difference."""

    def their_shapes(self, ours: Sequence[Shape]) -> list[Shape]:
        return list(ours)

    def to_ours(self, theirs: Sequence[np.ndarray], shapes: Sequence[Shape]) -> Arrays:
        del shapes
        return list(theirs)

    def to_theirs(self, ours: Sequence[np.ndarray]) -> Arrays:
        return list(ours)


@dataclass(frozen=True)
class Flat:
    """A vector of theirs is an array of ours: a bias [H * D] is [H, D]."""

    def their_shapes(self, ours: Sequence[Shape]) -> list[Shape]:
        return [(math.prod(shape),) for shape in ours]

    def to_ours(self, theirs: Sequence[np.ndarray], shapes: Sequence[Shape]) -> Arrays:
        return [array.reshape(shape) for array, shape in zip(theirs, shapes, strict=True)]

    def to_theirs(self, ours: Sequence[np.ndarray]) -> Arrays:
        return [array.reshape(-1) for array in ours]


@dataclass(frozen=True)
class Linear:
    """A weight [out, in] of theirs is [*in, *out] of ours, with `inputs` axes of input: [H * D, d] is [d, H, D]."""

    inputs: int = 1

    def their_shapes(self, ours: Sequence[Shape]) -> list[Shape]:
        return [(math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])) for shape in ours]

    def to_ours(self, theirs: Sequence[np.ndarray], shapes: Sequence[Shape]) -> Arrays:
        return [array.T.reshape(shape) for array, shape in zip(theirs, shapes, strict=True)]

    def to_theirs(self, ours: Sequence[np.ndarray]) -> Arrays:
        return [array.reshape(math.prod(array.shape[: self.inputs]), -1).T for array in ours]


@dataclass(frozen=True)
class GateUp:
    """Two weights [f, d] of theirs, gate and up, are [d, 2f] of ours, gate first; two biases [f] are [2f]."""

    def their_shapes(self, ours: Sequence[Shape]) -> list[Shape]:
        (*inputs, width), *_ = ours
        return [(width // 2, *inputs)] * 2

    def to_ours(self, theirs: Sequence[np.ndarray], shapes: Sequence[Shape]) -> Arrays:
        del shapes
        return [np.concatenate([array.T for array in theirs], axis=-1)]

    def to_theirs(self, ours: Sequence[np.ndarray]) -> Arrays:
        return [half.T for half in np.split(ours[0], 2, axis=-1)]


@dataclass(frozen=True)
class Interleaved:
    """Gate and up alternate along the last axis of theirs (gpt-oss); in ours all of the gate comes first."""

    def their_shapes(self, ours: Sequence[Shape]) -> list[Shape]:
        return list(ours)

    def to_ours(self, theirs: Sequence[np.ndarray], shapes: Sequence[Shape]) -> Arrays:
        del shapes
        return [np.concatenate([array[..., ::2], array[..., 1::2]], axis=-1) for array in theirs]

    def to_theirs(self, ours: Sequence[np.ndarray]) -> Arrays:
        return [np.stack(np.split(array, 2, axis=-1), axis=-1).reshape(array.shape) for array in ours]


@dataclass(frozen=True)
class KeyValueUp:
    """One weight [H * (nope + value), r] of theirs, by heads, is [r, H, nope] and [r, H, value] of ours (DeepSeek)."""

    def their_shapes(self, ours: Sequence[Shape]) -> list[Shape]:
        (rank, heads, nope), (*_, value) = ours
        return [(heads * (nope + value), rank)]

    def to_ours(self, theirs: Sequence[np.ndarray], shapes: Sequence[Shape]) -> Arrays:
        (rank, heads, nope), _ = shapes
        return np.split(theirs[0].T.reshape(rank, heads, -1), [nope], axis=-1)

    def to_theirs(self, ours: Sequence[np.ndarray]) -> Arrays:
        return [np.concatenate(ours, axis=-1).reshape(ours[0].shape[0], -1).T]


@dataclass(frozen=True)
class Rotary:
    """`inner`, and the last `dims` of our last axis, which RoPE turns: theirs holds a pair side by side (2i, 2i + 1),
    ours holds it as (i, i + dims / 2)."""

    inner: Layout
    dims: int

    def their_shapes(self, ours: Sequence[Shape]) -> list[Shape]:
        return self.inner.their_shapes(ours)

    def to_ours(self, theirs: Sequence[np.ndarray], shapes: Sequence[Shape]) -> Arrays:
        whole = self.inner.to_ours(theirs, shapes)
        parts = ((array[..., : -self.dims], array[..., -self.dims :]) for array in whole)
        return [np.concatenate([rest, turned[..., ::2], turned[..., 1::2]], axis=-1) for rest, turned in parts]

    def to_theirs(self, ours: Sequence[np.ndarray]) -> Arrays:
        whole = []
        for array in ours:
            rest, turned = array[..., : -self.dims], array[..., -self.dims :]
            pairs = np.stack(np.split(turned, 2, axis=-1), axis=-1).reshape(turned.shape)
            whole.append(np.concatenate([rest, pairs], axis=-1))
        return self.inner.to_theirs(whole)


@dataclass(frozen=True)
class Entry:
    """One line of a name map. With `{e}` in `theirs`, the layout is that of one expert, the first axis of ours."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    layout: Layout


def entry(ours: str | tuple[str, ...], theirs: str | tuple[str, ...], layout: Layout) -> Entry:
    """An entry, with a name alone for a tuple of one."""
    first, second = ((names,) if isinstance(names, str) else names for names in (ours, theirs))
    return Entry(first, second, layout)


def in_layers(entries: Iterable[Entry], theirs: str = "model.layers.{i}.") -> tuple[Entry, ...]:
    """The entries with the prefixes of a layer before their names."""
    return tuple(
        Entry(tuple(f"layers.{{i}}.{name}" for name in each.ours), tuple(f"{theirs}{name}" for name in each.theirs),
              each.layout)
        for each in entries
    )


class Step(NamedTuple):
    """An entry with its names filled in.

    Attributes:
      ours: our names.
      theirs: their names, for each expert where `stacked`, else a tuple of one.
      shapes: of ours, without the axis of the experts where `stacked`.
    """

    ours: tuple[str, ...]
    theirs: tuple[tuple[str, ...], ...]
    shapes: tuple[Shape, ...]
    layout: Layout
    stacked: bool

    def their_shapes(self) -> dict[str, Shape]:
        shapes = self.layout.their_shapes(self.shapes)
        return {name: shape for names in self.theirs for name, shape in zip(names, shapes, strict=True)}


def expand(family: str, entries: Sequence[Entry], model: Mapping[str, TensorInfo], num_layers: int) -> list[Step]:
    """The steps a model takes: an entry is used for the layers in which the model has its tensors.

    Args:
      family: for the error.
      entries: the family's name map.
      model: all our names of the model.

    Raises:
      ValueError: tensors of the model that no entry has.
    """
    steps: list[Step] = []
    done: set[str] = set()
    # The layers' entries stand together in a name map: bottom to top, a layer at a time, as released files have it.
    first = [each for each in entries if "{i}" not in each.ours[0] and each.ours[0] == "embedding"]
    last = [each for each in entries if "{i}" not in each.ours[0] and each not in first]
    inside = [each for each in entries if "{i}" in each.ours[0]]
    order = [*((each, 0) for each in first), *((each, i) for i in range(num_layers) for each in inside),
             *((each, 0) for each in last)]  # fmt: skip
    for each, i in order:
        ours = tuple(name.replace("{i}", str(i)) for name in each.ours)
        if not all(name in model for name in ours) or done.intersection(ours):
            continue
        done.update(ours)
        theirs = [name.replace("{i}", str(i)) for name in each.theirs]
        stacked = "{e}" in theirs[0]
        shapes = [model[name].shape for name in ours]
        experts = range(shapes[0][0]) if stacked else range(1)
        names = tuple(tuple(name.replace("{e}", str(e)) for name in theirs) for e in experts)
        shapes = tuple(shape[1:] if stacked else shape for shape in shapes)
        steps.append(Step(ours, names, shapes, each.layout, stacked))
    if missing := [name for name in model if name not in done]:
        raise ValueError(f"{family} cannot hold all of this model: it has no place for {listed(missing)}")
    return steps
