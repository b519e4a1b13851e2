"""`bench train-step`: our train step against the machine's matmul peak, a peer, and another commit.

Every contestant is a process that steps on command; rounds interleave them, so a slow minute of the machine meets all.
Ratios are medians of per-round ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from experiments.bench import report
from experiments.bench.peak import SQUARES
from experiments.bench.protocol import Worker, check_peer, closing_all, interleave, start_in_tree
from experiments.bench.shape import StepShape
from experiments.bench.worktree import ROOT, resolve_revision, worktree
from experiments.output import write_json
from experiments.provenance import provenance
from moe.config import require

WORKER = "experiments/bench/train_worker.py"
PEER = Path(__file__).with_name("peers") / "olmoe.py"


def main(
    json: Path,
    peer_python: Path | None = None,
    against: str | None = None,
    rounds: int = 9,
    *,
    shape: StepShape | None = None,
    squares: tuple[int, ...] = SQUARES,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures, prints tables, writes the result to `json` and returns it.

    Args:
      json: result file, written whole at the end; nothing is written when interrupted.
      peer_python: interpreter with torch and transformers; adds Hugging Face's OLMoE on PyTorch.
      against: git revision whose own train step joins, from a temporary worktree.
      rounds: timed steps of each contestant.
      shape, squares: smaller ones for tests.

    Raises:
      ValueError: bad arguments, before anything is started or written.
      WorkerError: a contestant failed; its last words are in the message.
    """
    shape, console = shape or StepShape(), console or Console()
    commit = check_arguments(json, peer_python, against, rounds)
    load = report.load_before(console)
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        # Entered first, so left last: workers end before their source tree goes.
        tree = stack.enter_context(worktree(commit)) if commit else None
        stack.enter_context(closing_all(workers))
        result = measure(start_all(workers, shape, squares, peer_python, tree), workers, shape, rounds, console)
    result = {"benchmark": "train-step", **result, "load_average_before": load, "provenance": provenance()}
    if commit:
        result["against"] |= {"revision": against, "commit": commit}
    write_json(json, result)
    for shown in tables(result):
        console.print(shown)
    console.print(f"written to {json}")
    return result


def check_arguments(json: Path, peer_python: Path | None, against: str | None, rounds: int) -> str | None:
    """Raises ValueError for bad input; returns the commit of `against`."""
    require(rounds >= 1, "rounds", rounds, "at least 1")
    report.check_output(json)
    check_peer(peer_python)
    return resolve_revision(against, WORKER) if against else None


