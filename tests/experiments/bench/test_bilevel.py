"""The whole command on tiny shapes; the closed form by hand, and what it refuses."""

from dataclasses import replace
from json import loads

import jax
import pytest
from rich.console import Console

from experiments.bench import bilevel
from experiments.config import DataConfig, RunConfig
from moe.config import ModelConfig
from moe.transformer import abstract_params

TINY = ModelConfig(
    vocab_size=64, hidden=16, num_layers=4, num_heads=2, num_kv_heads=2, head_dim=8, ffn_dim=24, moe=None
)  # fmt: skip


def test_the_closed_form_is_as_by_hand():
    outside = 2 * 64 * 16 + 16  # embedding, head, last norm
    layer = 4 * 16 * 16 + 16 * 48 + 24 * 16 + 2 * 16
    params = abstract_params(TINY)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == outside + 4 * layer
    both = 2 * 4 * (outside + 4 * layer)
    assert bilevel.closed_form("two copies", TINY, params) == {"model_bytes": both, "moment_bytes": 2 * both}
    lisa = {"model_bytes": both, "moment_bytes": 2 * 8 * (outside + layer)}
    assert bilevel.closed_form("LISA", TINY, params) == lisa
    plain = {"model_bytes": both // 2, "moment_bytes": both}
    assert bilevel.closed_form("plain", TINY, params) == plain


@pytest.mark.slow
def test_it_measures_prints_and_writes(tmp_path):
    run = RunConfig(model=replace(TINY, unroll=0), data=DataConfig(corpus="synthetic", seq_len=8), batch_size=4)
    path, console = tmp_path / "bilevel.json", Console(width=120, record=True, quiet=True)
    result = bilevel.main(path, 6, models={"tiny": TINY}, run=run, console=console)
    written = loads(path.read_text())
    assert written["rounds"] == 6
    assert set(written["time"]["methods"]) == {"plain", "two copies", "LISA"}
    assert result["time"]["methods"]["plain"]["ratio"] == 1.0
    assert all(of["ms"] > 0 for of in written["time"]["methods"].values())
    tiny = written["memory"]["tiny"]
    assert tiny["LISA"]["moment_bytes"] < tiny["two copies"]["moment_bytes"]
    saved = tiny["two copies"]["moment_bytes"] - tiny["LISA"]["moment_bytes"]
    arguments = tiny["two copies"]["argument_bytes"] - tiny["LISA"]["argument_bytes"]
    assert abs(arguments - saved) <= 64  # counts of steps


def test_bytes_that_are_not_their_closed_form_are_refused(monkeypatch):
    monkeypatch.setattr(bilevel, "closed_form", lambda method, *_: {"model_bytes": 1})
    with pytest.raises(ValueError, match="model_bytes of plain on tiny = "):
        bilevel.memory_of("tiny", TINY, lambda: None)


def test_too_few_rounds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rounds = 5"):
        bilevel.main(tmp_path / "x.json", 5)
    assert not list(tmp_path.iterdir())
