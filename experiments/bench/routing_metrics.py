"""`bench routing-metrics`: what the routing metrics, always on for users, cost a train step.

Two compiled steps of one shape, with and without them, run in one process in turns, each on its own state; both start
alike and learn the same batch, so that both route alike. The ratio is the median of the per-pair ratios.

The FLOPs are the compiler's own count. It takes the body of a loop once, however often that runs: the experts' products
are counted too low, and the share of the metrics, which have no loop, too high.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import jax
from rich.console import Console
from scipy.stats import quantile_test

from experiments.bench import report
from experiments.bench.batch import random_batch
from experiments.bench.shape import StepShape
from experiments.config import RunConfig
from experiments.output import write_json
from experiments.provenance import provenance
from experiments.step import Batch, batch_sharding, compile_step, init_state, make_optimizer, state_shardings
from moe.config import require
from parallel.mesh import make_mesh

LEAST_PAIRS = 50
MOST_TIME, MOST_FLOPS = 1.05, 1.01
WARM_UP = 3  # steps of each before the first pair


@dataclass
class Side:
    """One of the two steps: its executable, its state, and what was measured."""

    compiled: Any
    state: Any
    batch: Batch
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, config: RunConfig, batch: Batch, routing_metrics: bool) -> Side:
        mesh, tx = make_mesh(), make_optimizer(config.optimizer, config.steps)
        with jax.set_mesh(mesh):
            init = functools.partial(init_state, config, tx)
            state = jax.jit(init, out_shardings=state_shardings(jax.eval_shape(init), tx, mesh))()
            batch = jax.device_put(batch, batch_sharding(mesh))
            step = compile_step(config, tx, mesh, routing_metrics=routing_metrics)
            return cls(step.lower(state, batch).compile(), state, batch)

    @property
    def flops(self) -> float:
        return self.compiled.cost_analysis()["flops"]

    def run(self) -> tuple[float, dict[str, jax.Array]]:
        """Wall seconds and metrics of one step; it is given the state for good and leaves the next one here."""
        start = time.perf_counter()
        self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start, metrics

    def sample(self) -> None:
        seconds, metrics = self.run()
        self.seconds.append(seconds)
        self.loss.append(float(metrics["loss"]))


def main(
    json: Path,
    pairs: int = 60,
    *,
    shape: StepShape | None = None,
    least_pairs: int = LEAST_PAIRS,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures, prints a table, writes the result to `json` and returns it.

    Args:
      json: result file, written whole at the end.
      pairs: interleaved pairs of steps; which of the two goes first alternates.
      shape, least_pairs: smaller ones for tests; six pairs are the fewest that bound a median at 95%.

    Raises:
      ValueError: bad arguments, before anything is measured or written.
    """
    require(pairs >= least_pairs, "pairs", pairs, f"at least {least_pairs}")
    report.check_output(json)
    shape, console = shape or StepShape(), console or Console()
    load = report.load_before(console)
    with report.progress_bar(console) as bar:
        task = bar.add_task("compiling", total=pairs)
        batch = random_batch(shape)
        sides = {name: Side.of(shape.run_config(), batch, name == "with") for name in ("with", "without")}
        bar.update(task, description="warming up")
        for _ in range(WARM_UP):
            for side in sides.values():
                side.run()
        bar.update(task, description="pairs of steps")
        interleaved(sides, pairs, lambda: bar.advance(task))
    result = {
        "benchmark": "routing-metrics", "shape": asdict(shape), "pairs": pairs, **figures(sides),
        "samples": {name: {"seconds": side.seconds, "loss": side.loss} for name, side in sides.items()},
        "load_average_before": load, "provenance": provenance(),
    }  # fmt: skip
    write_json(json, result)
    console.print(shown(result))
    for words, met in result["verdict"].items():
        console.print(f"{words}: {'yes' if met else 'no'}")
    console.print(f"written to {json}")
    return result


def interleaved(sides: dict[str, Side], pairs: int, done: Callable[[], None]) -> None:
    names = list(sides)
    for index in range(pairs):
        for name in names if index % 2 == 0 else reversed(names):
            sides[name].sample()
        done()


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the median between two order statistics: free of any distribution, never too narrow.

    Symmetric ranks j and n + 1 - j with P(Binomial(n, 1/2) < j) <= 2.5%; not a number below six samples.
    """
    found = quantile_test(samples, p=0.5).confidence_interval(0.95)
    return float(found.low), float(found.high)


def figures(sides: dict[str, Side]) -> dict[str, Any]:
    """Every ratio is with / without."""
    on, off = sides["with"], sides["without"]
    ratios = [a / b for a, b in zip(on.seconds, off.seconds)]
    low, high = median_interval(ratios)
    flops_ratio = on.flops / off.flops
    return {
        "ratio": median(ratios), "ratio_interval_95": [low, high], "flops_ratio": flops_ratio,
        "step_ms": {name: 1e3 * median(side.seconds) for name, side in sides.items()},
        "compiled_flops": {name: side.flops for name, side in sides.items()},
        "verdict": {
            f"upper end below {MOST_TIME}": high < MOST_TIME,
            f"FLOPs below +{MOST_FLOPS - 1:.0%}": flops_ratio < MOST_FLOPS,
        },
    }  # fmt: skip


def shown(result: dict[str, Any]) -> Any:
    low, high = result["ratio_interval_95"]
    rows = [
        [f"{name} routing metrics", f"{result['step_ms'][name]:.1f}", f"{result['compiled_flops'][name] / 1e9:.4f}"]
        for name in ("with", "without")
    ]
    ratios = [f"{result['ratio']:.4f} [{low:.4f}, {high:.4f}]", f"{result['flops_ratio']:.5f}"]
    title = f"train step, {result['pairs']} pairs; ratio: median with its 95% interval"
    columns = ["", "ms", "compiled GFLOP"]
    return report.table(title, columns, [*rows, ["with / without", *ratios]])
