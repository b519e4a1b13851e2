"""`python -m experiments eval`: bits per byte and tasks of one model, a table, a figure, and files that resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from experiments.config import DataConfig
from experiments.data import DataError
from experiments.data.corpus import Corpus, open_corpus
from experiments.data.shards import SPLITS
from experiments.evaluation.render import draw, print_tables
from experiments.evaluation.scoring import Scorer
from experiments.evaluation.text import Words, open_words
from experiments.evaluation.units import BPB, Unit, domain_unit, task_unit
from experiments.output import contents, probe, write_json
from experiments.progress import Bar
from experiments.tasks.catalogue import TASKS, load_examples, missing, named
from moe.config import require
from moe.generate import Generator

FORMAT = 1
SETTINGS = "eval.json"  # what a directory was evaluated with: the mark of one of ours
WINDOW = 256


def evaluate_model(
    model: str,
    tasks: tuple[str, ...],
    limit: int | None = None,
    split: str = "test",
    out: Path | None = None,
    chat: bool = False,
    batch_size: int = 8,
    window: int = WINDOW,
    *,
    console: Console | None = None,
    loaded: Any = None,
) -> None:
    """Evaluates a model on bits per byte (`bpb`) and tasks; finished parts stay in `out`, the same command resumes.

    Writes `result.json`, `eval.png`, and for each task `answers/TASK.jsonl`: what was asked and what the model said.

    Args:
      model: a name (`smollm2`), a .gguf file, or a directory of `convert` or of Hugging Face's form.
      tasks: `bpb` and names of `experiments.tasks.catalogue.TASKS`.
      limit: the most examples of a task, and windows of a domain; a random sample, the same one always.
      split: train, validation or test.
      out: by default runs/eval-MODEL.
      chat: ask through the model's chat template.
      batch_size: rows of one pass.
      window: tokens of one window for `bpb`.
      loaded: the model, if it is in memory; `model` still says where its tokenizer is.

    Raises:
      ValueError: unknown task or split, numbers out of range, a directory that holds something else or another
        evaluation, data that is missing (names the command), no tokenizer, no chat template.
    """
    console = console or Console()
    tasks = named(tasks, also=(BPB,))
    require(split in SPLITS, "split", split, f"one of {', '.join(SPLITS)}")
    require(limit is None or limit >= 1, "limit", limit, "at least 1")
    require(batch_size >= 1, "batch_size", batch_size, "at least 1")
    require(window >= 2, "window", window, "at least 2")
    label = Path(model).name
    out = out or Path("runs") / f"eval-{label}"
    settings = {"format": FORMAT, "model": label, "split": split, "limit": limit, "chat": chat, "window": window}
    check_directory(out, settings)
    corpus = open_corpus(DataConfig()) if BPB in tasks else None
    if text := missing(name for name in tasks if name != BPB):
        raise DataError(text)
    if loaded is None:
        from moe.pretrained.model import load

        loaded = load(model)
        for note in loaded.notes:
            console.print(note)
    settings |= {"fingerprint": fingerprint(loaded.config, loaded.params)}
    check_directory(out, settings)
    context = loaded.config.context
    require(BPB not in tasks or not context or window <= context, "window", window, f"at most the context of {context}")
    words = open_words(model, loaded.config)
    done = finished(out)
    units = [unit for name in tasks for unit in prepare(name, done, loaded, words, corpus, settings)]
    probe(out)
    write_json(out / SETTINGS, settings)
    work(units, Scorer(loaded.config, loaded.params, loaded.router_state, batch_size), out, console)
    result = settings | describe(loaded, words, corpus) | {"results": in_order(finished(out))}
    write_json(out / "result.json", result)
    draw(result, out / "eval.png")
    print_tables(result, console)
    console.print(f"{out / 'result.json'}, {out / 'eval.png'}")


def check_directory(out: Path, settings: dict[str, Any]) -> None:
    """ValueError if `out` holds anything else, or an evaluation with other settings."""
    names = contents(out)
    if not names:
        return
    require(SETTINGS in names, "--out", str(out), f"an empty directory, or one with the {SETTINGS} of an evaluation")
    try:
        found = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{out / SETTINGS}: cannot be read as JSON ({error})") from error
    require(isinstance(found, dict), f"{out / SETTINGS}", found, "a JSON object")
    for name, value in settings.items():
        require(found.get(name) == value, f"--out = {str(out)!r}: {name} of the evaluation there", found.get(name),
                f"{value!r}, or another directory")


def fingerprint(config: Any, params: Any) -> str:
    """A hash of the config and of up to a thousand values of each parameter, evenly spaced."""
    digest = hashlib.sha256(repr(config).encode())
    for path, leaf in sorted((jax.tree_util.keystr(p), x) for p, x in jax.tree_util.tree_leaves_with_path(params)):
        flat = leaf.reshape(-1)
        digest.update(path.encode() + np.asarray(flat[:: max(1, flat.size // 1000)], np.float32).tobytes())
    return digest.hexdigest()[:16]


def prepare(
    name: str, done: Iterable[str], model: Any, words: Words, corpus: Corpus | None, settings: dict[str, Any]
) -> list[Unit]:
    """The units of a task that are not done."""
    split, limit = settings["split"], settings["limit"]
    if name == BPB:
        assert corpus is not None
        return [domain_unit(corpus, domain, split, words, settings["window"], limit)
                for domain in corpus.domains if f"{BPB}/{domain}" not in done]
    if name in done:
        return []
    generator = cache(lambda: Generator(model))
    if TASKS[name].check is not None:
        generator()  # refuses a router that cannot be used token by token
    examples = load_examples(name, split)[:limit]
    return [task_unit(name, examples, words, settings["chat"], model.config.context, generator)]


def work(units: list[Unit], scorer: Scorer, out: Path, console: Console) -> None:
    """Runs the units in order, each one's files written when it is finished."""
    for folder in ("parts", "answers"):
        (out / folder).mkdir(exist_ok=True)
    total, passed = sum(unit.cost for unit in units), 0
    with Bar("eval", max(total, 1), console=console) as bar:
        for unit in units:
            def advance(tokens: int, note: str = unit.name) -> None:
                nonlocal passed
                passed += tokens
                bar.update(passed, note)

            bar.update(passed, unit.name)
            result, rows = unit.run(scorer, advance)
            stem = unit.name.replace("/", "-")
            if rows:
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                (out / "answers" / f"{stem}.jsonl").write_text(lines, encoding="utf-8")
            write_json(out / "parts" / f"{stem}.json", {"name": unit.name} | result)


def finished(out: Path) -> dict[str, dict[str, Any]]:
    """Results of the units whose file is there, by name."""
    results = {}
    for path in sorted((out / "parts").glob("*.json")):
        part = json.loads(path.read_text(encoding="utf-8"))
        results[part.pop("name")] = part
    return results


def in_order(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Domains first, then tasks in the catalogue's order."""
    order = list(TASKS)
    return dict(sorted(results.items(), key=lambda row: order.index(row[0]) if row[0] in order else -1))


def describe(model: Any, words: Words, corpus: Corpus | None) -> dict[str, Any]:
    """What was evaluated, on what, where."""
    from experiments.provenance import provenance

    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    return {"family": model.family, "parameters": parameters, "tokenizer": words.name,
            "corpus": corpus.content_hash if corpus else None, "provenance": provenance()}
