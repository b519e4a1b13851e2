"""`bench bilevel`: what a step of ScaleBiO costs beside plain fine-tuning, in time and in bytes.

Time: compiled steps in one process, in turns, each on its own state: plain AdamW on a batch; the penalty method, whose
w and u see that batch and w a validation batch as large, three forward-backward passes; the same with LISA, a quarter
of the layers at a time. Ratios are to plain steps of the same turn, and their median is reported.

Memory: float32 bytes of both models and of their moments, exactly, beside the closed form; and the compiler's account
of a whole step, for decoders of real sizes. Nothing of that is allocated.

    models     2 * 4 N
    moments    2 * 8 N, or with LISA 2 * 8 (sum over stacked leaves of gamma times one layer, and all that is outside)
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.bench import report
from experiments.bench.optimizers import MIB, decoder
from experiments.bench.routing_metrics import median_interval
from experiments.bench.state_bytes import parameters_of
from experiments.config import DataConfig, RunConfig
from experiments.output import write_json
from experiments.provenance import provenance
from experiments.recipes import smollm2
from experiments.scalebio.methods import scalebio
from experiments.scalebio.problem import Method, Problem, begun, flat, trained
from experiments.step import Batch
from moe.config import ModelConfig, require
from moe.transformer import abstract_params, init_params

SOURCES, STEPS = 4, 100  # steps are of the schedule alone
LEAST_ROUNDS = 6


def active(model: ModelConfig) -> int:
    """A quarter of the layers, at least one; the paper has 2 of 12 and more."""
    return max(1, model.num_layers // 4)


def problem_of(run: RunConfig) -> Problem:
    return Problem(run, (1,) * SOURCES, 3.0 * STEPS)


def contestants(run: RunConfig) -> dict[str, Method]:
    problem, layers = problem_of(run), active(run.model)
    return {"plain": plain(problem), "two copies": scalebio(problem), "LISA": scalebio(problem, layers=layers)}


def plain(problem: Problem) -> Method:
    """Fine-tuning by the run's optimiser; it searches for nothing."""
    tx = problem.optimizer(STEPS)

    def step(state: Any, batch: Batch, validation: Batch) -> tuple[Any, dict[str, jax.Array]]:
        del validation
        model, loss = trained(problem, tx, state, flat(batch))
        return model, {"loss": loss}

    return Method(functools.partial(begun, tx), step, lambda state: jnp.ones(SOURCES) / SOURCES, STEPS, 1.0)


def real_models() -> dict[str, ModelConfig]:
    return {"LLaMA 60M": decoder("60m"), "SmolLM2-135M": smollm2()}


def timed_run() -> RunConfig:
    """A decoder whose plain step takes some 150 ms on two cores."""
    sizes = {"hidden": 256, "ffn_dim": 688, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4, "vocab_size": 1024}
    data = DataConfig(corpus="synthetic", seq_len=128)
    return RunConfig(model=replace(decoder("60m"), **sizes, unroll=0), data=data, batch_size=8, steps=STEPS)


