"""`bench moe-layer`: what a dropless MoE layer costs beside a dense FFN of equal active FLOPs, forward and backward.

The dense FFN has width k f on the same tokens. Few tokens per expert mean small products and padded blocks: both are
shown, with the time the arithmetic alone would take at the machine's matmul peak.

Legend: T tokens, E experts, k active, d hidden, f expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.bench import report
from experiments.bench.parts import forward_backward, moe_layer, normal
from experiments.bench.peak import SQUARES, PeakMeter, seconds_of
from experiments.bench.shape import StepShape
from experiments.output import write_json
from experiments.provenance import provenance
from kernels.grouped_ffn import automatic_block_sizes
from kernels.grouped_matmul import choose_blocks
from moe.config import require
from moe.layer import DenseFFN

TOKENS_PER_EXPERT = (512, 128, 64)


@dataclass(frozen=True)
class LayerFigures:
    """One size. `padding_share`: rows of padding among all rows the blocks multiply; `floor_ms`: FLOPs / peak."""

    tokens_per_expert: int
    tokens: int
    ratio: float
    moe_ms: float
    dense_ms: float
    floor_ms: float
    padding_share: float
    block_sizes: list[int]
    moe_samples: list[float]
    dense_samples: list[float]


def main(
    json: Path,
    rounds: int = 15,
    *,
    shape: StepShape | None = None,
    tokens_per_expert: tuple[int, ...] = TOKENS_PER_EXPERT,
    squares: tuple[int, ...] = SQUARES,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures, prints a table, writes the result to `json` and returns it.

    Args:
      json: result file, written whole at the end.
      rounds: interleaved samples of each layer; the ratio is the median of per-round ratios.
      shape: gives d, f, E and k; its batch and sequence are set by `tokens_per_expert`.

    Raises:
      ValueError: bad arguments, before anything is measured or written.
    """
    require(rounds >= 1, "rounds", rounds, "at least 1")
    report.check_output(json)
    shape, console = shape or StepShape(), console or Console()
    load = report.load_before(console)
    meter = PeakMeter.for_shapes(shape.matmul_shapes(), squares)
    samples: list[tuple[StepShape, float, list[float], list[float]]] = []
    with report.progress_bar(console) as bar:
        task = bar.add_task("matmul peak", total=rounds * len(tokens_per_expert))
        meter.sweep()
        for per_expert in tokens_per_expert:
            sized = at_tokens_per_expert(shape, per_expert)
            bar.update(task, description=f"{per_expert} tokens per expert")
            samples.append((sized, *interleaved(sized, rounds, meter, lambda: bar.advance(task))))
    layers = [figures(*of, meter.peak) for of in samples]
    result = {
        "benchmark": "moe-layer", "shape": asdict(shape), "rounds": rounds,
        "peak": {"flops_per_second": meter.peak, "shape": meter.best_shape, "rates": meter.medians},
        "layers": {str(layer.tokens_per_expert): asdict(layer) for layer in layers},
        "load_average_before": load, "provenance": provenance(),
    }  # fmt: skip
    write_json(json, result)
    console.print(shown(layers, meter))
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


def interleaved(
    shape: StepShape, rounds: int, meter: PeakMeter, done: Callable[[], None]
) -> tuple[float, list[float], list[float]]:
    """Padding share; seconds of the MoE layer and of the dense FFN, sampled in turns, with a peak probe per round."""
    moe, dense = moe_layer(shape).call, dense_ffn(shape)
    (_, counts, *_), _ = moe()
    jax.block_until_ready(dense())
    share = padding_share(np.asarray(counts).sum(axis=0), block_sizes(shape))
    taken: tuple[list[float], list[float]] = [], []
    for index in range(rounds):
        for which in (0, 1) if index % 2 else (1, 0):
            taken[which].append(seconds_of((moe, dense)[which]))
        meter.probe()
        done()
    return share, *taken


def block_sizes(shape: StepShape) -> tuple[int, ...]:
    return automatic_block_sizes(shape.tokens * shape.top_k, shape.experts)


def padding_share(counts: np.ndarray, sizes: tuple[int, ...]) -> float:
    """The share of the rows multiplied, block by block, that holds no assignment."""
    size, number = choose_blocks(jnp.asarray(counts, jnp.int32), sizes)
    return 1.0 - float(np.sum(counts)) / float(jnp.sum(size * number))


def figures(shape: StepShape, share: float, moe: list[float], dense: list[float], peak: float) -> LayerFigures:
    flops = shape.part_flops()
    arithmetic = (flops["experts"] + flops["router + dispatch"]) / shape.layers
    return LayerFigures(
        tokens_per_expert=shape.tokens * shape.top_k // shape.experts, tokens=shape.tokens,
        ratio=median(m / d for m, d in zip(moe, dense)), moe_ms=1e3 * median(moe), dense_ms=1e3 * median(dense),
        floor_ms=1e3 * arithmetic / peak, padding_share=share, block_sizes=list(block_sizes(shape)),
        moe_samples=moe, dense_samples=dense,
    )  # fmt: skip


def shown(layers: list[LayerFigures], meter: PeakMeter) -> Any:
    columns = ["tokens per expert", "MoE / dense", "MoE ms", "dense ms", "floor ms", "padding", "blocks of"]
    rows = [
        [str(of.tokens_per_expert), f"{of.ratio:.2f}", f"{of.moe_ms:.1f}", f"{of.dense_ms:.1f}", f"{of.floor_ms:.1f}",
         f"{of.padding_share:.0%}", f"{of.block_sizes[0]} to {of.block_sizes[-1]}"]
        for of in layers
    ]  # fmt: skip
    title = f"MoE layer, forward and backward; peak {meter.peak / 1e9:.0f} GFLOP/s ({meter.best_shape})"
    return report.table(title, columns, rows)
