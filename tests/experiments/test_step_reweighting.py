"""The training step with weights from its losses: against frozen weights of NumPy, on any mesh, under accumulation.

The oracle computes losses of sequences from all logits, weights them in float64 by the formulas of the paper, and
differentiates the sum with those weights as constants. One sequence is empty, two are ragged.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import experiments.step
from experiments.config import BalanceConfig, MeshConfig, ReweightingConfig, RunConfig
from experiments.overrides import flatten, with_overrides
from experiments.recipes import smoke
from experiments.step import batch_sharding, compile_step, forward, init_state, state_shardings, targets_of
from moe.config import ModelConfig, MoEConfig
from parallel.mesh import make_mesh

MODEL = ModelConfig(
    vocab_size=64, hidden=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, moe=None, ffn_dim=24, init_std=0.3
)
DENSE = replace(smoke(), model=MODEL, data=replace(smoke().data, seq_len=8))
BALANCE = BalanceConfig("global_exact", weight=0.1, micro_batch_size=1, z_weight=1e-3)
MOE = replace(
    DENSE,
    model=replace(MODEL, moe=MoEConfig(num_experts=8, top_k=2, expert_dim=8, block_size=16, dispatcher="einsum")),
    balance=BALANCE,
)
LIN_UPPER = ReweightingConfig("lin_upper", r=0.4)
FAST = {"xla_backend_optimization_level": 0}  # of compilation
slow = pytest.mark.slow


def weighted(config: RunConfig, **changes) -> RunConfig:
    return replace(config, reweighting=replace(LIN_UPPER, **changes))


def batch_of(config: RunConfig):
    """[A, B, S + 1]: sequence 1 is short, 2 has two documents, 6 is empty."""
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.data.seq_len + 1)
    tokens, segments = rng.integers(0, 64, size=shape), np.ones(shape, np.int32)
    segments[1, 5:], segments[2, 3:], segments[6] = 0, 2, 0
    batch = {"tokens": tokens, "segment_ids": segments, "positions": np.broadcast_to(np.arange(shape[1]), shape)}
    return {k: jnp.asarray(v.reshape(config.accumulation, -1, shape[1]), jnp.int32) for k, v in batch.items()}


@functools.cache
def drawn_params(model: ModelConfig):
    """Norm scales one, the rest normal; a function of name and shape alone."""

    def draw(path, leaf):
        if path[-1].key == "scale":
            return np.ones(leaf.shape, leaf.dtype)
        rng = np.random.default_rng(list(jax.tree_util.keystr(path).encode()))
        return model.init_std * rng.standard_normal(leaf.shape, leaf.dtype)

    shapes = jax.eval_shape(lambda: init_state(replace(DENSE, model=model), optax.sgd(1.0)).params)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def steps_of(config: RunConfig, batches, mesh_shape=(1, 1, 1)):
    """[(parameters before, metrics, parameters after)] over batches, under SGD of rate 1."""
    config = replace(config, mesh=MeshConfig(*mesh_shape))
    mesh, tx, seen = make_mesh(*mesh_shape), optax.sgd(1.0), []
    with jax.set_mesh(mesh):
        init = functools.partial(init_state, config, tx)
        rest = jax.jit(lambda: replace(init(), params={}, opt_state={}))()
        params = drawn_params(config.model)
        state = replace(rest, params=params, opt_state=tx.init(params))
        state = jax.device_put(state, state_shardings(jax.eval_shape(init), tx, mesh))
        batches = [jax.device_put(batch, batch_sharding(mesh)) for batch in batches]
        step = compile_step(config, tx, mesh).lower(state, batches[0]).compile(FAST)
        for batch in batches:
            before = jax.device_get(state.params)
            state, metrics = step(state, batch)
            seen.append((before, jax.device_get(metrics), jax.device_get(state.params)))
    return seen


@functools.cache
def gradients(config: RunConfig, mesh_shape=(1, 1, 1)):
    """(gradients, metrics) of one step."""
    ((before, metrics, after),) = steps_of(config, [batch_of(config)], mesh_shape)
    return jax.tree.map(lambda a, b: a - b, before, after), metrics


def assert_close(got, expected, tol=1e-5):
    """Relative to each leaf's largest magnitude."""
    flat = jax.tree_util.tree_flatten_with_path(expected)[0]
    for (path, b), a in zip(flat, jax.tree.leaves(got), strict=True):
        scale = max(float(np.abs(b).max()), 1e-12)
        np.testing.assert_allclose(a / scale, b / scale, atol=tol, err_msg=jax.tree_util.keystr(path))


def formula(losses, strategy, r):
    """Float64 weights of all units."""
    h = 2 * (losses - losses.min()) / (losses.max() - losses.min()) - 1
    f = {"uniform": 0 * h, "lin_upper": np.minimum(h + 1, 1), "quadratic": 1 - h**2, "extremes": np.abs(h)}[strategy]
    w = np.exp(f / r)
    return w / w.sum()


