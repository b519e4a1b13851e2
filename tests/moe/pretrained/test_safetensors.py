"""The safetensors reader and writer against the library, on every malformed input, and when writing is cut short."""

import gc
import io
import json
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors

from moe.pretrained import safetensors as ours
from moe.pretrained.safetensors import DTYPES, SafetensorsError, TensorInfo, open_safetensors, write_safetensors

F32 = np.dtype(np.float32)


def example():
    """A matrix, a scalar and an empty tensor of every dtype, any bytes; odd sizes, so that alignment is needed."""
    rng = np.random.default_rng(0)
    arrays = {}
    for code, dtype in DTYPES.items():
        for kind, shape in {"z": (3, 5), "scalar": (), "empty": (0, 4)}.items():
            count = int(np.prod(shape)) * dtype.itemsize
            high = 2 if code == "BOOL" else 256
            arrays[f"{kind}.{code}"] = rng.integers(0, high, count, np.uint8).view(dtype).reshape(shape)
    return arrays


def infos(arrays):
    return {name: TensorInfo(array.dtype, array.shape) for name, array in arrays.items()}


def write(folder, arrays, **options):
    write_safetensors(folder, infos(arrays), iter(arrays.values()), **options)


def by_library(arrays):
    spec = {
        name: safetensors.TensorSpec(
            dtype=array.dtype.name, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, array in arrays.items()
    }
    return bytes(safetensors.serialize(spec, metadata={"format": "pt"}))


def same(source, arrays):
    assert set(source.tensors) == set(arrays)
    for name, array in arrays.items():
        read = source.read(name)
        assert source.tensors[name] == (array.dtype, array.shape) == (read.dtype, read.shape), name
        assert read.tobytes() == array.tobytes(), name
        assert read.flags.c_contiguous
        assert read.flags.owndata
        assert read.flags.writeable


def listing(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*")}


# --- round trips ---


def test_the_file_is_the_librarys_byte_for_byte(tmp_path):
    arrays = example()
    write(tmp_path, arrays)
    assert (tmp_path / "model.safetensors").read_bytes() == by_library(arrays)


def test_reads_what_the_library_wrote(tmp_path):
    arrays = example()
    (tmp_path / "model.safetensors").write_bytes(by_library(arrays))
    same(open_safetensors(tmp_path), arrays)
    same(open_safetensors(tmp_path / "model.safetensors"), arrays)


def test_the_library_reads_our_shards(tmp_path):
    large = {"héad": np.arange(100.0, dtype=np.float32)}
    arrays = large | example() | {"tail": np.arange(100.0, dtype=np.float32)}
    write(tmp_path, arrays, max_shard_bytes=300)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text("utf-8"))
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 2
    assert {path.name for path in tmp_path.iterdir()} == {*files, "model.safetensors.index.json"}
    seen = set()
    for file in files:
        content = dict(safetensors.deserialize((tmp_path / file).read_bytes()))
        for name, tensor in content.items():
            assert index["weight_map"][name] == file
            assert bytes(tensor["data"]) == arrays[name].tobytes()
            assert tuple(tensor["shape"]) == arrays[name].shape
            assert DTYPES[tensor["dtype"]] == arrays[name].dtype
        # No more than the limit, unless the one tensor is larger: it is alone.
        assert sum(arrays[name].nbytes for name in content) <= 300 or set(content) in ({"héad"}, {"tail"})
        seen |= set(content)
    assert seen == set(arrays)
    same(open_safetensors(tmp_path), arrays)


def test_transposed_arrays_and_small_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "PIECE", 40)
    arrays = {
        "a": np.arange(42, dtype=np.int32).reshape(6, 7).T,
        "b": np.arange(60, dtype=np.float64).reshape(3, 4, 5).swapaxes(0, 2),
        "c": np.arange(30, dtype=np.int16)[::3],
        "d": np.arange(99, dtype=np.uint8),
    }
    calls = []
    write(tmp_path, arrays, max_shard_bytes=200, progress=lambda *call: calls.append(call))
    same(open_safetensors(tmp_path), arrays)
    total = sum(array.nbytes for array in arrays.values())
    done = [count for count, _ in calls]
    assert done == sorted(done)
    assert len(done) > len(arrays)
    assert calls[-1] == (total, total)


