"""The training step: any mesh and any accumulation give one device's loss and gradients; collectives are counted.

A program costs seconds to compile, so results are kept by configuration, parameters are drawn with NumPy instead of
by a compiled initialisation (which has its own test), and the dispatcher is the cheapest one that the test is about:
blocks of one size on meshes and under accumulation, `einsum` where only losses, counts and biases are looked at.
"""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.config import BalanceConfig, MeshConfig, OptimizerConfig, RunConfig
from experiments.data.corpus import open_corpus
from experiments.evaluate import evaluate, sequence_sums
from experiments.recipes import smoke
from experiments.step import (
    batch_sharding,
    compile_step,
    forward,
    init_state,
    make_optimizer,
    state_shardings,
    summed_cross_entropy,
    targets_of,
)
from experiments.train import restore_or_init
from moe.config import ModelConfig, MoEConfig
from parallel.checkpoint import Checkpoints
from parallel.mesh import make_mesh

MOE = MoEConfig(num_experts=8, top_k=2, expert_dim=8, block_size=16)
BASE = replace(
    smoke(),
    model=ModelConfig(
        vocab_size=64, hidden=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, moe=MOE, init_std=0.2
    ),
    data=replace(smoke().data, seq_len=8),
    balance=BalanceConfig("global_exact", weight=0.1, micro_batch_size=1, z_weight=1e-3),
)
slow = pytest.mark.slow
MESHES = [pytest.param((8, 1, 1), marks=slow), (2, 2, 2), pytest.param((1, 1, 8), marks=slow)]


def with_moe(config: RunConfig, **changes) -> RunConfig:
    return replace(config, model=replace(config.model, moe=replace(config.model.moe, **changes)))


EINSUM = with_moe(BASE, dispatcher="einsum")


def batch_of(config: RunConfig, seed=0, ragged=True):
    """[A, B, S + 1] with uneven padding and two documents in some sequences."""
    rng = np.random.default_rng(seed)
    shape = (config.batch_size, config.data.seq_len + 1)
    tokens = rng.integers(0, 64, size=shape)
    segments = np.ones(shape, np.int32)
    if ragged:
        segments[1, 5:] = 0
        segments[2, 3:] = 2
    positions = np.broadcast_to(np.arange(shape[1]), shape)
    batch = {"tokens": tokens, "segment_ids": segments, "positions": positions}
    a = config.accumulation
    return {k: jnp.asarray(v.reshape(a, -1, shape[1]), jnp.int32) for k, v in batch.items()}


def drawn_params(config: RunConfig):
    """Parameters like a fresh state's: norm scales one, the rest normal; a function of name and shape alone."""

    def draw(path, leaf):
        if path[-1].key == "scale":
            return np.ones(leaf.shape, leaf.dtype)
        rng = np.random.default_rng(list(jax.tree_util.keystr(path).encode()))
        return config.model.init_std * rng.standard_normal(leaf.shape, leaf.dtype)

    shapes = jax.eval_shape(lambda: init_state(config, optax.sgd(1.0)).params)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def drawn_state(config: RunConfig, tx, mesh):
    """A fresh state with `drawn_params`, on the mesh. Call under `jax.set_mesh(mesh)`."""
    abstract = jax.eval_shape(functools.partial(init_state, config, tx))
    params = drawn_params(config)

    def rest():  # the drawing of parameters is dead code here, so this compiles in no time
        return replace(init_state(config, tx), params={}, opt_state={})

    opt_state = jax.jit(tx.init)(params)
    state = replace(jax.jit(rest)(), params=params, opt_state=opt_state)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    return jax.device_put(state, state_shardings(abstract, tx, mesh))


@functools.cache
def gradients(config: RunConfig, mesh_shape=(1, 1, 1)):
    """(gradients, metrics) of one step on its batch, measured as the parameters' change under SGD of rate 1."""
    config = replace(config, mesh=MeshConfig(*mesh_shape))
    mesh, tx = make_mesh(*mesh_shape), optax.sgd(1.0)
    with jax.set_mesh(mesh):
        state = drawn_state(config, tx, mesh)
        before = jax.device_get(state.params)
        placed = jax.device_put(batch_of(config), batch_sharding(mesh))
        state, metrics = compile_step(config, tx, mesh)(state, placed)
        after = jax.device_get(state.params)
    return jax.tree.map(lambda a, b: a - b, before, after), jax.device_get(metrics)


