"""A model's tokens of text, whoever made the tokenizer; and held-out text as windows in which every token counts once.

Legend: N windows, S positions of one window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from experiments.data.corpus import Corpus
from moe.config import ModelConfig, require
from moe.pretrained.tokenizer import TextTokenizer, gguf_tokenizer, load_tokenizer

BYTES = 256
# Tokens that separate the documents of a training corpus, by their text; the first that a vocabulary has is used.
SEPARATORS = ("<|endoftext|>", "<|endofdocument|>")


class Words(Protocol):
    """What evaluation needs of a tokenizer.

    Attributes:
      start: the token put before a document, so that its first token has a context; None: there is none.
      eos: ids at which an answer ends.
    """

    name: str
    start: int | None
    eos: tuple[int, ...]

    def pieces(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Plain tokens [n], and after each the bytes of text so far [n], -1 inside of a character."""
        ...

    def encode(self, text: str) -> list[int]:
        """Tokens of a text of its own, with what the model expects before it."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def chat(self, prompt: str) -> tuple[list[int], str] | None:
        """Tokens and text of a conversation that asks for the answer; None without a template."""
        ...

    def continued(self, text: str, chat: bool) -> list[int]:
        """Tokens of a prompt with its continuation."""
        ...


class ByteWords:
    """Bytes are tokens; token 0 stands between documents."""

    name: str = "byte"
    start: int | None = 0
    eos: tuple[int, ...] = (0,)

    def pieces(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        raw = np.frombuffer(text.encode(), np.uint8)
        ends = np.arange(1, len(raw) + 1)
        inside = np.append(raw[1:] & 0xC0 == 0x80, [False])[: len(raw)]
        return raw.astype(np.int32), np.where(inside, -1, ends)

    def encode(self, text: str) -> list[int]:
        return [0, *text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i).decode(errors="replace")

    def chat(self, prompt: str) -> None:
        return None

    def continued(self, text: str, chat: bool) -> list[int]:
        return self.encode(text)


class LibraryWords:
    """A tokenizer of `moe.pretrained.tokenizer`."""

    def __init__(self, tokenizer: TextTokenizer, name: str = "tokenizer.json"):
        self.tokenizer, self.name, self.eos = tokenizer, name, tokenizer.eos
        known = [tokenizer.inner.token_to_id(text) for text in SEPARATORS]
        expected = tokenizer.encode("a")[:1] if tokenizer.encode("a") != tokenizer.encode("a", bos=False) else []
        self.start = next((i for i in (*expected, *known, *self.eos) if i is not None), None)

    def pieces(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        self.tokenizer.inner.encode_special_tokens = True  # written out in a text they are plain characters
        encoded = self.tokenizer.inner.encode(text, add_special_tokens=False)
        after = np.cumsum([0, *(len(c.encode()) for c in text)])  # characters -> bytes
        starts, ends = (np.array([pair[i] for pair in encoded.offsets], np.int64) for i in (0, 1))
        whole = np.append(starts[1:] >= ends[:-1], [True])[: len(ends)]
        ends = np.where(whole, after[ends], -1) if len(ends) else ends
        if len(ends):
            ends[-1] = after[-1]
        return np.array(encoded.ids, np.int32), ends

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def chat(self, prompt: str) -> tuple[list[int], str] | None:
        text = self.tokenizer.chat([{"role": "user", "content": prompt}])
        return None if text is None else (self.tokenizer.encode(text, bos=False), text)

    def continued(self, text: str, chat: bool) -> list[int]:
        return self.tokenizer.encode(text, bos=False) if chat else self.encode(text)


def open_words(source: str, config: ModelConfig) -> Words:
    """The tokenizer of a model.

    Args:
      source: `smollm2`, a .gguf file, or the model's directory.

    Raises:
      ValueError: no tokenizer.json and no byte-level vocabulary, or ids beyond the model's vocabulary.
    """
    if source == "smollm2":
        from moe.pretrained.smollm2 import smollm2_tokenizer

        words = LibraryWords(smollm2_tokenizer(), source)
    elif Path(source).suffix == ".gguf":
        words = LibraryWords(gguf_tokenizer(Path(source)), Path(source).name)
    elif (Path(source) / "tokenizer.json").is_file():
        words = LibraryWords(load_tokenizer(Path(source)))
    else:
        missing = "a tokenizer.json in its folder, or a vocabulary of 256 bytes"
        require(config.vocab_size == BYTES, f"model {source!r}: no tokenizer; vocab_size", config.vocab_size, missing)
        return ByteWords()
    # A model may have more rows than words (padding), never fewer.
    require(words.tokenizer.vocab_size <= config.vocab_size, f"model {source!r}: tokens", words.tokenizer.vocab_size,
            f"at most vocab_size = {config.vocab_size}")
    return words


class Windows(NamedTuple):
    """Held-out text to score.

    Attributes:
      tokens, targets, segment_ids, positions: [N, S] int32; a target counts where segment_ids > 0. Segments are
        documents, or parts of them; each begins anew with the token before it.
      num_tokens, num_bytes: that are scored.
    """

    tokens: np.ndarray
    targets: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    num_tokens: int
    num_bytes: int


@dataclass
class _Document:
    inputs: np.ndarray
    targets: np.ndarray
    num_bytes: int


def windows(words: Words, texts: Sequence[str], length: int, limit: int | None = None) -> Windows:
    """Documents one after another, cut into windows of S = `length` tokens; every token is scored once.

    The first token of a document follows `words.start`; without such a token it is context only, and its bytes do not
    count.

    Args:
      limit: the most windows; the text ends with the last whole character that fits.
    """
    documents, room = [], None if limit is None else limit * length
    for text in texts:
        document = _document(words, text, room)
        if document is None:
            continue
        documents.append(document)
        if room is not None and (room := room - len(document.targets)) <= 0:
            break
    require(bool(documents), "text", "", "at least one token to score")
    sizes = [len(document.targets) for document in documents]
    total = sum(sizes)
    rows = -(-total // length)
    index = np.arange(total)
    start_of_document = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    start = np.maximum(start_of_document, index // length * length)
    ids = np.repeat(np.arange(len(sizes)), sizes)
    first_id = ids[index // length * length]
    padded = [np.concatenate([d.inputs for d in documents]), np.concatenate([d.targets for d in documents]),
              ids - first_id + 1, index - start]
    grids = [np.pad(x, (0, rows * length - total)).reshape(rows, length).astype(np.int32) for x in padded]
    tokens, targets, segment_ids, positions = grids
    return Windows(tokens, targets, segment_ids, positions, total, sum(document.num_bytes for document in documents))


def _document(words: Words, text: str, room: int | None) -> _Document | None:
    tokens, ends = words.pieces(text)
    whole = np.flatnonzero(ends >= 0)  # after these tokens a character is complete
    first, before = 0, 0
    if words.start is None:
        if not len(whole):
            return None
        first = int(whole[0]) + 1
        before = int(ends[first - 1])
    if room is not None:
        whole = whole[whole < first + room]
    whole = whole[whole >= first]
    if not len(whole):
        return None
    last = int(whole[-1])
    targets = tokens[first : last + 1]
    context = tokens[first - 1 : first] if words.start is None else np.array([words.start], np.int32)
    return _Document(np.concatenate([context, targets[:-1]]), targets, int(ends[last]) - before)


def held_out(corpus: Corpus, domain: str, split: str) -> list[str]:
    """Documents of a corpus of bytes, in the order of their hashes: the first ones are a random sample."""
    require(corpus.tokenizer == "byte", "corpus.tokenizer", corpus.tokenizer, "byte")
    tokens, offsets = corpus.stream(domain, split)
    documents = [tokens[a : b - 1].tobytes() for a, b in pairwise(offsets.tolist())]
    return [document.decode() for document in sorted(documents, key=lambda raw: hashlib.sha256(raw).digest())]
