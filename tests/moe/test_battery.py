"""Every router x dispatcher x token policy, one battery. A new router, dispatcher or policy joins by one line.

A routing is data: padded to K = E slots, the outputs of all routers have one shape; so is the policy, a number that
picks the branch. One compiled program per dispatcher and mesh serves them all. The dispatchers' own cases (empty
experts, odd sizes) are in test_dispatch.py, the policies' closed forms in test_policies.py.
"""

import functools
import re
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe.config import MoEConfig
from moe.dispatch import ExpertParams, Grouped, dispatch
from moe.layer import MoELayer, swiglu
from moe.policies import make_policy
from moe.routing import make_router
from parallel.mesh import AXES, make_mesh

B, S, D, F, E, K, VOCAB = 8, 6, 8, 12, 8, 2, 50
T = B * S
ROUTERS = {
    "softmax": "softmax_topk",
    "softmax_raw": "softmax_topk(renormalize=False)",
    "deepseek_v2": "group_limited(groups=4, kept_groups=1, group_score='max', scaling=1.7)",
    "deepseek_v3": "group_limited(score='sigmoid', groups=4, kept_groups=2, group_score='top2', selection_bias=True,"
    " renormalize=True, scaling=2.5)",
    "gpt_oss": "learned_bias",
    "llama4": "sigmoid_input",
    "switch": "switch(jitter=0.01)",
    "gshard": "gshard(jitter=0.01)",
    "noisy_topk": "noisy_topk(load_weight=0.1)",
    "expert_choice": "expert_choice",
    "sinkhorn": "sinkhorn",
    "hash": f"hash(vocab_size={VOCAB})",
    "remoe": "remoe",
    "top_p": "top_p(p=0.5, entropy_weight=1e-3)",
    "loss_free": "loss_free",
    "loss_free_groups": "loss_free(groups=4, kept_groups=2, group_score='top2', renormalize=True)",
    "proportional": "loss_free(rule='proportional', pool='local')",
    "quantile": "loss_free(rule='quantile')",
    "fused": "loss_free(renormalize=True, fused=True)",
    "random": "random",
    "uniform": "uniform",
}
TOP_ONE = ("switch", "llama4")
VARIABLE_K = ("expert_choice", "remoe", "top_p")
FLOAT32_ALONE = ("fused",)  # kernels; in tests/kernels their gradients are those of the plain routers
WITHOUT_SCORES = ("random", "uniform", "hash")  # the choice does not look at the logits
NONCAUSAL = {"expert_choice": (True, False), "sinkhorn": (True,)}  # in training; in training and at evaluation
DISPATCHERS = {"blocks": Grouped("blocks", 16), "ragged": Grouped("ragged_dot")}
ORACLE = Grouped("reference")
POLICIES = {
    "dropless": "dropless",
    "position": "capacity(factor=1.0)",
    "position_global": "capacity(factor=0.75, group=0)",
    "token_order": "capacity(factor=0.75, order='token', group=2)",
    "probability": "capacity(factor=0.75, drop='probability', group=4)",
}
MESHES = {"4x1x2": (4, 1, 2), "8x1x1": (8, 1, 1), "1x2x4": (1, 2, 4), "1x1x8": (1, 1, 8)}
FIRST_MESH_IS_FAST = [name if name == "4x1x2" else pytest.param(name, marks=pytest.mark.slow) for name in MESHES]


def config_of(name, **changes):
    k = 1 if name in TOP_ONE else K
    base = MoEConfig(E, k, F, router=ROUTERS[name], allow_noncausal=name in NONCAUSAL)
    return replace(base, **changes)