def test_metadata(tmp_path):
    write(tmp_path, {"a": np.ones(3, np.float32)}, metadata={"made by": "us"})
    assert safetensors.safe_open(tmp_path / "model.safetensors", "np").metadata() == {"made by": "us"}
    write(tmp_path, {"a": np.ones(3, np.float32)}, metadata={})
    same(open_safetensors(tmp_path), {"a": np.ones(3, np.float32)})


def test_one_array_at_a_time(tmp_path):
    class Tracked(np.ndarray):
        pass

    tensors = {f"t{i}": TensorInfo(F32, (8, 16)) for i in range(6)}
    alive, written = [], []

    def arrays():
        for i in range(6):
            gc.collect()
            assert not any(reference() is not None for reference in alive), f"an earlier array lives at {i}"
            assert written[-1:] == ([(512 * i, 3072)] if i else []), "pulled ahead"
            array = np.full((8, 16), i, np.float32).view(Tracked)
            alive.append(weakref.ref(array))
            yield array
            del array

    write_safetensors(
        tmp_path, tensors, arrays(), max_shard_bytes=1024, progress=lambda *call: written.append(call)
    )
    assert len(alive) == 6
    assert open_safetensors(tmp_path).read("t5")[7, 15] == 5


# --- what a failed write leaves ---


def poison(kind):
    """Two good arrays and then trouble."""
    yield np.zeros((2, 3), np.float32)
    yield np.ones((2, 3), np.float32)
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "error":
        raise RuntimeError("no more")
    if kind != "few":
        yield {"dtype": np.ones((2, 3)), "shape": np.ones((3, 2), np.float32)}.get(kind, np.ones((2, 3), np.float32))
    if kind == "many":
        yield np.ones((2, 3), np.float32)


POISON = {
    "interrupt": (KeyboardInterrupt, None),
    "error": (RuntimeError, "no more"),
    "few": (SafetensorsError, "none for c"),
    "many": (SafetensorsError, "arrays = 'more': expected 3"),
    "dtype": (SafetensorsError, "c: dtype = 'float64': expected float32, as promised"),
    "shape": (SafetensorsError, r"c: shape = \(3, 2\): expected \(2, 3\), as promised"),
}


@pytest.mark.parametrize("kind", POISON)
@pytest.mark.parametrize("limit", [10, 10**6], ids=["shards", "one file"])
def test_nothing_left_after_an_error(tmp_path, kind, limit):
    tensors = {name: TensorInfo(F32, (2, 3)) for name in "abc"}
    write(tmp_path / "old", {"x": np.ones(5, np.float32), "y": np.ones(5, np.float32)}, max_shard_bytes=20)
    before = listing(tmp_path / "old")
    for folder in (tmp_path / "old", tmp_path / "new" / "deeper"):
        error, message = POISON[kind]
        with pytest.raises(error, match=message):
            write_safetensors(folder, tensors, poison(kind), max_shard_bytes=limit)
    assert listing(tmp_path / "old") == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("fail_at", range(6))
def test_an_interrupt_between_the_renames_undoes_them(tmp_path, monkeypatch, fail_at):
    """Three old files are put aside, then three new ones take their names; any of the six may be the last."""
    write(tmp_path, {"x": np.ones(5, np.float32), "y": np.ones(5, np.float32)}, max_shard_bytes=20)
    before, rename, count = listing(tmp_path), ours.os.replace, 0

    def interrupted(source, target):
        nonlocal count
        rename(source, target)
        count += 1
        if count == fail_at + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(ours.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, {"p": np.zeros(5, np.float32), "q": np.zeros(5, np.float32)}, max_shard_bytes=20)
    assert listing(tmp_path) == before


