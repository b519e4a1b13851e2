"""The whole command on tiny shapes; closed forms against sums by hand and, on the real shapes, against the state."""

import os
from json import dumps, loads
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from experiments.bench import optimizers, state_bytes
from experiments.bench.optimizers import (
    GAP,
    checked_state,
    figures,
    methods,
    real_models,
    step_config,
)
from experiments.bench.state_bytes import parameters_of
from moe.config import ModelConfig
from moe.transformer import abstract_params

TINY = ModelConfig(
    vocab_size=64, hidden=16, num_layers=4, num_heads=2, num_kv_heads=2, head_dim=8, ffn_dim=24, moe=None
)  # fmt: skip
# (N, a, b) by hand, gate and up in one matrix: four of attention, then the feed-forward's two
MATRICES = {
    "LLaMA 60M": [(8, 512, 512)] * 4 + [(8, 512, 2 * 1376), (8, 1376, 512)],
    "LLaMA 130M": [(12, 768, 768)] * 4 + [(12, 768, 2 * 2048), (12, 2048, 768)],
    "cpu MoE": [(3, 96, 96)] * 4 + [(3 * 16, 96, 2 * 96), (3 * 16, 96, 96)],
}
OTHERS = {  # embedding and head, norms, routers
    "LLaMA 60M": 2 * 32_000 * 512 + 17 * 512,
    "LLaMA 130M": 2 * 32_000 * 768 + 25 * 768,
    "cpu MoE": 2 * 256 * 96 + 7 * 96 + 3 * 96 * 16,
}
IN_LAYERS = {"LLaMA 60M": 16 * 512, "LLaMA 130M": 24 * 768, "cpu MoE": 6 * 96 + 3 * 96 * 16}  # of OTHERS


@pytest.mark.parametrize("name", list(MATRICES))
def test_parameters_are_counted_as_by_hand(name: str) -> None:
    model, found = real_models()[name], parameters_of(abstract_params(real_models()[name]))
    assert sorted(found.matrices) == sorted(MATRICES[name])
    assert found.others == OTHERS[name]
    assert {layers for layers, _ in found.layers} == {model.num_layers}
    in_layers = sum(n * a * b for n, a, b in MATRICES[name]) + IN_LAYERS[name]
    assert sum(layers * size for layers, size in found.layers) == in_layers
    assert found.outside == OTHERS[name] - IN_LAYERS[name]


@pytest.mark.parametrize(
    ("of_matrices", "by_hand"),
    [  # of 6 matrices of 7 rows and 10 columns
        (state_bytes.columns(0.25), 6 * (2 * 4 * 7 * 2 + 4 * 2)),
        (state_bytes.rows(0.25), 6 * (2 * 4 * 1 * 10 + 4 * 1)),
        (state_bytes.randk(0.25), 6 * (2 * 4 * 17 + 4 * 17)),
        (state_bytes.block(0.25), 2 * 4 * 2 * 70 + 2 * 4 + 4),
        (state_bytes.low_rank(3), 6 * (2 * 4 * 3 * 10 + 4 * 7 * 3)),
        (state_bytes.of_density(0.25), 6 * (2 * 4 * 2 * 10 + 4 * 7 * 2)),
        (state_bytes.with_norms(3), 6 * (2 * 4 * 3 * 10 + 4 * 7 * 3 + 4)),
        (state_bytes.with_errors(3), 6 * (2 * 4 * 3 * 10 + 4 * 7 * 3 + 4 * 70)),
        (state_bytes.nothing, 0),
    ],
)
def test_closed_forms_of_matrices(of_matrices: state_bytes.OfMatrices, by_hand: int) -> None:
    assert of_matrices(6, 7, 10) == by_hand
    parameters = state_bytes.Parameters(6 * 70 + 5, [(6, 7, 10)], [(6, 70)])
    assert state_bytes.on_matrices(of_matrices)(parameters) == by_hand + 8 * 5 + 16


def test_closed_forms_of_whole_models() -> None:
    parameters = state_bytes.Parameters(4 * 11 + 6, [], [(4, 3), (4, 8)])  # 6 numbers in no layer
    assert state_bytes.everything(parameters) == 8 * 50 + 8
    assert state_bytes.on_layers(2, others=False)(parameters) == 8 * 2 * 11 + 2 * (4 * 2 + 4) + 16
    assert state_bytes.on_layers(2, others=True)(parameters) == 8 * 2 * 11 + 2 * (4 * 2 + 4) + 16 + 8 * 6


