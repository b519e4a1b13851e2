"""Safetensors files, read and written one tensor at a time.

A file is an 8-byte little-endian length N, a JSON header of N bytes (tensor name -> dtype, shape, [begin, end) in the
data), and the data without holes. A model is one file, or shards and an index that says which tensor lies in which.
Format: https://github.com/huggingface/safetensors, names of the files: Hugging Face's `save_pretrained`.

The files are read with plain reads: a memory map counts as resident memory, which would hide what a conversion needs.
Nothing but numbers can come out of these files; pickles, which can run code, are refused.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from moe.config import require

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHTS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors|model\.safetensors\.index\.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
METADATA = MappingProxyType({"format": "pt"})  # transformers refuses files that do not say so
MAX_HEADER = 100_000_000  # bytes; the same limit as the library's
PIECE = 1 << 26  # bytes written at once
SHOWN = 20  # names listed in one error

# In ascending order of the data: a file starts with the last of these, so that every tensor begins at a multiple of
# its item size. Readers that view the data in place need that.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "C64": np.dtype(np.complex64),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


class SafetensorsError(ValueError):
    """A folder or file that is not what it should be; the message names it, what was found and what was expected."""


class TensorInfo(NamedTuple):
    """What a tensor is, without its numbers."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Source(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a command must tell its user, one sentence each."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor in fresh memory, C order."""
        ...


def check(ok: bool, field: str, value: object, expected: str) -> None:
    """`require`, raising SafetensorsError."""
    try:
        require(ok, field, value, expected)
    except ValueError as error:
        raise SafetensorsError(str(error)) from None


def listed(names: Iterable[str]) -> str:
    """The names in order, not more than SHOWN of them."""
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


# --- reading ---


class Place(NamedTuple):
    """Where a tensor's bytes lie: from byte `offset` of the file."""

    path: Path
    offset: int


class SafetensorsFiles:
    """A `Source` over safetensors files whose headers were checked; made by `open_safetensors`."""

    notes: tuple[str, ...] = ()

    def __init__(self, tensors: Mapping[str, TensorInfo], places: Mapping[str, Place]):
        self.tensors, self._places = dict(tensors), dict(places)

    def read(self, name: str) -> np.ndarray:
        """The tensor in fresh memory.

        Raises:
          SafetensorsError: no such tensor, or the file shrank since it was opened.
        """
        check(name in self.tensors, "tensor", name, "a name of the checkpoint")
        info, place = self.tensors[name], self._places[name]
        array = np.empty(info.shape, info.dtype)
        rest = array.reshape(-1).view(np.uint8).data
        with open(place.path, "rb", buffering=0) as file:
            file.seek(place.offset)
            while rest:
                count = file.readinto(rest)  # Linux reads at most 2 GB at once
                check(bool(count), str(place.path), "shorter than when it was opened", "a file that does not change")
                rest = rest[count:]
        return array


def open_safetensors(folder: Path) -> SafetensorsFiles:
    """Opens a model: a folder with model.safetensors or with an index and its shards, or one .safetensors file.

    Every header is read and checked now, so that a broken download shows before any work is done.

    Raises:
      SafetensorsError: nothing to read (or only pickles), shards missing (all are named), files truncated, oversized or
        malformed (all are named), a tensor in two shards, index and shards that contradict each other.
    """
    folder = Path(folder)
    if folder.is_file():
        check(folder.suffix == ".safetensors", "file", str(folder), "a .safetensors file")
        return _open_files([folder])[0]
    check(folder.is_dir(), "folder", str(folder), "a folder with safetensors files")
    if (folder / INDEX).is_file():
        return _open_indexed(folder)
    if not (folder / SINGLE).is_file():
        _refuse(folder)
    return _open_files([folder / SINGLE])[0]