def assert_close(got, expected, tol=1e-5):
    """Relative to each leaf's largest magnitude."""
    flat = jax.tree_util.tree_flatten_with_path(expected)[0]
    for (path, b), a in zip(flat, jax.tree.leaves(got)):
        scale = max(float(np.abs(b).max()), 1e-12)
        np.testing.assert_allclose(a / scale, b / scale, atol=tol, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def one_device():
    """By the oracle of the dispatchers, while meshes and accumulation run blocks."""
    return gradients(EINSUM)


def test_a_fresh_state_is_the_same_on_one_device_and_on_a_mesh():
    """Initialised where it is to lie, with `state_shardings` as out_shardings."""
    tx, states = make_optimizer(BASE.optimizer, BASE.steps), []
    for shape in ((1, 1, 1), (2, 2, 2)):
        mesh = make_mesh(*shape)
        with jax.set_mesh(mesh):
            init = functools.partial(init_state, replace(BASE, mesh=MeshConfig(*shape)), tx)
            shardings = state_shardings(jax.eval_shape(init), tx, mesh)
            state = jax.jit(init, out_shardings=shardings)()
            state = replace(state, key=jax.random.key_data(state.key))
            states.append(jax.device_get(state))
    jax.tree.map(np.testing.assert_array_equal, *states)
    params = jax.tree.leaves(states[0].params)
    assert all(leaf.std() > 0 or (leaf == 1.0).all() for leaf in params)


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: "x".join(map(str, m)))
def test_any_mesh_equals_one_device(mesh, one_device):
    grads, metrics = gradients(BASE, mesh)
    assert_close(grads, one_device[0])
    assert_close(metrics, one_device[1])


@pytest.mark.parametrize(
    ("accumulation", "mesh"),
    [(2, (1, 1, 1)), pytest.param(4, (2, 1, 1), marks=slow), pytest.param(2, (1, 2, 2), marks=slow)],
    ids=str,
)
def test_any_accumulation_equals_one_pass(accumulation, mesh, one_device):
    config = replace(BASE, accumulation=accumulation)
    grads, metrics = gradients(config, mesh)
    assert_close(grads, one_device[0])
    for name in ("loss", "balance_loss", "z_loss", "grad_norm", "max_violation", "dead_experts", "load_p95"):
        assert metrics[name] == pytest.approx(one_device[1][name], rel=1e-5), name


@pytest.mark.parametrize("scope", ["shuffle_micro", "microbatch", "sequence"])
@pytest.mark.slow
def test_other_scopes_do_not_depend_on_accumulation(scope):
    config = replace(EINSUM, balance=replace(BASE.balance, scope=scope, micro_batch_size=2))
    assert_close(gradients(replace(config, accumulation=2))[0], gradients(config)[0])


@pytest.mark.slow
def test_a_sample_of_the_whole_batch_is_exact_for_a_router_with_as_many_slots_as_experts():
    config = with_moe(EINSUM, router="top_p(p=0.5)")
    sampled = replace(config, balance=replace(BASE.balance, scope="shuffle_micro", micro_batch_size=BASE.batch_size))
    assert_close(gradients(sampled)[0], gradients(config)[0])


@pytest.mark.slow
def test_prefix_differs_from_exact_only_under_accumulation():
    prefix = replace(EINSUM, balance=replace(BASE.balance, scope="global_prefix"))
    once, many, exact = (gradients(c)[0] for c in (prefix, replace(prefix, accumulation=4), EINSUM))
    assert_close(once, exact)
    with pytest.raises(AssertionError):
        assert_close(many, exact)


def by_device(config: RunConfig, batch, devices):
    """(gradients, balance loss) of one step, each device's part of each pass on its own: a loop, on one device. With
    f of that part, L = sum_d E sum_i f_di (sum of p)_di / tokens of the step, mean over layers."""
    one = replace(config, mesh=MeshConfig())
    rows = config.batch_size // config.accumulation // devices
    parts = {name: leaf.reshape(-1, rows, leaf.shape[-1]) for name, leaf in batch.items()}
    targets = targets_of(batch)[1].sum()
    tokens = (batch["segment_ids"][..., :-1] > 0).sum()

    def loss(params):
        def part_of(part):
            out = forward(one, params, part, {}, None)
            counts, probs = out.stats.counts.sum(axis=1), out.stats.prob_sums.sum(axis=1)  # [L, E]
            f = counts / (MOE.top_k * out.stats.tokens.sum(axis=1, keepdims=True))
            balance = MOE.num_experts * jnp.sum(f * probs) / (one.model.num_moe_layers * tokens)
            z = out.stats.z_sums.sum() / (one.model.num_moe_layers * tokens)
            ce = summed_cross_entropy(out, *targets_of(part)) / targets
            return ce + one.balance.weight * balance + one.balance.z_weight * z, balance

        losses, balance = jax.lax.map(part_of, parts)
        return losses.sum(), balance.sum()

    grads, balance = jax.jit(jax.grad(loss, has_aux=True))(drawn_params(one))
    return jax.device_get(grads), float(balance)