@pytest.mark.parametrize("name", list(MATRICES))
def test_state_equals_its_closed_form_on_real_shapes(name: str) -> None:
    model = real_models()[name]
    found = checked_state(name, model)  # which compares
    assert list(found) == list(methods(model))
    gib = {method: size / 2**30 for method, size in found.items()}
    published = {"LLaMA 60M": (0.43, 0.29, 0.24), "LLaMA 130M": (1.00, 0.52, 0.37)}  # 2411.07837: AdamW, 0.25 and 0
    for method, expected in zip(("adamw", "block", "rho 0"), published.get(name, ())):
        assert gib[method] == pytest.approx(expected, abs=0.005)


def test_a_wrong_closed_form_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = state_bytes.rows
    monkeypatch.setattr(state_bytes, "rows", lambda density: lambda n, a, b: right(density)(n, a, b) + 1)
    with pytest.raises(ValueError, match=r"bytes of rows on tiny = \d+: expected \d+ by its paper"):
        checked_state("tiny", TINY)


def test_refreshes_are_told_apart() -> None:
    adamw = [2.0] * 2 * GAP
    slow = [9.0 if i % GAP == 0 else 2.5 for i in range(2 * GAP)]
    found = figures({"adamw": adamw, "columns": slow})
    row = found["columns"]
    assert (row["ms"], row["ratio"], row["refresh_ms"], row["refresh_ratio"]) == (2500.0, 1.25, 9000.0, 4.5)
    assert row["amortised_ratio"] == pytest.approx((4.5 + 199 * 1.25) / 200)
    assert row["ratio_interval_95"] == [1.25, 1.25]
    assert row["refresh_ratio_interval_95"] is None  # of two steps there is none
    assert set(found["adamw"]) == {"ms", "ratio", "ratio_interval_95"}


@pytest.mark.slow
def test_whole_command(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    console = Console(record=True, width=160, file=open(os.devnull, "w"))  # noqa: SIM115
    runs, only = {"timed": step_config(TINY, "adamw")}, ("adamw", "columns", "fira", "lisa")
    result = optimizers.main(out, 2, models={"tiny": TINY}, runs=runs, only=only, console=console)
    assert loads(out.read_text()) == loads(dumps(result))
    assert str(tmp_path) not in out.read_text()
    rows = result["memory"]["tiny"]["methods"]
    assert tuple(rows) == only
    for name, row in rows.items():  # what the compiled step is given falls by the state that is saved, to the byte
        saved = rows["adamw"]["state_bytes"] - row["state_bytes"]
        assert rows["adamw"]["argument_bytes"] - row["argument_bytes"] == saved, name
        assert row["argument_bytes_saved"] == saved
        assert row["temporary_bytes"] > 0
        assert row["bytes_per_parameter"] == row["state_bytes"] / result["memory"]["tiny"]["parameters"]
    samples, of = (result["time"]["timed"][name] for name in ("samples", "methods"))
    assert list(samples) == list(of) == ["adamw", "columns"]
    ratios = np.divide(samples["columns"]["seconds"], samples["adamw"]["seconds"]).reshape(2, GAP)
    assert of["columns"]["ratio"] == pytest.approx(float(np.median(ratios[:, 1:])))
    assert of["columns"]["refresh_ratio"] == pytest.approx(float(np.median(ratios[:, 0])))
    # The steps are real: both learn the same batch from the same start, each in its own way.
    losses = [samples[name]["loss"] for name in samples]
    assert all(loss[-1] < loss[0] for loss in losses)
    assert losses[0] != losses[1]
    assert result["verdict"] == {
        "tiny: arguments fall by exactly the state that is saved": True,
        "timed: upper end of columns at most 1.05": of["columns"]["ratio_interval_95"][1] <= 1.05,
    }
    text = console.export_text()
    assert "lisa" in text
    assert "amortised, T = 200" in text


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rounds = 0: expected at least 1"):
        optimizers.main(tmp_path / "result.json", 0)
    with pytest.raises(ValueError, match="json = "):
        optimizers.main(tmp_path / "missing" / "result.json", 1)
    assert list(tmp_path.iterdir()) == []
