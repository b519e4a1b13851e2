"""`bench optimizers`: what state the optimisers of `optim/` keep, and what their steps take beside AdamW's.

Memory, for LLaMA of 60M and 130M parameters (2411.07837) and the mixture of experts of the recipe `cpu`: bytes of
state, which must equal `state_bytes` to the byte, and the compiler's own account of a whole train step. Nothing of that
is allocated; with rolled layers a step takes some seconds to compile at any size, so every method is, at every shape.
The batch is two short sequences, so that temporaries are those of the update, not activations. State is not all memory:
parameters and gradients stay, and a method may need more temporaries than it saves state.

Time: whole train steps in one process, every contestant on a state of its own; the order is drawn for each step. A
window is GAP steps, the first of which refreshes the subspace; such steps are timed apart. Ratios are to the same step
of AdamW (Optax's own chain), and their median is reported. `amortised` is what both make of a window of the released
T = 200.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from experiments.bench import report, state_bytes
from experiments.bench.batch import random_batch
from experiments.bench.routing_metrics import Side, median_interval
from experiments.bench.shape import StepShape
from experiments.bench.state_bytes import Parameters, on_layers, on_matrices, parameters_of
from experiments.config import DataConfig, RunConfig
from experiments.dry_run import abstract_state
from experiments.frugal.experiment import llama
from experiments.output import write_json
from experiments.provenance import provenance
from experiments.recipes import cpu
from experiments.step import compile_step, make_optimizer
from moe.config import ModelConfig, require
from moe.transformer import abstract_params
from parallel.mesh import make_mesh

DENSITY = 0.25
GAP, RELEASED_GAP = 5, 200  # steps between refreshes: when timed, and of the released scripts
MOST_TIME = 1.05
TIMED = {"adamw": False, "rho 0": False, "columns": True, "block": True, "svd": True}  # and whether it ever refreshes
BOUNDED = ("columns", "block")
BATCH_SIZE, SEQ_LEN = 2, 32  # of the compiled step
MIB = 2**20


@dataclass(frozen=True)
class Method:
    """`spec` is an `optimizer.name`, `state` the bytes it should keep by its paper."""

    spec: str
    state: Callable[[Parameters], int]


def methods(model: ModelConfig) -> dict[str, Method]:
    """All at a quarter: of columns, rows, entries, directions, matrices or layers. Where a paper has a rank for all
    matrices, a quarter of the hidden width. How often they refresh changes no byte."""
    rank, active, gap = model.hidden // 4, max(1, round(DENSITY * model.num_layers)), f"update_gap={GAP}"

    def frugal(subspace: str, of_matrices: state_bytes.OfMatrices) -> Method:
        return Method(f"frugal(subspace='{subspace}(density={DENSITY})', {gap})", on_matrices(of_matrices))

    return {
        "adamw": Method("adamw", state_bytes.everything),
        "columns": frugal("columns", state_bytes.columns(DENSITY)),
        "rows": frugal("rows", state_bytes.rows(DENSITY)),
        "randk": frugal("randk", state_bytes.randk(DENSITY)),
        "svd": frugal("svd", state_bytes.of_density(DENSITY)),
        "random": frugal("random", state_bytes.of_density(DENSITY)),
        "block": frugal("block", state_bytes.block(DENSITY)),
        "rho 0": Method("frugal(subspace='none')", on_matrices(state_bytes.nothing, counts=3)),
        "galore": Method(f"galore(rank={rank}, {gap})", on_matrices(state_bytes.low_rank(rank))),
        "fira": Method(f"fira(rank={rank}, {gap})", on_matrices(state_bytes.with_norms(rank))),
        "apollo": Method(f"apollo(rank={rank}, {gap})", on_matrices(state_bytes.with_norms(rank))),
        "ldadam": Method(f"ldadam(rank={rank})", on_matrices(state_bytes.with_errors(rank), counts=3)),
        "apollo mini": Method(f"apollo_mini({gap})", on_matrices(state_bytes.with_norms(1))),
        "badam": Method(f"badam(active={active}, {gap})", on_layers(active, others=False)),
        "lisa": Method(f"lisa(active={active}, {gap})", on_layers(active, others=True)),
    }


def decoder(size: str) -> ModelConfig:
    """Of the paper's pre-training, in float32."""
    return replace(llama(size).model, compute_dtype="float32", remat="none")


def real_models() -> dict[str, ModelConfig]:
    return {"LLaMA 60M": decoder("60m"), "LLaMA 130M": decoder("130m"), "cpu MoE": cpu().model}


def timed_runs() -> dict[str, RunConfig]:
    """A dense decoder whose step takes some 300 ms on two cores, and the recipe `cpu` as it is. Unrolled: see
    `StepShape.run_config`."""
    sizes = {"hidden": 256, "ffn_dim": 688, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4, "vocab_size": 1024}
    dense = replace(decoder("60m"), **sizes, unroll=0)
    data = DataConfig(corpus="synthetic", seq_len=128)
    return {"dense": RunConfig(model=dense, data=data, batch_size=16, steps=1_000), "cpu MoE": cpu()}