@pytest.mark.parametrize(("mesh", "accumulation"), [((2, 2, 2), 1), ((2, 1, 2), 2)], ids=str)
@pytest.mark.slow
def test_device_scope_is_each_device_alone(mesh, accumulation):
    """Two sequences a device and pass: neither `sequence` nor the whole batch."""
    devices = int(np.prod(mesh))
    balance = replace(BASE.balance, scope="device")
    config = replace(EINSUM, batch_size=2 * devices * accumulation, accumulation=accumulation, balance=balance)
    grads, metrics = gradients(config, mesh)
    expected, value = by_device(config, batch_of(config), devices)
    assert metrics["balance_loss"] == pytest.approx(value, rel=1e-5)
    assert_close(grads, expected)


def trajectory(config: RunConfig, steps, mesh_shape=(1, 1, 1), tx=None):
    """[(state before, metrics, state after)] on the host, over `steps` batches of their own."""
    config = replace(config, mesh=MeshConfig(*mesh_shape))
    mesh, tx = make_mesh(*mesh_shape), tx or make_optimizer(config.optimizer, config.steps)
    host = lambda state: jax.device_get(replace(state, key=jax.random.key_data(state.key)))  # noqa: E731
    seen = []
    with jax.set_mesh(mesh):
        state, step = drawn_state(config, tx, mesh), compile_step(config, tx, mesh)
        for i in range(steps):
            before = host(state)
            state, metrics = step(state, jax.device_put(batch_of(config, seed=i), batch_sharding(mesh)))
            seen.append((before, jax.device_get(metrics), host(state)))
    return seen


def routed(config: RunConfig):
    """The statistics [L, B, ...] of a whole step, from its state before and its number, in one pass on one device."""
    run = jax.jit(lambda params, batch, state: forward(config, params, batch, state, None).stats)

    def stats(before, step):
        batch = {name: leaf.reshape(-1, leaf.shape[-1]) for name, leaf in batch_of(config, seed=step).items()}
        return jax.device_get(run(before.params, batch, before.router_state))

    return stats


@pytest.mark.parametrize(
    ("decay", "accumulation", "mesh"),
    [(0.75, 2, (2, 1, 2)), (0.75, 1, (1, 1, 1)), (0.75, 2, (1, 1, 1)), (0.0, 2, (2, 1, 2))],
    ids=str,
)
@pytest.mark.slow
def test_ema_scope_uses_the_counts_of_earlier_steps_alone(decay, accumulation, mesh):
    """c <- decay c + c_step, T likewise; step n is balanced by f = c / (k T) of the steps before it, the first by none.
    A decay of 0 leaves the step before."""
    balance = replace(BASE.balance, scope="ema", ema_decay=decay)
    config = replace(EINSUM, balance=balance, accumulation=accumulation)
    counts, tokens, stats_at, last = np.zeros((2, MOE.num_experts)), np.zeros(2), routed(config), None
    for step, (before, metrics, after) in enumerate(trajectory(config, 3, mesh)):
        stats = stats_at(before, step)
        f = counts / (MOE.top_k * np.maximum(tokens, 1.0)[:, None])
        if last is not None and decay == 0:
            np.testing.assert_allclose(f, last.counts.sum(axis=1) / (MOE.top_k * last.tokens.sum(axis=1))[:, None])
        expected = MOE.num_experts * (f * stats.prob_sums.sum(axis=1)).sum() / stats.tokens.sum()
        assert metrics["balance_loss"] == pytest.approx(expected, rel=1e-5)
        assert (metrics["balance_loss"] == 0.0) == (step == 0)
        counts = decay * counts + stats.counts.sum(axis=1)
        tokens = decay * tokens + stats.tokens.sum(axis=1)
        ema = after.method_state["balance_ema"]
        np.testing.assert_array_equal(ema.counts, counts)  # whole numbers and powers of two: exact
        np.testing.assert_array_equal(ema.tokens, tokens)
        last = stats


LOSS_FREE = "loss_free(step_size=0.0078125)"  # 2^-7: every sum below is exact in float32
HARD_ON_PARAMETERS = OptimizerConfig(learning_rate=0.05, warmup_steps=1, weight_decay=10.0, clip_norm=1e-3)


