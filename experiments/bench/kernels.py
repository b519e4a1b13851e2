"""`bench kernels`: products of row groups and the expert FFN, by implementation, beside a device's ceilings.

Every operation (`experiments.bench.roofline`) by every implementation (`experiments.bench.kernel_forms`), for every
shape under every load: balanced, Zipf and all rows to one expert. Group sizes are data on the device, so that one
compiled program serves all loads; what XLA's `ragged_dot` became in it is shown, for a dense rewrite costs E times the
FLOPs.

`floor`: FLOPs or bytes at the measured ceilings, whichever takes longer. `of dense`: how fast in shares of the dense
product's speed, the median of ratios of one round. `padding`: the share of the rows multiplied that hold nothing.
Implementations take turns in an order drawn for each round. Those so slow that all samples would take too long take
fewer, which their row says.
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from rich.console import Console

from experiments.bench import report
from experiments.bench.kernel_forms import (
    OURS,
    Form,
    Load,
    Operands,
    capacity_of,
    contestants,
    has_tokamax,
    make_loads,
    make_operands,
    padding,
)
from experiments.bench.kernels_figure import draw
from experiments.bench.peak import seconds_of
from experiments.bench.roofline import (
    LOADS,
    PRODUCTS,
    Ceilings,
    KernelShape,
    difference,
    first_line,
    flops,
    launches_for,
    least_bytes,
    measure_ceilings,
    seconds_per_call,
    shapes,
)
from experiments.output import write_json
from experiments.provenance import provenance
from moe.config import require

GOAL, GOAL_ROWS = 0.7, 512  # of the dense product's speed, from so many rows per expert on
SQUARES = {"cpu": (512, 1024, 2048), "gpu": (4096, 8192)}
DIFFERENT = 0.05  # of a result's greatest value: more than bfloat16 explains


@dataclass(frozen=True)
class Timing:
    """How often each implementation runs: `warmups`, then `samples`; fewer, but at least `fewest`, where they would
    take more than `seconds`. No operation begins after `limit` seconds."""

    warmups: int
    samples: int
    fewest: int
    seconds: float
    limit: float

    def __post_init__(self) -> None:
        numbers = self.fewest, self.samples
        require(1 <= self.fewest <= self.samples, "fewest, samples", numbers, "1 <= fewest <= samples")


TIMINGS = {"cpu": Timing(1, 15, 3, 0.3, 3600.0), "gpu": Timing(20, 50, 5, 1.0, 400.0)}


def main(
    json: Path,
    device: str | None = None,
    *,
    sizes: Sequence[KernelShape] | None = None,
    timing: Timing | None = None,
    squares: Sequence[int] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures, prints tables, writes the result to `json` and a figure beside it, and returns the result.

    Args:
      json: result file, written whole at the end; the figure has its name with `.png`.
      device: `cpu` or `gpu`; None for JAX's default.
      sizes, timing, squares: what is timed, how often, and the products that the peak is the best of; None for those of
        the device. Smaller ones for tests.

    Raises:
      ValueError: bad arguments or no such device, before anything is measured or written.
    """
    report.check_output(json)
    require(json.suffix != ".png", "json", str(json), "not the figure's own name")
    backend, console = backend_of(device), console or Console()
    timing = timing or TIMINGS[backend]
    load_average, began = report.load_before(console), time.monotonic()
    rows: list[dict[str, Any]] = []
    compiled: dict[str, Any] = {}
    with jax.default_device(jax.devices(backend)[0]), report.progress_bar(console) as bar:
        sizes = sizes or shapes(backend)
        task = bar.add_task("ceilings", total=len(sizes) * len(PRODUCTS))
        ceilings = measure_ceilings(backend, sizes[0].dtype, squares or SQUARES[backend])
        for shape, operation, operands, loads in cases(sizes):
            bar.update(task, description=f"{shape.name}: {operation}")
            forms = contestants(backend, operation, shape)
            if time.monotonic() - began < timing.limit:
                programs, failed = compile_all(forms, operands, loads[LOADS[0]])
                compiled[f"{shape.name} {operation}"] = what_became(programs, flops(operation, shape)) | failed
                for load, of in loads.items():
                    seconds, apart = timed(programs, operands, of, timing, backend)
                    case = operation, shape, np.asarray(of.counts)
                    rows += [
                        {"operation": operation, "shape": shape.name, "load": load}
                        | figures(who, seconds, case, ceilings, apart[who])
                        for who in seconds
                    ]  # fmt: skip
            bar.advance(task)
    result = {
        "benchmark": "kernels", "device": jax.devices(backend)[0].device_kind, "backend": backend,
        "shapes": {shape.name: asdict(shape) for shape in sizes}, "timing": asdict(timing),
        "ceilings": asdict(ceilings), "rows": rows, "compiled": compiled, "has_tokamax": has_tokamax(),
        "not_run": len(sizes) * len(PRODUCTS) - len(compiled),
        "verdict": verdict(rows, {shape.name: shape for shape in sizes}, backend), "load_average_before": load_average,
        "seconds": round(time.monotonic() - began, 1), "provenance": provenance(),
    }  # fmt: skip
    write_json(json, result)
    draw(result, json.with_suffix(".png"))
    show(result, console)
    console.print(f"written to {json} and {json.with_suffix('.png').name}")
    return result


