"""A byte corpus in another tokenizer's tokens: same domains, documents and splits, so that a pretrained model trains
on it (`data build --from packaged --tokenizer smollm2`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.data.bars import percent_bars
from experiments.data.corpus import Corpus, DomainInfo, load_directory
from experiments.data.shards import SPLITS, DomainWriter, atomic_directory, token_dtype, write_index
from experiments.data.tokenizer import BpeTokenizer, Tokenizer
from moe.config import require


def documents(corpus: Corpus, domain: str, split: str, limit: int = 0) -> Iterator[bytes]:
    """The documents of a byte corpus, in its order.

    Args:
      limit: at most that many bytes, but at least one document; what does not fit is passed over. 0 takes all.
    """
    tokens, offsets = corpus.stream(domain, split)
    size = 0
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
        if limit and size and size + end - start > limit:
            continue
        size += end - start
        yield tokens[start : end - 1].tobytes()


def retokenize(corpus: Corpus, out: Path, words: Tokenizer, max_bytes: int = 0,
               console: Console | None = None) -> Corpus:
    """Writes `corpus` in the tokens of `words` to the directory `out`, which appears whole or not at all.

    Args:
      corpus: of bytes.
      max_bytes: per domain, shared among its splits in proportion; 0 takes all.

    Raises:
      ValueError: a corpus that is not of bytes, a bad cap, or an `out` that is there already.
    """
    require(corpus.tokenizer == "byte", "corpus.tokenizer", corpus.tokenizer, "byte (text can be had from no other)")
    require(max_bytes >= 0, "max_bytes", max_bytes, "0 (all) or a number of bytes per domain")
    require(not out.exists() or (out.is_dir() and not any(out.iterdir())), "out", str(out),
            "a directory that is new or empty")
    with percent_bars(console) as progress, atomic_directory(out) as scratch:
        if isinstance(words, BpeTokenizer):
            words.save(scratch / "tokenizer.json")
        totals = {info.name: sum(info.tokens.values()) for info in corpus.info}
        capped = {name: min(total, max_bytes or total) for name, total in totals.items()}
        bar, entries = progress.add_task("tokenise", total=sum(capped.values())), []
        for number, info in enumerate(corpus.info):
            progress.update(bar, description=f"tokenise {info.name}")
            writer = DomainWriter(scratch, info.name, token_dtype(words.vocab_size))
            try:
                splits: list[int] = []
                for index, split in enumerate(SPLITS):
                    limit = max(1, capped[info.name] * info.tokens[split] // totals[info.name]) if max_bytes else 0
                    for text in documents(corpus, info.name, split, limit):
                        writer.add(words.encode(text.decode()), hashlib.sha256(text).digest())
                        splits.append(index)
                        progress.advance(bar, len(text) + 1)
                entries.append(_entry(info, writer.finish(np.array(splits))))
            finally:
                writer.close()
            progress.update(bar, completed=sum(list(capped.values())[: number + 1]))
        write_index(scratch, name=f"{corpus.name}-{words.name}", tokenizer=words.name, vocab_size=words.vocab_size,
                    domains=entries)
    return load_directory(out)


def _entry(info: DomainInfo, splits: dict[str, Any]) -> dict[str, Any]:
    return {"name": info.name, "licence": info.licence, "rights": info.rights, "source": info.source, "splits": splits}
