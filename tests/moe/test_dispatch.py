"""All dispatchers equal the oracle on one routing: values, gradients, 1 and 8 devices. A new one joins by one line."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe.dispatch import ExpertParams, Grouped, dispatch
from moe.layer import swiglu
from moe.routing import RouterOutput
from parallel.mesh import AXES, make_mesh

T, D, F, E, K = 48, 8, 12, 8, 2
ORACLE = Grouped("reference")  # itself against a loop over tokens below
DISPATCHERS = {
    "blocks": Grouped("blocks", 16),
    "ragged": Grouped("ragged_dot"),
    "auto": Grouped("auto"),
    "triton": Grouped("triton"),  # here the path of CPUs; the kernels are in tests/kernels
}
MESHES = {"8x1x1": (8, 1, 1), "2x2x2": (2, 2, 2), "1x1x8": (1, 1, 8), "1x2x4": (1, 2, 4)}
FAST = ("2x2x2", "1x1x8")  # a program each, and one more for `scale_on_input`


def routing_case(name, num_tokens=T, num_experts=E, k=K):
    rng = np.random.default_rng(3)
    indices = np.stack([rng.permutation(num_experts)[:k] for _ in range(num_tokens)])
    valid = np.ones((num_tokens, k), bool)
    if name == "empty_experts":
        indices = np.stack([rng.permutation(3)[:k] for _ in range(num_tokens)])
    elif name == "one_expert_takes_all":
        indices[:, 0] = 5
        indices[:, 1] = np.where(indices[:, 1] == 5, 4, indices[:, 1])
    elif name == "dropped":
        valid = rng.random((num_tokens, k)) < 0.6
    elif name == "all_dropped":
        valid[:] = False
    weights = rng.random((num_tokens, k)).astype(np.float32)
    none = jnp.zeros((num_tokens, num_experts))
    return RouterOutput(
        jnp.asarray(indices, jnp.int32),
        jnp.asarray(weights),
        jnp.asarray(valid),
        none,
        none,
        none[0],
        "input" if name == "scale_on_input" else "output",
    )


CASES = ["plain", "empty_experts", "one_expert_takes_all", "dropped", "all_dropped", "scale_on_input"]


@functools.cache
def inputs(num_tokens=T, num_experts=E):
    keys = jax.random.split(jax.random.key(1), 4)
    x = jax.random.normal(keys[0], (num_tokens, D))
    experts = ExpertParams(
        jax.random.normal(keys[1], (num_experts, D, 2 * F)) * 0.3, jax.random.normal(keys[2], (num_experts, F, D)) * 0.3
    )
    return x, experts, jax.random.normal(keys[3], (num_tokens, D))


@functools.cache
def program(local, mesh_name=None):
    """One compiled program per dispatcher and mesh: routings are data (and `scale_on` a static field of theirs)."""

    def scalar(x, experts, weights, routing, seed_out):
        out = dispatch(x, routing.replace(weights=weights), experts, local)
        return jnp.sum(out * seed_out), out

    return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True))


forward = jax.jit(dispatch, static_argnums=3)


def value_and_grads(local, routing, x, experts, seed_out, mesh_name=None):
    return program(local, mesh_name)(x, experts, routing.weights, routing, seed_out)


def assert_tree_close(got, expected, tol=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        scale = max(float(np.abs(b).max()), 1e-30)
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=tol)


PAIRS = [(name, case) for name in DISPATCHERS for case in CASES if (name, case) != ("triton", "scale_on_input")]


@pytest.mark.parametrize(("name", "case"), PAIRS)
@pytest.mark.slow_after(8)
def test_equal_to_the_oracle(name, case):
    x, experts, out = inputs()
    routing = routing_case(case)
    assert_tree_close(
        value_and_grads(DISPATCHERS[name], routing, x, experts, out),
        value_and_grads(ORACLE, routing, x, experts, out),
    )


@pytest.mark.parametrize("num_tokens", [1, 7, 50])
def test_token_counts_that_divide_nothing(num_tokens):
    x, experts, out = inputs(num_tokens)
    routing = routing_case("plain", num_tokens)
    assert_tree_close(
        value_and_grads(DISPATCHERS["blocks"], routing, x, experts, out),
        value_and_grads(ORACLE, routing, x, experts, out),
    )


@pytest.mark.parametrize(
    "mesh_name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in MESHES]
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow_after(5)
def test_sharded_equals_the_oracle_on_one_device(mesh_name, case):
    x, experts, out = inputs()
    routing = routing_case(case)
    expected = value_and_grads(ORACLE, routing, x, experts, out)
    mesh = make_mesh(*MESHES[mesh_name])
    tokens = NamedSharding(mesh, P(AXES, None))
    with jax.set_mesh(mesh):
        placed = ExpertParams(*(jax.device_put(w, NamedSharding(mesh, P("expert"))) for w in experts))
        sharded = routing.replace(
            indices=jax.device_put(routing.indices, tokens),
            weights=jax.device_put(routing.weights, tokens),
            valid=jax.device_put(routing.valid, tokens),
        )
        got = value_and_grads(DISPATCHERS["blocks"], sharded, jax.device_put(x, tokens), placed, out, mesh_name)
    assert_tree_close(jax.device_get(got), expected)


@pytest.mark.parametrize("case", CASES)
def test_the_oracle_equals_a_loop_over_tokens(case):
    x, experts, _ = inputs()
    routing = routing_case(case)
    expected = np.zeros(x.shape, np.float32)
    for t, k in np.argwhere(np.asarray(routing.valid)):
        e, w = int(routing.indices[t, k]), float(routing.weights[t, k])
        inside, outside = (w, 1.0) if routing.scale_on == "input" else (1.0, w)
        gate, up = np.split(inside * np.asarray(x[t]) @ np.asarray(experts.gate_up[e]), 2)
        expected[t] += outside * (gate / (1 + np.exp(-gate)) * up) @ np.asarray(experts.down[e])
    assert_tree_close(forward(x, routing, experts, ORACLE), expected)


def test_one_expert_is_a_dense_ffn():
    x, experts, _ = inputs(num_experts=1)
    routing = routing_case("plain", num_experts=1, k=1).replace(weights=jnp.ones((T, 1)))
    expected = swiglu(x, experts.gate_up[0], experts.down[0])
    for local in (ORACLE, *DISPATCHERS.values()):
        assert_tree_close(forward(x, routing, experts, local), expected)


def test_permuting_experts_or_tokens_permutes_nothing_else():
    x, experts, _ = inputs()
    routing, local = routing_case("dropped"), DISPATCHERS["blocks"]
    base = forward(x, routing, experts, local)
    order = np.random.default_rng(0).permutation(E)
    inverse = jnp.asarray(np.argsort(order))
    renamed = routing.replace(indices=inverse[routing.indices].astype(jnp.int32))
    moved = ExpertParams(experts.gate_up[order], experts.down[order])
    assert_tree_close(forward(x, renamed, moved, local), base)
    rows = np.random.default_rng(1).permutation(T)
    shuffled = routing.replace(indices=routing.indices[rows], weights=routing.weights[rows], valid=routing.valid[rows])
    assert_tree_close(forward(x[rows], shuffled, experts, local), base[rows])
