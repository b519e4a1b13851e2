"""The exchange maps: every valid assignment arrives once, at its expert's device, and comes back to its place.

XLA:CPU has no ragged all-to-all: that branch runs here on a stand-in of its documented meaning, and is lowered for the
platforms that have it.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe.dispatch import ExpertParams, Grouped, dispatch
from moe.routing import RouterOutput
from parallel import exchange
from parallel.exchange import plan_exchange, return_to_tokens, rows_per_peer, send_to_experts, take_rows
from parallel.mesh import make_mesh

T, K, E, D = 6, 3, 8, 4  # tokens per device, assignments, experts, devices


def case(seed):
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.permutation(E)[:K] for _ in range(D * T)])
    return jnp.asarray(indices, jnp.int32), jnp.asarray(rng.random((D * T, K)) < 0.8)


def sharded(fn, *outs):
    mesh = make_mesh(expert=D)
    spec = P("expert", None)
    return lambda *args: jax.jit(
        jax.shard_map(
            fn, mesh=mesh, in_specs=(spec,) * len(args), out_specs=tuple(P("expert") for _ in outs), check_vma=False
        )
    )(*args)


@pytest.mark.parametrize("seed", range(3))
def test_each_valid_assignment_reaches_its_expert_once_and_returns(seed):
    indices, valid = case(seed)
    names = jnp.arange(D * T, dtype=jnp.float32)[:, None] + 1.0  # token names; 0 is padding

    def local(names, indices, valid):
        plan = plan_exchange(indices, valid, num_experts=E, axis="expert")
        rows = send_to_experts(names, plan, "expert")
        expert = plan.received_expert + jax.lax.axis_index("expert") * (E // D)
        scaled = rows * 100 + jnp.where(rows > 0, expert[:, None], 0)
        return rows, plan.received_expert, return_to_tokens(scaled, plan, "expert")

    rows, received, back = sharded(local, 1, 2, 3)(names, indices, valid)
    rows, received = np.asarray(rows).reshape(D, -1), np.asarray(received).reshape(D, -1)
    got = sorted(
        (int(name), int(e) + device * (E // D))
        for device in range(D)
        for name, e in zip(rows[device], received[device])
        if e < E // D
    )
    expected = sorted((t + 1, int(indices[t, k])) for t in range(D * T) for k in range(K) if valid[t, k])
    assert got == expected
    assert (rows[received == E // D] == 0).all()
    tokens = np.arange(D * T)[:, None] + 1
    np.testing.assert_array_equal(
        np.asarray(back).reshape(D * T, K), np.where(valid, tokens * 100 + np.asarray(indices), 0)
    )


def test_gradient_of_there_and_back_is_the_number_of_valid_assignments():
    indices, valid = case(0)
    x = jnp.ones((D * T, 2))

    def total(x):
        def local(x, indices, valid):
            plan = plan_exchange(indices, valid, num_experts=E, axis="expert")
            return (return_to_tokens(send_to_experts(x, plan, "expert") * 2.0, plan, "expert"),)

        return sharded(local, 1)(x, indices, valid)[0].sum()

    np.testing.assert_allclose(jax.grad(total)(x)[:, 0], 2.0 * np.asarray(valid).sum(axis=1))


def test_take_rows_gradient_equals_autodiff_of_indexing():
    x = jax.random.normal(jax.random.key(0), (5, 3))
    forward = jnp.array([4, 0, 5, 2, 0])  # 5: none
    backward = jnp.array([[1, 4], [5, 5], [3, 5], [5, 5], [0, 5]])
    weight = jax.random.normal(jax.random.key(1), (5, 3))
    plain = lambda x: jnp.sum(jnp.concatenate([x, jnp.zeros((1, 3))])[forward] * weight)  # noqa: E731
    ours = lambda x: jnp.sum(take_rows(x, forward, backward) * weight)  # noqa: E731
    np.testing.assert_allclose(ours(x), plain(x), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(plain)(x), rtol=1e-6)


def test_buffer_bound_is_the_most_that_can_go_to_one_peer():
    assert rows_per_peer(6, 3, 2) == 12
    assert rows_per_peer(6, 1, 2) == 6


def test_experts_must_divide_over_the_axis():
    indices, valid = case(0)
    with pytest.raises(ValueError, match=r"num_experts = 6.*4"):
        sharded(lambda i, v: plan_exchange(i, v, num_experts=6, axis="expert")[:1], 1)(indices, valid)


@pytest.mark.parametrize("seed", range(3))
def test_sizes_are_the_valid_assignments_seen_from_both_ends(seed):
    indices, valid = case(seed)

    def local(indices, valid):
        plan = plan_exchange(indices, valid, num_experts=E, axis="expert")
        return plan.send_sizes, plan.receive_sizes

    sent, received = (np.asarray(a).reshape(D, D) for a in sharded(local, 1, 2)(indices, valid))
    owner = np.where(valid, np.asarray(indices) // (E // D), D).reshape(D, -1)
    np.testing.assert_array_equal(sent, [np.bincount(row, minlength=D + 1)[:D] for row in owner])
    np.testing.assert_array_equal(received, sent.T)


# The ragged branch


def stand_in(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all` from gathers and masks; NaN where a receiver expects other sizes than are sent."""
    senders = [jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)]
    devices, slices = senders[1].shape[0], recv_sizes.shape[0] // senders[1].shape[0]
    row = jnp.arange(output.shape[0])
    for source in range(devices):
        for number in range(slices):
            mine = jax.lax.axis_index(axis_name) * slices + number
            data, start, size, to = senders[0][source], *(a[source][mine] for a in senders[1:])
            taken = jnp.take(data, row - to + start, axis=0, mode="clip")
            expected = jnp.where(size == recv_sizes[source * slices + number], taken, jnp.nan)
            output = jnp.where(((row >= to) & (row < to + size))[:, None], expected, output)
    return output