def start_all(
    workers: dict[str, Worker], shape: StepShape, squares: tuple[int, ...], peer_python: Path | None, tree: Path | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Starts contestants one after another, each warmed up before the next starts: yields (name, announcement)."""

    def ours(name: str, source: Path) -> dict[str, Any]:
        module = ["-m", "experiments.bench.train_worker", shape.to_json(), str(list(squares))]
        return start_in_tree(workers, name, module, source) | {"warm": workers[name].ask("warm")}

    yield "ours", ours("ours", ROOT)
    if tree is not None:
        yield "against", ours("against", tree)
    if peer_python is not None:
        workers["peer"] = Worker("peer", [str(peer_python), str(PEER), shape.to_json()])
        yield "peer", workers["peer"].hello()


def measure(
    started: Iterator[tuple[str, dict[str, Any]]], workers: dict[str, Worker], shape: StepShape, rounds: int,
    console: Console,
) -> dict[str, Any]:
    """Warm-up, then rounds: in each a step of everyone, one matmul at the peak and one sample of every part."""
    facts: dict[str, dict[str, Any]] = {}
    with phases(console, rounds) as say:
        say("building and warming up", 0)
        for name, hello in started:
            facts[name] = hello
            say(f"{name} is ready", 0)
        say("the step in parts, warming up", 0)
        ours = workers["ours"]
        ours.ask("parts")
        say("matmul peak", 0)
        ours.ask("peak")
        parts: list[dict[str, float]] = []
        peaks: list[dict[str, Any]] = []

        def after(index: int) -> None:
            peaks.append(ours.ask("probe"))
            parts.append(ours.ask("parts"))
            say(f"round {index + 1} of {rounds}", 1)

        answers = interleave(workers, rounds, after=after)
        own_peak = max(workers["peer"].ask("peak")["rates"].values()) if "peer" in workers else None
    milliseconds = {name: 1e3 * median(sample[name] for sample in parts) for name in parts[0]}
    return summary(shape, facts, answers, peaks[-1], milliseconds, own_peak)


@contextmanager
def phases(console: Console, rounds: int) -> Iterator[Callable[[str, int], None]]:
    with report.progress_bar(console) as bar:
        task = bar.add_task("", total=rounds)
        yield lambda text, advance: bar.update(task, description=text, advance=advance)


def summary(
    shape: StepShape, facts: dict[str, dict[str, Any]], answers: dict[str, list[dict[str, Any]]],
    peak: dict[str, Any], parts: dict[str, float], peer_peak: float | None,
) -> dict[str, Any]:
    """The result's figures from the samples. The step's FLOPs leave attention products and the lookup out."""
    seconds = {name: [answer["seconds"] for answer in of] for name, of in answers.items()}
    ours = figures(shape, seconds["ours"], peak["peak"])
    floors = {name: 1e3 * flops / peak["peak"] for name, flops in shape.part_flops().items()}
    rows = {name: {"ms": parts[name], "floor_ms": floors[name]} for name in floors}
    rows["other"] = {"ms": ours["step_ms"] - sum(parts.values()), "floor_ms": 0.0}
    result: dict[str, Any] = {
        **ours, "peak_ratio_to_best_sample": ours["flops_per_second"] / peak["best_sample"], "parts": rows,
        "peak": {"flops_per_second": peak["peak"], **{key: peak[key] for key in ("shape", "best_sample", "rates")}},
        "shape": asdict(shape), "flops_per_step": shape.flops, "active_parameters": shape.active_parameters,
        **{key: facts["ours"][key] for key in ("versions", "device")},
        "samples": {name: {"seconds": seconds[name], "loss": [a["loss"] for a in of]} for name, of in answers.items()},
    }  # fmt: skip
    for name in seconds.keys() - {"ours"}:
        ratio = median(theirs / own for theirs, own in zip(seconds[name], seconds["ours"]))
        result[name] = figures(shape, seconds[name], peak["peak"]) | {"speed_of_ours": ratio} | facts[name]
    if peer_peak is not None:
        result["peer"]["own_matmul_peak"] = peer_peak
    return result


def figures(shape: StepShape, seconds: list[float], peak: float) -> dict[str, float]:
    middle = median(seconds)
    rate = shape.flops / middle
    return {
        "tokens_per_second": shape.tokens / middle, "peak_ratio": rate / peak, "step_ms": 1e3 * middle,
        "flops_per_second": rate,
    }  # fmt: skip


def tables(result: dict[str, Any]) -> list[Any]:
    """What a person sees: contestants, then parts against their floors."""
    names = {"ours": result} | {name: result[name] for name in ("peer", "against") if name in result}
    labels = {"ours": "ours", "peer": f"OLMoE on PyTorch ({result.get('peer', {}).get('variant', '')})",
              "against": f"ours at {result.get('against', {}).get('revision', '')}"}  # fmt: skip
    rows = [
        [labels[name], f"{of['tokens_per_second']:,.0f}", f"{of['step_ms']:.0f}", f"{of['peak_ratio']:.1%}",
         f"{of['speed_of_ours']:.2f}x" if name != "ours" else ""]
        for name, of in names.items()
    ]  # fmt: skip
    peak = result["peak"]
    title = f"train step; peak {peak['flops_per_second'] / 1e9:.0f} GFLOP/s ({peak['shape']})"
    shown = report.table(title, ["", "tokens/s", "ms", "of peak", "ours is faster by"], rows)
    step = result["step_ms"]
    parts = [
        [name, f"{row['ms']:.1f}", f"{row['floor_ms']:.1f}", f"{row['ms'] / step:.0%}"]
        for name, row in result["parts"].items()
    ]
    return [shown, report.table("one step in parts", ["part", "ms", "floor ms", "share"], parts)]