def main(
    json: Path,
    rounds: int = 12,
    *,
    models: dict[str, ModelConfig] | None = None,
    runs: dict[str, RunConfig] | None = None,
    only: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures, prints tables, writes the result to `json` and returns it.

    Args:
      json: result file, written whole at the end.
      rounds: timed windows of GAP steps of each contestant; six are the fewest that bound a refresh step at 95%.
      models, runs: what is accounted for and what is timed; smaller ones for tests.
      only: fewer methods to compile and time, for tests; with adamw.

    Raises:
      ValueError: bad arguments, before anything is compiled or written; state that is not what its paper says.
    """
    require(rounds >= 1, "rounds", rounds, "at least 1")
    report.check_output(json)
    models, runs, console = models or real_models(), runs or timed_runs(), console or Console()
    load = report.load_before(console)
    states = {name: checked_state(name, model) for name, model in models.items()}
    memory, time = {}, {}
    with report.progress_bar(console) as bar:
        for name, model in models.items():
            wanted = {method: size for method, size in states[name].items() if method in (only or states[name])}
            task = bar.add_task(f"compiling steps of {name}", total=len(wanted))
            memory[name] = compiled_memory(model, wanted, functools.partial(bar.advance, task))
        for name, config in runs.items():
            task = bar.add_task(f"timing {name}", total=rounds + 1)
            contestants = [method for method in TIMED if method in (only or TIMED)]
            time[name] = timed(config, contestants, rounds, functools.partial(bar.advance, task))
    result = {
        "benchmark": "optimizers", "rounds": rounds, "update_gap": GAP, "memory": memory, "time": time,
        "verdict": verdict(memory, time), "load_average_before": load, "provenance": provenance(),
    }  # fmt: skip
    write_json(json, result)
    for shown in [state_table(memory), compiled_table(memory), *(time_table(name, of) for name, of in time.items())]:
        console.print(shown)
    for words, met in result["verdict"].items():
        console.print(f"{words}: {'yes' if met else 'no'}")
    console.print(f"written to {json}")
    return result


def step_config(model: ModelConfig, spec: str) -> RunConfig:
    """The run whose step is compiled, never run."""
    config = RunConfig(model=model, data=DataConfig(corpus="synthetic", seq_len=SEQ_LEN), batch_size=BATCH_SIZE)
    return with_optimizer(config, spec)


def with_optimizer(config: RunConfig, spec: str) -> RunConfig:
    return replace(config, optimizer=replace(config.optimizer, name=spec))


def checked_state(name: str, model: ModelConfig) -> dict[str, int]:
    """Bytes of state of every method, as its `init` makes it. ValueError if a closed form says otherwise."""
    params, found = abstract_params(model), {}
    for method, of in methods(model).items():
        config, expected = step_config(model, of.spec), of.state(parameters_of(params))
        made = jax.eval_shape(make_optimizer(config.optimizer, config.steps).init, params)
        found[method] = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(made))
        require(found[method] == expected, f"bytes of {method} on {name}", found[method], f"{expected} by its paper")
    return found


def compiled_memory(model: ModelConfig, states: dict[str, int], done: Callable[[], None]) -> dict[str, Any]:
    """State beside the compiler's bytes of a step's arguments (state, parameters, batch) and temporaries."""
    parameters, rows = parameters_of(abstract_params(model)).total, {}
    for method, size in states.items():
        spec = methods(model)[method].spec
        analysis = compiled_step(step_config(model, spec)).memory_analysis()
        row = {
            "optimizer": spec, "state_bytes": size, "bytes_per_parameter": size / parameters,
            "argument_bytes": analysis.argument_size_in_bytes, "temporary_bytes": analysis.temp_size_in_bytes,
        }  # fmt: skip
        rows[method] = row | {"argument_bytes_saved": rows.get("adamw", row)["argument_bytes"] - row["argument_bytes"]}
        done()
    return {"model": asdict(model), "parameters": parameters, "methods": rows}


def compiled_step(config: RunConfig) -> Any:
    """The executable of a train step on one device, made from shapes alone."""
    (state, tx), mesh = abstract_state(config), make_mesh()
    tokens = jax.ShapeDtypeStruct((1, config.batch_size, config.data.seq_len + 1), jnp.int32)
    batch = dict.fromkeys(("tokens", "segment_ids", "positions"), tokens)
    with jax.set_mesh(mesh):
        return compile_step(config, tx, mesh).lower(state, batch).compile()


def timed(config: RunConfig, names: list[str], rounds: int, done: Callable[[], None]) -> dict[str, Any]:
    """Figures of these methods on one shape, after an untimed window: every GAP-th step from the first refreshes."""
    shape = StepShape(vocab=config.model.vocab_size, batch=config.batch_size, seq=config.data.seq_len)  # of the batch
    batch, known = random_batch(shape), methods(config.model)
    sides = {name: Side.of(with_optimizer(config, known[name].spec), batch, True) for name in names}
    for _ in range(GAP):
        for side in sides.values():
            side.run()
    done()
    rng = random.Random(0)
    for _ in range(rounds):
        for _ in range(GAP):
            # Turned instead of drawn, AdamW would follow most of svd's refreshes and find its caches empty.
            for name in rng.sample(names, len(names)):
                sides[name].sample()
        done()
    return {
        "model": asdict(config.model), "batch_size": config.batch_size, "seq_len": config.data.seq_len,
        "methods": figures({name: side.seconds for name, side in sides.items()}),
        "samples": {name: {"seconds": side.seconds, "loss": side.loss} for name, side in sides.items()},
    }  # fmt: skip


def figures(seconds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Of each method its milliseconds and ratios to AdamW; refresh steps, every GAP-th, apart."""
    found = {}
    for name, of in seconds.items():
        ratios = [own / adamw for own, adamw in zip(of, seconds["adamw"], strict=True)]
        usual = [i for i in range(len(of)) if i % GAP > 0]
        found[name] = middle("", of, ratios, usual)
        if TIMED[name]:
            found[name] |= middle("refresh_", of, ratios, range(0, len(of), GAP))
            once, else_ = found[name]["refresh_ratio"], found[name]["ratio"]
            found[name]["amortised_ratio"] = (once + (RELEASED_GAP - 1) * else_) / RELEASED_GAP
    return found


def middle(prefix: str, seconds: list[float], ratios: list[float], steps: Any) -> dict[str, Any]:
    """Medians over some steps; the interval is None where there are too few of them."""
    chosen = [ratios[i] for i in steps]
    interval = list(median_interval(chosen))
    return {
        f"{prefix}ms": 1e3 * median(seconds[i] for i in steps), f"{prefix}ratio": median(chosen),
        f"{prefix}ratio_interval_95": None if any(map(math.isnan, interval)) else interval,
    }  # fmt: skip


def verdict(memory: dict[str, Any], time: dict[str, Any]) -> dict[str, bool]:
    """State is what an argument saves, to the byte; and the bounded methods' interval lies below MOST_TIME."""
    said = {}
    for shape, of in memory.items():
        rows = of["methods"]
        exact = all(
            row["argument_bytes_saved"] == rows["adamw"]["state_bytes"] - row["state_bytes"] for row in rows.values()
        )
        said[f"{shape}: arguments fall by exactly the state that is saved"] = exact
    for shape, of in time.items():
        for name in [name for name in BOUNDED if name in of["methods"]]:
            interval = of["methods"][name]["ratio_interval_95"]
            said[f"{shape}: upper end of {name} at most {MOST_TIME}"] = bool(interval) and interval[1] <= MOST_TIME
    return said


def by_shape(title: str, memory: dict[str, Any], cells: dict[str, Callable[[dict[str, Any]], str]]) -> Any:
    """A row for each method, and for each shape these columns."""
    columns = ["", *(f"{shape}\n{column}" for shape in memory for column in cells)]
    names = next(iter(memory.values()))["methods"]
    rows = [
        [name, *(cell(of["methods"][name]) for of in memory.values() for cell in cells.values())]
        for name in names
    ]  # fmt: skip
    return report.table(title, columns, rows)


def state_table(memory: dict[str, Any]) -> Any:
    cells = {
        "B/param": lambda row: f"{row['bytes_per_parameter']:.3f}",
        "MiB": lambda row: f"{row['state_bytes'] / MIB:.1f}",
    }
    return by_shape(f"optimiser state at density {DENSITY}, equal to its closed form to the byte", memory, cells)


def compiled_table(memory: dict[str, Any]) -> Any:
    cells = {
        "args": lambda row: f"{row['argument_bytes'] / MIB:.0f}",
        "saved": lambda row: f"{row['argument_bytes_saved'] / MIB:.0f}",
        "temp": lambda row: f"{row['temporary_bytes'] / MIB:.0f}",
    }
    return by_shape(f"compiled train step, MiB, {BATCH_SIZE} sequences of {SEQ_LEN}", memory, cells)


def time_table(shape: str, of: dict[str, Any]) -> Any:
    rows = [
        [name, f"{row['ms']:.1f}", with_interval(row, ""), f"{row['refresh_ms']:.1f}" if TIMED[name] else "",
         with_interval(row, "refresh_") if TIMED[name] else "",
         f"{row['amortised_ratio']:.3f}" if TIMED[name] else ""]
        for name, row in of["methods"].items()
    ]  # fmt: skip
    columns = ["", "ms", "/ adamw [95%]", "refresh ms", "/ adamw [95%]", f"amortised, T = {RELEASED_GAP}"]
    title = f"train step, {shape}, {of['batch_size']} sequences of {of['seq_len']}"
    return report.table(title, columns, rows)


def with_interval(row: dict[str, Any], prefix: str) -> str:
    interval = row[f"{prefix}ratio_interval_95"]
    ends = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return f"{row[f'{prefix}ratio']:.3f}{ends}"
