from pathlib import Path

import pytest
from rich.console import Console

from experiments.bench import report


def test_bad_output_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"json = .*missing.* expected a file in an existing, writable directory"):
        report.check_output(tmp_path / "missing" / "result.json")
    with pytest.raises(ValueError, match="expected a file, not a directory"):
        report.check_output(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_busy_machine_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    for load, warned in ((0.2, False), (5.0, True)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        console = Console(record=True, width=120)
        assert report.load_before(console) == load
        assert ("load average 5.0 on 2 cores" in console.export_text()) == warned
