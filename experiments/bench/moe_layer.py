"""`bench moe-layer`: what a dropless MoE layer costs beside a dense FFN of equal active FLOPs, forward and backward.

The dense FFN has width k f on the same tokens. Few tokens per expert mean small products and padded blocks: both are
shown, with the time the arithmetic alone would take at the machine's matmul peak. Another revision's layer may join, in
a process of its own; rounds interleave all of them.

Legend: T tokens, E experts, k active, d hidden, f expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.bench import report
from experiments.bench.parts import forward_backward, normal
from experiments.bench.peak import SQUARES
from experiments.bench.protocol import Worker, closing_all, start_in_tree
from experiments.bench.shape import StepShape
from experiments.bench.worktree import ROOT, resolve_revision, worktree
from experiments.output import write_json
from experiments.provenance import provenance
from kernels.grouped_matmul import automatic_block_sizes, choose_blocks
from moe.config import require
from moe.layer import DenseFFN

TOKENS_PER_EXPERT = (512, 128, 64)
WORKER = Path(__file__).with_name("layer_worker.py")
NEEDED = "experiments/bench/parts.py"  # what the worker takes from another revision


@dataclass(frozen=True)
class LayerFigures:
    """One size. `padding_share`: rows of padding among all rows the blocks multiply; `floor_ms`: FLOPs / peak;
    `speed_against`: how much faster this tree's layer is than the other revision's, None without one."""

    tokens_per_expert: int
    tokens: int
    ratio: float
    moe_ms: float
    dense_ms: float
    floor_ms: float
    padding_share: float
    speed_against: float | None
    block_sizes: list[int]
    samples: dict[str, list[float]]


def main(
    json: Path,
    rounds: int = 15,
    against: str | None = None,
    *,
    shape: StepShape | None = None,
    tokens_per_expert: tuple[int, ...] = TOKENS_PER_EXPERT,
    squares: tuple[int, ...] = SQUARES,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures, prints a table, writes the result to `json` and returns it.

    Args:
      json: result file, written whole at the end; nothing is written when interrupted.
      rounds: interleaved samples of each layer; ratios are medians of per-round ratios.
      against: git revision whose own layer joins, from a temporary worktree.
      shape: gives d, f, E and k; its batch and sequence are set by `tokens_per_expert`.

    Raises:
      ValueError: bad arguments, before anything is measured or written.
      WorkerError: a process that measures failed; its last words are in the message.
    """
    require(rounds >= 1, "rounds", rounds, "at least 1")
    report.check_output(json)
    commit = resolve_revision(against, NEEDED) if against else None
    shape, console = shape or StepShape(), console or Console()
    shapes = {str(per_expert): at_tokens_per_expert(shape, per_expert) for per_expert in tokens_per_expert}
    load = report.load_before(console)
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        # Entered first, so left last: workers end before their source tree goes.
        tree = stack.enter_context(worktree(commit)) if commit else None
        stack.enter_context(closing_all(workers))
        sizes = dumps({name: asdict(of) for name, of in shapes.items()})
        for name, source in (("ours", ROOT), ("against", tree)):
            if source is not None:
                start_in_tree(workers, name, ["-P", str(WORKER), sizes, dumps(squares)], source)
        peak, layers = measure(workers, shapes, rounds, console)
    result = {
        "benchmark": "moe-layer", "shape": asdict(shape), "rounds": rounds,
        "peak": {"flops_per_second": peak["peak"], **{key: peak[key] for key in ("shape", "rates")}},
        "layers": {str(layer.tokens_per_expert): asdict(layer) for layer in layers},
        "load_average_before": load, "provenance": provenance(),
    }  # fmt: skip
    if commit:
        result["against"] = {"revision": against, "commit": commit}
    write_json(json, result)
    console.print(shown(layers, peak, against))
    console.print(f"written to {json}")
    return result


def at_tokens_per_expert(shape: StepShape, per_expert: int) -> StepShape:
    """The same layer on one sequence of as many tokens as give each expert `per_expert` assignments on average."""
    tokens = per_expert * shape.experts // shape.top_k
    return StepShape(**asdict(shape) | {"batch": 1, "seq": tokens})