def loss_free(router=LOSS_FREE, **changes):
    return replace(with_moe(EINSUM, router=router), optimizer=HARD_ON_PARAMETERS, **changes)


def next_bias(bias, groups):
    """One sign update, u = 2^-7, in float64: bias [L, E], groups [L, G, E] (a single one: global counts)."""
    error = np.sign(groups.mean(axis=-1, keepdims=True) - groups).mean(axis=1)
    new = bias + 2.0**-7 * error
    return new - new.mean(axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("accumulation", "mesh"),
    [(2, (2, 1, 2)), (1, (1, 1, 1)), (2, (1, 1, 1)), (1, (2, 2, 2))],
    ids=str,
)
@pytest.mark.slow
def test_loss_free_bias_follows_the_counts_of_the_whole_step_and_nothing_else(accumulation, mesh):
    """Bit for bit, under an optimiser whose decay and clipping would show."""
    config = loss_free(accumulation=accumulation)
    stats_at = routed(config)
    for step, (before, _, after) in enumerate(trajectory(config, 2, mesh)):
        counts = stats_at(before, step).counts.sum(axis=1, keepdims=True).astype(np.float64)
        expected = next_bias(before.router_state["bias"].astype(np.float64), counts)
        np.testing.assert_array_equal(after.router_state["bias"], expected)
        assert np.abs(expected).max() > 0
        np.testing.assert_array_equal(after.router_state["updates"], step + 1)
        paths = [
            jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path((after.params, after.opt_state))
        ]
        assert not any("bias" in path for path in paths)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.slow
def test_loss_free_local_pool_is_the_mean_over_micro_batches(accumulation):
    """Micro-batches of two sequences, whatever the accumulation."""
    router = LOSS_FREE.replace(")", ", pool='local')")
    config = loss_free(router, accumulation=accumulation, balance=replace(BASE.balance, micro_batch_size=2))
    ((before, _, after),) = trajectory(config, 1)
    counts = routed(config)(before, 0).counts.astype(np.float64)  # [L, B, E]
    groups = counts.reshape(2, -1, 2, MOE.num_experts).sum(axis=2)
    np.testing.assert_array_equal(after.router_state["bias"], next_bias(np.zeros((2, MOE.num_experts)), groups))
    whole = next_bias(np.zeros((2, MOE.num_experts)), counts.sum(axis=1, keepdims=True))
    assert (after.router_state["bias"] != whole).any()


def test_evaluation_uses_the_frozen_bias_and_does_not_move_it():
    config = loss_free(eval_tokens_per_domain=64)
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        state = drawn_state(config, make_optimizer(config.optimizer, config.steps), mesh)
        bias = jnp.zeros((2, MOE.num_experts)).at[:, 3].set(9.0).at[:, 5].set(9.0)  # scores are below 1
        state = replace(state, router_state=state.router_state | {"bias": bias})
        batch = {name: leaf[0] for name, leaf in batch_of(config).items()}
        sums = jax.jit(functools.partial(sequence_sums, config=config))
        counts = sums(state.params, batch, state.router_state)["counts"].sum(axis=0)
        tokens = float((batch["segment_ids"][:, :-1] > 0).sum())
        np.testing.assert_array_equal(counts, np.isin(np.arange(MOE.num_experts), (3, 5)) * np.full((2, 1), tokens))
        metrics, series = evaluate(config, state, open_corpus(config.data), mesh)
    np.testing.assert_array_equal(np.asarray(series["domain_expert"])[..., [3, 5]], 0.5)
    assert metrics["max_violation"] == pytest.approx(MOE.num_experts / MOE.top_k - 1)
    np.testing.assert_array_equal(state.router_state["bias"], bias)
    np.testing.assert_array_equal(state.router_state["updates"], 0)


@pytest.mark.slow
def test_ema_and_biases_survive_a_checkpoint_bit_for_bit(tmp_path):
    config = loss_free(balance=replace(BASE.balance, scope="ema"))
    mesh, tx = make_mesh(), make_optimizer(config.optimizer, config.steps)
    with jax.set_mesh(mesh), Checkpoints(tmp_path / "checkpoints") as saved:
        state = restore_or_init(config, tx, mesh, saved)
        state, _ = compile_step(config, tx, mesh)(state, batch_of(config))
        saved.save(1, state)
        saved.wait()  # until then the step is not complete, and a fresh state is what there is
        again = restore_or_init(config, tx, mesh, saved)
    assert float(state.method_state["balance_ema"].counts.sum()) > 0
    assert float(jnp.abs(state.router_state["bias"]).sum()) > 0
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(again)):
        old, new = (jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (old, new))
        assert old.dtype == new.dtype
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes(), jax.tree_util.keystr(path)