def test_a_new_model_replaces_every_file_of_the_old_one(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    arrays = {name: np.full(5, i, np.float32) for i, name in enumerate("abc")}
    for limit, files in ((20, 4), (10**6, 1), (40, 3)):
        write(tmp_path, arrays, max_shard_bytes=limit)
        same(open_safetensors(tmp_path), arrays)
        assert len(list(tmp_path.iterdir())) == files + 1  # config.json stays


def test_a_model_can_be_written_over_its_source(tmp_path):
    arrays = {name: np.full(5, i, np.float32) for i, name in enumerate("abc")}
    write(tmp_path, arrays, max_shard_bytes=20)
    source = open_safetensors(tmp_path)
    write_safetensors(tmp_path, source.tensors, (source.read(name) + 1 for name in source.tensors))
    same(open_safetensors(tmp_path), {name: array + 1 for name, array in arrays.items()})


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({"a": TensorInfo(np.dtype(">f4"), (2,))}, {}, "a: dtype = '>f4'"),
        ({"a": TensorInfo(np.dtype(ml_dtypes.float4_e2m1fn), (2,))}, {}, "a: dtype = 'float4_e2m1fn'"),
        ({"a": TensorInfo(F32, (-1,))}, {}, "a: shape"),
        ({"__metadata__": TensorInfo(F32, (1,))}, {}, "other than __metadata__"),
        ({"a": TensorInfo(F32, (1,))}, {"max_shard_bytes": 0}, "max_shard_bytes = 0"),
        ({"a": TensorInfo(F32, (1,))}, {"metadata": {"a": 1}}, "metadata = "),
    ],
)
def test_refuses_before_anything_is_pulled_or_written(tmp_path, tensors, options, message):
    def never():
        raise AssertionError("pulled")
        yield

    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "out", tensors, never(), **options)
    assert not (tmp_path / "out").exists()


