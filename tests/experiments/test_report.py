"""REPRODUCTIONS.md is a function of the committed results: the same bytes again, and stale when they change."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import report
from experiments.claims import mean_std
from experiments.cli import main


def numbers(values):
    mean, std = mean_std(values)
    return {"mean": mean, "std": std, "values": values}


def result(preset: str, commit: str = "0123456789abcdef+changes") -> dict:
    claim = {
        "text": "ours beats theirs",
        "metric": "val_ce",
        "compared": "ours - theirs",
        "claimed": "<= -0.1",
        "paper": "-0.2",
        "measured": {"mean": -0.25, "std": 0.07071, "values": [-0.2, -0.3]},
        "verdict": "holds",
    }
    made = {
        "commit": commit,
        "date": "2025-01-31",
        "python": "3.11.9",
        "packages": {"jax": "0.10.2"},
        "hardware": {"cpu": "A Processor", "cores": 2, "device_kind": "cpu", "devices": 1, "processes": 1},
        "corpus_hash": "feedface" * 8,
        "seeds": 2,
        "wall_seconds": 90.0,
        "config": {},
    }
    arms = {
        "theirs": {"val_ce": numbers([2.0, 2.1]), "step_ms": numbers([5.0, 5.5])},
        "ours": {"val_ce": numbers([1.8, 1.8]), "step_ms": numbers([6.0, 6.5]), "only_here": numbers([1.0, 1.0])},
    }
    names = {"experiment": "a-study", "preset": preset, "verdict": "holds"}
    return names | {"claim": [claim], "arms": arms, "provenance": made, "series": {}}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A tree with one experiment that has two committed presets and one that has none; returns where it is."""
    folder = tmp_path / "experiments"
    results = folder / "a_study" / "results"
    results.mkdir(parents=True)
    for preset in ("cpu", "cpu-long"):
        (results / f"{preset}.json").write_text(json.dumps(result(preset)))
    draw = lambda content, path: path.write_text(f"drawn {content['preset']}")  # noqa: E731
    load = lambda name: SimpleNamespace(title="A Study of Things", paper="Someone, 2020", figure=draw)  # noqa: E731
    monkeypatch.setattr(report, "FOLDER", folder)
    monkeypatch.setattr(report, "names", lambda: ["a-study", "not-run"])
    monkeypatch.setattr(report, "load", load)
    return SimpleNamespace(results=results, target=tmp_path / "REPRODUCTIONS.md")


def test_everything_a_result_says_is_there(tree):
    report.write(target=tree.target)
    text = tree.target.read_text()
    assert text.startswith(report.HEAD)
    assert "## a-study\n\nA Study of Things. Someone, 2020.\n" in text
    assert "not-run" not in text
    assert text.index("### cpu: holds") > 0
    assert text.index("### cpu-long: holds") > 0
    assert "| ours beats theirs: val_ce, ours - theirs | <= -0.1 | -0.2 | -0.25 ± 0.071 | -0.2, -0.3 | holds |" in text
    assert "| arm | val_ce | step_ms |" in text  # a metric that not every arm has is no column
    assert "| ours | 1.8 ± 0 | 6.25 ± 0.35 |" in text
    for word in (
        "2 seeds",
        "1.5 minutes on 2 cores (A Processor, 1 x cpu)",
        "2025-01-31",
        "Python 3.11.9",
        "jax 0.10.2",
    ):
        assert word in text
    assert "commit 0123456789ab with changes," in text
    assert report.commits("0123456789abcdef fedcba9876543210") == "0123456789ab and fedcba987654"
    assert "corpus feedfacefeed." in text
    assert "![a-study cpu](experiments/a_study/results/cpu.png)" in text
    assert (tree.results / "cpu-long.png").read_text() == "drawn cpu-long"


def test_equal_results_give_equal_bytes_and_check_agrees(tree):
    report.write(target=tree.target)
    first = tree.target.read_bytes()
    report.write(target=tree.target)
    assert tree.target.read_bytes() == first
    report.write(check=True, target=tree.target)


@pytest.mark.parametrize("change", ["text", "result", "gone", "new"])
def test_check_notices_what_is_stale_and_writes_nothing(tree, change):
    report.write(target=tree.target)
    if change == "text":
        tree.target.write_text(tree.target.read_text().replace("1.8", "1.7"))
    elif change == "result":
        (tree.results / "cpu.json").write_text(json.dumps(result("cpu", commit="fedcba9876543210")))
    elif change == "gone":
        tree.target.unlink()
    else:
        (tree.results / "gpu.json").write_text(json.dumps(result("gpu")))
    before = tree.target.read_bytes() if tree.target.exists() else None
    with pytest.raises(ValueError, match=r"REPRODUCTIONS\.md = 'stale'.*python -m experiments report"):
        report.write(check=True, target=tree.target)
    assert (tree.target.read_bytes() if tree.target.exists() else None) == before
    assert not (tree.results / "gpu.png").exists()


def test_without_results_there_is_only_the_head(tree):
    for path in tree.results.iterdir():
        path.unlink()
    report.write(target=tree.target)
    assert tree.target.read_text() == report.HEAD


def test_the_committed_file_is_what_the_committed_results_say(capsys):
    assert main(["report", "--check"]) == 0, capsys.readouterr().err


def test_what_is_typed_by_hand_is_what_the_committed_result_says():
    from experiments.global_batch_lbl import experiment

    folder = Path(experiment.__file__).parent
    content = json.loads((folder / "results" / "cpu.json").read_text())
    readme = (folder / "README.md").read_text()
    for row in content["claim"]:
        mean = row["measured"]["mean"]
        typed = f"{mean:.2f}x" if "/" in row["compared"] else f"{mean:.4f}"
        line = next(line for line in readme.splitlines() if line.startswith("|") and row["compared"] in line)
        assert typed in line
        assert line.endswith(f" {row['verdict']} |")
        assert typed in (experiment.__doc__ or "")
    assert f"**{content['verdict']}**" in readme
    for row in json.loads((folder / "results" / "cpu-long.json").read_text())["claim"]:
        mean, std = row["measured"]["mean"], row["measured"]["std"]
        assert (f"{mean:.2f}x" if "/" in row["compared"] else f"{mean:.4f} ± {std:.4f}") in readme