def dense_ffn(shape: StepShape) -> Callable[[], Any]:
    """Forward and backward of the model's dense FFN of width k f, as a call."""
    layer = DenseFFN(shape.top_k * shape.expert_dim, init_std=0.02, out_std=0.02)
    x = normal(0, shape.batch, shape.seq, shape.hidden)
    params = jax.jit(layer.init)(jax.random.key(0), x)
    return forward_backward(layer.apply, params, x)


def measure(
    workers: dict[str, Worker], shapes: dict[str, StepShape], rounds: int, console: Console
) -> tuple[dict[str, Any], list[LayerFigures]]:
    """Samples of every size, in rounds that interleave the layers and end with a probe of the peak; figures of all."""
    ours = workers["ours"]
    samples: dict[str, dict[str, list[float]]] = {}
    shares: dict[str, float] = {}
    with report.progress_bar(console) as bar:
        task = bar.add_task("matmul peak", total=rounds * len(shapes))
        peak = ours.ask("peak")
        for name in shapes:
            bar.update(task, description=f"{name} tokens per expert")
            contestants = {"moe": (ours, f"moe {name}"), "dense": (ours, f"dense {name}")}
            if "against" in workers:
                contestants["against"] = workers["against"], f"moe {name}"
            shares[name] = ours.ask(f"share {name}")["share"]
            for worker, command in contestants.values():
                worker.ask(command)
            samples[name] = {of: [] for of in contestants}
            for index in range(rounds):
                for of in list(contestants)[:: 1 if index % 2 else -1]:
                    worker, command = contestants[of]
                    samples[name][of].append(worker.ask(command)["seconds"])
                peak = ours.ask("probe")
                bar.advance(task)
    return peak, [figures(shapes[name], shares[name], samples[name], peak["peak"]) for name in shapes]


def block_sizes(shape: StepShape) -> tuple[int, ...]:
    return automatic_block_sizes(shape.tokens * shape.top_k, shape.experts)


def padding_share(counts: np.ndarray, sizes: tuple[int, ...]) -> float:
    """The share of the rows multiplied, block by block, that holds no assignment."""
    size, number = choose_blocks(jnp.asarray(counts, jnp.int32), sizes)
    return 1.0 - float(np.sum(counts)) / float(jnp.sum(size * number))


def padding_share_of(made: Any, shape: StepShape) -> float:
    """The padding of what `moe_layer`'s call returned: its statistics hold the counts [B, E]."""
    (_, counts, *_), _ = made
    return padding_share(np.asarray(counts).sum(axis=0), block_sizes(shape))


def figures(shape: StepShape, share: float, samples: dict[str, list[float]], peak: float) -> LayerFigures:
    flops = shape.part_flops()
    arithmetic = (flops["experts"] + flops["router + dispatch"]) / shape.layers
    ratio = lambda a, b: median(x / y for x, y in zip(samples[a], samples[b]))  # noqa: E731
    return LayerFigures(
        tokens_per_expert=shape.tokens * shape.top_k // shape.experts, tokens=shape.tokens,
        ratio=ratio("moe", "dense"), moe_ms=1e3 * median(samples["moe"]), dense_ms=1e3 * median(samples["dense"]),
        floor_ms=1e3 * arithmetic / peak, padding_share=share,
        speed_against=ratio("against", "moe") if "against" in samples else None,
        block_sizes=list(block_sizes(shape)), samples=samples,
    )  # fmt: skip


def shown(layers: list[LayerFigures], peak: dict[str, Any], against: str | None) -> Any:
    columns = ["tokens per expert", "MoE / dense", "MoE ms", "dense ms", "floor ms", "padding", "blocks of"]
    rows = [
        [str(of.tokens_per_expert), f"{of.ratio:.2f}", f"{of.moe_ms:.1f}", f"{of.dense_ms:.1f}", f"{of.floor_ms:.1f}",
         f"{of.padding_share:.0%}", f"{of.block_sizes[0]} to {of.block_sizes[-1]}",
         *([] if of.speed_against is None else [f"{of.speed_against:.2f}x"])]
        for of in layers
    ]  # fmt: skip
    title = f"MoE layer, forward and backward; peak {peak['peak'] / 1e9:.0f} GFLOP/s ({peak['shape']})"
    return report.table(title, columns + ([f"faster than at {against}"] if against else []), rows)
