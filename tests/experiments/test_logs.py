"""Metric sinks: a file that can be cut short anywhere and gone on with, and the optional ones behind one protocol."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.logs import JsonLines, check_loggers, make_loggers


def written(path: Path, steps, **more) -> bytes:
    lines = JsonLines(path)
    for step in steps:
        lines.log(step, {"loss": 1.0 / 3.0 / step, **more})
    lines.close()
    return path.read_bytes()


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_is_readable_before_the_next_one_and_before_closing(tmp_path):
    lines = JsonLines.resume(tmp_path / "new" / "metrics.jsonl", 0)
    for step in (1, 2):
        lines.log(step, {"loss": 0.1 * step, "tokens": 7.0})
        assert rows(tmp_path / "new" / "metrics.jsonl")[-1] == {"step": step, "loss": 0.1 * step, "tokens": 7.0}
    lines.close()


def test_resume_keeps_the_bytes_up_to_the_step_and_drops_later_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = written(path, range(1, 7))
    JsonLines.resume(path, 4).close()
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_dropped(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    kept, whole = written(path, (1, 2)), written(path, (3,))
    path.write_bytes(whole[:-cut])
    JsonLines.resume(path, 10).close()
    assert path.read_bytes() == kept


def test_going_on_after_a_torn_line_gives_the_uninterrupted_file(tmp_path):
    path, other = tmp_path / "metrics.jsonl", tmp_path / "whole.jsonl"
    path.write_bytes(written(path, range(1, 6))[:-9])
    lines = JsonLines.resume(path, 3)
    for step in (4, 5, 6):
        lines.log(step, {"loss": 1.0 / 3.0 / step})
    lines.close()
    assert path.read_bytes() == written(other, range(1, 7))


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo\n', b"\x00\x00\x00\n", b"7\n", b"[]\n", b"{}\n", b'"\xff\xfe"\n'])
def test_what_follows_a_damaged_line_is_not_trusted(tmp_path, torn):
    """After a power cut a block of zeros or half a line may stand in the middle; a line that is no step is as bad."""
    path = tmp_path / "metrics.jsonl"
    kept = written(path, (1, 2))
    path.write_bytes(kept + torn)
    written(path, (4, 5))
    JsonLines.resume(path, 5).close()
    assert path.read_bytes() == kept


@pytest.mark.parametrize("content", [None, b"", b'{"st'])
def test_nothing_to_keep(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)
    JsonLines.resume(path, 5).close()
    assert path.read_bytes() == b""


def test_resume_at_step_zero_starts_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, (1, 2))
    JsonLines.resume(path, 0).close()
    assert path.read_bytes() == b""


def test_tensorboard_writes_each_metric_with_its_step(tmp_path):
    pytest.importorskip("tensorboardX")
    (sink,) = make_loggers(["tensorboard"], tmp_path, start=0)
    for step in (1, 2):
        sink.log(step, {"loss": 0.5 * step, "grad_norm": 3.0})
    sink.close()
    assert {(1, "loss", 0.5), (2, "loss", 1.0), (1, "grad_norm", 3.0), (2, "grad_norm", 3.0)} == set(events(tmp_path))


def test_tensorboard_purges_what_comes_after_the_restored_step(tmp_path):
    pytest.importorskip("tensorboardX")
    (sink,) = make_loggers(["tensorboard"], tmp_path, start=5)
    sink.close()
    assert [event.step for event in records(tmp_path) if event.HasField("session_log")] == [6]


def events(out: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of every scalar."""
    return [(event.step, value.tag, value.simple_value) for event in records(out) for value in event.summary.value]


def records(out: Path) -> Iterator[Any]:
    """Events read back record by record: length, its checksum, payload, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for path in (out / "tensorboard").glob("events.*"):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


class FakeSink:
    """Stands for wandb and trackio: records what their `init` gets; neither is installed where this runs."""

    def __init__(self):
        self.opened, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.opened.append(options)
        return self

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize(("name", "kept"), [("wandb", "id"), ("trackio", "name")])
def test_a_resumed_run_goes_on_under_its_own_id(tmp_path, monkeypatch, name, kept):
    fake = FakeSink()
    monkeypatch.setitem(sys.modules, name, fake)
    for start in (0, 5):
        (sink,) = make_loggers([name], tmp_path, start)
        sink.log(start + 1, {"loss": 2.0})
        sink.close()
    assert fake.logged == [(1, {"loss": 2.0}), (6, {"loss": 2.0})]
    assert fake.finished == 2
    first, second = (options[kept] for options in fake.opened)
    assert first == second
    (tmp_path / "other").mkdir()
    make_loggers([name], tmp_path / "other", 0)
    assert fake.opened[-1][kept] != first


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, {"tensorboard": "tensorboardX"}.get(name, name), None)
    for attempt in (lambda: check_loggers([name]), lambda: make_loggers([name], tmp_path, 0)):
        with pytest.raises(ValueError, match=rf"log = '{name}'.*\[logging\]"):
            attempt()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_sink_lists_the_known_ones(tmp_path):
    for attempt in (lambda: check_loggers(["mlflow"]), lambda: make_loggers(["mlflow"], tmp_path, 0)):
        with pytest.raises(ValueError, match=r"'mlflow'.*tensorboard, wandb, trackio"):
            attempt()
