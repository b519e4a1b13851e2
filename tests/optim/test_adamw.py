"""AdamW against its equations in NumPy; the schedule's corners; what is decayed; where the state lives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optim.adamw import adamw, decay_mask, warmup_cosine
from optim.sharding import bytes_per_device, opt_state_shardings
from parallel.mesh import make_mesh

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "norm": {"scale": jnp.array([1.0, 2.0])}}


def test_three_steps_equal_the_equations():
    lr, b1, b2, decay, clip, eps = 0.1, 0.9, 0.95, 0.2, 1.0, 1e-8
    tx = adamw(optax.constant_schedule(lr), b1=b1, b2=b2, weight_decay=decay, clip_norm=clip)
    params, state = PARAMS, tx.init(PARAMS)
    expected = [np.asarray(PARAMS["w"], np.float64), np.asarray(PARAMS["norm"]["scale"], np.float64)]
    m = [np.zeros_like(x) for x in expected]
    v = [np.zeros_like(x) for x in expected]
    rng = np.random.default_rng(0)
    for t in range(1, 4):
        grads = [rng.normal(size=x.shape) for x in expected]
        updates, state = tx.update(
            {"w": jnp.asarray(grads[0], jnp.float32), "norm": {"scale": jnp.asarray(grads[1], jnp.float32)}},
            state,
            params,
        )
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum((g**2).sum() for g in grads))
        grads = [g * min(1.0, clip / norm) for g in grads]
        for i, weight_decay in enumerate((decay, 0.0)):
            m[i] = b1 * m[i] + (1 - b1) * grads[i]
            v[i] = b2 * v[i] + (1 - b2) * grads[i] ** 2
            direction = m[i] / (1 - b1**t) / (np.sqrt(v[i] / (1 - b2**t)) + eps)
            expected[i] = expected[i] - lr * (direction + weight_decay * expected[i])
    np.testing.assert_allclose(params["w"], expected[0], rtol=1e-5)
    np.testing.assert_allclose(params["norm"]["scale"], expected[1], rtol=1e-5)


def test_norm_scales_biases_and_sinks_are_not_decayed():
    assert decay_mask(PARAMS) == {"w": True, "norm": {"scale": False}}
    weights = ("wq", "wo", "wkv_down", "wk_up", "down", "gate_up", "router", "gate", "embedding", "head")
    others = ("bq", "bk", "bv", "bo", "bq_down", "bkv_down", "down_bias", "gate_up_bias", "bias", "sinks", "scale")
    expected = dict.fromkeys(weights, True) | dict.fromkeys(others, False)
    assert decay_mask(dict.fromkeys(expected, 0)) == expected


def test_schedule_rises_from_the_first_step_peaks_and_ends_at_the_fraction():
    schedule = warmup_cosine(1.0, 10, 100, 0.1)
    assert float(schedule(0)) == pytest.approx(0.1)
    assert float(schedule(10)) == pytest.approx(1.0)
    assert float(schedule(100)) == pytest.approx(0.1)
    assert float(schedule(1000)) == pytest.approx(0.1)
    assert float(schedule(55)) == pytest.approx(0.1 + 0.9 * 0.5, rel=1e-5)


@pytest.mark.parametrize("total", [1, 2, 5])
def test_schedule_of_runs_shorter_than_the_warmup_is_finite(total):
    schedule = warmup_cosine(1.0, 20, total, 0.1)
    assert all(0 <= float(schedule(i)) <= 1 for i in range(total + 1))


TRANSFORMS = {
    "adamw": adamw(optax.constant_schedule(0.1)),
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_state_is_placed_like_its_parameter_and_counted_exactly(name):
    mesh, tx = make_mesh(fsdp=2), TRANSFORMS[name]
    params = {"w": jnp.ones((8, 4)), "b": jnp.ones((3,))}
    shardings = {"w": NamedSharding(mesh, P("fsdp", None)), "b": NamedSharding(mesh, P())}
    placed = jax.device_put(params, shardings)
    state_shardings = opt_state_shardings(tx, params, shardings)
    state = jax.jit(tx.init, out_shardings=state_shardings)(placed)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert bytes_per_device(jax.eval_shape(tx.init, params), state_shardings) == held
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.spec == (P("fsdp", None) if leaf.shape == (8, 4) else P())
