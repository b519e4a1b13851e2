from json import loads
from pathlib import Path

import pytest

from experiments.bench import report


def test_the_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    report.write_json(path, {"a": 1})
    assert loads(path.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        report.write_json(path, {"a": object()})
    assert loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_bad_output_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"json = .*missing.* expected a file in an existing, writable directory"):
        report.check_output(tmp_path / "missing" / "result.json")
    with pytest.raises(ValueError, match="expected a file, not a directory"):
        report.check_output(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_provenance_names_commit_and_hardware_but_no_machine_path() -> None:
    found = report.provenance()
    assert set(found) == {"date", "commit", "hardware"}
    assert found["hardware"]["cores"] >= 1
    assert str(Path.home()) not in str(found)