def backend_of(device: str | None) -> str:
    """`cpu` or `gpu`, the default backend's for None; ValueError for others, and for `gpu` where there is none."""
    require(device in (None, "cpu", "gpu"), "device", device, "cpu or gpu")
    default = jax.default_backend()
    require(device != "gpu" or default == "gpu", "device", device, f"a GPU that JAX sees; it has {default}")
    require(device is not None or default in TIMINGS, "device", default, "cpu or gpu")
    return device or default


def cases(sizes: Sequence[KernelShape]) -> Iterator[tuple[KernelShape, str, Operands, dict[str, Load]]]:
    """Every operation of every shape, with what it works on."""
    for shape in sizes:
        operands, loads = make_operands(shape), make_loads(shape)
        yield from ((shape, operation, operands, loads) for operation in PRODUCTS)


def compile_all(forms: Mapping[str, Form], operands: Operands, load: Load) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compiled programs, run once; and, of those that fail, the first line of what was said. Dense must not fail."""
    programs, failed = {}, {}
    for name, form in forms.items():
        try:
            program = jax.jit(form).lower(operands, load).compile()
            jax.block_until_ready(program(operands, load))
        except Exception as error:  # of a compiler, a launch or memory: the other contestants still count
            if name == "dense":
                raise
            failed[name] = {"error": first_line(error)}
        else:
            programs[name] = program
    return programs, failed


def what_became(programs: Mapping[str, Any], ideal: int) -> dict[str, Any]:
    """Of each compiled program, the instructions that multiply, and its FLOPs over the operation's as XLA counts them
    (a loop's body once, a kernel's not at all)."""
    made = {}
    for name, program in programs.items():
        counted = (program.cost_analysis() or {}).get("flops", 0.0)
        made[name] = {"instructions": multiplying(program.as_text()), "flops_over_ideal": counted / ideal}
    return made


def multiplying(hlo: str) -> dict[str, int]:
    """How often each kind of instruction that may multiply matrices occurs in a compiled module's text: dots, ragged
    dots, custom calls by target and custom fusions by kind."""
    found = Counter(re.findall(r"[})\]] ((?:ragged-)?dot)\(", hlo))
    found.update(re.findall(r'custom_call_target="([^"]+)"', hlo))
    found.update(re.findall(r'"kind":"(__[^"]+)"', hlo))
    return dict(sorted(found.items()))


def timed(
    programs: Mapping[str, Any], operands: Operands, load: Load, timing: Timing, backend: str
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Seconds of each program in every round it takes part in; how far its result is from `ragged_dot`'s."""
    first = {name: program(operands, load) for name, program in programs.items()}
    wanted = first.get("ragged_dot")
    alike = {} if wanted is None else {name: out for name, out in first.items() if name not in ("dense", "ragged_dot")}
    apart = {name: difference(alike[name], wanted) if name in alike else None for name in first}
    del first, wanted, alike
    args, plan = (operands, load), {}
    for name, program in programs.items():
        once = seconds_of(partial(program, *args))
        most = int(timing.seconds / once)
        for _ in range(min(timing.warmups, most)):
            jax.block_until_ready(program(*args))
        plan[name] = min(timing.samples, max(timing.fewest, most)), launches_for(backend, once)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    rng = random.Random(0)
    for index in range(timing.samples):
        for name in rng.sample(list(programs), len(programs)):
            if index < plan[name][0]:
                seconds[name].append(seconds_per_call(programs[name], args, plan[name][1]))
    return seconds, apart


def figures(
    name: str,
    seconds: Mapping[str, list[float]],
    case: tuple[str, KernelShape, np.ndarray],
    ceilings: Ceilings,
    apart: float | None = None,
) -> dict[str, Any]:
    """The row of one contestant; milliseconds are the median, and the tenth and ninetieth percentile."""
    operation, shape, counts = case
    own, work = seconds[name], flops(operation, shape)
    low, high = np.quantile(own, (0.1, 0.9))
    ratios = [dense / mine for dense, mine in zip(seconds["dense"], own)]  # of rounds that both took part in
    dropped = int(np.maximum(counts - capacity_of(shape), 0).sum()) if name == "capacity" else 0
    return {
        "implementation": name, "flops": work, "bytes": least_bytes(operation, shape, counts),
        "floor_ms": 1e3 * ceilings.floor(operation, shape, counts), "ms": 1e3 * median(own), "low_ms": 1e3 * float(low),
        "high_ms": 1e3 * float(high), "samples": len(own),
        "share_of_peak": work / median(own) / ceilings.flops_per_second, "of_dense": median(ratios),
        "padding": padding(name, operation, shape, counts), "dropped": dropped,
        "difference": None if dropped else apart,
    }  # fmt: skip


