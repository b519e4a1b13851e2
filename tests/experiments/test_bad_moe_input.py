"""Bad input of the mixture of experts, refused before anything is compiled: one ValueError that names the field, the
value and what was expected. What is data cannot be refused so: ids out of range, and scores that are not numbers."""

import json
import math
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.overrides import with_overrides
from experiments.recipes import smoke
from experiments.train import fit
from moe.config import ModelConfig, MoEConfig
from moe.dispatch import ExpertParams, Grouped, dispatch
from moe.layer import MoELayer
from moe.presets import preset
from moe.routing import expert_counts, make_router, token_choice
from moe.transformer import Transformer, init_router_state

E, K = 8, 2  # of `smoke`
GROUPED = "model.moe.router=group_limited"
BY_DEVICE = ("balance.devices=2", "balance.device_weight=0.1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.moe.top_k=9"], r"moe.top_k = 9: expected 1 <= top_k <= num_experts = 8"),
        (["model.moe.num_experts=1"], r"moe.top_k = 2: expected 1 <= top_k <= num_experts = 1"),
        # groups of experts
        ([f"{GROUPED}(groups=3)"], r"moe.router groups = 3: expected a divisor of 8"),
        ([f"{GROUPED}(groups=8, kept_groups=1)"], r"moe.router kept_groups = 1: expected groups of 1 to hold k = 2"),
        (
            [f"{GROUPED}(groups=4, kept_groups=2, group_score='topk')", "model.moe.top_k=3"],
            r"moe.router group_score = 'topk': expected k = 3 to be a multiple of kept_groups = 2",
        ),
        # policies
        (["model.moe.policy=capacity(factor=0)"], r"moe.policy factor = 0: expected a finite number above 0"),
        (["model.moe.policy=capacity(factor=-1.5)"], r"moe.policy factor = -1.5: expected a finite number above 0"),
        (["model.moe.policy=capacity(factor=1e999)"], r"moe.policy factor = inf: expected a finite number above 0"),
        (
            ["model.moe.policy=capacity(factor=1.0, drop='probability')"],
            r"moe.policy = .*probability.*: expected a choice that does not depend on later tokens, or moe.allow_nonc",
        ),
        # routers
        (["model.moe.router=expert_choice"], r"moe.router = 'expert_choice': expected a choice .* moe.allow_noncausal"),
        (["model.moe.router=no_such"], r"moe.router = 'moe.routers.no_such:make': expected an import path"),
        (["model.moe.router=softmax_topk(selection_bias=True)"], r"moe.router = .*: expected options that softmax_top"),
        (["model.moe.router=softmax_topk(renormalise=True)"], r"moe.router = .*'renormalise'"),
        (["model.moe.router=softmax_topk + 1"], r"moe.router = 'moe.routers.softmax_topk \+ 1:make': expected an im"),
        (["model.moe.router=softmax_topk(True)"], r"moe.router = .*: expected `name` or `name\(option=value, ...\)`"),
        (["model.moe.router=softmax_topk(1"], r"moe.router = .*: expected `name` or `name\(option=value, ...\)`"),
        (["model.moe.router=math:pi"], r"moe.router = 'math:pi': expected a factory called as factory\(num_experts, "),
        (["balance.weight=-0.1"], r"balance.weight = -0.1: expected a finite number, 0 or more"),
        (["balance.z_weight=1e999"], r"balance.z_weight = inf: expected a finite number, 0 or more"),
        (["balance.micro_batch_size=0"], r"balance.micro_batch_size = 0: expected at least 1"),
        # the mesh
        (["mesh.data=0"], r"mesh.data = 0: expected at least 1"),
        (
            ["mesh.expert=8", "model.moe.num_experts=12"],
            r"mesh.expert = 8: expected a divisor of moe.num_experts = 12",
        ),
        # balance
        (["balance.ema_decay=1.0"], r"balance.ema_decay = 1.0: expected at least 0 and below 1"),
        (["balance.ema_decay=-0.1"], r"balance.ema_decay = -0.1: expected at least 0 and below 1"),
        (["balance.ema_decay=nan"], r"balance.ema_decay = nan: expected at least 0 and below 1"),
        (["balance.devices=3"], r"balance.devices = 3: expected a divisor of moe.num_experts = 8"),
        (["balance.devices=0"], r"balance.devices = 0: expected at least 1"),
        (["balance.devices=2", "balance.device_limit=3"], r"balance.device_limit = 3: expected 1 <= .* devices = 2"),
        (
            [*BY_DEVICE, "balance.scope=global_prefix"],
            r"balance.scope = 'global_prefix': expected sequence, microbatch",
        ),
        ([*BY_DEVICE, "balance.scope=ema"], r"balance.scope = 'ema': expected sequence, microbatch"),
        ([*BY_DEVICE, "balance.scope=shuffle_micro"], r"balance.scope = 'shuffle_micro': expected sequence"),
        ([*BY_DEVICE, "accumulation=2"], r"balance.scope = 'global_exact': expected .* accumulation = 1"),
        (
            ["balance.devices=2", "balance.communication_weight=0.1", "accumulation=2"],
            r"balance.scope = 'global_exact': expected .* accumulation = 1",
        ),
        (["balance.scope=microbatch", "balance.micro_batch_size=3"], r"balance.micro_batch_size = 3: expected a divis"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_that_cannot_be_is_refused_as_a_config(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        with_overrides(smoke(), settings)


@pytest.mark.parametrize(
    "settings",
    [
        [*BY_DEVICE],
        [*BY_DEVICE, "balance.scope=device", "accumulation=2"],
        [*BY_DEVICE, "balance.scope=sequence", "accumulation=2"],
        ["balance.ema_decay=0.0", "balance.scope=ema"],
        ["model.moe.router=expert_choice", "model.moe.allow_noncausal=true"],
    ],
    ids=" ".join,
)
def test_their_neighbours_are_accepted(settings):
    with_overrides(smoke(), settings)


def test_an_unknown_family_is_named():
    with pytest.raises(ValueError, match=r"^preset = 'gpt5': expected one of mixtral, olmoe"):
        preset("gpt5")


# Shapes: refused while tracing


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
def test_no_token_is_refused(shape):
    layer = MoELayer(MoEConfig(E, K, 4), 0.1, 0.1)
    empty = jnp.zeros(shape, jnp.int32)
    with pytest.raises(ValueError, match=r"^num_tokens = 0: expected at least one token"):
        jax.eval_shape(
            lambda key: layer.init(key, jnp.zeros((*shape, 4)), empty > 0, empty, {}, key), jax.random.key(0)
        )
    routing = token_choice(*[jnp.zeros((0, E))] * 2, jnp.zeros((0, K), jnp.int32), jnp.zeros((0, K)))
    with pytest.raises(ValueError, match=r"^num_tokens = 0"):
        dispatch(jnp.zeros((0, 4)), routing, ExpertParams(jnp.zeros((E, 4, 8)), jnp.zeros((E, 4, 4))), Grouped())


@pytest.mark.parametrize("router", ["group_limited(selection_bias=True)", "loss_free"])
@pytest.mark.parametrize("shape", [(5,), (1,), (2, E)], ids=str)
def test_a_bias_of_another_shape_is_refused(router, shape):
    """(1,) and (2, E) would broadcast in silence."""
    config = MoEConfig(E, K, 4, router=router)
    state = make_router(config).init_state()
    tokens = jnp.zeros((2, 4), jnp.int32)
    layer = MoELayer(config, 0.1, 0.1)
    init = lambda key, state: layer.init(key, jnp.zeros((2, 4, 4)), tokens == 0, tokens, state, key)  # noqa: E731
    jax.eval_shape(init, jax.random.key(0), state)
    message = rf"^router_state bias.shape = \({shape[0]},.*\): expected \(8,\)"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(init, jax.random.key(0), state | {"bias": jnp.zeros(shape)})
    missing = {name: leaf for name, leaf in state.items() if name != "bias"}
    with pytest.raises(ValueError, match=r"^router_state bias.shape = None: expected \(8,\)"):
        jax.eval_shape(init, jax.random.key(0), missing)


def test_a_state_nobody_asked_for_is_refused_through_the_whole_model():
    model = ModelConfig(vocab_size=8, hidden=8, num_heads=2, num_kv_heads=1, head_dim=4, moe=MoEConfig(E, K, 4))
    tokens = jnp.zeros((1, 4), jnp.int32)
    biased = init_router_state(replace(model, moe=replace(model.moe, router="group_limited(selection_bias=True)")))
    with pytest.raises(ValueError, match=r"^router_state bias.shape = \(8,\): expected None"):
        jax.eval_shape(
            lambda key: Transformer(model).init(key, tokens, tokens + 1, tokens, biased, key), jax.random.key(0)
        )


# Data: what happens instead


@pytest.mark.parametrize("implementation", ["blocks", "ragged_dot", "reference"])
@pytest.mark.slow_after(1)
def test_an_expert_id_that_is_no_experts_is_dropped_like_an_invalid_one(implementation):
    """Marked valid or not; counts leave it out too, so sum(counts) < sum(valid) tells of it."""
    rng = np.random.default_rng(0)
    tokens, d, f = 6, 8, 12
    x = jnp.asarray(rng.normal(size=(tokens, d)), jnp.float32)
    experts = ExpertParams(
        jnp.asarray(rng.normal(size=(E, d, 2 * f)), jnp.float32), jnp.asarray(rng.normal(size=(E, f, d)), jnp.float32)
    )
    indices = jnp.asarray(np.stack([rng.permutation(E)[:K] for _ in range(tokens)]), jnp.int32)
    probs, weights = jnp.full((tokens, E), 1 / E), jnp.asarray(rng.random((tokens, K)), jnp.float32)
    apply = Grouped(implementation).apply

    def output(indices, valid, weights=weights):
        return apply(x, token_choice(probs, probs, indices, weights, valid), experts)

    every = jnp.ones((tokens, K), bool)
    dropped = every.at[1, 1].set(False)
    want = output(indices, dropped)
    for bad in (-1, -E, E, E + 3, 10**6):
        wrong = indices.at[1, 1].set(bad)
        np.testing.assert_allclose(output(wrong, every), want, rtol=1e-6)
        np.testing.assert_allclose(output(wrong, dropped), want, rtol=1e-6)
        assert float(jax.grad(lambda w: output(wrong, every, w).sum())(weights)[1, 1]) == 0.0  # noqa: B023
        assert float(expert_counts(wrong, every, E).sum()) == tokens * K - 1


BREAKS = """
import jax.numpy as jnp
from moe.routers import softmax_topk

class Breaks:  # its scores are not numbers from the fourth step on
    def __init__(self, num_experts, top_k):
        self.inner = softmax_topk.make(num_experts, top_k)

    def init_state(self):
        return {"updates": jnp.int32(0)}

    def __call__(self, x, logits, token_ids, router_state, key):
        logits = jnp.where(router_state["updates"] >= 3, jnp.nan, logits)
        return self.inner(x, logits, token_ids, {}, key)

    def update(self, state, counts, observed):
        return {"updates": state["updates"] + 1}

def make(num_experts, top_k):
    return Breaks(num_experts, top_k)
"""


@pytest.fixture
def breaks(tmp_path, monkeypatch):
    (tmp_path / "router_that_breaks.py").write_text(BREAKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "router_that_breaks"
    sys.modules.pop("router_that_breaks", None)


@pytest.mark.slow
def test_scores_that_are_no_numbers_end_the_run_and_keep_the_last_checkpoint(breaks, tmp_path):
    """top_k hides them: the choice is still in range. The loss does not."""
    out = tmp_path / "out"
    short = ["steps=6", "checkpoint_every=2", "eval_tokens_per_domain=64", "model.moe.dispatcher=einsum"]
    config = with_overrides(smoke(), [f"model.moe.router={breaks}:make", *short])
    with pytest.raises(ValueError, match=r"^loss = nan at step 4: expected a finite number; the last checkpoint is"):
        fit(config, out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [math.isfinite(row["loss"]) for row in rows] == [True, True, True, False]
    steps = sorted(path.name for path in (out / "checkpoints").iterdir() if path.name.isdecimal())
    assert steps == ["2"], "the broken step 4 was not saved"
    result = fit(config, out, steps=2)  # restores step 2, trains nothing and evaluates it
    assert math.isfinite(result.metrics["val_ce"])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]  # it resumes where it was sound


def test_a_gradient_that_is_not_finite_ends_the_run_too(tmp_path, monkeypatch):
    """The loss of the step is still finite: the mask of a NaN, or an overflow, is in the gradient alone."""

    def overflow(config, tx, mesh):
        def step(state, batch):
            finite = {"loss": jnp.float32(1.0), "tokens": jnp.float32(1.0)}
            return state.replace(step=state.step + 1), finite | {"grad_norm": jnp.float32(jnp.inf)}

        return step

    monkeypatch.setattr("experiments.train.compile_step", overflow)
    with pytest.raises(ValueError, match=r"^grad_norm = inf at step 1: expected a finite number"):
        fit(replace(smoke(), eval_tokens_per_domain=64), tmp_path)
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal()]