def main(
    json: Path,
    rounds: int = 20,
    *,
    models: dict[str, ModelConfig] | None = None,
    run: RunConfig | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures, prints tables, writes the result to `json` and returns it.

    Args:
      json: result file, written whole at the end.
      rounds: interleaved rounds; six are the fewest that bound a median at 95%.
      models, run: what is accounted for and what is timed; smaller ones for tests.

    Raises:
      ValueError: bad arguments, before anything is compiled or written; bytes that are not their closed form.
    """
    require(rounds >= LEAST_ROUNDS, "rounds", rounds, f"at least {LEAST_ROUNDS}")
    report.check_output(json)
    models, run, console = models or real_models(), run or timed_run(), console or Console()
    load = report.load_before(console)
    with report.progress_bar(console) as bar:
        task = bar.add_task("bytes of real models", total=len(models) * 3 + rounds + 1)
        step = functools.partial(bar.advance, task)
        memory = {name: memory_of(name, model, step) for name, model in models.items()}
        bar.update(task, description="timing steps")
        timed = time_of(run, rounds, step)
    result = {
        "benchmark": "bilevel", "rounds": rounds, "memory": memory, "time": timed, "load_average_before": load,
        "provenance": provenance(),
    }  # fmt: skip
    write_json(json, result)
    console.print(time_table(timed))
    console.print(memory_table(memory))
    console.print(f"written to {json}")
    return result


def batches(run: RunConfig) -> tuple[Batch, Batch]:
    """Two of random tokens [1, B, S + 1], as many sequences of every source."""
    rng = np.random.default_rng(0)

    def one() -> Batch:
        tokens = rng.integers(0, run.model.vocab_size, (1, run.batch_size, run.data.seq_len + 1))
        positions = np.broadcast_to(np.arange(tokens.shape[-1]), tokens.shape)
        domain = np.arange(run.batch_size)[None] % SOURCES
        made = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": positions, "domain": domain}
        return {name: jnp.asarray(leaf, jnp.int32) for name, leaf in made.items()}

    return one(), one()


@dataclass
class Side:
    """A compiled step, the state it is given for good, and what was measured."""

    compiled: Any
    state: Any
    seconds: list[float] = field(default_factory=list)

    def sample(self, data: tuple[Batch, Batch]) -> float:
        start = time.perf_counter()
        self.state, metrics = self.compiled(self.state, *data)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start


def time_of(run: RunConfig, rounds: int, done: Callable[[], None]) -> dict[str, Any]:
    data, sides = batches(run), {}
    params = init_params(run.model, jax.random.key(0))
    for name, method in contestants(run).items():
        state = method.init(params)
        sides[name] = Side(jax.jit(method.step, donate_argnums=0).lower(state, *data).compile(), state)
        sides[name].sample(data)
    done()
    rng = random.Random(0)
    for _ in range(rounds):
        for name in rng.sample(list(sides), len(sides)):
            sides[name].seconds.append(sides[name].sample(data))
        done()
    rows = {}
    for name, side in sides.items():
        ratios = [own / base for own, base in zip(side.seconds, sides["plain"].seconds, strict=True)]
        rows[name] = {"ms": 1e3 * median(side.seconds), "ratio": median(ratios), "interval": median_interval(ratios)}
    return {"model": asdict(run.model), "batch_size": run.batch_size, "seq_len": run.data.seq_len, "methods": rows}


def memory_of(name: str, model: ModelConfig, done: Callable[[], None]) -> dict[str, Any]:
    """Of each contestant: bytes of models and of moments, and the compiler's of a step of two short sequences of each
    source. ValueError if a closed form says otherwise."""
    run = RunConfig(model=model, data=DataConfig(corpus="synthetic", seq_len=32), batch_size=2 * SOURCES, steps=STEPS)
    params, found = abstract_params(model), {}
    for method, made in contestants(run).items():
        state = jax.eval_shape(made.init, params)
        sizes = {"model_bytes": models_of(state), "moment_bytes": moments_of(state)}
        for kind, expected in closed_form(method, model, params).items():
            require(sizes[kind] == expected, f"{kind} of {method} on {name}", sizes[kind], f"{expected} by its formula")
        data = jax.eval_shape(lambda: batches(run))
        analysis: Any = jax.jit(made.step, donate_argnums=0).lower(state, *data).compile().memory_analysis()
        found[method] = sizes | {
            "argument_bytes": analysis.argument_size_in_bytes, "temporary_bytes": analysis.temp_size_in_bytes
        }  # fmt: skip
        done()
    return found


def closed_form(method: str, model: ModelConfig, params: Any) -> dict[str, int]:
    of = parameters_of(params)
    copies = 1 if method == "plain" else 2
    training = of.total
    if method == "LISA":
        training = of.outside + sum(active(model) * size for _, size in of.layers)
    return {"model_bytes": copies * 4 * of.total, "moment_bytes": copies * 8 * training}


def models_of(state: Any) -> int:
    models = (state.w, state.u) if hasattr(state, "w") else (state.params,)
    return floats(models)


def moments_of(state: Any) -> int:
    return floats((state.opt_w, state.opt_u) if hasattr(state, "w") else state.opt_state)


def floats(tree: Any) -> int:
    """Bytes of the floating-point leaves: counts of steps are left out."""
    return sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)
    )


def time_table(timed: dict[str, Any]) -> Any:
    rows = [
        [name, f"{of['ms']:.1f}", f"{of['ratio']:.3f}", "{:.3f} to {:.3f}".format(*of["interval"])]
        for name, of in timed["methods"].items()
    ]  # fmt: skip
    title = f"a step on {timed['batch_size']} sequences of {timed['seq_len']}; three passes would be 3"
    return report.table(title, ["", "ms", "/ plain", "95%"], rows)


def memory_table(memory: dict[str, Any]) -> Any:
    keys = ("model_bytes", "moment_bytes", "argument_bytes", "temporary_bytes")
    rows = [
        [f"{name}, {method}", *(f"{of[key] / MIB:,.1f}" for key in keys)]
        for name, methods in memory.items() for method, of in methods.items()
    ]  # fmt: skip
    title = "MiB; models and moments equal their closed form to the byte; the rest is the compiler's"
    return report.table(title, ["", "models", "moments", "arguments", "temporaries"], rows)
