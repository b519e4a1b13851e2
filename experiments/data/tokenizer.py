"""Text to token ids: bytes, or byte-level BPE through the optional `tokenizers`, one's own or a pretrained model's.

Token 0 ends a document in all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from experiments.data import DataError
from moe.config import require

END = "<|endofdocument|>"
BYTE_VOCAB = 256


class Tokenizer(Protocol):
    """`encode` gives int ids [n] without the end-of-document token 0; `decode` drops that token."""

    name: str
    vocab_size: int

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, tokens: np.ndarray) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes; NUL, the end-of-document token, is removed from text."""

    name = "byte"
    vocab_size = BYTE_VOCAB

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.replace("\0", "").encode(), np.uint8)

    def decode(self, tokens: np.ndarray) -> str:
        """Bytes that are no whole character become U+FFFD."""
        return np.asarray(tokens, np.uint8).tobytes().replace(b"\0", b"").decode(errors="replace")


class BpeTokenizer:
    """Byte-level BPE (`tokenizers`), trained by `train_bpe` and saved beside the shards as tokenizer.json."""

    name = "bpe"

    def __init__(self, inner: Any):
        self.inner = inner
        self.vocab_size: int = inner.get_vocab_size()

    @classmethod
    def load(cls, path: Path) -> BpeTokenizer:
        """Raises DataError if the file is missing or no tokenizer."""
        library = _tokenizers()
        try:
            return cls(library.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path}: cannot be read as a tokenizer ({error})") from error

    def save(self, path: Path) -> None:
        self.inner.save(str(path))

    def encode(self, text: str) -> np.ndarray:
        # The marker written out in a text must not become token 0.
        ids = self.inner.encode(text.replace("\0", "").replace(END, ""), add_special_tokens=False).ids
        return np.array(ids, np.uint32)

    def decode(self, tokens: np.ndarray) -> str:
        return self.inner.decode([int(t) for t in tokens], skip_special_tokens=True)


class SmolLM2Tokenizer(BpeTokenizer):
    """The vocabulary of SmolLM2 (49,152): what `--model smollm2` reads and predicts. Its <|endoftext|> is token 0."""

    name = "smollm2"

    @classmethod
    def packaged(cls) -> SmolLM2Tokenizer:
        """Raises ValueError if the model was not fetched (names the command)."""
        from moe.pretrained.smollm2 import smollm2_tokenizer

        return cls(smollm2_tokenizer().inner)

    def encode(self, text: str) -> np.ndarray:
        # Special tokens written out in a text are plain characters: none may become token 0 or open a chat.
        self.inner.encode_special_tokens = True
        return np.array(self.inner.encode(text.replace("\0", ""), add_special_tokens=False).ids, np.uint32)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
    """Byte-level BPE with all 256 bytes and token 0 in its vocabulary, so that it encodes any text.

    Raises:
      ValueError: vocab_size < 257.
      DataError: the `tokenizers` package is missing (names the extra).
    """
    require(vocab_size > BYTE_VOCAB, "vocab_size", vocab_size, f"at least {BYTE_VOCAB + 1} (256 bytes and one marker)")
    library = _tokenizers()
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], show_progress=False,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(texts, trainer)
    return BpeTokenizer(inner)


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError("tokenizer = 'bpe': expected the package `tokenizers`; install the extra with "
                        "`pip install -e '.[hf]'`") from error
    return tokenizers