@functools.cache
def nll_and_gradient(model: ModelConfig):
    """Compiled: nll [B, S] from all logits, and the gradient of its sum with given weights [B, S]."""

    def nll(params, batch):
        out = forward(replace(DENSE, model=model), params, batch, {}, None)
        logits = jax.nn.log_softmax(out.hidden @ out.head.T)
        return -jnp.take_along_axis(logits, targets_of(batch)[0][..., None], axis=-1)[..., 0]

    return jax.jit(nll), jax.jit(jax.grad(lambda params, batch, w: jnp.sum(w * nll(params, batch))))


def oracle(config: RunConfig):
    """(gradients, weighted loss, effective share of the units), passes one after another."""
    nll, gradient = nll_and_gradient(config.model)
    weigh, params, batch = config.reweighting, drawn_params(config.model), batch_of(config)
    part = {name: leaf.reshape(-1, leaf.shape[-1]) for name, leaf in batch.items()}
    counted = np.asarray(targets_of(part)[1], np.float64)
    losses = np.asarray(nll(params, part), np.float64)
    per_token = counted  # what a unit's weight is multiplied by at each token
    if weigh.level == "sample":
        per_token = counted / np.maximum(counted.sum(axis=1, keepdims=True), 1)
        losses = (losses * per_token).sum(axis=1, keepdims=True)
        counted = counted.max(axis=1, keepdims=True)
    passes = config.accumulation if weigh.scope == "micro" else 1
    weights, busy = np.zeros_like(losses), 0
    for rows in np.split(np.arange(len(losses)), passes):
        active = counted[rows] > 0
        if active.any():
            mine = np.zeros(active.shape)
            mine[active] = formula(losses[rows][active], weigh.strategy, weigh.r)
            weights[rows], busy = mine, busy + 1
    weights = weights / busy
    grads = jax.device_get(gradient(params, part, jnp.asarray(weights * per_token, jnp.float32)))
    return grads, (weights * losses).sum(), 1 / (weights**2).sum() / (counted > 0).sum()


CASES = [
    ("lin_upper", "sample"), ("extremes", "token"),
    *(pytest.param(*c, marks=slow) for c in (("quadratic", "sample"), ("extremes", "sample"), ("uniform", "sample"),
                                             ("lin_upper", "token"), ("quadratic", "token"))),
]  # fmt: skip


@pytest.mark.parametrize(("strategy", "level"), CASES)
@pytest.mark.slow_after(1)
def test_a_step_is_the_one_of_frozen_weights(strategy, level):
    config = weighted(DENSE, strategy=strategy, level=level)
    grads, metrics = gradients(config)
    want, loss, effective = oracle(config)
    assert_close(grads, want)
    assert metrics["weighted_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["effective_samples"] == pytest.approx(effective, rel=1e-4)
    assert effective == pytest.approx(1) if strategy == "uniform" else effective < 0.95
    with pytest.raises(AssertionError):
        assert_close(grads, gradients(DENSE)[0], 1e-2)


def test_the_reported_loss_is_the_unweighted_mean_per_token():
    metrics = gradients(weighted(DENSE))[1]
    assert metrics["loss"] == pytest.approx(gradients(DENSE)[1]["loss"], rel=1e-6)
    assert abs(metrics["weighted_loss"] - metrics["loss"]) > 1e-2
    assert metrics["tokens"] == gradients(DENSE)[1]["tokens"]


@pytest.mark.parametrize("level", ["sample", "token"])
@pytest.mark.slow_after(1)
def test_eight_devices_of_one_sequence_weigh_as_one(level):
    """Each device alone would find all of its sequences equal."""
    config = weighted(DENSE, level=level)
    grads, metrics = gradients(config)
    found, counted = gradients(config, (8, 1, 1))
    assert_close(found, grads)
    assert_close(counted, metrics)


@pytest.mark.parametrize("level", ["sample", "token"])
@pytest.mark.slow
def test_global_scope_does_not_depend_on_accumulation_and_micro_does(level):
    once, twice = weighted(DENSE, level=level), replace(DENSE, accumulation=2)
    grads, metrics = gradients(once)
    found, counted = gradients(weighted(twice, level=level, scope="global"))
    assert_close(found, grads)
    assert_close(counted, metrics)
    micro = weighted(twice, level=level, scope="micro")
    found, counted = gradients(micro)
    want, loss, effective = oracle(micro)
    assert_close(found, want)
    assert counted["weighted_loss"] == pytest.approx(loss, rel=1e-5)
    assert counted["effective_samples"] == pytest.approx(effective, rel=1e-4)
    with pytest.raises(AssertionError):
        assert_close(found, grads, 1e-2)


@pytest.mark.parametrize("scope", ["micro", "global"])
def test_a_pass_of_padding_takes_no_share(scope):
    """Two passes, the second empty, are one step on the first."""
    config = replace(weighted(DENSE, scope=scope), accumulation=2)
    batch = batch_of(config)
    batch["segment_ids"] = batch["segment_ids"].at[1].set(0)
    alone = {name: leaf[:1] for name, leaf in batch.items()}
    (_, metrics, found) = steps_of(config, [batch])[0]
    (_, expected, want) = steps_of(replace(weighted(DENSE), batch_size=4), [alone])[0]
    assert_close(found, want)
    for name in ("loss", "weighted_loss", "effective_samples"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.slow
def test_router_losses_stay_outside():
    """What they add to gradients is what they add without weights; their values are the same."""
    off = replace(MOE, balance=replace(BALANCE, weight=0.0, z_weight=0.0))
    added = []
    for one in (lambda c: c, weighted):
        (grads, metrics), (without, _) = gradients(one(MOE)), gradients(one(off))
        added.append((jax.tree.map(np.subtract, grads, without), metrics))
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradients(MOE)[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), added[1][0], added[0][0])
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(added[0][0])) > 1e-3 * scale
    for name in ("balance_loss", "z_loss", "max_violation"):
        assert added[1][1][name] == pytest.approx(added[0][1][name], rel=1e-6)