def test_the_stand_in_on_the_documented_example():
    """The two-device example of jax.lax.ragged_all_to_all's own documentation."""
    operand = jnp.array([[1.0], [2], [2], [3], [4], [0]])
    args = (jnp.array(a) for a in ([0, 1, 0, 1], [1, 2, 1, 1], [0, 0, 1, 2], [1, 1, 2, 1]))
    fn = functools.partial(stand_in, axis_name="expert")
    specs = (P("expert", None),) * 2 + (P("expert"),) * 4
    got = jax.shard_map(fn, mesh=make_mesh(expert=2), in_specs=specs, out_specs=specs[0], check_vma=False)
    result = jax.jit(got)(operand, jnp.zeros((8, 1)), *args)
    np.testing.assert_array_equal(result[:, 0], [1, 3, 0, 0, 2, 2, 4, 0])


MESHES = {2: (2, 1, 2), 4: (1, 2, 4), 8: (1, 1, 8)}
TOKENS, HIDDEN, WIDTH, TOP_K = 48, 4, 3, 2
ROUTINGS = ["plain", "empty_experts", "one_expert_takes_all", "dropped", "all_dropped"]


def routing_case(name):
    rng = np.random.default_rng(5)
    chosen = 3 if name == "empty_experts" else E
    indices = np.stack([rng.permutation(chosen)[:TOP_K] for _ in range(TOKENS)])
    valid = rng.random(indices.shape) < {"dropped": 0.6, "all_dropped": 0.0}.get(name, 1.0)
    if name == "one_expert_takes_all":
        indices[:, 0], valid[:, 1] = 5, False
    return jnp.asarray(indices, jnp.int32), jnp.asarray(valid)


def operands():
    keys = jax.random.split(jax.random.key(1), 4)
    return (
        jax.random.normal(keys[0], (TOKENS, HIDDEN)),
        jax.random.uniform(keys[1], (TOKENS, TOP_K)),
        ExpertParams(
            jax.random.normal(keys[2], (E, HIDDEN, 2 * WIDTH)), jax.random.normal(keys[3], (E, WIDTH, HIDDEN))
        ),
    )


def layer(local, gradient=True):
    def scalar(x, weights, experts, indices, valid):
        none = jnp.zeros((x.shape[0], 0))
        out = dispatch(x, RouterOutput(indices, weights, valid, none, none, none[0]), experts, local)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    return jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True) if gradient else scalar


@functools.cache
def program(branch, devices, batched=False):
    """Compiled once per form and mesh: routings are data."""
    fn = layer(Grouped("reference") if branch == "oracle" else Grouped("blocks", 8))
    args = (*operands(), *routing_case("plain"))
    if batched:
        fn, args = jax.vmap(fn), jax.tree.map(lambda a: jnp.stack([a, a]), args)
    if branch == "oracle":
        return jax.jit(fn)
    mesh = make_mesh(*MESHES[devices])
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        if branch == "ragged":
            patch.setattr(exchange, "_static", exchange._ragged)
            patch.setattr(jax.lax, "ragged_all_to_all", stand_in)
        lowered = jax.jit(fn).lower(*args)
        assert ("all_to_all" in lowered.as_text()) == (branch == "static"), "the form asked for"
        return lowered.compile()


def assert_tree_close(got, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        scale = max(float(np.abs(b).max()), 1e-30)
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=tolerance)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("devices", MESHES)
@pytest.mark.slow_after(5)
def test_ragged_values_and_gradients_equal_the_static_ones_and_the_oracle(devices, routing):
    args = (*operands(), *routing_case(routing))
    ragged = jax.device_get(program("ragged", devices)(*args))
    assert_tree_close(ragged, jax.device_get(program("static", devices)(*args)), 1e-6)
    assert_tree_close(ragged, jax.device_get(program("oracle", 1)(*args)))


@pytest.mark.parametrize("branch", ["static", "ragged"])
def test_a_batch_of_exchanges_is_each_one(branch):
    """The ragged branch's own batching rule: one exchange with a slice per peer and element."""
    x, weights, experts = operands()
    each = [(x * (i + 1), weights, experts, *routing_case(name)) for i, name in enumerate(("plain", "dropped"))]
    got = program(branch, 4, batched=True)(*jax.tree.map(lambda *a: jnp.stack(a), *each))
    for i, args in enumerate(each):
        assert_tree_close(jax.tree.map(lambda a, i=i: a[i], jax.device_get(got)), program("oracle", 1)(*args))


@functools.cache
def traced(devices, gradient):
    with jax.set_mesh(make_mesh(*MESHES[devices])):
        return jax.jit(layer(Grouped(), gradient)).trace(*operands(), *routing_case("plain"))


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("devices", MESHES)
@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
@pytest.mark.slow_after(8)
def test_each_platform_gets_one_form_and_two_exchanges_each_way(platform, devices, gradient):
    lowered = traced(devices, gradient).lower(lowering_platforms=(platform,))
    text, hlo = lowered.as_text(), lowered.as_text(dialect="hlo")
    wanted = 4 if gradient else 2
    found = [len(re.findall(name, text)) for name in (r"stablehlo\.all_to_all", "custom_call @ragged_all_to_all")]
    opcodes = [len(re.findall(name, hlo)) for name in (r" all-to-all\(", r" ragged-all-to-all\(")]
    assert found == opcodes == ([wanted, 0] if platform == "cpu" else [0, wanted])
