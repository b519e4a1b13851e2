from json import loads
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from experiments.bench import moe_layer
from experiments.bench.shape import StepShape

TINY = StepShape(hidden=8, layers=2, heads=1, head_dim=8, experts=4, top_k=2, expert_dim=6, vocab=8)


def test_padding_share_counts_each_experts_last_block() -> None:
    # 10 rows in blocks of 4 are 12 multiplied rows, 4 are 4, none are none: 2 of 16 are padding.
    assert moe_layer.padding_share(np.array([10, 4, 0]), (4,)) == pytest.approx(2 / 16)
    assert moe_layer.padding_share(np.array([8, 8]), (8,)) == 0.0
    assert moe_layer.padding_share(np.array([10, 4, 0]), (4, 8)) == pytest.approx(6 / 20)


def test_sizes_give_every_expert_its_tokens() -> None:
    shape = moe_layer.at_tokens_per_expert(StepShape(), 128)
    assert shape.tokens == 1024
    assert shape.tokens * shape.top_k / shape.experts == 128


@pytest.mark.slow
def test_whole_command(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    console = Console(record=True, width=120, quiet=False, file=(tmp_path / "shown").open("w"))
    result = moe_layer.main(out, 3, shape=TINY, tokens_per_expert=(8, 4), squares=(16,), console=console)
    assert loads(out.read_text()) == result
    assert list(result["layers"]) == ["8", "4"]
    row = result["layers"]["8"]
    assert row["ratio"] == pytest.approx(float(np.median(np.divide(row["samples"]["moe"], row["samples"]["dense"]))))
    tokens, experts = 16, 2 * 3 * 8 * 6
    assert row["floor_ms"] == pytest.approx(1e3 * 6 * tokens * (experts + 8 * 4) / result["peak"]["flops_per_second"])
    assert 0 <= row["padding_share"] < 1
    assert row["speed_against"] is None
    assert "MoE / dense" in console.export_text()


@pytest.mark.slow
def test_another_revisions_layer_joins(tmp_path: Path) -> None:
    result = moe_layer.main(tmp_path / "a.json", 3, "HEAD", shape=TINY, tokens_per_expert=(8,), squares=(16,))
    samples = result["layers"]["8"]["samples"]
    assert all(len(samples[name]) == 3 and min(samples[name]) > 0 for name in ("moe", "dense", "against"))
    ratio = float(np.median(np.divide(samples["against"], samples["moe"])))
    assert result["layers"]["8"]["speed_against"] == pytest.approx(ratio)
    assert result["against"]["revision"] == "HEAD"


def test_the_dense_layer_has_equal_active_flops() -> None:
    _, (params, _) = moe_layer.dense_ffn(moe_layer.at_tokens_per_expert(TINY, 8))()
    weights = sum(leaf.size for leaf in params["params"].values())
    assert weights == TINY.top_k * 3 * TINY.hidden * TINY.expert_dim


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rounds = 0"):
        moe_layer.main(tmp_path / "result.json", 0)
    with pytest.raises(ValueError, match="json = "):
        moe_layer.main(tmp_path / "missing" / "result.json")
    with pytest.raises(ValueError, match="against = 'no-such': expected a revision"):
        moe_layer.main(tmp_path / "result.json", against="no-such")
