"""The loop in one process: exact resume, Ctrl-C, refusals before anything is written. Killing is in test_resume.py."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.overrides import with_overrides
from experiments.recipes import smoke
from experiments.train import fit

CONFIG = with_overrides(  # einsum compiles faster
    smoke(), ["steps=6", "checkpoint_every=2", "eval_tokens_per_domain=64", "model.moe.dispatcher=einsum"]
)
TIMES = {"step_ms", "tokens_per_second"}


def lines(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return fit(CONFIG, out), lines(out)


@pytest.mark.slow
def test_metrics_and_series_have_what_the_runner_reads(whole):
    result, rows = whole
    names = {"val_ce", "test_ce", "domain_expert_mi", "max_violation", "tokens_per_second", "step_ms"}
    assert names <= result.metrics.keys()
    assert all(isinstance(v, float) and v == v for v in result.metrics.values())
    assert [row["step"] for row in rows] == list(range(1, 7))
    layers, domains, experts = 2, 8, 8
    shares = result.series["domain_expert"]
    assert (len(shares), len(shares[0]), len(shares[0][0])) == (layers, domains, experts)
    assert sum(shares[0][0]) == pytest.approx(1.0, abs=1e-3)
    always_on = {"router_entropy", "dead_experts", "drop_rate", "load_p5", "load_p95", "max_violation_sequence"}
    assert always_on <= rows[0].keys()
    json.dumps(result.series)


def test_stopping_and_going_on_is_bitwise_the_same(whole, tmp_path):
    fit(CONFIG, tmp_path, steps=3)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "loss": 99.0}\n{"step": 5, "lo')  # written after the checkpoint, the last one torn
    result = fit(CONFIG, tmp_path)
    assert lines(tmp_path) == whole[1]
    drop = lambda metrics: {k: v for k, v in metrics.items() if k not in TIMES}  # noqa: E731
    assert drop(result.metrics) == drop(whole[0].metrics)


def test_ctrl_c_saves_and_the_same_call_resumes(whole, tmp_path):
    def interrupt(step, total, metrics):
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="saved"):
        fit(CONFIG, tmp_path, progress=interrupt)
    assert 3 <= len(lines(tmp_path)) < 6
    fit(CONFIG, tmp_path)
    assert lines(tmp_path) == whole[1]


def test_ctrl_c_while_evaluating_acts_at_once_and_the_same_call_resumes(whole, tmp_path, monkeypatch):
    def interrupt(*args):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the evaluation went on")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
    try:
        with monkeypatch.context() as patch:
            patch.setattr("experiments.train.evaluate", interrupt)
            with pytest.raises(KeyboardInterrupt):
                fit(CONFIG, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    result = fit(CONFIG, tmp_path)
    assert lines(tmp_path) == whole[1]
    assert result.metrics["val_ce"] == whole[0].metrics["val_ce"]


def test_another_config_is_refused_and_nothing_is_lost(whole, tmp_path):
    fit(CONFIG, tmp_path, steps=2)
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"balance\.weight"):
        fit(replace(CONFIG, balance=replace(CONFIG.balance, weight=0.5)), tmp_path)
    assert sorted(p for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": replace(CONFIG.data, corpus="nowhere")}, "nowhere"),
        ({"data": replace(CONFIG.data, seq_len=10**7)}, "seq_len"),
        ({"model": replace(CONFIG.model, vocab_size=16)}, "model.vocab_size = 16"),
        ({"optimizer": replace(CONFIG.optimizer, name="no.such:thing")}, "optimizer.name"),
        ({"batch_size": 2_000, "mesh": replace(CONFIG.mesh, data=1_000)}, "1000"),
    ],
    ids=str,
)
def test_bad_input_is_named_before_anything_is_written(change, words, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=words):
        fit(replace(CONFIG, **change), out)
    assert not (out / "checkpoints").exists()
    assert not (out / "metrics.jsonl").exists()


def test_a_missing_packaged_corpus_names_the_command_that_fetches_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCHYARD_DATA", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="data fetch"):
        fit(replace(CONFIG, data=replace(CONFIG.data, corpus="packaged")), tmp_path / "out")


@pytest.mark.slow
def test_the_mesh_may_change_when_resuming(whole, tmp_path):
    """A checkpoint moves to another mesh: losses go on within 1e-5 of the uninterrupted run."""
    fit(CONFIG, tmp_path, steps=3)
    fit(replace(CONFIG, mesh=replace(CONFIG.mesh, data=2, expert=2)), tmp_path)
    for got, expected in zip(lines(tmp_path), whole[1]):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
