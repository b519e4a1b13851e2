"""Made archives: nothing here touches a package index."""

import base64
import hashlib
import zipfile

import pytest


def write_wheel(path, members, record_of=None):
    """A wheel with `members` {name: bytes}; RECORD lists `record_of` (default: the members). Returns RECORD's hash."""
    rows = [f"{n},sha256={base64.urlsafe_b64encode(hashlib.sha256(d).digest()).decode().rstrip('=')},{len(d)}"
            for n, d in (record_of or members).items()]
    record = "\n".join([*rows, "toy-1.0.dist-info/RECORD,,"]).encode()
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in [*members.items(), ("toy-1.0.dist-info/RECORD", record)]:
            wheel.writestr(name, data)
    return hashlib.sha256(record).hexdigest()


@pytest.fixture
def make_wheel():
    return write_wheel
