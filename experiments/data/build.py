"""`data build`: a user's own text to shards that every recipe reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from rich.console import Console
from rich.progress import Progress

from experiments.data import DataError
from experiments.data.bars import percent_bars
from experiments.data.corpus import Corpus, load_directory
from experiments.data.readers import check_source, read_documents
from experiments.data.shards import DomainWriter, atomic_directory, split_of, token_dtype, unit_hash, write_index
from experiments.data.tokenizer import BpeTokenizer, ByteTokenizer, SmolLM2Tokenizer, Tokenizer, train_bpe
from moe.config import require

TokenizerName = Literal["byte", "bpe", "smollm2"]
MAX_DOMAINS = 256
BPE_TRAINING_BYTES = 64 << 20  # of training documents; more changes little and costs memory


def content_digest(text: str) -> bytes:
    """SHA-256 of a document, which decides its split and finds its copies."""
    return hashlib.sha256(text.encode()).digest()


def build_corpus(source: Path, out: Path, text_key: str = "text", domain_key: str = "domain",
                 tokenizer: TokenizerName = "byte", vocab_size: int = 4096,
                 console: Console | None = None) -> Corpus:
    """Tokenises `source` into the directory `out`, which appears whole or not at all.

    Equal documents are kept once; the split goes by a hash of the document, so it survives reordering and growth.

    Args:
      source: .txt, .jsonl or .parquet (see `readers.read_documents`).
      vocab_size: of the BPE; the result may be smaller for little text.

    Raises:
      ValueError: bad arguments, bad text, or fewer than three documents in a domain.
    """
    require(tokenizer in get_args(TokenizerName), "tokenizer", tokenizer, "byte, bpe or smollm2")
    check_source(source)
    require(not out.exists() or (out.is_dir() and not any(out.iterdir())), "out", str(out),
            "a directory that is new or empty")
    with percent_bars(console) as progress, atomic_directory(out) as scratch:
        words: Tokenizer = ByteTokenizer()
        if tokenizer != "byte":
            bpe = SmolLM2Tokenizer.packaged() if tokenizer == "smollm2" else _train(
                source, text_key, domain_key, vocab_size, progress)
            bpe.save(scratch / "tokenizer.json")
            words = bpe
        domains = _write_documents(source, text_key, domain_key, words, scratch, progress)
        write_index(scratch, name=source.stem, tokenizer=words.name, vocab_size=words.vocab_size, domains=domains)
    return load_directory(out)


def _train(source: Path, text_key: str, domain_key: str, vocab_size: int, progress: Progress) -> BpeTokenizer:
    """BPE of the documents whose hash puts them into the training split."""
    bar = progress.add_task("train BPE", total=1.0)

    def texts() -> Iterator[str]:
        size = 0
        for document in read_documents(source, text_key, domain_key):
            progress.update(bar, completed=document.position)
            if split_of(unit_hash(content_digest(document.text))) == "train":
                size += len(document.text)
                yield document.text
                if size > BPE_TRAINING_BYTES:
                    return

    trained = train_bpe(texts(), vocab_size)
    progress.update(bar, completed=1.0)
    return trained


def _write_documents(source: Path, text_key: str, domain_key: str, words: Tokenizer, folder: Path,
                     progress: Progress) -> list[dict]:
    """Streams all documents into one writer per domain; returns the domains' index entries."""
    bar = progress.add_task("tokenise", total=1.0)
    writers: dict[str, DomainWriter] = {}
    seen: set[bytes] = set()
    try:
        for document in read_documents(source, text_key, domain_key):
            progress.update(bar, completed=document.position)
            digest = content_digest(document.text)
            if digest in seen or not document.text.strip():
                continue
            seen.add(digest)
            if document.domain not in writers:
                if len(writers) == MAX_DOMAINS:
                    raise DataError(f"{source}: more than {MAX_DOMAINS} domains: expected few, large ones "
                                    f"(is {domain_key!r} the right key?)")
                writers[document.domain] = DomainWriter(folder, document.domain, token_dtype(words.vocab_size))
            writers[document.domain].add(words.encode(document.text), digest)
        if not writers:
            raise DataError(f"{source}: no text: expected at least one document that is not blank")
        return [{"name": name, "licence": "not stated", "rights": "own", "source": source.name,
                 "splits": writer.finish()} for name, writer in sorted(writers.items())]
    finally:
        for writer in writers.values():
            writer.close()
