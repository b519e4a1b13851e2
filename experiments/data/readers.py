"""A user's text files to documents, streamed: .txt, .jsonl, .parquet. Every error says in which line, row or byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.data import DataError
from moe.config import require

EXTENSIONS = (".txt", ".jsonl", ".parquet")
PARQUET_ROWS = 256  # read at a time
MIN_PIECE_BYTES, MAX_PIECE_BYTES = 2_048, 65_536  # of a text without blank lines


class Document(NamedTuple):
    """position: how far into the file, 0 to 1."""

    domain: str
    text: str
    position: float


def check_source(path: Path) -> None:
    """Raises ValueError unless `path` is a file, not empty, with a known extension."""
    require(path.suffix.lower() in EXTENSIONS, "from", str(path), f"a file ending in one of {', '.join(EXTENSIONS)}")
    require(path.is_file(), "from", str(path), "an existing file")
    require(path.stat().st_size > 0, "from", str(path), "a file with text in it (this one has 0 bytes)")


def read_documents(path: Path, text_key: str, domain_key: str) -> Iterator[Document]:
    """Documents in file order.

    A text file is one domain named after the file, its documents separated by blank lines; without any, it is cut at
    line ends into about a hundred. Rows of the other two hold a text and perhaps a domain: all of them, or none, and
    then the domain is named after the file.

    Raises:
      DataError: not UTF-8 (byte offset), invalid JSON (line), a missing or wrong value (row, key).
    """
    check_source(path)
    kind = path.suffix.lower()
    if kind == ".txt":
        yield from _text(path)
        return
    rows = _jsonl(path) if kind == ".jsonl" else _parquet(path, text_key, domain_key)
    unit = "line" if kind == ".jsonl" else "row"
    with_domain: bool | None = None
    for number, row, position in rows:
        where = f"{path}, {unit} {number}"
        if with_domain is None:
            with_domain = domain_key in row
            if not with_domain and domain_key != "domain":  # asked for by name
                raise DataError(f"{where}: no key {domain_key!r}: expected one of {', '.join(map(repr, row))}")
        text = _string(row, text_key, where)
        if with_domain != (domain_key in row):
            raise DataError(f"{where}: {'no' if with_domain else 'a'} key {domain_key!r}: expected it in all rows or "
                            f"in none, and the first row has {'one' if with_domain else 'none'}")
        yield Document(_string(row, domain_key, where) if with_domain else path.stem, text, position)


def _string(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise DataError(f"{where}: no key {key!r}: this row has {', '.join(map(repr, row)) or 'none'}")
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} = {value!r}: expected a string")
    return value


def _lines(path: Path) -> Iterator[tuple[int, str, int]]:
    """(number from 1, line without its end, bytes read so far)."""
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: not UTF-8 at byte {offset + error.start} (line {number}, "
                                f"0x{raw[error.start]:02x}): expected UTF-8 text") from error
            offset += len(raw)
            yield number, line.rstrip("\r\n"), offset


def _text(path: Path) -> Iterator[Document]:
    size = path.stat().st_size
    limit = None if _has_blank_lines(path) else min(max(size // 100, MIN_PIECE_BYTES), MAX_PIECE_BYTES)
    block: list[str] = []
    started = read = 0
    for _, line, read in _lines(path):
        if line.strip():
            block.append(line)
        if block and (not line.strip() if limit is None else read - started >= limit):
            yield Document(path.stem, "\n".join(block), read / size)
            block, started = [], read
    if block:
        yield Document(path.stem, "\n".join(block), read / size)


def _has_blank_lines(path: Path) -> bool:
    """Whether a blank line stands between two lines of text."""
    state = "start"
    for _, line, _ in _lines(path):
        if line.strip():
            if state == "blank":
                return True
            state = "text"
        elif state == "text":
            state = "blank"
    return False


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any], float]]:
    size = path.stat().st_size
    for number, line, read in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: invalid JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: {type(row).__name__}: expected a JSON object")
        yield number, row, read / size


def _parquet(path: Path, text_key: str, domain_key: str) -> Iterator[tuple[int, dict[str, Any], float]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names, total, number = file.schema_arrow.names, file.metadata.num_rows, 0
            columns = [key for key in (text_key, domain_key) if key in names]
            if text_key not in names:
                raise DataError(f"{path}: no column {text_key!r}: expected one of {', '.join(map(repr, names))}")
            for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row, number / total
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({error})") from error
