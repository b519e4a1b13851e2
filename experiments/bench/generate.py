"""`bench generate`: our decoding against PyTorch's of the same weights, and against the memory that it has to read.

One sequence, greedy, float32. Both sides get the same random prompt and must say the same tokens. Each is a process
that generates on command; rounds interleave them. A token cannot be faster than reading every weight it uses once:
that floor is their bytes over the pace of the memory, measured in the same run.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack
from json import dumps
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from experiments.bench import report
from experiments.bench.protocol import Worker, check_peer, closing_all, interleave
from experiments.bench.worktree import ROOT
from experiments.output import write_json
from experiments.provenance import provenance
from moe.config import require

WORKER = "experiments.bench.generate_worker"
PEER = Path(__file__).with_name("peers") / "generate.py"


def main(
    json: Path,
    peer_python: Path | None = None,
    model: str = "smollm2",
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    rounds: int = 7,
    *,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures, prints a table, writes the result to `json` and returns it.

    Args:
      json: result file, written whole at the end; nothing is written when interrupted.
      peer_python: interpreter with torch and transformers; adds PyTorch.
      model: a name, or a directory of `convert` or of Hugging Face's form.
      prompt_tokens, new_tokens: lengths.
      rounds: timed generations of each side.

    Raises:
      ValueError: bad arguments, before anything is started or written.
      WorkerError: a side failed; its last words are in the message.
    """
    console = console or Console()
    require(rounds >= 1, "rounds", rounds, "at least 1")
    require(prompt_tokens >= 1, "prompt_tokens", prompt_tokens, "at least 1")
    require(new_tokens >= 2, "new_tokens", new_tokens, "at least 2: the first one is the prompt's")
    report.check_output(json)
    check_peer(peer_python)
    load = report.load_before(console)
    asked = {"model": model, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        stack.enter_context(closing_all(workers))
        result = measure(workers, stack, asked, peer_python, rounds, console)
    label = Path(model).name
    result = {"benchmark": "generate", **asked, "model": label, **result, "load_average_before": load}
    result |= {"provenance": provenance()}
    write_json(json, result)
    for shown in tables(result):
        console.print(shown)
    console.print(f"written to {json}")
    return result


def measure(
    workers: dict[str, Worker], stack: ExitStack, asked: dict[str, Any], peer_python: Path | None, rounds: int,
    console: Console,
) -> dict[str, Any]:
    """Both sides warmed up, then rounds: a generation of each and a sample of the memory's pace."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with report.progress_bar(console) as bar:
        task = bar.add_task("loading and warming up", total=rounds)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-generate-")))
        given = dumps(asked | {"scratch": str(scratch / "model")})
        ours = workers["ours"] = Worker("ours", [sys.executable, "-m", WORKER, given], env=env)
        facts = {"ours": ours.hello()}
        ours.ask("warm")
        if peer_python is not None:
            bar.update(task, description="the peer is warming up")
            given = ours.ask("release") | {"new_tokens": asked["new_tokens"]}
            workers["peer"] = Worker("peer", [str(peer_python), str(PEER), dumps(given)])
            facts["peer"] = workers["peer"].hello()
        ours.ask("probe")

        def after(index: int) -> None:
            ours.ask("probe")
            bar.update(task, advance=1, description=f"round {index + 1} of {rounds}")

        answers = interleave(workers, rounds, after=after)
        paces, program = ours.ask("probe"), ours.ask("program")  # the best of all samples
    return summary(facts, answers, paces, program)


def summary(
    facts: dict[str, dict[str, Any]], answers: dict[str, list[dict[str, Any]]], paces: dict[str, float],
    program: dict[str, float],
) -> dict[str, Any]:
    """The result's figures from the samples. A round's pace is its median token; a side's is the median round."""
    own = facts["ours"]
    needed, pace = own["weight_bytes"] + own["cache_bytes"], max(paces.values())
    tokens = {name: [median(answer["token_seconds"]) for answer in of] for name, of in answers.items()}
    result: dict[str, Any] = {
        "memory": {"bytes_per_second": pace, "ways": paces}, "bytes_per_token": needed,
        "floor_ms_per_token": 1e3 * needed / pace, "program": program, "parameters": own["parameters"],
        "weight_bytes": own["weight_bytes"], "cache_bytes": own["cache_bytes"],
        **{key: own[key] for key in ("versions", "device")},
    }  # fmt: skip
    said = answers["ours"][0]["tokens"]
    for name, of in answers.items():
        middle = median(tokens[name])
        result[name] = {
            "tokens_per_second": 1 / middle, "ms_per_token": 1e3 * middle, "over_floor": middle * pace / needed,
            "prefill_ms": 1e3 * median(answer["prefill_seconds"] for answer in of),
            "ms_of_rounds": [1e3 * s for s in tokens[name]],
            "equal_tokens": sum(a == b for a, b in zip(said, of[0]["tokens"])) / len(said),
        }  # fmt: skip
    if "peer" in answers:
        ratio = median(theirs / mine for theirs, mine in zip(tokens["peer"], tokens["ours"]))
        result["peer"] |= facts["peer"] | {"speed_of_ours": ratio}
    return result


def tables(result: dict[str, Any]) -> list[Any]:
    """What a person sees: both sides, and the floor."""
    labels = {"ours": "ours", "peer": f"PyTorch ({result.get('peer', {}).get('variant', '')})"}
    rows = [
        [label, f"{of['tokens_per_second']:.1f}", f"{of['ms_per_token']:.1f}", f"{of['over_floor']:.2f}x",
         f"{of['prefill_ms']:.0f}", f"{of['equal_tokens']:.0%}",
         f"{of['speed_of_ours']:.2f}x" if name == "peer" else ""]
        for name, label in labels.items() if (of := result.get(name))
    ]  # fmt: skip
    rows.append(["floor", f"{1e3 / result['floor_ms_per_token']:.1f}", f"{result['floor_ms_per_token']:.1f}", "1.00x"])
    columns = ["", "tokens/s", "ms a token", "of the floor", "prompt ms", "same tokens", "ours is faster by"]
    shape = f"{result['prompt_tokens']} + {result['new_tokens']} tokens"
    mega = {key: f"{result[key] / 1e6:,.1f} MB" for key in ("bytes_per_token", "weight_bytes", "cache_bytes")}
    bytes_rows = [
        ["needed for a token", mega["bytes_per_token"]],
        ["  weights", mega["weight_bytes"]],
        ["  keys and values", mega["cache_bytes"]],
        ["counted by XLA", f"{result['program']['bytes accessed'] / 1e6:,.1f} MB"],
        ["the memory's pace", f"{result['memory']['bytes_per_second'] / 1e9:.1f} GB/s"],
    ]
    title = f"{result['model']}, {result['parameters'] / 1e6:,.0f} M parameters, {shape}, float32"
    return [report.table(title, columns, rows), report.table("bytes", ["", ""], bytes_rows)]