@functools.cache
def inputs():
    """x, logits, token ids with padding at the end of two sequences."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(T, D)), jnp.float32)
    logits = jnp.asarray(rng.normal(size=(T, E)), jnp.float32)
    ids = rng.integers(0, VOCAB, (B, S))
    ids[1, 4:] = ids[5, 1:] = -1
    return x, logits, jnp.asarray(ids.reshape(-1), jnp.int32)


def router_call(name):
    """`(x, logits, ids, key) -> (RouterOutput, losses)` with parameters of its own and a bias, none of them zero."""
    router = make_router(config_of(name))
    state = router.init_state()
    if "bias" in state:
        state["bias"] = jnp.linspace(-0.1, 0.1, E)
    if not isinstance(router, nn.Module):
        return lambda x, logits, ids, key: router(x, logits, ids, state, key)
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(router.init, jax.random.key(0), *inputs(), state, jax.random.key(1))
    params = jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype), shapes)
    return lambda x, logits, ids, key: router.apply(params, x, logits, ids, state, key)


@functools.cache
def routed(name, training=True):
    key = jax.random.key(3) if training else None
    return jax.jit(router_call(name), static_argnums=() if training else (3,))(*inputs(), key)


@functools.cache
def as_data(name):
    """The routing of `name` with padding dropped and K = E slots."""
    routing = jax.device_get(routed(name)[0])
    valid = routing.valid & (np.asarray(inputs()[2]) >= 0)[:, None]
    extra = ((0, 0), (0, E - routing.indices.shape[1]))
    routing = replace(
        routing, indices=np.pad(routing.indices, extra), weights=np.pad(routing.weights, extra),
        valid=np.pad(valid, extra), balance_indices=None, observed=None,
    )  # fmt: skip
    return jax.tree.map(jnp.asarray, routing)


@functools.cache
def experts():
    keys = jax.random.split(jax.random.key(1), 2)
    return ExpertParams(0.3 * jax.random.normal(keys[0], (E, D, 2 * F)), 0.3 * jax.random.normal(keys[1], (E, F, D)))


@functools.cache
def cotangent():
    return jax.random.normal(jax.random.key(4), (T, D))


@functools.cache
def program(local, mesh_name=None):
    """Compiled once; routings and the policy's number are data (`scale_on` is a static field, so it makes two)."""
    policies = [make_policy(config_of("softmax", policy=spec, allow_noncausal=True)) for spec in POLICIES.values()]
    branches = [functools.partial(policy, num_sequences=B, training=True) for policy in policies]

    def scalar(x, experts, weights, routing, policy, seed):
        kept = jax.lax.switch(policy, branches, routing.replace(weights=weights))
        out = dispatch(x, kept, experts, local)
        return jnp.sum(out * seed), (out, kept.counts)

    return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True))


def run(local, policy_name, routing, mesh_name=None):
    (x, *_), weights, seed = inputs(), experts(), cotangent()
    policy = np.int32(list(POLICIES).index(policy_name))
    if mesh_name is None:
        return program(local)(x, weights, routing.weights, routing, policy, seed)
    mesh = make_mesh(*MESHES[mesh_name])
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P(AXES))
        by_token = {f: jax.device_put(getattr(routing, f), rows) for f in ("indices", "weights", "valid", "probs")}
        placed = jax.device_put(weights, NamedSharding(mesh, P("expert")))
        routing = replace(routing, **by_token)
        x = jax.device_put(x, rows)
        return jax.device_get(program(local, mesh_name)(x, placed, routing.weights, routing, policy, seed))


@functools.cache
def expected(policy_name, name):
    return jax.device_get(run(ORACLE, policy_name, as_data(name)))


def assert_tree_close(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(float(np.abs(b).max()), 1e-30)
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=tolerance)


# 1 and 7: all dispatchers equal the oracle on every routing, policy and mesh


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("router", ROUTERS)
def test_dispatchers_equal_the_oracle(router, dispatcher, policy):
    assert_tree_close(run(DISPATCHERS[dispatcher], policy, as_data(router)), expected(policy, router))


def test_the_number_of_a_policy_picks_that_policy():
    routing, kept = as_data("softmax"), set()
    for name, spec in POLICIES.items():
        policy = make_policy(config_of("softmax", policy=spec, allow_noncausal=True))
        counts = jax.jit(functools.partial(policy, num_sequences=B, training=True))(routing).counts
        np.testing.assert_array_equal(expected(name, "softmax")[0][1][1], counts)
        kept.add(tuple(np.asarray(counts).tolist()))
    assert len(kept) >= len(POLICIES) - 1  # the least probable and the last may be as many


