"""One form for all tasks: a prompt, and options to choose from or an answer to write. Splits go by hash of the text."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from experiments.data.shards import SPLITS, unit_hash
from moe.config import require

HELD_OUT = 0.1  # share of the examples in each of validation and test

Checker = Callable[[str, str], bool]  # (what the model wrote, the answer) -> correct


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
      prompt: what the model sees; the option or answer follows after a space. No blank at its end.
      options: what can follow, one of them right; empty if the answer is written freely.
      answer: index of the right option, or the text expected.
      group: text that decides the split; examples that share it (one passage, several questions) stay together. Empty:
        the prompt.
    """

    prompt: str
    options: tuple[str, ...]
    answer: int | str
    group: str = ""

    def __post_init__(self) -> None:
        require(bool(self.prompt) and self.prompt == self.prompt.rstrip(), "prompt", self.prompt,
                "text without blanks at its end")
        if isinstance(self.answer, int):
            distinct = len(set(self.options)) == len(self.options) >= 2 and all(map(str.strip, self.options))
            require(distinct, "options", self.options, "two or more distinct texts")
            require(0 <= self.answer < len(self.options), "answer", self.answer, f"one of {len(self.options)} options")
        else:
            require(not self.options and bool(self.answer.strip()), "answer", self.answer, "a text, and no options")

    @property
    def target(self) -> str:
        """The right text."""
        return self.options[self.answer] if isinstance(self.answer, int) else self.answer


def folded(text: str) -> str:
    """Case and runs of white space do not tell two texts apart."""
    return " ".join(text.split()).casefold()


def digest(text: str) -> bytes:
    return hashlib.sha256(folded(text).encode()).digest()


def split_of(example: Example) -> str:
    """`test` and `validation` get a tenth each: the second eight bytes of SHA-256 of the folded group or prompt."""
    share = unit_hash(digest(example.group or example.prompt))
    return "test" if share < HELD_OUT else "validation" if share < 2 * HELD_OUT else "train"


def deduplicated(examples: Iterable[Example]) -> list[Example]:
    """One of each prompt, in order of its hash, so that the first n are a random sample.

    A prompt that comes with different answers has none: all its examples go.
    """
    same: dict[bytes, list[Example]] = defaultdict(list)
    for example in examples:
        same[digest(example.prompt)].append(example)
    return [found[0] for _, found in sorted(same.items()) if len({example.target for example in found}) == 1]


def of_split(examples: Iterable[Example], split: str) -> list[Example]:
    """Deduplicated examples of one split, in hash order."""
    require(split in SPLITS, "split", split, f"one of {', '.join(SPLITS)}")
    return [example for example in deduplicated(examples) if split_of(example) == split]


def exact(written: str, answer: str) -> bool:
    """The first line, without case, quotes and punctuation around it."""
    return _bare(first_line(written)) == _bare(answer)


def last_number(written: str, answer: str) -> bool:
    """The last number in the text, thousands separators removed; an answer of 5.0 is 5."""
    numbers = re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?", written.replace("\u2212", "-"))
    return bool(numbers) and float(numbers[-1].replace(",", "")) == float(answer.replace(",", ""))


def first_line(written: str) -> str:
    """The first line that is not empty."""
    return written.strip().partition("\n")[0].strip()


def _bare(text: str) -> str:
    return folded(text).strip(" \"'`.,:;!?*")
