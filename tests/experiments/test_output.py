"""The output directory: what is in it, whether it can be written to, and files that are never half there."""

import json
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest

from experiments.output import contents, elapsed, probe, stopwatch, write_json


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_contents(tmp_path):
    assert contents(tmp_path / "new") is None
    assert contents(tmp_path) == []
    (tmp_path / "file").write_text("mine")
    assert contents(tmp_path) == ["file"]
    for path in (tmp_path / "file", tmp_path / "file" / "deeper", tmp_path / ("x" * 300)):
        with pytest.raises(ValueError, match="--out = .*expected a directory"):
            contents(path)


def test_probe_makes_the_directory_and_leaves_it_as_it_was(tmp_path):
    probe(tmp_path / "a" / "b")
    assert files(tmp_path) == ["a", "a/b"]
    (tmp_path / "a" / "b" / "kept").write_text("mine")
    probe(tmp_path / "a" / "b")
    assert files(tmp_path) == ["a", "a/b", "a/b/kept"]


@contextmanager
def small_files():
    """A limit of the operating system on the size of files: a write that really fails half way.

    It holds for this whole process, so not a moment longer than the write: pytest's own output may go to a file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_probe_finds_that_a_megabyte_does_not_fit(tmp_path):
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "there", tmp_path / "a" / "b"):
        message = r"--out = .*expected a writable directory with free space \(File too"
        with pytest.raises(ValueError, match=message), small_files():
            probe(out)
    assert files(tmp_path) == ["there"]


def test_probe_below_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"--out = .*Not a directory"):
        probe(tmp_path / "file" / "a" / "b")
    assert files(tmp_path) == ["file"]


def test_a_failed_write_keeps_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})
    with pytest.raises(OSError, match="File too large"), small_files():
        write_json(path, {"new": list(range(10_000))})
    assert files(tmp_path) == ["result.json"]
    assert json.loads(path.read_text()) == {"old": 1}


def test_rows_of_numbers_are_written_on_one_line_and_read_back_equal(tmp_path):
    value = {
        "curve": [0.5, -1e-7, 3.0],
        "maps": [[[1, 2], [3, 4]], None, []],
        "words": ["a [b]", "c, d\n", "[\n1\n]"],
        "nested": {"list": [{"x": [1.25]}], "none": [None, True]},
    }
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == value
    for row in ("[0.5, -1e-07, 3.0]", "[1, 2]", "[3, 4]", "[1.25]", "[null, true]"):
        assert row in text


def test_stopwatch_adds_up_over_interruptions(tmp_path, monkeypatch):
    now = iter([100.0, 103.0, 200.0, 204.5])
    monkeypatch.setattr("experiments.output.time.time", lambda: next(now))
    path = tmp_path / "wall.json"
    assert elapsed(path) == 0.0
    with pytest.raises(KeyboardInterrupt), stopwatch(path):
        raise KeyboardInterrupt
    assert elapsed(path) == 3.0
    with stopwatch(path):
        pass
    assert elapsed(path) == 7.5


def test_what_cannot_be_written_as_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