def verdict(rows: Sequence[dict[str, Any]], sizes: Mapping[str, KernelShape], backend: str) -> dict[str, bool]:
    """Ours against `ragged_dot` in every row that has both; on GPU against the goal, at balanced products."""
    ours, said = OURS[backend], {}
    ms = {
        who: {(row["operation"], row["shape"], row["load"]): row["ms"] for row in rows if row["implementation"] == who}
        for who in (ours, "ragged_dot")
    }
    both = [case for case in ms[ours] if case in ms["ragged_dot"]]
    if both:
        said[f"{ours} faster than ragged_dot in all rows"] = all(ms[ours][of] < ms["ragged_dot"][of] for of in both)
    reached = [
        row["of_dense"] for row in rows
        if row["implementation"] == "triton" and row["load"] == "balanced" and not row["operation"].startswith("ffn")
        and sizes[row["shape"]].rows // sizes[row["shape"]].experts >= GOAL_ROWS
    ]  # fmt: skip
    if reached:
        words = f"triton at least {GOAL:.0%} of dense, balanced products of {GOAL_ROWS} rows per expert and more"
        said[words] = min(reached) >= GOAL
    return said


def show(result: dict[str, Any], console: Console) -> None:
    """Tables of figures and of what the compiler made, failures and the verdict."""
    ceilings = result["ceilings"]
    for fields in result["shapes"].values():
        for operation in PRODUCTS:
            console.print(figures_table(KernelShape(**fields), operation, result))
    console.print(
        f"{result['device']}: {ceilings['flops_per_second'] / 1e12:.3g} TFLOP/s ({ceilings['product']}), "
        f"{ceilings['bytes_per_second'] / 1e9:.4g} GB/s ({ceilings['stream']})"
    )
    console.print(compiled_table(result["compiled"]))
    for case, made in result["compiled"].items():
        for who, of in made.items():
            if "error" in of:
                console.print(f"{case}: {who} failed: {of['error']}", style="red", markup=False)
    if result["not_run"]:
        console.print(f"[yellow]{result['not_run']} operations of a shape were not run: time was up[/yellow]")
    for row in result["rows"]:
        if row["difference"] is not None and not row["difference"] <= DIFFERENT:  # not a number is not alike
            words = ", ".join(row[key] for key in ("shape", "operation", "load", "implementation"))
            console.print(f"[red]{words}: differs from ragged_dot by {row['difference']:.3g}[/red]")
    if not result["has_tokamax"]:
        console.print("tokamax is not installed")
    for words, met in result["verdict"].items():
        console.print(f"{words}: {'yes' if met else 'no'}")


def figures_table(shape: KernelShape, operation: str, result: dict[str, Any]) -> Any:
    """One operation of one shape: of each load its bytes and its floor, then the implementations."""
    of = [row for row in result["rows"] if (row["shape"], row["operation"]) == (shape.name, operation)]
    lines: list[list[str]] = []
    for row in of:
        if row["implementation"] == "dense":
            megabytes = f"{short(row['bytes'] / 1e6)} MB"
            lines.append([f"{row['load']}: floor", short(row["floor_ms"]), megabytes, *[""] * 4])
        few = f" n={row['samples']}" if row["samples"] < result["timing"]["samples"] else ""
        lines.append(
            [f"  {row['implementation']}{few}", short(row["ms"]), f"{short(row['low_ms'])}-{short(row['high_ms'])}",
             f"{row['share_of_peak']:.1%}", f"{row['of_dense']:.2f}",
             "" if row["padding"] is None else f"{row['padding']:.0%}", str(row["dropped"] or "")]
        )  # fmt: skip
    title = (
        f"{operation}, {shape.name}: {shape.rows} rows, d={shape.hidden} f={shape.width} {shape.dtype}, "
        f"{flops(operation, shape) / 1e9:.3g} GFLOP"
    )
    columns = ["", "ms", "10-90%", "of peak", "of dense", "padding", "dropped"]
    return report.table(title, columns, lines)


def short(number: float) -> str:
    """Three digits or more, without an exponent."""
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"


def compiled_table(compiled: dict[str, Any]) -> Any:
    """What XLA's `ragged_dot` became."""
    rows = []
    for case, made in compiled.items():
        of = made.get("ragged_dot", {})
        if "instructions" in of:
            words = ", ".join(f"{many} {kind}" for kind, many in of["instructions"].items())
            rows.append([case, words, f"{of['flops_over_ideal']:.2f}"])
    return report.table("ragged_dot, compiled", ["", "multiplies by", "FLOPs / ideal"], rows)