@pytest.mark.parametrize("policy", ["dropless", "probability"])
@pytest.mark.parametrize("mesh", FIRST_MESH_IS_FAST)
@pytest.mark.parametrize("router", ROUTERS)
def test_on_eight_devices_as_on_one(router, mesh, policy):
    assert_tree_close(run(DISPATCHERS["blocks"], policy, as_data(router), mesh), expected(policy, router))


@pytest.mark.parametrize("router", ROUTERS)
def test_the_router_itself_on_eight_devices_as_on_one(router):
    """Tokens sharded: the choice (of expert choice and Sinkhorn too) is that of the whole pass."""
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P(AXES))
        got = jax.jit(router_call(router))(*(jax.device_put(a, rows) for a in inputs()), jax.random.key(3))
    got, want = jax.device_get(got), jax.device_get(routed(router))
    np.testing.assert_array_equal(got[0].indices, want[0].indices)
    np.testing.assert_array_equal(got[0].valid, want[0].valid)
    assert_tree_close((got[0].weights, got[0].probs, got[1]), (want[0].weights, want[0].probs, want[1]), 1e-6)


@pytest.mark.parametrize("mesh", ["4x1x2", "1x1x8"])
def test_two_all_to_alls_forward(mesh):
    built = make_mesh(*MESHES[mesh])
    with jax.set_mesh(built):
        fn = jax.jit(lambda x, routing, w: dispatch(x, routing, w, DISPATCHERS["blocks"]))
        text = fn.lower(inputs()[0], as_data("softmax"), experts()).as_text()
    assert len(re.findall(r"stablehlo\.all_to_all", text)) == 2


# 2: closed forms


@functools.cache
def layer_program(name, training=False, top_k=None):
    """`(parameters, jitted (parameters, x [1, T, d], ids [1, T]) -> output)` of a layer with that router; the router's
    own parameters are zero. One router has the dispatcher of the presets, the others the one that compiles fast: that
    both do the same is the first part of this file."""
    config = config_of(name, dispatcher="auto" if name == "softmax" else "einsum")
    config = config if top_k is None else replace(config, top_k=top_k)
    layer, state = MoELayer(config, init_std=0.5, out_std=0.5), make_router(config).init_state()
    x, ids = layer_inputs()
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x, ids >= 0, ids, state, jax.random.key(1))
    rng, params = (
        np.random.default_rng(1),
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)["params"],
    )
    drawn = {"router": params["router"], "experts": params["experts"]}
    params |= jax.tree.map(lambda leaf: 0.5 * rng.standard_normal(leaf.shape, leaf.dtype), drawn)
    key = jax.random.key(5) if training else None
    return {"params": params}, jax.jit(lambda params, x, ids: layer.apply(params, x, ids >= 0, ids, state, key)[0])


def layer_inputs():
    return inputs()[0][None], jnp.asarray(np.maximum(inputs()[2], 0))[None]


SUM_TO_ONE = ("softmax", "gpt_oss", "gshard", "noisy_topk", "random", "uniform")


@pytest.mark.parametrize("router", SUM_TO_ONE)
def test_equal_experts_and_weights_that_sum_to_one_are_a_dense_ffn(router):
    params, output = layer_program(router)
    weights = jax.tree.map(lambda w: np.broadcast_to(w[:1], w.shape), params["params"]["experts"])
    out = output({"params": params["params"] | {"experts": weights}}, *layer_inputs())
    expected = jax.jit(swiglu)(layer_inputs()[0], weights["gate_up"][0], weights["down"][0])
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("router", ["softmax", "softmax_raw"])
def test_every_expert_chosen_is_the_full_softmax_mixture(router):
    params, output = layer_program(router, top_k=E)
    weights, x = params["params"], inputs()[0]

    @jax.jit
    def mixture(experts, router):
        each = jax.vmap(swiglu, in_axes=(None, 0, 0))(x, experts["gate_up"], experts["down"])
        return jnp.einsum("te,etd->td", jax.nn.softmax(x @ router), each)

    out = output(params, *layer_inputs())[0]
    np.testing.assert_allclose(out, mixture(weights["experts"], weights["router"]), atol=1e-5)