def test_refuses_a_file_as_folder(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(SafetensorsError, match="folder = "):
        write(tmp_path / "out", {"a": np.ones(1, np.float32)})
    assert (tmp_path / "out").read_text() == "x"


# --- malformed files ---


def file_of(header, data=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin, end, dtype: Any = "F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


GOOD = {"a": entry(0, 8), "b": entry(8, 16)}
DUPLICATE = f'{{"a":{json.dumps(entry(0, 8))},"a":{json.dumps(entry(0, 8))}}}'.encode()
BAD_FILES = {
    "empty file": (b"", "= '0 bytes': expected at least the 8 bytes"),
    "cut in the header": (file_of(GOOD)[:30], r"= '30 bytes': expected at least \d+ bytes \(truncated\)"),
    "cut in the data": (file_of(GOOD, bytes(15)), r"expected \d+ bytes \(truncated\)"),
    "bytes after the data": (file_of(GOOD, bytes(17)), r"expected \d+ bytes \(oversized\)"),
    "header too long": (file_of(b"{}", length=100_000_001), "header = '100000001 bytes': expected at most 100000000"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    "no JSON": (file_of(b"{nothing"), "header is no JSON"),
    "no text": (file_of(b'{"\xff\xfe": 1}'), "header is no JSON"),
    "deep JSON": (file_of(b'{"a":' + b"[" * 200_000), "header is no JSON"),
    "JSON list": (file_of(b"[]"), "expected a JSON object"),
    "space before": (file_of(b" {}"), "expected a JSON object"),
    "duplicate": (file_of(DUPLICATE, bytes(8)), "'a' is there twice"),
    "hole": (file_of({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)), r"b begins at byte = 12: expected 8 \(leaves"),
    "hole at the start": (file_of({"a": entry(4, 12)}, bytes(12)), "a begins at byte = 4: expected 0"),
    "overlap": (file_of({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), r"byte = 4: expected 8 \(overlaps"),
    "same bytes": (file_of({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), "overlaps"),
    "wrong count": (file_of({"a": entry(0, 12)}, bytes(12)), r"data_offsets = \[0, 12\]: expected 8 bytes for F32 of"),
    "backwards": (file_of({"a": entry(8, 0)}, bytes(8)), "expected 8 bytes"),
    "unknown dtype": (file_of({"a": entry(0, 8, "F31")}, bytes(8)), "a: dtype = 'F31': expected one of BOOL, U8"),
    "half bytes": (file_of({"a": entry(0, 1, "F4")}, bytes(1)), "a: dtype = 'F4'"),
    "dtype a list": (file_of({"a": entry(0, 8, ["F32"])}, bytes(8)), "a: dtype"),
    "negative shape": (file_of({"a": entry(0, 8, shape=(-2, -1))}, bytes(8)), "a: shape"),
    "shape of floats": (file_of({"a": entry(0, 8, shape=(2.0,))}, bytes(8)), "a: shape"),
    "huge shape": (file_of({"a": entry(0, 0, shape=(2**62, 4))}), "expected 73786976294838206464 bytes"),
    "three offsets": (file_of({"a": {**entry(0, 8), "data_offsets": [0, 4, 8]}}, bytes(8)), "a: data_offsets"),
    "extra field": (file_of({"a": {**entry(0, 8), "more": 1}}, bytes(8)), "a = .*data_offsets, dtype, shape"),
    "entry a number": (file_of({"a": 3}), "a = 3"),
    "metadata of numbers": (file_of({"__metadata__": {"x": 1}}), "__metadata__"),
}


def test_the_good_file_is_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(file_of(GOOD, np.arange(4, dtype=np.float32).tobytes()))
    same(open_safetensors(tmp_path), {"a": np.array([0, 1], np.float32), "b": np.array([2, 3], np.float32)})


@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses_a_malformed_file(tmp_path, case):
    content, message = BAD_FILES[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(SafetensorsError, match=message) as error:
        open_safetensors(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value)


def test_an_unknown_name_and_a_file_that_shrank(tmp_path):
    write(tmp_path, {"a": np.ones(100, np.float32)})
    source = open_safetensors(tmp_path)
    with pytest.raises(SafetensorsError, match="tensor = 'b'"):
        source.read("b")
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(300)
    with pytest.raises(SafetensorsError, match="does not change"):
        source.read("a")


def test_reads_that_return_less_than_asked(tmp_path, monkeypatch):
    """As reads of more than 2 GB do."""

    class Slow(io.FileIO):
        def readinto(self, buffer):
            return super().readinto(memoryview(buffer)[:7])

    arrays = example()
    write(tmp_path, arrays)
    source = open_safetensors(tmp_path)
    monkeypatch.setattr(ours, "open", lambda path, mode, buffering: Slow(path, mode), raising=False)
    same(source, arrays)


# --- folders ---


@pytest.fixture
def sharded(tmp_path):
    """Tensors a, b, c in a file each."""
    write(tmp_path, {name: np.ones(5, np.float32) for name in "abc"}, max_shard_bytes=20)
    return tmp_path


def rewrite_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def refused(folder, *messages):
    with pytest.raises(SafetensorsError) as error:
        open_safetensors(folder)
    for message in messages:
        assert message in str(error.value)


def test_missing_shards_are_all_named(sharded):
    (sharded / "model-00001-of-00003.safetensors").unlink()
    (sharded / "model-00003-of-00003.safetensors").unlink()
    refused(sharded, "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors", "all 3 files")


def test_broken_shards_are_all_named(sharded):
    for i in (1, 3):
        with open(sharded / f"model-0000{i}-of-00003.safetensors", "r+b") as file:
            file.truncate(90)
    refused(sharded, "model-00001-of-00003.safetensors = '90 bytes'", "model-00003-of-00003.safetensors = '90 bytes'")


def test_a_tensor_in_two_shards(sharded):
    content = (sharded / "model-00001-of-00003.safetensors").read_bytes()
    (sharded / "model-00002-of-00003.safetensors").write_bytes(content)
    refused(sharded, "tensor a is in model-00001-of-00003.safetensors and in model-00002-of-00003.safetensors")


def test_index_and_shards_that_contradict_each_other(sharded):
    def change(places):
        places["ghost"] = places["b"]
        del places["b"]
        places["a"], places["c"] = places["c"], places["a"]

    rewrite_index(sharded, change)
    refused(
        sharded,
        "named by the index, in no shard: ghost",
        "in a shard, not in the index: b",
        "not in the shard the index says: a, c",
    )


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""])
def test_an_index_may_not_lead_outside(sharded, name):
    rewrite_index(sharded, lambda places: places.update(a=name))
    refused(sharded, "without a folder")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"a":1,"a":2}'])
def test_a_malformed_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    refused(sharded, "model.safetensors.index.json")


def test_an_index_beside_one_file(sharded, tmp_path):
    write(tmp_path / "one", {"a": np.ones(5, np.float32)})
    (sharded / "model.safetensors").write_bytes((tmp_path / "one" / "model.safetensors").read_bytes())
    refused(sharded, "expected one model")
    index = {"weight_map": {"a": "model.safetensors"}}  # some writers add an index to a single file
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    same(open_safetensors(sharded), {"a": np.ones(5, np.float32)})


def test_folders_without_safetensors(tmp_path):
    refused(tmp_path / "none", "expected a folder with safetensors")
    refused(tmp_path, "has no weights")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    refused(tmp_path, "pickle files only (pytorch_model.bin): only safetensors are read")
    refused(tmp_path / "pytorch_model.bin", "expected a .safetensors file")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    refused(tmp_path, "only adapter_model.safetensors")


def test_long_lists_are_cut():
    assert ours.listed(f"t{i:02}" for i in range(30)).endswith("t19 and 10 more")
    assert ours.listed("ba") == "a, b"
