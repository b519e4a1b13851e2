"""From the members of a package to examples.

Rows of `evals` repeat one instruction in each prompt; it is left out, or a model would mostly learn that. What differs
between rows (the shift of a cipher) is kept. Each prompt ends in a cue that names what follows.
"""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from experiments.data import DataError
from experiments.tasks.example import Example

NEAR_ZERO = 0.5  # mean sentiment runs from -4 to 4
QUESTION_TYPES = {"ABBR": "abbreviation", "DESC": "description", "ENTY": "entity", "HUM": "person", "LOC": "location",
                  "NUM": "number"}
INFERENCES = ("entailment", "contradiction", "neutral")
LOGIQA = re.compile(r"\s*Passage: (.*?)Question: (.*?)\nA\. (.*?)\nB\. (.*?)\nC\. (.*?)\nD\. (.*?)\nAnswer:\s*", re.S)
QUARTZ = re.compile(r"(.*?)\s*\n\s*A: (.*?)\s*\n\s*B: (.*)", re.S)


def sarcasm(data: bytes) -> Iterator[Example]:
    """News headlines, sarcastic or not."""
    for user, ideal, _ in _evals_rows(data):
        yield Example(f"Headline: {user}\nSarcastic:", ("no", "yes"), _index(ideal, ("0", "1")))


def logiqa(data: bytes) -> Iterator[Example]:
    """Logical reading: a passage, a question, four options. The questions about one passage share a split."""
    for user, ideal, _ in _evals_rows(data):
        passage, question, *options = (part.strip() for part in _match(LOGIQA, user))
        # The rows name each option twice: "A. A.Zhao ...".
        options = tuple(option.removeprefix(f"{letter}.").strip() for letter, option in zip("ABCD", options))
        if len(set(options)) == 4 and all(options):
            listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options))
            prompt = f"Passage: {passage}\nQuestion: {question}\n{listed}\nAnswer:"
            yield Example(prompt, options, _index(ideal, tuple("ABCD")), passage)


def quartz(data: bytes) -> Iterator[Example]:
    """Qualitative relations: two options, of which one completes or answers the text."""
    for user, ideal, _ in _evals_rows(data):
        question, *options = (part.strip() for part in _match(QUARTZ, user))
        if len(set(options)) == 2 and all(options):
            prompt = f"Question: {question}\nA. {options[0]}\nB. {options[1]}\nAnswer:"
            yield Example(prompt, tuple(options), _index(ideal, ("A", "B")))


def corr2cause(data: bytes) -> Iterator[Example]:
    """From correlations to causes: does the hypothesis follow? 21 premises, so splits share premises."""
    for user, ideal, _ in _evals_rows(data):
        yield Example(f"{user}\nAnswer:", INFERENCES, _index(ideal.removeprefix("Answer:").strip(), INFERENCES))


def decrypt_caesar(data: bytes) -> Iterator[Example]:
    """A line of a novel, each letter shifted by 1 to 5. The shifts of one line share a split."""
    for user, ideal, system in _evals_rows(data):
        (shift,) = _match(re.compile(r".*shifted by (\d+) .*", re.S), system)
        if ideal.strip():
            prompt = f"Caesar cipher, each letter shifted by {shift}: {user.strip()}\nPlain text:"
            yield Example(prompt, (), ideal.strip(), ideal.strip())


def question_types(data: bytes) -> Iterator[Example]:
    """TREC questions by the kind of thing they ask for: six coarse classes."""
    for line in data.decode("latin-1").splitlines():
        label, _, question = line.partition(" ")
        if question.strip():
            kind = _index(label.partition(":")[0], tuple(QUESTION_TYPES))
            yield Example(f"Question: {question.strip()}\nAsks for:", tuple(QUESTION_TYPES.values()), kind)


def sentiment(data: bytes) -> Iterator[Example]:
    """Short texts with the mean of twenty people's ratings; those within 0.5 of zero are left out."""
    for line in data.decode("utf-8").splitlines()[1:]:
        _, mean, text = line.split("\t", 2)
        text = " ".join(html.unescape(text).split())
        if text and abs(float(mean)) >= NEAR_ZERO:
            yield Example(f"Text: {text}\nSentiment:", ("negative", "positive"), int(float(mean) > 0))


def sms_spam(data: bytes) -> Iterator[Example]:
    """Text messages, spam or not.

    Quotes that were never closed joined rows of the original file, `label TAB message`, into one: they are taken apart.
    """
    for row in csv.DictReader(io.StringIO(data.decode("utf-8"))):
        label = _index(row["spam"], ("0", "1"))
        first, *others = re.split(r"\n(ham|spam)\t", row["text"])
        for kind, text in ((label, first), *((_index(k, ("ham", "spam")), t) for k, t in zip(*[iter(others)] * 2))):
            if text := text.strip().strip('"').strip():
                yield Example(f"Message: {text}\nSpam:", ("no", "yes"), kind)


def _evals_rows(data: bytes) -> Iterator[tuple[str, str, str]]:
    """(last user message, ideal, system message) of each JSON line."""
    for line in data.decode("utf-8").splitlines():
        if line.strip():
            row: dict[str, Any] = json.loads(line)
            messages = row["input"]
            system = messages[0]["content"] if messages[0]["role"] == "system" else ""
            ideal = row["ideal"]
            yield messages[-1]["content"].strip(), str(ideal[0] if isinstance(ideal, list) else ideal), system


def _match(pattern: re.Pattern[str], text: str) -> tuple[str, ...]:
    found = pattern.fullmatch(text)
    if found is None:
        raise DataError(f"a row of the task is not as expected: {text[:80]!r} does not match {pattern.pattern[:60]!r}")
    return found.groups()


def _index(label: str, labels: tuple[str, ...]) -> int:
    if label not in labels:
        raise DataError(f"a row of the task is not as expected: label {label!r}, expected one of {', '.join(labels)}")
    return labels.index(label)