@pytest.mark.parametrize(
    ("accumulation", "mesh"),
    [(2, (2, 1, 2)), (1, (2, 2, 2)), (1, (1, 1, 8)), (2, (1, 2, 2))],
    ids=str,
)
@pytest.mark.slow
def test_experts_on_a_mesh_under_accumulation_equal_one_pass_on_one_device(accumulation, mesh):
    grads, metrics = gradients(weighted(MOE))
    found, counted = gradients(replace(weighted(MOE, scope="global"), accumulation=accumulation), mesh)
    assert_close(found, grads)
    for name in ("loss", "weighted_loss", "effective_samples", "balance_loss", "z_loss"):
        assert counted[name] == pytest.approx(metrics[name], rel=1e-5), name


def test_warm_up_is_by_optimiser_step():
    config = weighted(DENSE, warmup_steps=1, warm_r=np.inf)
    batch = batch_of(config)
    (before, burned_in, after), (_, later, _) = steps_of(config, [batch, batch])
    assert_close(jax.tree.map(np.subtract, before, after), oracle(weighted(DENSE, strategy="uniform"))[0])
    assert burned_in["effective_samples"] == pytest.approx(1.0)
    assert later["effective_samples"] < 0.95


def test_without_weights_nothing_of_them_is_in_the_step(monkeypatch):
    """Its losses are made and weighted by other functions, and it reports as much as before."""

    def never(*args):
        raise AssertionError

    for name in ("weighted_cross_entropy", "pass_weighting", "step_weighting", "token_losses", "unit_losses"):
        monkeypatch.setattr(experiments.step, name, never)
    batch, mesh, tx = batch_of(DENSE), make_mesh(), optax.sgd(1.0)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(functools.partial(init_state, DENSE, tx))
        metrics = jax.eval_shape(compile_step(DENSE, tx, mesh), state, batch)[1]
        assert set(metrics) == {"loss", "grad_norm", "tokens"}
        with pytest.raises(AssertionError):
            jax.eval_shape(compile_step(weighted(DENSE), tx, mesh), state, batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0.0}, "reweighting.r = 0.0: expected a number above 0"),
        ({"r": float("nan")}, "reweighting.r = nan"),
        ({"warm_r": -1.0}, "reweighting.warm_r = -1.0"),
        ({"delta": 0.0}, "reweighting.delta = 0.0"),
        ({"warmup_steps": -1}, "reweighting.warmup_steps = -1"),
        ({"strategy": "upper"}, "strategy = 'upper': expected `lin_upper`"),
        ({"strategy": "mid"}, "strategy = 'mid': expected one of uniform"),
        ({"strategy": "ohem(share=2)"}, "share = 2: expected above 0, at most 1"),
        ({"strategy": "ohem(top=2)"}, "reweighting.strategy = .*expected options that ohem takes"),
        ({"strategy": "lin_upper("}, "reweighting.strategy"),
        ({"strategy": "optim.reweighting:excess"}, "expected options that optim.reweighting:excess takes"),
        ({"level": "batch"}, "reweighting.level = 'batch'"),
        ({"scope": "local"}, "reweighting.scope = 'local'"),
        ({"clip_quantile": 1.5}, "reweighting.clip_quantile = 1.5"),
    ],
    ids=str,
)
def test_bad_config_names_field_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        ReweightingConfig(**changes)


def test_accumulation_asks_for_the_scope_by_name():
    with pytest.raises(ValueError, match="reweighting.scope = '': expected micro or global, by name: accumulation = 2"):
        replace(weighted(DENSE), accumulation=2)


def test_fields_are_set_from_the_command_line():
    config = with_overrides(weighted(DENSE), ["reweighting.r=0.1", "reweighting.strategy=ohem(share=0.5)"])
    assert config.reweighting == ReweightingConfig("ohem(share=0.5)", r=0.1)
    assert flatten(config)["reweighting.strategy"] == "ohem(share=0.5)"
    assert with_overrides(DENSE, ["reweighting.strategy=quadratic"]).reweighting == ReweightingConfig("quadratic")
    assert flatten(DENSE)["reweighting.strategy"] == ""
