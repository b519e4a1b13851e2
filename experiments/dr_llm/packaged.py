"""A released model and tasks of `experiments.tasks.catalogue` with options, of which the likeliest is the answer.

Supervision comes from each task's training split, tests from its test split. A task is used if the model, along its
full path, beats the commonest answer of the validation split by the margin; the others are dropped and named.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from experiments.dr_llm.quiz import Examiner, Quiz, Rows
from experiments.evaluation.scoring import Request, bucket, option_requests
from experiments.experiment import StudyProgress
from experiments.finetune import Base, released, released_config
from experiments.initial import pretrained_config
from experiments.tasks.example import Example
from moe.config import ModelConfig, require


@dataclass(frozen=True)
class Packaged:
    """Attributes:
    tasks: routers learn from all of them together.
    others: tasks that routers have not seen, for which the change of accuracy is told.
    source: a name or a directory, as `generate --model` takes it; empty for a shape without weights, `model`, which
      can be counted and not run.
    dtype: of the frozen parameters and the arithmetic.
    longest: examples of more tokens, options included, are left out.
    search_questions, test_questions: the most of all tasks together; as many are tested of each of `others`.
    validation_questions: of each task, for the precondition.
    margin: of the precondition.
    size: most rows of a pass.
    mixed: whether paths that differ share a pass, see `Examiner`.
    """

    tasks: tuple[str, ...] = ("sentiment-film", "sentiment-products", "sentiment-tweets")
    others: tuple[str, ...] = ("sentiment-news", "question-types")
    source: str = "smollm2"
    dtype: str = "float32"
    model: ModelConfig = field(default_factory=ModelConfig)
    longest: int = 64
    search_questions: int = 128
    test_questions: int = 96
    validation_questions: int = 64
    margin: float = 0.05
    size: int = 16
    mixed: bool = False

    def check(self) -> None:
        from experiments.data import DataError
        from experiments.evaluation.text import open_words
        from experiments.tasks.catalogue import TASKS, missing, named

        for task in named((*self.tasks, *self.others)):
            require(TASKS[task].check is None, "world.tasks", task, "tasks with options")
        require(bool(self.source), "world.source", self.source, "a model: --set world.source=DIRECTORY")
        open_words(self.source, pretrained_config(self.source))
        if text := missing((*self.tasks, *self.others)):
            raise DataError(text)

    def config(self) -> ModelConfig:
        return released_config(self.source, self.dtype, absent=self.model)  # `check` says what is missing

    @property
    def steps(self) -> int:
        """Of pretraining."""
        return 0

    def search_seed(self, seed: int) -> int:
        """All seeds share the model, its questions and its searches; they differ in their routers."""
        del seed
        return 0

    def base(self, seed: int, folder: Path, progress: StudyProgress) -> Base:
        del seed, folder
        progress(0, f"reading {Path(self.source).name}")
        return released(self.source, self.dtype)

    def quiz(self, name: str, seed: int) -> Quiz:
        """`search`, `test`, or a task of `others`.

        Raises:
          ValueError: no task fulfils the precondition.
        """
        del seed
        if name not in ("search", "test"):
            return self._quiz((name,), "test", self.test_questions)
        used, shares = self.passing()
        require(bool(used), "world.tasks", shares, f"one of which the model knows: {self.margin} above the commonest")
        split, count = ("train", self.search_questions) if name == "search" else ("test", self.test_questions)
        return self._quiz(used, split, count)

    def passing(self) -> tuple[tuple[str, ...], dict[str, tuple[float, float]]]:
        """The tasks that are used, and (accuracy, share of the commonest answer) of all, also of `others`."""
        return _passing(self)

    def _quiz(self, tasks: Sequence[str], split: str, count: int) -> Quiz:
        """The first examples of each task that fit, as many of each."""
        from experiments.evaluation.text import open_words
        from experiments.tasks.catalogue import load_examples

        words, per_task, kept = open_words(self.source, self.config()), -(-count // len(tasks)), []
        for task in tasks:
            fit = []
            for example in load_examples(task, split):
                prompt = words.encode(example.prompt)
                wholes = [words.continued(f"{example.prompt} {option}", False) for option in example.options]
                if max(map(len, wholes)) <= self.longest:
                    fit.append((task, example, prompt, option_requests(prompt, wholes, None)))
                if len(fit) == per_task:
                    break
            require(bool(fit), f"task {task}: examples of at most {self.longest} tokens", 0, "at least one")
            kept += fit
        return option_quiz(kept)


def option_quiz(kept: Sequence[tuple[str, Example, Sequence[int], Sequence[Request]]]) -> Quiz:
    """Questions of (task, example, prompt's tokens, requests of its options). Options that read the same tokens share a
    row: those of one token are scored in a single pass."""
    groups = []
    for question, (_, _, _, requests) in enumerate(kept):
        inputs = dict.fromkeys(request.inputs for request in requests)
        groups += [(question, read, [(r.tag[1], r) for r in requests if r.inputs == read]) for read in inputs]
    length = bucket(max(len(read) for _, read, _ in groups))
    most = max(sum(len(request.where) for _, request in asked) for _, _, asked in groups)
    tokens = np.zeros((len(groups), length), np.int32)
    where, targets, option = np.zeros((3, len(groups), most), np.int32)
    weights = np.zeros((len(groups), most), np.float32)
    for i, (_, read, asked) in enumerate(groups):
        tokens[i, : len(read)] = read
        flat = [(at, target, tag) for tag, r in asked for at, target in zip(r.where, r.targets)]
        columns = np.array(flat, np.int32).T
        where[i, : len(flat)], targets[i, : len(flat)], option[i, : len(flat)] = columns
        weights[i, : len(flat)] = 1.0
    lengths = np.array([len(read) for _, read, _ in groups], np.int32)
    owners = np.array([question for question, _, _ in groups], np.int32)
    prompts = np.zeros((len(kept), length), np.int32)
    for row, (_, _, prompt, _) in zip(prompts, kept):
        row[: len(prompt)] = prompt
    right = np.array([example.answer for _, example, _, _ in kept], np.int32)
    written = np.array([len(requests[answer].where) for (*_, requests), answer in zip(kept, right)])
    answers = tuple((task, int(answer)) for (task, *_), answer in zip(kept, right))
    return Quiz(Rows(tokens, lengths, where, targets, weights, option, owners), prompts,
                np.array([len(prompt) for _, _, prompt, _ in kept], np.int32), answers, written, right)  # fmt: skip


@functools.lru_cache(maxsize=4)
def _passing(world: Packaged) -> tuple[tuple[str, ...], dict[str, tuple[float, float]]]:
    base, shares = released(world.source, world.dtype), {}
    for task in (*world.tasks, *world.others):
        quiz = world._quiz((task,), "validation", world.validation_questions)
        right = Examiner(base, quiz, world.size, world.mixed).right(np.ones((len(quiz), base.config.num_layers), int))
        shares[task] = (round(float(right.mean()), 4), round(quiz.majority, 4))
    used = tuple(task for task in world.tasks if shares[task][0] - shares[task][1] >= world.margin)
    return used, shares
