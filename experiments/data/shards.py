"""The shard format, one for packaged, built and user corpora: how it is written.

A directory with `corpus.json` and, per domain and split, `SLUG.SPLIT.tokens.npy` (uint8 for bytes, else uint16 or
uint32) and `SLUG.SPLIT.offsets.npy` (int64 [documents + 1]: starts, then the end). A document ends with one token 0,
which no text contains. `corpus.json` is written last: a directory without it is no corpus.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data import DataError

FORMAT = 1
SPLITS = ("train", "validation", "test")
HELD_OUT = 0.05  # share of the documents, by hash, in each of validation and test
END_OF_DOCUMENT = 0
MIN_DOCUMENTS = 3


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint8, uint16, uint32 that holds every token id."""
    return np.dtype(np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def slug(name: str) -> str:
    """A file name for a domain; names that need changing get a hash so that no two meet."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:40]
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def unit_hash(digest: bytes) -> float:
    """[0, 1), from the second eight bytes: independent of an order by digest, which the first bytes decide."""
    return int.from_bytes(digest[8:16], "big") / 2**64


def split_of(share: float) -> str:
    """The split of a document whose content hashes to `share`."""
    return "test" if share < HELD_OUT else "validation" if share < 2 * HELD_OUT else "train"


def assign_splits(shares: np.ndarray) -> np.ndarray:
    """Index into SPLITS for each document [n]; n >= 3 documents with distinct hashes fill every split."""
    splits = np.array([SPLITS.index(split_of(share)) for share in shares])
    if all(np.any(splits == i) for i in range(3)):
        return splits
    order = np.argsort(shares)  # too few documents to leave it to chance
    held_out = max(1, round(HELD_OUT * len(shares)))
    splits[:] = 0
    splits[order[:held_out]] = 2
    splits[order[held_out : 2 * held_out]] = 1
    return splits


def array_sha256(values: np.ndarray, chunk: int = 1 << 22) -> str:
    """SHA-256 of the values' little-endian bytes, read in chunks."""
    digest = hashlib.sha256()
    for start in range(0, len(values), chunk):
        part = np.ascontiguousarray(values[start : start + chunk])
        digest.update(part.astype(part.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


class DomainWriter:
    """Takes the documents of one domain in any number, keeps only their lengths and hashes in memory."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype):
        self.name, self.folder, self.dtype = name, folder, dtype
        self.lengths, self.shares = array("q"), array("d")
        self._spool = (folder / f".{slug(name)}.spool").open("w+b")

    def add(self, tokens: np.ndarray, digest: bytes) -> None:
        """tokens [n] without the end-of-document token; digest: SHA-256 of the document's content."""
        self._spool.write(np.append(tokens, END_OF_DOCUMENT).astype(self.dtype).tobytes())
        self.lengths.append(len(tokens) + 1)
        self.shares.append(unit_hash(digest))

    def finish(self, splits: np.ndarray | None = None) -> dict[str, Any]:
        """Writes the split files; returns {split: {tokens, documents, sha256, offsets_sha256}}.

        Args:
          splits: index into SPLITS of each document [n]; None lets the digests decide.
        """
        lengths, shares = np.array(self.lengths, np.int64), np.array(self.shares)
        if len(lengths) < MIN_DOCUMENTS:
            raise DataError(f"domain {self.name!r} has {len(lengths)} distinct document(s): expected at least "
                            f"{MIN_DOCUMENTS}, so that train, validation and test each get one")
        self._spool.flush()
        spool = np.memmap(self._spool.name, self.dtype, "r")
        starts = np.concatenate([[0], np.cumsum(lengths)])
        splits = assign_splits(shares) if splits is None else splits
        out = {split: self._write(split, spool, starts, np.flatnonzero(splits == i)) for i, split in enumerate(SPLITS)}
        del spool
        self.close()
        return out

    def _write(self, split: str, spool: np.ndarray, starts: np.ndarray, documents: np.ndarray) -> dict[str, Any]:
        sizes = starts[documents + 1] - starts[documents]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        stem = self.folder / f"{slug(self.name)}.{split}"
        tokens = np.lib.format.open_memmap(
            stem.with_name(stem.name + ".tokens.npy"), "w+", self.dtype, (int(offsets[-1]),))
        for document, offset, size in zip(documents, offsets, sizes):
            tokens[offset : offset + size] = spool[starts[document] : starts[document] + size]
        tokens.flush()
        np.save(stem.with_name(stem.name + ".offsets.npy"), offsets)
        return {"tokens": len(tokens), "documents": len(documents), "sha256": array_sha256(tokens),
                "offsets_sha256": array_sha256(offsets)}

    def close(self) -> None:
        """Removes the scratch file."""
        self._spool.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._spool.name)


def write_index(folder: Path, *, name: str, tokenizer: str, vocab_size: int, domains: list[dict[str, Any]],
                recipe: str = "") -> None:
    """Writes `corpus.json`. Each domain: name, licence, rights, source, splits (of `DomainWriter.finish`)."""
    index = {"format": FORMAT, "name": name, "tokenizer": tokenizer, "vocab_size": vocab_size,
             "dtype": token_dtype(vocab_size).name, "end_of_document": END_OF_DOCUMENT, "recipe": recipe,
             "domains": [domain | {"slug": slug(domain["name"])} for domain in domains]}
    (folder / "corpus.json").write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def clear_leftovers(folder: Path, prefix: str, older_than_s: float = 3_600.0) -> None:
    """Removes scratch directories of killed runs; young ones may belong to a run that is alive."""
    for path in folder.glob(f"{prefix}*"):
        if path.is_dir() and time.time() - path.stat().st_mtime > older_than_s:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A scratch directory beside `target` that becomes `target` on success and vanishes on any failure.

    Raises:
      DataError: the directory cannot be made or written (no space, no permission); names it.
    """
    scratch = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        yield scratch
        scratch.chmod(0o755)
        if target.is_dir() and not any(target.iterdir()):
            target.rmdir()
        os.rename(scratch, target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
