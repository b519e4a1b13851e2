"""The whole command on tiny shapes; the timed forms against each other and the arithmetic they are said to do."""

import os
from functools import partial
from json import dumps, loads
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.bench import lora_experts
from experiments.bench.lora_experts import ProductShape, figures, verdict
from experiments.bench.lora_forms import (
    FeedForwardShape,
    Problem,
    contestants,
    forward_backward,
    naive,
    ours,
    plain_lora,
    shared,
    summed,
)
from moe.config import ModelConfig

TINY = FeedForwardShape(tokens=24, hidden=16, ffn_dim=24, experts=4, top_k=2, rank=3)
MODEL = ModelConfig(
    vocab_size=32, hidden=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=24, moe=None,
    tie_embeddings=True,
)  # fmt: skip


def test_the_forms_of_one_feed_forward_agree() -> None:
    of = Problem.of(TINY)
    forms = naive, shared, ours, partial(summed, how="concat"), partial(summed, how="blocks")
    wanted, *others = (forward_backward(form, of, of.experts)() for form in forms)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(wanted))
    for found in others:
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(other).max())


def test_plain_lora_is_an_expert_that_all_tokens_choose() -> None:
    one = Problem.of(FeedForwardShape(24, 16, 24, experts=1, top_k=1, rank=3))
    found, wanted = plain_lora(one.x, one.experts, one), naive(one.x, one.experts, one)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(("form", "frozen"), [(naive, 6), (shared, 4), (partial(summed, how="concat"), 3)])
def test_a_form_compiles_to_the_frozen_products_it_is_said_to_have(form, frozen) -> None:
    """The compiler finds no two rows of the naive form alike; what is beyond its products is small at rank one."""
    shape = FeedForwardShape(tokens=32, hidden=128, ffn_dim=160, experts=2, top_k=2, rank=1)
    of = Problem.of(shape)
    options = {} if frozen == 3 else {"how": "concat"}
    compiled = jax.jit(lambda x, loras: form(x, loras, of, **options)).lower(of.x, of.experts).compile()
    product = 2 * shape.tokens * shape.hidden * shape.ffn_dim
    assert compiled.cost_analysis()["flops"] / product == pytest.approx(frozen, rel=0.12)


def test_arithmetic_by_hand() -> None:
    shape = FeedForwardShape(tokens=10, hidden=4, ffn_dim=6, experts=4, top_k=2, rank=3)
    counts = {name: count for name, (_, count) in contestants(shape).items()}
    frozen, adapters = 10 * 4 * 6 * 2, 3 * (10 * 2) * 3 * (4 + 6) * 2  # one frozen product; the three maps', forward
    assert counts["naive"] == 2 * 6 * frozen + 3 * adapters
    assert counts["shared"] == 2 * 4 * frozen + 3 * adapters
    assert counts["ours"] == counts["ours, concat"] == 2 * 3 * frozen + 3 * adapters
    assert counts["LoRA"] == 2 * 3 * frozen + 3 * 3 * 10 * 4 * (4 + 6) * 2  # at most min(d, f) = 4 of rank 80


def test_plain_lora_has_about_as_many_parameters() -> None:
    of = Problem.of(FeedForwardShape())
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(loras)) for loras in (of.plain, of.experts)]
    assert sizes == [3 * 80 * (576 + 1536), 3 * 8 * 16 * (576 + 1536)]


def test_ratios_are_of_one_round() -> None:
    seconds = {"LoRA": [1.0, 2.0, 1.0], "naive": [4.0, 6.0, 8.0], "ours": [2.0, 2.0, 2.0]}
    row = figures(seconds, {"LoRA": 1, "naive": 2, "ours": 40}, 100.0)["ours"]
    assert row["ms"] == 2000
    assert row["share_of_peak"] == pytest.approx(0.2)
    assert (row["speedup"], row["to_naive"], row["to_lora"]) == (3.0, 1 / 3, 2.0)
    assert row["speedup_interval_95"] is None  # of three rounds there is none


def test_the_verdict_takes_the_lower_end() -> None:
    rows = {"shared": {"speedup_interval_95": [1.24, 1.6]}, "ours": {"speedup_interval_95": [1.25, 1.3]}}
    memory = {"by_number": {"1": {"beyond_base": 8, "expected": 8}, "2": {"beyond_base": 17, "expected": 16}}}
    assert list(verdict({"size": {"contestants": rows}}, memory).values()) == [False, True, False]
    rows["ours"]["speedup_interval_95"] = None
    assert not verdict({"size": {"contestants": rows}}, memory)["size: ours at least 1.25 times as fast as naive"]


@pytest.mark.slow
def test_whole_command(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    console = Console(record=True, width=160, file=open(os.devnull, "w"))  # noqa: SIM115
    products = [ProductShape(24, 2, 4, 2, 8, 12), ProductShape(24, 2, 8, 16, 8, 12)]
    result = lora_experts.main(
        out, 6, sizes={"tiny": TINY}, products=products, squares=(16,), model=MODEL, console=console
    )
    assert loads(out.read_text()) == loads(dumps(result))
    assert str(tmp_path) not in out.read_text()
    of = result["time"]["tiny"]
    assert list(of["contestants"]) == ["LoRA", "naive", "shared", "ours", "ours, concat", "ours, blocks"]
    taken = of["samples"]
    assert {len(samples) for samples in taken.values()} == {6}
    ratios = np.divide(taken["naive"], taken["ours"])
    assert of["contestants"]["ours"]["speedup"] == pytest.approx(float(np.median(ratios)))
    assert of["contestants"]["ours"]["speedup_interval_95"] == [ratios.min(), ratios.max()]
    rates = {"base product": 2 * 24 * 16 * 48, "16 square": 2 * 16**3}
    assert of["peak"]["rates"] == {name: pytest.approx(of / np.median(taken[name])) for name, of in rates.items()}
    assert [row["slots"]["auto"] for row in result["products"]] == ["concat", "blocks"]

    memory = result["memory"]
    assert memory["base_bytes"] == 4 * (32 * 16 + 16 + 2 * (2 * 16 + 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24))
    # E = 8 experts of rank 4 at three maps, and a router, in each of two layers
    assert memory["adapter_bytes"] == 4 * 2 * (3 * 8 * 4 * (16 + 24) + 16 * 8)
    for number, row in memory["by_number"].items():
        assert row["beyond_base"] == int(number) * memory["adapter_bytes"], number
        assert row["temporary_bytes"] > 0
    assert result["verdict"]["n adapters of one base are n times the bytes of one"]
    text = console.export_text()
    assert "of peak" in text
    assert "n x adapter" in text


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rounds = 0"):
        lora_experts.main(tmp_path / "result.json", 0)
    with pytest.raises(ValueError, match="json = "):
        lora_experts.main(tmp_path / "missing" / "result.json")
    with pytest.raises(ValueError, match="shape.top_k = 9"):
        FeedForwardShape(top_k=9)
    with pytest.raises(ValueError, match="shape.dtype = 'int8'"):
        FeedForwardShape(dtype="int8")
