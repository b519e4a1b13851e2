"""A researcher's own router, optimiser and experiment, in files outside the tree, through the real command line."""

import json
import sys

import numpy as np
import pytest
from rich.console import Console

from experiments.cli import main
from experiments.run import run

ROUTER = """
import jax, jax.numpy as jnp
from dataclasses import dataclass
from moe.routing import RouterOutput, expert_counts

@dataclass(frozen=True)
class Always:  # every token goes to experts 0..k-1
    num_experts: int
    top_k: int

    def init_state(self):
        return {}

    def __call__(self, x, logits, token_ids, router_state, key):
        probs = jax.nn.softmax(logits.astype(jnp.float32))
        indices = jnp.broadcast_to(jnp.arange(self.top_k, dtype=jnp.int32), (logits.shape[0], self.top_k))
        valid = jnp.ones(indices.shape, bool)
        weights = jnp.full(indices.shape, 1.0 / self.top_k)
        counts = expert_counts(indices, valid, self.num_experts)
        return RouterOutput(indices, weights, valid, probs, logits, counts), {"own": jnp.float32(logits.shape[0])}

def make(num_experts, top_k):
    return Always(num_experts, top_k)
"""
OPTIMIZER = """
import optax

asked = []

def make(config, steps):
    asked.append((config.learning_rate, steps))
    return optax.sgd(0.0)
"""
EXPERIMENT = """
from dataclasses import replace
from experiments import recipes
from experiments.experiment import Experiment, Preset

def smoke():
    return Preset({"a": replace(recipes.smoke(), steps=2, eval_tokens_per_domain=64)}, seeds=1, claims=())

def figure(content, path):
    path.write_bytes(b"drawn " + content["experiment"].encode())

EXPERIMENT = Experiment("outside", "Not in the tree", "none", {"smoke": smoke}, figure)
"""
MINE = ["--router", "my_router:make", "--optimizer", "my_optimizer:make"]


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder on the import path with a router, an optimiser and an experiment of its own."""
    folder = tmp_path / "mine"
    (folder / "my_package").mkdir(parents=True)
    names = {"my_router": ROUTER, "my_optimizer": OPTIMIZER, "my_package/__init__": "", "my_package/study": EXPERIMENT}
    for name, text in names.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in ("my_router", "my_optimizer", "my_package", "my_package.study"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_own_router_and_optimizer_by_import_path_decide_the_run(outside, tmp_path):
    words = ["run", "global-batch-lbl", "--preset", "smoke", "--arms", "global", *MINE]
    words += ["--set", "eval_tokens_per_domain=64", "--set", "model.moe.dispatcher=einsum"]  # compiles faster
    contents = []
    for steps in (2, 3):
        out = tmp_path / f"out{steps}"
        assert main([*words, "--out", str(out), "--set", f"steps={steps}"]) == 0
        contents.append(json.loads((out / "result.json").read_text()))
    arm, series = contents[0]["arms"]["global"], contents[0]["series"]["global"]
    # 8 experts, every token to the same 2: each is loaded 4 times the mean, 3 above it
    assert arm["max_violation"]["values"] == pytest.approx([3.0])
    used = np.asarray(series[0]["domain_expert"])  # [L, D, E]
    np.testing.assert_allclose(used[..., :2], 0.5)
    np.testing.assert_allclose(used[..., 2:], 0.0)
    rows = [json.loads(line) for line in (tmp_path / "out2/runs/global-seed0/metrics.jsonl").read_text().splitlines()]
    # its own loss is one per token and MoE layer: a sum over tokens, divided once by the token count
    assert [row["own"] for row in rows] == pytest.approx([2.0, 2.0])
    # the rate is 0: gradients there are, and after two steps or three the model is the same to the last bit
    assert all(row["grad_norm"] > 0 for row in rows)
    assert arm["val_ce"]["values"] == contents[1]["arms"]["global"]["val_ce"]["values"]
    assert {(1e-2, 2), (1e-2, 3)} == set(sys.modules["my_optimizer"].asked)
    config = contents[0]["provenance"]["config"]["global"]
    assert (config["model.moe.router"], config["optimizer.name"]) == ("my_router:make", "my_optimizer:make")


@pytest.mark.slow
def test_experiment_by_import_path(outside, tmp_path):
    out = tmp_path / "out"
    assert main(["run", "my_package.study", "--preset", "smoke", "--out", str(out), *MINE]) == 0
    content = json.loads((out / "result.json").read_text())
    assert (content["experiment"], list(content["arms"])) == ("outside", ["a"])
    assert content["verdict"] == "no claim judged"
    assert content["arms"]["a"]["max_violation"]["values"] == pytest.approx([3.0])
    assert (out / "figure.png").read_bytes() == b"drawn outside"


@pytest.mark.slow
def test_template_smoke_holds_and_draws(tmp_path):
    """The folder to copy works as it is, and its router is really the one that ran."""
    settings = ("steps=2", "eval_tokens_per_domain=64", "model.moe.dispatcher=einsum")  # which compiles faster
    content = run("template", "smoke", tmp_path / "out", settings=settings, console=Console(width=120, quiet=True))
    assert content["verdict"] == "holds"
    assert content["arms"]["sharp"]["top_score"]["mean"] > 1.3 * content["arms"]["plain"]["top_score"]["mean"]
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
