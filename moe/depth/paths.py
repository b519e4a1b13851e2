"""Layer paths and their labels (Dr.LLM, Heakl et al., arXiv 2510.12773, Algorithm 1).

A path names the blocks to run, in order: (0, 1, 1, 3) runs block 1 twice and skips block 2. Its labels count each
block, (1, 2, 0, 1). Blocks keep their order, so labels say all of a path that runs no block three times.

Legend: L layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe.config import require

SKIP, EXECUTE, REPEAT = 0, 1, 2
Path = tuple[int, ...]
Labels = tuple[int, ...]


def full_path(num_layers: int) -> Path:
    """Every block once."""
    return tuple(range(num_layers))


def check_path(path: Sequence[int], num_layers: int) -> Path:
    """The path as a tuple; ValueError for an unknown block, blocks out of order, or more than 2L of them."""
    path = tuple(int(layer) for layer in path)
    require(all(0 <= layer < num_layers for layer in path), "path", path, f"layers 0 to {num_layers - 1}")
    ordered = all(below <= above for below, above in itertools.pairwise(path))
    require(ordered, "path", path, "layers in the order they have in the model")
    require(len(path) <= 2 * num_layers, "path", path, f"at most 2L = {2 * num_layers} blocks")
    return path


def check_labels(labels: Sequence[int] | np.ndarray, num_layers: int) -> np.ndarray:
    """Labels [..., L] as int32; ValueError unless there is one of 0, 1, 2 for every layer."""
    array = np.asarray(labels)
    require(array.ndim >= 1 and array.shape[-1] == num_layers, "labels shape", array.shape, f"[..., L = {num_layers}]")
    wrong = array[~np.isin(array, (SKIP, EXECUTE, REPEAT))]
    require(wrong.size == 0, "labels", wrong[:5].tolist(), "0 (skip), 1 (execute) or 2 (repeat)")
    return array.astype(np.int32)


def path_of(labels: Sequence[int] | np.ndarray) -> Path:
    """The path of labels [L]."""
    checked = check_labels(labels, len(labels))
    require(checked.ndim == 1, "labels shape", checked.shape, "[L], of one path")
    return tuple(layer for layer, count in enumerate(checked.tolist()) for _ in range(count))


def labels_of(path: Sequence[int], num_layers: int) -> Labels:
    """How often a path runs each block; ValueError where that is no label, as the released search's paths may be."""
    path = check_path(path, num_layers)
    counts = tuple(path.count(layer) for layer in range(num_layers))
    require(max(counts, default=0) <= REPEAT, "path", path, "no layer more than twice, for labels")
    return counts


def edits(path: Path) -> tuple[Path, ...]:
    """The paths one action away: one or two neighbours of the path left out, or a block that runs once repeated."""
    skips = [path[:i] + path[i + size :] for size in (1, 2) for i in range(len(path) - size + 1)]
    repeats = [path[: i + 1] + path[i:] for i, layer in enumerate(path) if path.count(layer) == 1]
    return tuple(dict.fromkeys(skips + repeats))


def neighbourhood(num_layers: int, max_edits: int) -> tuple[Path, ...]:
    """All paths at most `max_edits` actions from the full one, nearest first, each once."""
    require(max_edits >= 0, "max_edits", max_edits, "0 or more")
    found = {full_path(num_layers): None}
    front = list(found)
    for _ in range(max_edits):
        front = [path for path in dict.fromkeys(new for old in front for new in edits(old)) if path not in found]
        found.update(dict.fromkeys(front))
    return tuple(found)


class Executions(NamedTuple):
    """Block executions, counted both ways.

    Attributes:
      per_query: mean over queries of the executions summed over generated tokens: the paper's "layers".
      full_per_query: the same for as many tokens at full depth.
      fraction: of the two, which does not move with the number of tokens; what a saving of time is made of.
    """

    per_query: float
    full_per_query: float
    fraction: float


def count_executions(lengths: Sequence[int], tokens: Sequence[int], num_layers: int) -> Executions:
    """Counts what queries ran.

    Args:
      lengths: blocks on each query's path.
      tokens: tokens each query generated. The paper's unedited rows are L times these: its "5 layers saved" of 331 are
        spread over all tokens, about 2% of the work.

    Raises:
      ValueError: no queries, unequal numbers of them, no token, or a length that no path has.
    """
    require(len(lengths) == len(tokens) > 0, "lengths, tokens", (len(lengths), len(tokens)), "one of each for a query")
    require(min(tokens) >= 0 < max(tokens), "tokens", list(tokens)[:5], "numbers of generated tokens")
    fits = all(0 <= length <= 2 * num_layers for length in lengths)
    require(fits, "lengths", list(lengths)[:5], f"0 to 2L = {2 * num_layers} blocks")
    run, full = float(np.dot(lengths, tokens)), float(num_layers * np.sum(tokens))
    return Executions(run / len(tokens), full / len(tokens), run / full)
