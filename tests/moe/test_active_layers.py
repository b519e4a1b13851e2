"""A model of which some layers train: the `Transformer`'s values, its gradient's rows, and no other gradient."""

import math
import re
from dataclasses import replace
from functools import partial
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe.active_layers import active_forward
from moe.config import LatentConfig, ModelConfig, MoEConfig
from moe.transformer import Transformer, init_params, init_router_state
from optim.layerwise import adam_of_part, lisa
from optim.parts import active_layers
from parallel.mesh import BATCH, make_mesh
from parallel.sharding import tree_shardings

DENSE = ModelConfig(
    vocab_size=37, hidden=16, num_layers=5, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=24, moe=None, init_std=0.3
)
MOE = MoEConfig(num_experts=4, top_k=2, expert_dim=12, shared_dim=12, router="loss_free")
MIXED = replace(DENSE, moe=MOE, dense_layers=(2,), windows=(4, 0, 3, 0, 2), sinks=True)  # runs of 2, 1 and 2 layers
CONFIGS = {
    "dense": replace(DENSE, unroll=2),
    "dense_full": replace(DENSE, remat="full", tie_embeddings=True),
    "mixed": MIXED,
    "mixed_dots": replace(MIXED, remat="dots", dense_layers=(), first_dense=2, attention_bias="all"),
    "noisy_full_bf16": replace(
        DENSE, num_layers=2, remat="full", compute_dtype="bfloat16", moe=replace(MOE, router="noisy_topk")
    ),
    "latent": replace(
        DENSE, num_layers=2, num_kv_heads=2, latent=LatentConfig(q_rank=0, kv_rank=8, nope_dim=4, rope_dim=4)
    ),
}
B, S, GAP = 8, 6, 3
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def labels(params):
    of_run = lambda path, _: "layers" if path[0].key.startswith("runs_") else "adam"  # noqa: E731
    return jax.tree_util.tree_map_with_path(of_run, params)


def parameters(config):
    """Random ones, the biases and scales too."""
    noisy = lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape)  # noqa: E731
    return jit(lambda: jax.tree.map(noisy, init_params(config, jax.random.key(0))))()


def inputs(config, seed=0):
    """A batch with padding, two documents a row, and the router's state."""
    tokens = jax.random.randint(jax.random.key(seed), (B, S), 0, config.vocab_size)
    segments = jnp.broadcast_to(jnp.array([1, 1, 2, 2, 2, 0])[None], (B, S))
    positions = jnp.broadcast_to(jnp.array([0, 1, 0, 1, 2, 0])[None], (B, S))
    return tokens, segments, positions, init_router_state(config)


def loss_of(out):
    """Of everything that carries a gradient."""
    loss = jnp.mean(jnp.square(out.hidden.astype(jnp.float32) @ out.head.T))
    if out.stats is None:
        return loss, out
    terms = out.stats.prob_sums, out.stats.z_sums, out.stats.entropy_sums
    return loss + 0.1 * sum(jnp.mean(jnp.square(term)) for term in terms), out


def whole_loss(config, params, *batch):
    return loss_of(Transformer(config).apply({"params": params}, *batch))


def part_loss(config, seen, *batch):
    return loss_of(active_forward(config, *seen, *batch))