def test_padding_and_first_tokens_of_documents_are_not_targets():
    batch = batch_of(BASE)
    _, weights = targets_of(batch)
    s = BASE.data.seq_len
    assert weights[0, 0].sum() == s
    assert weights[0, 1].sum() == 4  # positions 0..4 are real: four next tokens
    assert weights[0, 2].sum() == s - 1  # the step from document 1 to 2 is not predicted
    ids = {"tokens": jnp.array([[5, 6, 0, 7, 0, 0]]), "segment_ids": jnp.array([[1, 1, 1, 2, 2, 0]])}
    targets, weights = targets_of(ids)
    assert targets.tolist() == [[6, 0, 7, 0, 0]]
    assert weights.tolist() == [[1, 1, 0, 1, 0]]


def step_hlo(mesh_shape, forward_only):
    config = replace(EINSUM, mesh=MeshConfig(*mesh_shape))
    mesh, tx = make_mesh(*mesh_shape), optax.sgd(1.0)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(functools.partial(init_state, config, tx))
        shardings = state_shardings(state, tx, mesh)
        place = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)  # noqa: E731
        state = jax.tree.map(place, state, shardings)
        batch = jax.tree.map(lambda a: place(a, batch_sharding(mesh)), batch_of(config))
        if not forward_only:
            return compile_step(config, tx, mesh).lower(state, batch).compile().as_text()
        rows = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(
                a.shape[1:], a.dtype, sharding=NamedSharding(mesh, P(tuple(mesh.axis_names)))
            ),
            batch,
        )
        run = jax.jit(lambda p, b: forward(config, p, b, {}, jax.random.key(0)).hidden)
        return run.lower(state.params, rows).compile().as_text()


@pytest.mark.parametrize(
    ("mesh", "forward_only", "expected"),
    [
        pytest.param((1, 1, 8), True, 2, marks=slow),
        pytest.param((2, 2, 2), True, 2, marks=slow),
        ((1, 1, 8), False, 4),
        pytest.param((8, 1, 1), False, 0, marks=slow),
    ],
    ids=str,
)
def test_two_token_all_to_alls_forward_per_moe_layer(mesh, forward_only, expected):
    """Both layers share one scanned body, so the program text holds each once: two forward, two more backward."""
    ops = re.findall(r" all-to-all(?:-start)?\(", step_hlo(mesh, forward_only))
    assert len(ops) == expected


def test_batch_not_divisible_by_the_mesh_names_both():
    with pytest.raises(ValueError, match=r"batch_size = 8.*3 devices"):
        replace(BASE, mesh=MeshConfig(data=3))
    with pytest.raises(ValueError, match=r"mesh.expert = 8.*num_experts = 4"):
        replace(BASE, mesh=MeshConfig(expert=8), model=replace(BASE.model, moe=replace(MOE, num_experts=4)))
    with pytest.raises(ValueError, match=r"batch_size = 8.*accumulation = 3"):
        replace(BASE, accumulation=3)


@pytest.mark.slow
def test_bfloat16_training_tracks_float32():
    """Bound stated beforehand: over 50 steps the loss curves differ by less than 0.05 nats on average and 0.15
    anywhere, while the loss falls by more than ten times the mean bound."""
    config = replace(EINSUM, steps=50, optimizer=replace(BASE.optimizer, learning_rate=5e-3))
    data = [batch_of(config, seed, ragged=False) for seed in range(5)]  # five batches, seen ten times: learnable
    curves = {}
    for dtype in ("float32", "bfloat16"):
        run = replace(config, model=replace(config.model, compute_dtype=dtype, init_std=0.02))
        mesh, tx = make_mesh(), make_optimizer(config.optimizer, config.steps)
        with jax.set_mesh(mesh):
            state = drawn_state(run, tx, mesh)
            step, losses = compile_step(run, tx, mesh), []
            for i in range(50):
                state, metrics = step(state, data[i % 5])
                losses.append(metrics["loss"])
        curves[dtype] = np.asarray(jax.device_get(losses))
    gap = np.abs(curves["bfloat16"] - curves["float32"])
    assert gap.max() > 0
    assert gap.mean() < 0.05, gap
    assert gap.max() < 0.15, gap
    assert curves["float32"][0] - curves["float32"][-1] > 0.5