# 3: permutations and causality


@pytest.mark.parametrize("router", [name for name in ROUTERS if name not in WITHOUT_SCORES])
def test_renaming_experts_changes_nothing(router):
    """Within groups where the router has groups; state and own parameters stay zero here."""
    order = np.arange(E).reshape(-1, 2)[:, ::-1].reshape(-1)
    params, output = layer_program(router)
    inner = params["params"]
    renamed = {"router": inner["router"][:, order], "experts": jax.tree.map(lambda w: w[order], inner["experts"])}
    moved = output({"params": inner | renamed}, *layer_inputs())
    np.testing.assert_allclose(moved, output(params, *layer_inputs()), atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
def test_later_tokens_do_not_change_earlier_ones(router, training):
    """And where they do, the router says so: expert choice, and the Sinkhorn plan in training."""
    params, output = layer_program(router, training)
    x, ids = map(np.array, layer_inputs())
    before, first = np.asarray(output(params, x, ids)), T // 2
    x[:, first:] = 3.0 * np.random.default_rng(6).normal(size=(T - first, D))
    ids[:, first:] = (ids[:, first:] + 7) % VOCAB
    leaks = not np.allclose(before[:, :first], output(params, x, ids)[:, :first], atol=1e-6)
    assert leaks == (training in NONCAUSAL.get(router, ()))
    assert getattr(make_router(config_of(router)), "causal", True) == (router not in NONCAUSAL)


# 5: gradients


@pytest.mark.parametrize("router", [name for name in ROUTERS if name not in ("random", "uniform", *FLOAT32_ALONE)])
def test_weights_and_probabilities_have_the_gradient_of_finite_differences(router):
    """fp64, in a random direction small enough to cross no tie (the choice is checked to be the same)."""
    with jax.enable_x64(True):
        call = router_call(router)
        x, logits, ids = (jnp.asarray(a, jnp.float64) if a.dtype == jnp.float32 else a for a in inputs())
        key, rng = jax.random.key(3), np.random.default_rng(1)
        toward = jnp.asarray(rng.normal(size=logits.shape))
        shape = routed(router)[0].weights.shape
        on_weights, on_probs = jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=logits.shape))

        @jax.jit
        @functools.partial(jax.value_and_grad, has_aux=True)
        def value(logits):
            routing, losses = call(x, logits, ids, key)
            used = jnp.sum(on_weights * routing.weights * routing.valid) + jnp.sum(on_probs * routing.probs)
            return used + sum(losses.values()), (routing.indices, routing.valid)

        step = 1e-6
        ((high, chosen), _), ((low, too), _) = (value(logits + sign * step * toward) for sign in (1, -1))
        for a, b in zip(chosen, too):
            np.testing.assert_array_equal(a, b)
        exact = np.vdot(value(logits)[1], toward)
        assert float(exact) == pytest.approx(float(high - low) / (2 * step), rel=1e-6, abs=1e-7)


# 6: counts


@pytest.mark.parametrize("router", ROUTERS)
def test_counts_are_the_valid_assignments(router):
    routing = routed(router)[0]
    valid, indices = np.asarray(routing.valid), np.asarray(routing.indices)
    np.testing.assert_array_equal(routing.counts, np.bincount(indices[valid], minlength=E))
    assert float(routing.counts.sum()) == valid.sum()
    if router not in (*VARIABLE_K, "gshard"):
        assert valid.all()
        assert valid.shape == (T, config_of(router).top_k)
    for t in range(T):
        assert len(set(indices[t][valid[t]])) == valid[t].sum(), "a token's experts are distinct"
    assert indices.min() >= 0
    assert indices.max() < E


def test_expert_choice_takes_as_many_tokens_for_every_expert_and_no_padding():
    routing = routed("expert_choice")[0]
    np.testing.assert_array_equal(routing.counts, np.full(E, K * T / E))
    assert not np.asarray(routing.valid)[np.asarray(inputs()[2]) < 0].any()
