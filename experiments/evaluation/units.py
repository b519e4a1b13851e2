"""What `eval` does, one unit after another: bits per byte of a domain, or a task.

A unit is prepared first (text read, tokens made, prompts that do not fit counted), so that bad input shows before
anything is compiled and the time left is known; then it runs and gives a result for a file.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from experiments.data.corpus import Corpus
from experiments.evaluation.scoring import Advance, Request, Scorer, bucket, option_requests
from experiments.evaluation.statistics import majority, share
from experiments.evaluation.text import Windows, Words, held_out, windows
from experiments.tasks.catalogue import TASKS
from experiments.tasks.example import Checker, Example, first_line
from moe.config import require
from moe.generate import Generator

BPB = "bpb"
DECODING_COST = 8  # a token that is written costs about as much as so many that are read
LOOK_EVERY = 8  # steps between looks whether all answers of a batch have ended their line

Row = dict[str, Any]  # one example: what was asked, what the model said
GetGenerator = Callable[[], Generator]


class Unit(Protocol):
    """A piece of work with a name and its cost in tokens; `run` gives its result and a row for each example."""

    @property
    def name(self) -> str: ...
    @property
    def cost(self) -> int: ...
    def run(self, scorer: Scorer, advance: Advance) -> tuple[dict[str, Any], list[Row]]: ...


@dataclass(frozen=True)
class DomainText:
    """Bits per byte of one domain's held-out text."""

    name: str
    text: Windows

    @property
    def cost(self) -> int:
        return self.text.tokens.size

    def run(self, scorer: Scorer, advance: Advance) -> tuple[dict[str, Any], list[Row]]:
        began = time.time()
        nats = scorer.total_nll(self.text, advance)
        return {"kind": BPB, "domain": self.name.removeprefix(f"{BPB}/"), "bytes": self.text.num_bytes,
                "tokens": self.text.num_tokens, "windows": len(self.text.tokens), "nats": round(nats, 3),
                "bits_per_byte": round(nats / math.log(2) / self.text.num_bytes, 6),
                "nats_per_token": round(nats / self.text.num_tokens, 6), "seconds": round(time.time() - began, 1)}, []


@dataclass(frozen=True)
class Choice:
    """A task whose options are scored: the likeliest one is the answer, and the likeliest one per byte another."""

    name: str
    examples: tuple[Example, ...]
    requests: tuple[Request, ...]
    too_long: int

    @property
    def cost(self) -> int:
        return sum(map(len, {request.inputs for request in self.requests}))

    def run(self, scorer: Scorer, advance: Advance) -> tuple[dict[str, Any], list[Row]]:
        began = time.time()
        nats = scorer.run(self.requests, advance)
        rows, hits, hits_per_byte = [], 0, 0
        for i, example in enumerate(self.examples):
            of_option = np.array([nats[i, j] for j in range(len(example.options))])
            sizes = np.array([len(option.encode()) for option in example.options])
            chosen, per_byte = int(np.argmin(of_option)), int(np.argmin(of_option / sizes))
            hits += chosen == example.answer
            hits_per_byte += per_byte == example.answer
            rows.append({"prompt": example.prompt, "options": example.options, "answer": example.answer,
                         "chosen": chosen, "chosen_per_byte": per_byte, "nats": of_option.round(4).tolist()})
        count = len(self.examples)
        return {"kind": "options", "examples": count, "too_long": self.too_long,
                "options": max(len(example.options) for example in self.examples), "accuracy": share(hits, count),
                "accuracy_per_byte": share(hits_per_byte, count),
                "majority": share(majority([example.answer for example in self.examples]), count),
                "seconds": round(time.time() - began, 1)}, rows


