"""A corpus as everything else sees it: named domains, one token stream per domain and split.

`open_corpus` returns the same object for the packaged corpus, a directory written by `data build`, synthetic data, and
what is made of one of them in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.config import DataConfig
from experiments.data import DataError
from experiments.data.shards import END_OF_DOCUMENT, FORMAT, SPLITS, array_sha256, token_dtype
from moe.config import require

FETCH_COMMAND = "python -m experiments data fetch"
FETCH_MODELS_COMMAND = f"{FETCH_COMMAND} --models"
MADE = ("noised", "redundant")  # of another corpus, by `experiments.data.noise`
Key = tuple[str, str]  # (domain, split)


class Stream(NamedTuple):
    """tokens [n] of a split's documents one after another; offsets int64 [documents + 1], starts and then n."""

    tokens: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True)
class DomainInfo:
    """What `data list` and `data stats` print. rights: `clear`, `unclear`, or `own` for a user's text."""

    name: str
    licence: str
    rights: str
    source: str
    tokens: Mapping[str, int]
    documents: Mapping[str, int]
    hashes: Mapping[str, tuple[str, str]]  # split -> SHA-256 of tokens, of offsets


@dataclass(frozen=True, eq=False)
class Corpus:
    """Token streams of several domains.

    Attributes:
      tokenizer: `byte`, `bpe`, `smollm2` or `none` (synthetic).
      vocab_size: token ids are below it; token 0 ends a document.
      folder: where `tokenizer.json` lies, unless tokens are bytes; None for synthetic data.
    """

    name: str
    tokenizer: str
    vocab_size: int
    info: tuple[DomainInfo, ...]
    streams: Mapping[Key, Stream] = field(repr=False)
    folder: Path | None = None

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(info.name for info in self.info)

    @property
    def content_hash(self) -> str:
        """SHA-256 over the vocabulary and, per domain and split, names and hashes of the arrays."""
        content = [self.tokenizer, self.vocab_size, [[i.name, sorted(i.hashes.items())] for i in self.info]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def stream(self, domain: str, split: str) -> Stream:
        """Raises ValueError for a domain or split that is not there."""
        require(split in SPLITS, "split", split, f"one of {', '.join(SPLITS)}")
        require(domain in self.domains, "domain", domain, f"one of {', '.join(self.domains)}")
        return self.streams[domain, split]

    def text(self, tokens: np.ndarray) -> bytes:
        """Bytes of a run of tokens [n], documents separated by blank lines (a cut character stays cut)."""
        if self.tokenizer not in ("byte", "none") and self.folder is not None:
            from experiments.data.tokenizer import BpeTokenizer

            words = BpeTokenizer.load(self.folder / "tokenizer.json")
            documents = np.split(tokens, np.flatnonzero(tokens == END_OF_DOCUMENT) + 1)
            return b"".join(words.decode(d).encode() + b"\n\n" * (END_OF_DOCUMENT in d[-1:]) for d in documents)
        return tokens.astype(np.uint8).tobytes().replace(b"\0", b"\n\n")

    def describe(self) -> dict[str, Any]:
        """For provenance: name, tokenizer, sizes and hash; no path of this machine."""
        return {"name": self.name, "tokenizer": self.tokenizer, "vocab_size": self.vocab_size,
                "content_hash": self.content_hash,
                "domains": {i.name: {"tokens": dict(i.tokens), "documents": dict(i.documents), "licence": i.licence,
                                     "rights": i.rights, "source": i.source} for i in self.info}}


def data_root() -> Path:
    """Where downloads and the packaged corpus live: SWITCHYARD_DATA, or `.data` in the checkout."""
    if override := os.environ.get("SWITCHYARD_DATA"):
        return Path(override).expanduser()
    checkout = Path(__file__).resolve().parents[2]
    return (checkout if (checkout / "pyproject.toml").exists() else Path.cwd()) / ".data"


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus a config names, reduced to its domains.

    Raises:
      DataError: the corpus is missing (says which command makes it), damaged or foreign.
      ValueError: an unknown domain, or no domain left; options that a made corpus does not take; weights that are not
        as many as the domains, or of domains named in another order than the corpus'.
    """
    if config.corpus == "synthetic":
        from experiments.data.synthetic import synthetic_corpus

        corpus = synthetic_corpus()
    elif config.corpus == "packaged":
        folder = data_root() / "packaged"
        if not (folder / "corpus.json").is_file():
            raise DataError(f"the packaged corpus is missing (looked in {folder}): run `{FETCH_COMMAND}` first")
        corpus = load_directory(folder)
    elif config.corpus.partition("(")[0].strip() in MADE:
        from moe.routing import from_spec  # it needs JAX

        corpus = from_spec(config.corpus, "experiments.data.noise:{}", "data.corpus")
    else:
        folder = Path(config.corpus).expanduser()
        if not (folder / "corpus.json").is_file():
            raise DataError(f"data.corpus = {config.corpus!r}: expected `packaged`, `synthetic`, or a directory "
                            "written by `python -m experiments data build` (one with a corpus.json), or a call such "
                            f"as `{MADE[0]}(levels=(0.0, 0.5))` or `{MADE[1]}(share=0.8)`")
        corpus = load_directory(folder)
    corpus = select(corpus, config.domains, config.allow_unclear_rights)
    if config.weights:
        count, order = len(corpus.domains), ", ".join(corpus.domains)
        require(len(config.weights) == count, "data.weights", config.weights, f"{count} numbers, for {order}; or none")
        require(config.domains in ((), corpus.domains), "data.domains", config.domains,
                f"the order of data.weights, which is the corpus': {order}")
    return corpus


def select(corpus: Corpus, domains: tuple[str, ...], allow_unclear_rights: bool) -> Corpus:
    """The corpus reduced to `domains` (empty: all), in the corpus' own order."""
    for name in domains:
        require(name in corpus.domains, "data.domains", name, f"names out of {', '.join(corpus.domains)}")
    kept = tuple(info for info in corpus.info if (not domains or info.name in domains)
                 and (allow_unclear_rights or info.rights != "unclear"))
    require(bool(kept), "data.allow_unclear_rights", allow_unclear_rights,
            f"true, or data.domains with clear rights: none of {', '.join(domains or corpus.domains)} has them")
    return replace(corpus, info=kept)


def load_directory(folder: Path, verify: bool = False) -> Corpus:
    """Opens a shard directory, arrays memory-mapped.

    Args:
      verify: also read every array and compare its SHA-256.

    Raises:
      DataError: an index that is no index, or an array that is missing or not what the index says.
    """
    index = _read_index(folder / "corpus.json")
    info, streams = [], {}
    try:
        for entry in index["domains"]:
            splits = {split: entry["splits"][split] for split in SPLITS}
            info.append(DomainInfo(
                entry["name"], entry["licence"], entry["rights"], entry["source"],
                {s: v["tokens"] for s, v in splits.items()}, {s: v["documents"] for s, v in splits.items()},
                {s: (v["sha256"], v["offsets_sha256"]) for s, v in splits.items()}))
            for split, values in splits.items():
                streams[entry["name"], split] = _load_stream(
                    folder, f"{entry['slug']}.{split}", token_dtype(index["vocab_size"]), values, verify)
        return Corpus(index["name"], index["tokenizer"], index["vocab_size"], tuple(info), streams, folder)
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / 'corpus.json'}: the entry {error} is missing or of the wrong type") from error


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
    found = index.get("format") if isinstance(index, dict) else None
    if found != FORMAT:
        raise DataError(f"{path}: format = {found!r}: expected {FORMAT}")
    return index


def _load_stream(folder: Path, stem: str, dtype: np.dtype, entry: Mapping[str, Any], verify: bool) -> Stream:
    tokens = _load_array(folder / f"{stem}.tokens.npy", dtype, entry["tokens"])
    offsets = _load_array(folder / f"{stem}.offsets.npy", np.dtype(np.int64), entry["documents"] + 1)
    for name, values, expected in (("tokens", tokens, entry["sha256"]), ("offsets", offsets, entry["offsets_sha256"])):
        if verify and (found := array_sha256(values)) != expected:
            raise DataError(f"{folder / stem}.{name}.npy: expected SHA-256 {expected}, found {found}")
    if offsets[0] != 0 or offsets[-1] != len(tokens):
        raise DataError(f"{folder / stem}.offsets.npy: expected to run from 0 to {len(tokens)}, "
                        f"found {offsets[0]} to {offsets[-1]}")
    return Stream(tokens, np.asarray(offsets))


def _load_array(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    try:
        values = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if values.dtype != dtype or values.shape != (length,):
        raise DataError(f"{path}: expected {dtype.name} [{length}], found {values.dtype.name} {list(values.shape)}")
    return values
