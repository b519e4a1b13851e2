"""`bench tune-tiles`: times tiles of the grouped kernels on the GPU here, and writes their table with the fastest.

For every kernel and class of rows per group, the tile of the present table and CANDIDATES run on one layer's products,
as the fused FFN launches them, in bfloat16. What does not compile, does not fit shared memory or gives another result
is skipped and told. Candidates are tried by turns of one per kernel and class: when time is up, each has had some.
Entries for other GPUs, and those of which nothing could be timed, stay as they are.

Legend: T tokens, k experts per token, E experts, N = T k sorted rows, d model width, f expert width.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from rich.console import Console

from experiments.bench import report
from experiments.bench.roofline import difference, first_line, load_counts, load_indices, sampled_seconds
from kernels import _triton
from kernels.grouped_gpu import products, swiglu_backward, swiglu_forward, weight_gradients
from kernels.grouped_matmul import SortedRows, sort_rows
from kernels.tiles import CLASSES, TABLE, Tile, using
from moe.config import require

EXPERTS, TOP_K, HIDDEN, WIDTH = 64, 8, 2048, 1024  # OLMoE-1B-7B's layer
ROWS_PER_GROUP = {"few": 16, "some": 128, "many": 1024}
SAMPLES = 20
LIMIT = 450.0  # seconds after which no candidate begins
DIFFERENT = 0.05  # of a result's greatest value: more than another order of bfloat16 sums explains

Sizes = tuple[int, int, int, int, int]  # BM, BN, BK, warps, stages
Case = tuple[str, str]  # kernel, class of rows per group
Table = dict[str, dict[str, dict[str, dict[str, Any]]]]  # kernel, capability, class: tile and source

CANDIDATES: dict[Case, tuple[Sizes, ...]] = {
    ("rows_kernel", "few"): (
        (16, 128, 64, 4, 4), (16, 64, 128, 4, 4), (16, 128, 128, 4, 3), (16, 256, 64, 8, 3), (32, 128, 64, 4, 4),
    ),
    ("rows_kernel", "some"): (
        (64, 128, 64, 4, 4), (128, 128, 64, 8, 3), (64, 256, 64, 8, 3), (64, 128, 32, 4, 4), (128, 256, 64, 8, 3),
    ),
    ("rows_kernel", "many"): (
        (128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 32, 8, 4), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3),
    ),
    # Two accumulators and two tiles of weights: half as wide.
    ("swiglu_kernel", "few"): (
        (16, 64, 64, 4, 4), (16, 64, 128, 4, 3), (16, 128, 64, 4, 3), (32, 64, 64, 4, 4),
    ),
    ("swiglu_kernel", "some"): (
        (64, 64, 64, 4, 4), (64, 128, 64, 8, 3), (128, 64, 64, 8, 3), (64, 64, 32, 4, 4), (128, 128, 64, 8, 3),
    ),
    ("swiglu_kernel", "many"): (
        (128, 128, 64, 8, 3), (128, 64, 64, 8, 4), (128, 64, 32, 8, 4), (128, 128, 32, 8, 4), (256, 64, 64, 8, 3),
    ),
    ("swiglu_backward_kernel", "few"): (
        (16, 64, 64, 4, 4), (16, 64, 128, 4, 3), (16, 128, 64, 4, 3), (32, 64, 64, 4, 3),
    ),
    ("swiglu_backward_kernel", "some"): (
        (64, 64, 64, 4, 3), (64, 64, 32, 4, 3), (64, 128, 64, 8, 3), (128, 64, 64, 8, 3),
    ),
    ("swiglu_backward_kernel", "many"): (
        (128, 64, 64, 8, 3), (64, 64, 32, 4, 3), (128, 128, 64, 8, 3), (128, 64, 64, 8, 4), (64, 128, 64, 8, 3),
    ),
    # Rows are what is contracted here: few of them fill no long BK.
    ("weights_kernel", "few"): (
        (128, 128, 32, 8, 3), (64, 128, 32, 4, 3), (128, 128, 16, 8, 4), (128, 256, 32, 8, 3),
    ),
    ("weights_kernel", "some"): (
        (128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3),
    ),
    ("weights_kernel", "many"): (
        (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (256, 128, 64, 8, 3), (128, 256, 64, 8, 4),
    ),
}  # fmt: skip


class Problem(NamedTuple):
    """What kernels work on: tokens and gradients of outputs [T, d], weights, and arrays of sorted rows [N, .]."""

    x: Array
    g: Array
    gate_up: Array
    down: Array
    rows: SortedRows
    token: Array
    scale: Array
    hidden: Array
    activation: Array


# The one launch of each kernel that matters most; what a jitted call does not return is not launched.
LAUNCHES: dict[str, Callable[[Problem], Array]] = {
    "rows_kernel": lambda of: products(
        of.activation, of.down, of.rows.counts, of.token.shape[0], target=of.rows.order,
        num_targets=of.token.shape[0], scale=of.scale,
    ),
    "swiglu_kernel": lambda of: swiglu_forward(of.x, of.gate_up, of.down, of.rows, of.token, of.scale)[1],
    "swiglu_backward_kernel": lambda of: swiglu_backward(
        of.x, of.gate_up, of.down, of.rows, of.token, of.scale, of.hidden, of.g
    ).scale,
    "weights_kernel": lambda of: weight_gradients(
        of.x, of.hidden, of.rows.counts, of.token.shape[0], left_source=of.token
    ),
}  # fmt: skip


def main(out: Path, console: Console | None = None) -> Table:
    """Times, prints a table, writes the new one to `out` and returns it.

    Raises:
      ValueError: no GPU of capability 80 or more, no Triton, or a file that cannot be written; before anything is.
    """
    report.check_output(out)
    backend, console = jax.default_backend(), console or Console()
    require(backend == "gpu", "device", backend, "a GPU that JAX sees: tiles are measured, not guessed")
    require(_triton.available(), "triton, jax_triton", None, "installed packages; pip install 'switchyard[gpu]'")
    capability, began = "90" if _triton.capability() >= 90 else "80", time.monotonic()
    present: Table = json.loads(TABLE.read_text())
    order = list(turns(present, capability))
    problems = {name: make_problem(rows * EXPERTS // TOP_K) for name, rows in ROWS_PER_GROUP.items()}
    seconds: dict[Case, dict[Tile, float]] = {case: {} for case in CANDIDATES}
    results: dict[Case, Array] = {}
    with report.progress_bar(console) as bar:
        task = bar.add_task("tiles", total=len(order))
        for case, tile in order:
            bar.update(task, description=f"{case[0]}, {case[1]}")
            if time.monotonic() - began < LIMIT:
                try:
                    seconds[case][tile] = timed(case[0], tile, problems[case[1]], case, results)
                except Exception as error:  # of a compiler, a launch or memory: what another tile does not meet
                    console.print(f"skipped {', '.join(case)}, {sizes_of(tile)}: {first_line(error)}", markup=False)
            bar.advance(task)
    found = {case: fastest(of) for case, of in seconds.items() if of}
    made = merged(present, capability, found, f"measured on {jax.devices()[0].device_kind}")
    write(out, made)
    console.print(shown(present, capability, seconds))
    console.print(f"written to {out}")
    return made


def candidates(present: Table, capability: str, case: Case) -> tuple[Tile, ...]:
    """The tile of the present table, then CANDIDATES, none twice."""
    kernel, name = case
    sizes = [tuple(present[kernel][capability][name]["tile"]), *CANDIDATES[case]]
    return tuple(Tile(*of) for of in dict.fromkeys(sizes))


def turns(present: Table, capability: str) -> Iterator[tuple[Case, Tile]]:
    """The first candidate of every kernel and class, then the second ones, and so on."""
    for tiles in zip_longest(*(candidates(present, capability, case) for case in CANDIDATES)):
        yield from ((case, tile) for case, tile in zip(CANDIDATES, tiles) if tile is not None)


def make_problem(tokens: int) -> Problem:
    """Balanced rows; the arrays of sorted rows are as random as the others."""
    counts = load_counts("balanced", tokens * TOP_K, EXPERTS)
    rows = sort_rows(jnp.asarray(load_indices(counts, tokens)).reshape(-1), EXPERTS)
    keys = iter(jax.random.split(jax.random.key(0), 7))

    def normal(*size: int) -> Array:
        return jax.random.normal(next(keys), size, jnp.bfloat16)

    return Problem(
        x=normal(tokens, HIDDEN), g=normal(tokens, HIDDEN), gate_up=normal(EXPERTS, HIDDEN, 2 * WIDTH),
        down=normal(EXPERTS, WIDTH, HIDDEN), rows=rows, token=rows.order // TOP_K,
        scale=jax.random.uniform(next(keys), (tokens * TOP_K,)), hidden=normal(tokens * TOP_K, 2 * WIDTH),
        activation=normal(tokens * TOP_K, WIDTH),
    )  # fmt: skip


def timed(kernel: str, tile: Tile, of: Problem, case: Case, results: dict[Case, Array]) -> float:
    """Median seconds of a launch with this tile; ValueError if it differs from the first of its case, which is kept."""
    with using(tile):
        program = jax.jit(LAUNCHES[kernel]).lower(of).compile()
    out = program(of)
    apart = difference(out, results.setdefault(case, out))
    require(apart < DIFFERENT, "difference from another tile", apart, f"below {DIFFERENT}")
    return median(sampled_seconds("gpu", program, (of,), SAMPLES))


def fastest(seconds: Mapping[Tile, float]) -> Tile:
    """The tile of fewest seconds; of equals the first."""
    return min(seconds, key=seconds.__getitem__)


def merged(present: Table, capability: str, found: Mapping[Case, Tile], source: str) -> Table:
    """The table with these tiles at one capability, and every other entry as it is; `present` is not changed."""
    made: Table = json.loads(json.dumps(present))
    for (kernel, name), tile in found.items():
        made[kernel][capability][name] = {"tile": list(sizes_of(tile)), "source": source}
    return made


def sizes_of(tile: Tile) -> Sizes:
    return tile.BM, tile.BN, tile.BK, tile.warps, tile.stages


def formatted(table: Table) -> str:
    """As `tiles.json` is written: a line for each entry."""

    def block(items: Iterable[tuple[str, str]], indent: str) -> str:
        lines = ",\n".join(f"{indent}  {json.dumps(key)}: {value}" for key, value in items)
        return f"{{\n{lines}\n{indent}}}"

    def of_capability(classes: dict[str, dict[str, Any]]) -> str:
        return block(((name, json.dumps(entry)) for name, entry in classes.items()), "    ")

    def of_kernel(capabilities: dict[str, dict[str, dict[str, Any]]]) -> str:
        return block(((name, of_capability(classes)) for name, classes in capabilities.items()), "  ")

    return block(((kernel, of_kernel(capabilities)) for kernel, capabilities in table.items()), "") + "\n"


def write(path: Path, table: Table) -> None:
    """Atomically, so that no kernel meets half a table."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(formatted(table))
    os.replace(temporary, path)


def shown(present: Table, capability: str, seconds: Mapping[Case, Mapping[Tile, float]]) -> Any:
    """The present tile and the fastest of each kernel and class, and their milliseconds."""
    rows = []
    for (kernel, name), of in seconds.items():
        before = Tile(*present[kernel][capability][name]["tile"])
        words = [" ".join(map(str, sizes_of(before))), f"{1e3 * of[before]:.3f}" if before in of else ""]
        best = [" ".join(map(str, sizes_of(fastest(of)))), f"{1e3 * min(of.values()):.3f}"] if of else ["", ""]
        rows.append([f"{kernel}, {name}", *words, *best, str(len(of))])
    columns = ["BM BN BK warps stages", "present", "ms", "fastest", "ms", "timed"]
    return report.table(f"tiles at capability {capability}, classes {', '.join(CLASSES)}", columns, rows)