def _refuse(folder: Path) -> None:
    """Says why a folder without safetensors is not read."""
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    expected = f"{SINGLE}, or {INDEX} and its shards"
    pickles = [name for name in files if name.endswith(PICKLES)]
    others = [name for name in files if name.endswith(".safetensors")]
    if others:
        raise SafetensorsError(f"{folder} has no {SINGLE} and no {INDEX}, only {listed(others)}: expected {expected}")
    if pickles:
        raise SafetensorsError(
            f"{folder} has its weights in pickle files only ({listed(pickles)}): only safetensors are read, because "
            f"unpickling can run code; expected {expected}"
        )
    raise SafetensorsError(f"{folder} has no weights: expected {expected}")


def _open_indexed(folder: Path) -> SafetensorsFiles:
    index = folder / INDEX
    try:
        content = json.loads(index.read_text("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise SafetensorsError(f"{index} is no JSON ({error}): expected an index of shards") from None
    places = content.get("weight_map") if isinstance(content, dict) else None
    ok = isinstance(places, dict) and places and all(isinstance(file, str) for file in places.values())
    if not ok or not isinstance(places, dict):
        raise SafetensorsError(f"{index} has no map from tensors to files: expected weight_map, a JSON object")
    files = sorted(set(places.values()))
    outside = [file for file in files if file in ("", ".", "..") or re.search(r"[/\\\0]", file)]
    check(not outside, f"{index}: files", listed(outside), "names of files beside the index, without a folder")
    if (folder / SINGLE).is_file() and SINGLE not in files:
        raise SafetensorsError(f"{folder} has both {SINGLE} and an {INDEX} that does not name it: expected one model")
    missing = [file for file in files if not (folder / file).is_file()]
    check(not missing, f"{index}: missing shards", ", ".join(missing), f"all {len(files)} files of the index")

    source, found = _open_files([folder / file for file in files])
    wrong = {
        "named by the index, in no shard": [name for name in places if name not in found],
        "in a shard, not in the index": [name for name in found if name not in places],
        "not in the shard the index says": [name for name in found if places.get(name, found[name]) != found[name]],
    }
    text = [f"{what}: {listed(names)}" for what, names in wrong.items() if names]
    if text:
        raise SafetensorsError(f"{index} and its shards contradict each other; tensors {'; tensors '.join(text)}")
    return source


def _open_files(paths: Sequence[Path]) -> tuple[SafetensorsFiles, dict[str, str]]:
    """The files as one source, and the name of the file of every tensor."""
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, Place] = {}
    problems: list[str] = []
    for path in paths:
        try:
            data, header = _read_header(path)
        except SafetensorsError as error:
            problems.append(str(error))
            continue
        for name, (info, begin) in header.items():
            if name in tensors:
                problems.append(f"tensor {name} is in {places[name].path.name} and in {path.name}: expected one shard")
            tensors[name], places[name] = info, Place(path, data + begin)
    if problems:
        more = f"\n... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise SafetensorsError("\n".join(problems[:SHOWN]) + more)
    return SafetensorsFiles(tensors, places), {name: place.path.name for name, place in places.items()}


def _read_header(path: Path) -> tuple[int, dict[str, tuple[TensorInfo, int]]]:
    """Reads and checks a header.

    Returns:
      The byte at which the data begins, and for every tensor what it is and where in the data it begins.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        check(first != b"version ", str(path), "a git-lfs pointer", "the file it points to")
        check(len(first) == 8, str(path), f"{size} bytes", "at least the 8 bytes of a header's length (truncated)")
        length = int.from_bytes(first, "little")
        check(length <= MAX_HEADER, f"{path}: header", f"{length} bytes", f"at most {MAX_HEADER} bytes")
        check(8 + length <= size, str(path), f"{size} bytes", f"at least {8 + length} bytes (truncated)")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates) if raw[:1] == b"{" else None
    except (ValueError, RecursionError) as error:
        raise SafetensorsError(f"{path}: header is no JSON ({error}): expected an object of tensors") from None
    if not isinstance(header, dict):
        raise SafetensorsError(f"{path}: header = {raw[:20]!r}...: expected a JSON object")
    _check_metadata(header.pop("__metadata__", {}), f"{path}: __metadata__")

    entries = {name: _entry(entry, f"{path}: {name}") for name, entry in header.items()}
    position = 0
    for name, (_, begin, end) in sorted(entries.items(), key=lambda item: item[1][1:]):
        what = "overlaps the tensor before" if begin < position else "leaves a hole"
        check(begin == position, f"{path}: {name} begins at byte", begin, f"{position} ({what})")
        position = end
    what = "truncated" if size < 8 + length + position else "oversized"
    check(size == 8 + length + position, str(path), f"{size} bytes", f"{8 + length + position} bytes ({what})")
    return 8 + length, {name: (info, begin) for name, (info, begin, _) in entries.items()}


def _entry(entry: Any, field: str) -> tuple[TensorInfo, int, int]:
    """Checks one tensor's entry of a header; returns what it is and the bytes [begin, end) it takes."""
    fields = {"dtype", "shape", "data_offsets"}
    check(isinstance(entry, dict) and set(entry) == fields, field, entry, f"an object with {', '.join(sorted(fields))}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    check(isinstance(code, str) and code in DTYPES, f"{field}: dtype", code, f"one of {', '.join(DTYPES)}")
    check(_sizes(shape), f"{field}: shape", shape, "a list of sizes")
    check(_sizes(offsets) and len(offsets) == 2, f"{field}: data_offsets", offsets, "two byte positions")
    info = TensorInfo(DTYPES[code], tuple(shape))
    begin, end = offsets
    check(end - begin == info.nbytes, f"{field}: data_offsets", offsets,
          f"{info.nbytes} bytes for {code} of shape {list(shape)}")
    return info, begin, end


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return content


def _check_metadata(metadata: Any, field: str) -> None:
    ok = isinstance(metadata, Mapping) and all(isinstance(x, str) for item in metadata.items() for x in item)
    check(ok, field, metadata, "a map from text to text")


# --- writing ---


def write_safetensors(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    arrays: Iterable[np.ndarray],
    *,
    max_shard_bytes: int = 5 * 10**9,
    metadata: Mapping[str, str] = METADATA,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a model as model.safetensors, or as shards and an index.

    Weights that the folder had under these names are replaced when everything is written; after an error or an
    interrupt they are as before and nothing new is there.

    Args:
      folder: is made if it does not exist.
      tensors: what will be written, in order; this alone decides the shards.
      arrays: the arrays in the order of `tensors`, each pulled when the one before is written and let go.
      max_shard_bytes: of tensors in one file; a larger tensor has a file of its own.
      metadata: text for the files' headers.
      progress: called as (bytes done, bytes in all) while writing.

    Raises:
      SafetensorsError: a tensor that the format cannot hold, too few or too many arrays, an array of another dtype or
        shape than promised.
    """
    folder = Path(folder)
    check(not folder.exists() or folder.is_dir(), "folder", str(folder), "a folder, or a path where one can be made")
    tensors = _checked(tensors)
    _check_metadata(metadata, "metadata")
    require(max_shard_bytes >= 1, "max_shard_bytes", max_shard_bytes, "at least 1")
    shards = _split(tensors, max_shard_bytes)
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE]
    layouts = [_layout(shard, metadata) for shard in shards]
    done, total = 0, sum(info.nbytes for info in tensors.values())

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    source = iter(arrays)
    with _all_or_nothing(folder, files if len(files) == 1 else [*files, INDEX]) as paths:
        for name, shard, (header, begins) in zip(files, shards, layouts):
            with open(paths[name], "wb") as file:
                file.write(header)
                for tensor, info in shard.items():
                    file.seek(len(header) + begins[tensor])
                    _put(file, source, tensor, info, advance)
        check(next(source, None) is None, "arrays", "more", f"{len(tensors)}, one for each tensor")
        if len(files) > 1:
            weight_map = {tensor: file for file, shard in zip(files, shards) for tensor in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            paths[INDEX].write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _checked(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    checked = {}
    for name, (dtype, shape) in tensors.items():
        check(isinstance(name, str) and name != "__metadata__", "tensor", name, "a name other than __metadata__")
        dtype = np.dtype(dtype)
        check(dtype in CODES, f"{name}: dtype", str(dtype), f"one of {', '.join(map(str, CODES))}")
        checked[name] = TensorInfo(dtype, tuple(int(size) for size in shape))
        check(min(checked[name].shape, default=0) >= 0, f"{name}: shape", shape, "sizes of 0 or more")
    return checked


def _split(tensors: Mapping[str, TensorInfo], limit: int) -> list[dict[str, TensorInfo]]:
    """Consecutive tensors of at most `limit` bytes together."""
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in tensors.items():
        if shards[-1] and size + info.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.nbytes
    return shards


def _layout(shard: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """A file's first bytes, up to its data, and where in the data each tensor begins.

    Tensors lie in descending order of item size, see DTYPES, and by name, in whatever order they are written.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, position = {}, 0
    for name, info in sorted(shard.items(), key=lambda item: (-RANK[item[1].dtype], item[0])):
        begins[name], end = position, position + info.nbytes
        entries[name] = {"dtype": CODES[info.dtype], "shape": info.shape, "data_offsets": (position, end)}
        position = end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    header += b" " * (-len(header) % 8)
    check(len(header) <= MAX_HEADER, "header", f"{len(header)} bytes", f"at most {MAX_HEADER}: fewer tensors a shard")
    return len(header).to_bytes(8, "little") + header, begins


def _put(
    file: BinaryIO, source: Iterator[np.ndarray], name: str, info: TensorInfo, advance: Callable[[int], None]
) -> None:
    """Pulls the next array and writes it; a function of its own so that nothing holds the array afterwards."""
    array = next(source, None)
    check(array is not None, "arrays", f"none for {name}", "one for each tensor")
    array = np.asarray(array)
    check(array.dtype == info.dtype, f"{name}: dtype", str(array.dtype), f"{info.dtype}, as promised")
    check(array.shape == info.shape, f"{name}: shape", array.shape, f"{info.shape}, as promised")
    for piece in _pieces(array):
        file.write(piece.data)
        advance(piece.nbytes)


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array's bytes in C order, in parts; a transposed array is copied by parts, never as a whole."""
    if array.flags.c_contiguous:
        flat = array.reshape(-1).view(np.uint8)
        for begin in range(0, flat.size, PIECE):
            yield flat[begin : begin + PIECE]
        return
    rows = max(1, PIECE // (array.nbytes // len(array)))
    for begin in range(0, len(array), rows):
        yield np.ascontiguousarray(array[begin : begin + rows]).reshape(-1).view(np.uint8)


@contextlib.contextmanager
def _all_or_nothing(folder: Path, names: Sequence[str]) -> Iterator[dict[str, Path]]:
    """Gives a temporary path for each name; at the end they take the place of all weights the folder had.

    After an error the temporary files, and folders that were made, are gone and the folder's weights untouched.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    staged = {name: folder / f".{name}.{os.getpid()}.new" for name in names}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield staged
        old = [path for path in folder.iterdir() if WEIGHTS.fullmatch(path.name) and not path.is_dir()]
        aside = [path.with_name(f".{path.name}.{os.getpid()}.old") for path in old]
        _rename_all([*zip(old, aside), *((staged[name], folder / name) for name in names)])
    except BaseException:  # KeyboardInterrupt too
        for path in staged.values():
            path.unlink(missing_ok=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    for path in aside:
        path.unlink()


def _rename_all(moves: Sequence[tuple[Path, Path]]) -> None:
    """All renames or, after an error or an interrupt, none."""
    begun = []
    try:
        for source, target in moves:
            begun.append((source, target))
            os.replace(source, target)
    except BaseException:
        for source, target in reversed(begun):
            if not source.exists():
                os.replace(target, source)
        raise