@dataclass(frozen=True)
class Writing:
    """A task whose answer is written, greedily, and checked."""

    name: str
    examples: tuple[Example, ...]
    prompts: tuple[tuple[int, ...], ...]
    too_long: int
    max_new_tokens: int
    check: Checker
    words: Words
    generator: GetGenerator
    one_line: bool

    @property
    def cost(self) -> int:
        return sum(map(len, self.prompts)) + DECODING_COST * self.max_new_tokens * len(self.prompts)

    def run(self, scorer: Scorer, advance: Advance) -> tuple[dict[str, Any], list[Row]]:
        began = time.time()
        order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        written = [""] * len(order)
        while order:
            length = bucket(len(self.prompts[order[0]]))
            batch = [i for i in order[: scorer.batch_size] if bucket(len(self.prompts[i])) == length]
            order = order[len(batch) :]
            for i, text in zip(batch, self._answers([self.prompts[i] for i in batch], scorer.batch_size)):
                written[i] = text
            advance(sum(len(self.prompts[i]) + DECODING_COST * self.max_new_tokens for i in batch))
        right = [self.check(text, example.target) for text, example in zip(written, self.examples)]
        rows = [{"prompt": e.prompt, "answer": e.answer, "written": text, "right": ok}
                for e, text, ok in zip(self.examples, written, right)]
        count = len(rows)
        return {"kind": "written", "examples": count, "too_long": self.too_long, "accuracy": share(sum(right), count),
                "majority": share(majority([example.answer for example in self.examples]), count),
                "seconds": round(time.time() - began, 1)}, rows

    def _answers(self, prompts: list[tuple[int, ...]], batch_size: int) -> list[str]:
        padded = [*prompts, *[prompts[-1]] * (batch_size - len(prompts))]  # always as many: one program for all
        ids: list[list[int]] = [[] for _ in prompts]
        steps = self.generator()(padded, max_new_tokens=self.max_new_tokens, stop=self.words.eos)
        for step, tokens in enumerate(steps, 1):
            for answer, token in zip(ids, tokens.tolist()):
                if token >= 0 and token not in self.words.eos:
                    answer.append(token)
            if step % LOOK_EVERY == 0 and self.one_line and all(
                    "\n" in self.words.decode(answer).lstrip() or ended
                    for answer, ended in zip(ids, (tokens < 0).tolist())):
                break
        texts = [self.words.decode(answer) for answer in ids]
        return [first_line(text) if self.one_line else text.strip() for text in texts]


def domain_unit(corpus: Corpus, domain: str, split: str, words: Words, window: int, limit: int | None) -> DomainText:
    text = windows(words, held_out(corpus, domain, split), window, limit)
    return DomainText(f"{BPB}/{domain}", text)


def task_unit(name: str, examples: Sequence[Example], words: Words, chat: bool, context: int,
              generator: GetGenerator) -> Choice | Writing:
    """A task's unit over `examples`; those whose prompt leaves the context (0: unknown) are counted, not cut.

    Raises:
      ValueError: a chat without a template, no examples, or none that fits.
    """
    task = TASKS[name]
    require(bool(examples), f"task {name}: examples", 0, "at least one")
    kept, prompts, requests = [], [], []
    for example in examples:
        ids, text = _prompt(words, example, chat)
        if task.check is not None:
            size = len(ids) + task.max_new_tokens
        else:
            wholes = [words.continued(f"{text}{'' if chat else ' '}{option}", chat) for option in example.options]
            size = max(map(len, wholes)) - 1
        if context and size > context:
            continue
        if task.check is None:
            requests += option_requests(ids, wholes, len(kept))  # pyright: ignore[reportPossiblyUnboundVariable]
        kept.append(example)
        prompts.append(tuple(ids))
    require(bool(kept), f"task {name}: prompts longer than the model's context of {context}", len(examples),
            "at least one that fits")
    too_long = len(examples) - len(kept)
    if task.check is None:
        return Choice(name, tuple(kept), tuple(requests), too_long)
    return Writing(name, tuple(kept), tuple(prompts), too_long, task.max_new_tokens, task.check, words, generator,
                   one_line=not chat)


def _prompt(words: Words, example: Example, chat: bool) -> tuple[list[int], str]:
    if not chat:
        return words.encode(example.prompt), example.prompt
    asked = words.chat(example.prompt)
    if asked is None:
        raise ValueError("--chat = True: expected a model with a chat template")
    return asked