def assert_close(got, want, tolerance):
    """Relative to the leaf's largest magnitude; whole numbers are equal."""

    def leaf(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max(initial=0) <= tolerance * np.abs(b).max(initial=0)

    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(leaf, got, want)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.slow
def test_values_and_gradients_are_the_transformers(name):
    config, key = CONFIGS[name], jax.random.key(2)
    part = active_layers(labels, min(len(list(group)) for _, group in groupby(config.layer_kinds)), GAP)
    params, batch = parameters(config), (*inputs(config), key)

    @jit
    def whole(params):
        return jax.value_and_grad(partial(whole_loss, config), has_aux=True)(params, *batch)

    @jit
    def of_part(params, step):
        loss = lambda trained: part_loss(config, part.view(params, trained, step), *batch)  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(part.take(params, step))

    want, gradient = whole(params)
    tolerance = 1e-5 if config.compute_dtype == "float32" else 2e-2
    for step in (0, GAP):
        got, of_trained = of_part(params, step)
        assert_close(got, want, tolerance)
        assert_close(of_trained, part.take(gradient, step), tolerance)
        assert all(np.any(leaf) for leaf in jax.tree.leaves(of_trained["runs_0"]["attention"]))
    assert of_part._cache_size() == 1


@pytest.mark.slow
def test_at_evaluation_it_is_the_transformer_too():
    config = replace(MIXED, num_layers=2, windows=(), dense_layers=(0,))
    params, part = parameters(config), active_layers(labels, 1, GAP)
    want = jit(lambda params: whole_loss(config, params, *inputs(config), None))(params)
    seen = part.view(params, part.take(params, 0), 0)
    assert_close(jit(partial(part_loss, config))(seen, *inputs(config), None), want, 1e-6)


def test_nothing_but_the_trained_has_a_gradient():
    config = replace(DENSE, num_layers=3)
    params, part = parameters(config), active_layers(labels, 1, GAP)
    trained, batch = part.take(params, 0), (*inputs(config), None)
    gradient = jit(jax.grad(lambda params: part_loss(config, part.view(params, trained, 0), *batch)[0]))(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


# --- steps ---


def lisa_step(config, active):
    """(params, state, step, batch) -> (params, state) from gradients of everything."""
    tx = lisa(0.02, labels, active=active, update_gap=GAP, seed=4)

    def step(params, state, at, batch):
        del at
        gradient = jax.grad(lambda params: whole_loss(config, params, *batch)[0])(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return step, tx.init


def part_step(config, active, *, put=True):
    """The same without gradients of frozen layers; `put=False` returns what was trained instead."""
    part, tx = active_layers(labels, active, GAP, seed=4), adam_of_part(0.02, labels, update_gap=GAP)

    def step(params, state, at, batch):
        trained = part.take(params, at)
        gradient = jax.grad(lambda trained: part_loss(config, part.view(params, trained, at), *batch)[0])(trained)
        updates, state = tx.update(gradient, state, trained)
        trained = optax.apply_updates(trained, updates)
        return (part.put(params, trained, at) if put else trained), state

    return step, lambda params: tx.init(part.take(params, 0))


@pytest.mark.slow
def test_lisa_step_for_step_in_one_program():
    config, ends = DENSE, []
    for step, init in (lisa_step(config, 2), part_step(config, 2)):
        params, step = parameters(config), jit(step)
        state = init(params)
        for at in range(3 * GAP):
            params, state = step(params, state, jnp.int32(at), (*inputs(config, at), jax.random.key(at)))
        assert step._cache_size() == 1
        ends.append(params)
    assert_close(*ends, 1e-4)
    moved = [np.asarray(a != b).any() for a, b in zip(jax.tree.leaves(ends[0]), jax.tree.leaves(parameters(config)))]
    assert all(moved)


def compiled(config, step, init, donated=(0, 1)):
    params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    state, batch = jax.eval_shape(init, params), (*inputs(config), jax.random.key(0))
    return jit(step, donate_argnums=donated).lower(params, state, jnp.int32(0), batch).compile()


def of_runs(config):
    """Shapes of stacked weights; those of norms' scales and biases are too common to look for."""
    params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    leaves = jax.tree.leaves([of_run for name, of_run in params.items() if name.startswith("runs_")])
    return [leaf.shape for leaf in leaves if len(leaf.shape) > 2]


def stacked_weights_made(config, program):
    """Instructions of a program, fused ones included, whose result has the size of a weight of all layers of a run."""
    sizes, made = {(shape[0], math.prod(shape)) for shape in of_runs(config)}, []
    for dims, operation in re.findall(r"= (?:f32|bf16)\[([\d,]+)\]\S* ([\w-]+)\(", program.as_text()):
        shape = tuple(int(n) for n in dims.split(","))
        passed_on = operation in ("parameter", "get-tuple-element", "bitcast")
        if (shape[0], math.prod(shape)) in sizes and not passed_on:
            made.append((operation, shape))
    return made


SIZES = replace(DENSE, hidden=20, ffn_dim=23)  # no activation [L, B S n] has the size of a weight [L, ...]
SIZES_MOE = replace(SIZES, moe=replace(MOE, expert_dim=11, shared_dim=11), remat="full")


@pytest.mark.parametrize("config", [
    SIZES, replace(SIZES, remat="full"), SIZES_MOE,
], ids=["none", "full", "moe"])  # fmt: skip
@pytest.mark.slow
def test_no_array_of_the_size_of_a_stacked_weight_is_made(config):
    assert all(math.prod(shape[1:]) % (B * S) for shape in of_runs(config))
    assert stacked_weights_made(config, compiled(config, *part_step(config, 1, put=False), donated=())) == []
    found = {shape for _, shape in stacked_weights_made(config, compiled(config, *lisa_step(config, 1)))}
    assert found >= set(of_runs(config))


@pytest.mark.slow
def test_the_step_needs_less_memory_by_most_of_the_frozen_layers():
    config = replace(DENSE, hidden=48, ffn_dim=96, num_layers=12, remat="full")
    whole, part = (compiled(config, *make(config, 2)).memory_analysis() for make in (lisa_step, part_step))
    frozen = 10 / 12 * 4 * sum(map(math.prod, of_runs(config)))
    assert part.temp_size_in_bytes < whole.temp_size_in_bytes - frozen / 2
    assert part.alias_size_in_bytes > 4 * sum(map(math.prod, of_runs(config)))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_eight_devices_equal_one(sizes):
    config = replace(MIXED, num_layers=3, windows=(4, 0, 3), dense_layers=(0,))
    part, params, batch = active_layers(labels, 1, GAP), parameters(config), (*inputs(config), jax.random.key(2))

    @jit
    def run(params, batch):
        loss = lambda trained: part_loss(config, part.view(params, trained, 0), *batch)  # noqa: E731
        (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(part.take(params, 0))
        return value, gradient

    want, mesh = run(params, batch), make_mesh(*sizes)
    with jax.set_mesh(mesh):
        spread = jax.device_put(batch[:3], jax.sharding.NamedSharding(mesh, BATCH))
        got = run(jax.device_put(params, tree_shardings(params, mesh)), (*spread, *batch[3:]))
    assert_close(jax.device_get(got), jax.device_get(want), 1e-4)


def test_bad_input():
    config = DENSE
    params, part, batch = parameters(config), active_layers(labels, 2, GAP), (*inputs(config), None)
    seen = part.view(params, part.take(params, 0), 0)
    with pytest.raises(ValueError, match=r"index = \[4\]: expected the active ones of the 5 layers of runs_0"):
        part_loss(config, seen._replace(index={4: seen.index[5]}), *batch)
    with pytest.raises(ValueError, match=r"runs_0\['attention'\]\['wk'\].shape = \(5, 16, 1, 8\): expected \[2, ...\]"):
        part_loss(config, seen._replace(trained=params), *batch)
    fixed = seen.trained | {"runs_0": seen.trained["runs_0"] | {"ffn_norm": {"scale": None}}}
    with pytest.raises(ValueError, match=r"runs_0\['ffn_norm'\]\['scale'\].shape = None: expected \[2, ...\]"):
        part_loss(config, seen._replace(trained=fixed), *batch)
