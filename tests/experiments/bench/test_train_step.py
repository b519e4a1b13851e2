"""The whole command on a tiny shape with our real worker, and with fake contestants where only the order matters."""

import os
import sys
from json import loads
from pathlib import Path

import pytest
from rich.console import Console

from experiments.bench import protocol, train_step
from experiments.bench.protocol import Worker, WorkerError
from experiments.bench.shape import StepShape

TINY = StepShape(
    hidden=16, layers=2, heads=2, head_dim=8, experts=4, top_k=2, expert_dim=8, vocab=32, batch=2, seq=16
)  # fmt: skip
FAKE = Path(__file__).with_name("fake_worker.py")


@pytest.fixture
def fake_peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An 'interpreter' that has torch, as far as the check can see, and runs a contestant of one millisecond a step."""
    script = tmp_path / "python"
    root = Path(__file__).parents[3]
    run = f'exec "{sys.executable}" "{FAKE}" 0.001'
    script.write_text(f'#!/bin/sh\nexport PYTHONPATH="{root}"\nif [ "$1" = -c ]; then exit 0; fi\n{run}\n')
    script.chmod(0o755)
    return script


@pytest.mark.slow
def test_whole_command(fake_peer: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    console = Console(record=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115
    result = train_step.main(out, fake_peer, rounds=2, shape=TINY, squares=(32,), console=console)
    assert loads(out.read_text()) == result

    seconds = result["samples"]["ours"]["seconds"]
    assert result["tokens_per_second"] == pytest.approx(TINY.tokens / (sum(seconds) / 2))
    assert result["peak_ratio"] == pytest.approx(TINY.flops / (sum(seconds) / 2) / result["peak"]["flops_per_second"])
    assert set(result["peak"]["rates"]) == {"32 square", *TINY.matmul_shapes()}
    # The steps are real: the same batch again and again is learnt.
    losses = result["samples"]["ours"]["loss"]
    assert losses[0] > losses[1]

    assert list(result["parts"]) == [*TINY.part_flops(), "other"]
    assert sum(row["ms"] for row in result["parts"].values()) == pytest.approx(result["step_ms"])
    floors = {name: row["floor_ms"] for name, row in result["parts"].items()}
    expected = 1e3 * TINY.part_flops()["experts"] / result["peak"]["flops_per_second"]
    assert floors["experts"] == pytest.approx(expected)

    assert result["peer"]["tokens_per_second"] == pytest.approx(TINY.tokens / 0.001)
    assert result["peer"]["speed_of_ours"] == pytest.approx(sum(0.001 / s for s in seconds) / 2)
    assert result["peer"]["own_matmul_peak"] == 1e9
    assert {"provenance", "load_average_before", "versions", "shape", "flops_per_step"} <= result.keys()
    assert str(tmp_path) not in out.read_text()
    shown = console.export_text()
    assert "OLMoE on PyTorch (only one)" in shown
    assert "router + dispatch" in shown


def refuse_to_start(*args: object, **options: object) -> None:
    raise AssertionError("a worker was started")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, "rounds = 0: expected at least 1"),
        ({"json": "missing/result.json"}, "json = .* expected a file in an existing"),
        ({"peer_python": "no-python"}, "peer_python = .*no-python.* expected an executable Python interpreter"),
        ({"against": "no-such-revision"}, "against = 'no-such-revision': expected a revision"),
    ],
)
def test_bad_arguments(
    arguments: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "Worker", refuse_to_start)
    paths = {name: tmp_path / value for name, value in arguments.items() if name in ("json", "peer_python")}
    with pytest.raises(ValueError, match=message):
        train_step.main(**{"json": tmp_path / "result.json", **arguments, **paths})
    assert list(tmp_path.iterdir()) == []


def test_an_interpreter_without_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(protocol, "Worker", refuse_to_start)
    with pytest.raises(ValueError, match="expected an interpreter that has torch and transformers"):
        train_step.main(tmp_path / "result.json", bare)


class Interrupted(Worker):
    """Our side as a fake, and Ctrl-C in the first round."""

    started: "list[Worker]" = []  # noqa: RUF012

    def __init__(self, name: str, command: object, cwd: Path | None = None, env: object = None) -> None:
        del command, cwd
        super().__init__(name, [sys.executable, str(FAKE), "1"], env=env)  # type: ignore[arg-type]
        self.started.append(self)

    def hello(self) -> dict:
        return super().hello() | {"source": str(train_step.ROOT)}

    def ask(self, command: str) -> dict:
        if command == "run":
            raise KeyboardInterrupt
        return {} if command == "parts" else super().ask(command)


def test_ctrl_c_writes_nothing_and_ends_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "Worker", Interrupted)
    Interrupted.started.clear()
    with pytest.raises(KeyboardInterrupt):
        train_step.main(tmp_path / "result.json", rounds=1, shape=TINY)
    assert list(tmp_path.iterdir()) == []
    assert [worker._process.poll() is not None for worker in Interrupted.started] == [True]


def test_a_worker_of_another_tree_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "Worker", Interrupted)
    monkeypatch.setattr(Interrupted, "hello", lambda self: {"source": str(tmp_path)})
    with pytest.raises(WorkerError, match="imported another source tree"):
        train_step.main(tmp_path / "result.json", rounds=1, shape=TINY)


@pytest.mark.slow
def test_against_runs_the_other_commits_own_worker(tmp_path: Path) -> None:
    result = train_step.main(tmp_path / "result.json", against="HEAD", rounds=1, shape=TINY, squares=(32,))
    assert result["against"]["revision"] == "HEAD"
    assert result["against"]["tokens_per_second"] > 0
    # Same commit or not, the first steps of one seed and one batch are about the same.
    mine, theirs = (result["samples"][name]["loss"][0] for name in ("ours", "against"))
    assert mine == pytest.approx(theirs, rel=0.05)
