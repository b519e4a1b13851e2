"""Low-rank experts against a slot-by-slot NumPy oracle: values, all gradients, extreme routings, transformations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels.lora import choose, mixed_lora, slot_lora, slot_lora_sum
from parallel.mesh import AXES, BATCH, make_mesh, on_shards

T, K, E, D, O, R = 40, 2, 5, 7, 6, 3
FORMS = ("concat", "blocks", "ragged_dot", "reference", "auto")
ROUTINGS = ("uneven", "one_slot", "all_experts", "empty_experts", "some_invalid", "all_invalid", "outside")


def problem(routing="uneven", *, inputs="each", shared_a=False, dtype=np.float64, seed=0):
    """x, a, b, weights, indices, valid."""
    rng = np.random.default_rng(seed)
    slots = {"one_slot": 1, "all_experts": E}.get(routing, K)
    scores = rng.standard_normal((T, E)) + np.linspace(2, 0, E)
    indices = np.argsort(-scores, axis=1)[:, :slots]
    valid = np.ones((T, slots), bool)
    if routing == "some_invalid":
        valid = rng.random((T, slots)) < 0.6
    elif routing == "all_invalid":
        valid[:] = False
    elif routing == "empty_experts":
        indices = np.where(indices[:, :1] > 1, [[1, 3]], [[3, 1]])
    elif routing == "outside":
        indices[::3, 0], indices[1::3, 1] = E, -1

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    x = normal(T, 1 if inputs == "one" else slots, D)
    a, b = normal(1 if shared_a else E, D, R), normal(E, R, O)
    return x, a, b, normal(T, slots), indices.astype(np.int32), valid


def slots_oracle(x, a, b, weights, indices, valid, g):
    """weights[t, j] (x[t, j] A_e) B_e of every valid slot, and the gradients of x, a, b and weights for g [T, K, o]."""
    out, dx, da, db, dw = np.zeros(g.shape), *(np.zeros(z.shape) for z in (x, a, b, weights))
    for t, j in np.argwhere(valid & (indices >= 0) & (indices < E)):
        e, row, w = indices[t, j], j % x.shape[1], weights[t, j]
        own = e % a.shape[0]
        h, gh = x[t, row] @ a[own], b[e] @ g[t, j]
        out[t, j] = w * (h @ b[e])
        dx[t, row] += w * (a[own] @ gh)
        da[own] += w * np.outer(x[t, row], gh)
        db[e] += w * np.outer(h, g[t, j])
        dw[t, j] = h @ gh
    return out, dx, da, db, dw


def oracle(summed, x, a, b, weights, indices, valid, g):
    """Output and gradients of `slot_lora`, or of `slot_lora_sum` with weights of zero at what is not valid."""
    if not summed:
        return slots_oracle(x, a, b, np.ones_like(weights), indices, valid, g)[:-1]
    slots = np.repeat(g[:, None], indices.shape[1], axis=1)
    out, *gradients = slots_oracle(x, a, b, weights * valid, indices, np.ones_like(valid), slots)
    return out.sum(axis=1), *gradients


@partial(jax.jit, static_argnames=("summed", "implementation"))
def value_and_grads(x, a, b, weights, indices, valid, g, *, summed, implementation):
    if summed:
        call = lambda x, a, b, w: slot_lora_sum(x, a, b, indices, w, implementation=implementation)  # noqa: E731
        out, vjp = jax.vjp(call, x, a, b, weights * valid)
    else:
        out, vjp = jax.vjp(lambda x, a, b: slot_lora(x, a, b, indices, valid, implementation=implementation), x, a, b)
    return out, *vjp(g.astype(out.dtype))


def cotangent(summed, indices, dtype=np.float64):
    shape = (T, O) if summed else (*indices.shape, O)
    return np.random.default_rng(9).standard_normal(shape).astype(dtype)


def assert_close(got, want, tolerance):
    for i, (p, q) in enumerate(zip(got, want, strict=True)):
        p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
        np.testing.assert_allclose(p, q, rtol=0, atol=tolerance * max(np.abs(q).max(), 1e-2), err_msg=f"result {i}")


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("inputs", ["each", "one"])
@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.slow_after(8)
def test_values_and_gradients_match_a_slot_by_slot_oracle(implementation, inputs, summed):
    with jax.enable_x64(True):
        for routing in ROUTINGS:
            arrays = problem(routing, inputs=inputs)
            g = cotangent(summed, arrays[4])
            got = value_and_grads(*arrays, g, summed=summed, implementation=implementation)
            assert_close(got, oracle(summed, *arrays, g), 1e-12)


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("inputs", ["each", "one"])
@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.slow_after(6)
def test_experts_may_share_a(implementation, inputs, summed):
    with jax.enable_x64(True):
        x, a, *rest = problem("some_invalid", inputs=inputs, shared_a=True)
        g = cotangent(summed, rest[2])
        want = oracle(summed, x, a, *rest, g)
        run = partial(value_and_grads, summed=summed, implementation=implementation)
        assert_close(run(x, a, *rest, g), want, 1e-12)
        out, dx, da, *others = run(x, a[0], *rest, g)
        assert_close((out, dx, da[None], *others), want, 1e-12)


@pytest.mark.parametrize("form", ["own", "shared", "plain"])
@pytest.mark.parametrize("experts", [1, E])
def test_mixed_lora_is_the_sum_over_experts(form, experts):
    rng = np.random.default_rng(0)
    x, b, g = (rng.standard_normal(shape) for shape in ((T, D), (experts, R, O), (T, O)))
    a = rng.standard_normal((experts if form == "own" else 1, D, R))
    gates = rng.standard_normal((T, experts)) * (rng.random((T, experts)) < 0.7)
    every = np.repeat(a, experts // a.shape[0], axis=0)
    out, gb = np.einsum("te,td,edr,ero->to", gates, x, every, b), np.einsum("to,ero->ter", g, b)
    da = np.einsum("te,td,ter->edr", gates, x, gb)
    want = [
        out, np.einsum("te,edr,ter->td", gates, every, gb), da if form == "own" else da.sum(axis=0, keepdims=True),
        np.einsum("te,td,edr,to->ero", gates, x, every, g), np.einsum("td,edr,ter->te", x, every, gb),
    ]  # fmt: skip
    with jax.enable_x64(True):
        out, vjp = jax.vjp(jax.jit(mixed_lora), *map(jnp.asarray, (x, a[0] if form == "plain" else a, b, gates)))
        got = [out, *vjp(jnp.asarray(g))]
    if form == "plain":
        want[2] = want[2][0]
    assert_close(got, want, 1e-12)


def test_one_hot_gates_and_slots_say_the_same():
    with jax.enable_x64(True):
        x, a, b, weights, indices, _ = map(jnp.asarray, problem(inputs="one"))
        gates = np.zeros((T, E))
        np.put_along_axis(gates, np.asarray(indices), np.asarray(weights), axis=1)
        assert_close([mixed_lora(x[:, 0], a, b, gates)], [slot_lora_sum(x, a, b, indices, weights)], 1e-12)


def test_a_shared_a_multiplies_each_input_once():
    """No array of T rows and E r columns stands before the gates: the product with A has r."""
    x, _, b, *_ = problem(shared_a=True, dtype=np.float32)
    program = jax.make_jaxpr(mixed_lora)(x[:, 0], np.zeros((1, D, R), np.float32), b, np.ones((T, E), np.float32))
    widths = [eqn.outvars[0].aval.shape[-1] for eqn in program.eqns if eqn.primitive.name == "dot_general"]
    assert widths == [R, O]


def test_slots_of_one_input_share_the_product_with_a():
    x, a, b, _, indices, valid = problem(inputs="one", dtype=np.float32)
    program = jax.make_jaxpr(partial(slot_lora, implementation="concat"))(x, a, b, indices, valid)
    rows = [eqn.outvars[0].aval.shape for eqn in program.eqns if eqn.primitive.name == "dot_general"]
    assert rows == [(T, E * R), (T * K, O)]


def test_the_sum_over_slots_comes_before_the_product_with_b():
    x, a, b, weights, indices, _ = problem(dtype=np.float32)
    program = jax.make_jaxpr(partial(slot_lora_sum, implementation="concat"))(x, a, b, indices, weights)
    rows = [eqn.outvars[0].aval.shape for eqn in program.eqns if eqn.primitive.name == "dot_general"]
    assert rows == [(T * K, E * R), (T, O)]


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("implementation", ["concat", "blocks", "ragged_dot"])
def test_bfloat16_compute_with_float32_parameters(implementation, summed):
    x, a, b, weights, *routing = problem("some_invalid", dtype=np.float32)
    x = np.asarray(jnp.asarray(x, jnp.bfloat16))
    g = cotangent(summed, routing[0], np.float32)
    run = partial(value_and_grads, summed=summed, implementation=implementation)
    got = run(x, a, b, weights, *routing, g)
    assert [z.dtype.name for z in got] == ["bfloat16"] * 2 + ["float32"] * (3 if summed else 2)
    exact = [np.asarray(z, np.float64) for z in (x, a, b, weights)]
    assert_close(got, oracle(summed, *exact, *routing, g), 0.03)


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("own_routing", [False, True])
@pytest.mark.parametrize("implementation", ["concat", "blocks", "ragged_dot", "auto"])
@pytest.mark.slow_after(4)
def test_several_adapters_under_vmap(implementation, own_routing, summed):
    """Adapters share x; their routers may, too, or each chooses for itself."""
    with jax.enable_x64(True):
        many = [problem("some_invalid", seed=seed) for seed in range(3)]
        x = many[0][0]
        stacked = [np.stack(z) for z in zip(*many)]
        routing = stacked[3:] if own_routing else many[0][3:]
        g = cotangent(summed, many[0][4])
        run = partial(value_and_grads, summed=summed, implementation=implementation)
        axes = (None, 0, 0, *([0 if own_routing else None] * 3), None)
        got = jax.vmap(run, in_axes=axes)(x, *stacked[1:3], *routing, g)
        for i, (_, a, b, *own) in enumerate(many):
            want = oracle(summed, x, a, b, *(own if own_routing else routing), g)
            assert_close([z[i] for z in got], want, 1e-12)


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("implementation", ["concat", "blocks", "ragged_dot", "auto"])
@pytest.mark.slow_after(2)
def test_eight_devices_with_their_own_tokens(implementation, summed):
    """Tokens are split, adapters replicated: the gradients of a and b are summed over devices."""
    arrays = problem("some_invalid", inputs="one")
    with jax.enable_x64(True):
        x, a, b, weights, indices, valid = map(jnp.asarray, arrays)
        g = cotangent(summed, indices)

        def loss(x, a, b, weights):
            if summed:
                local = lambda x, a, b, i, w, v: slot_lora_sum(x, a, b, i, w * v, implementation=implementation)  # noqa: E731
            else:
                local = lambda x, a, b, i, w, v: slot_lora(x, a, b, i, v, implementation=implementation)  # noqa: E731
            specs = (BATCH, P(), P(), BATCH, BATCH, BATCH)
            return jnp.vdot(g, on_shards(local, specs, P(AXES))(x, a, b, indices, weights, valid))

        run = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
        alone = run(x, a, b, weights)
        with jax.set_mesh(make_mesh(data=2, fsdp=2, expert=2)):
            together = jax.jit(run)(x, a, b, weights)
        assert_close(jax.tree.leaves(together), jax.tree.leaves(alone), 1e-12)


@pytest.mark.parametrize("summed", [False, True])
def test_rows_move_by_gathers_alone(summed):
    """Sorting is undone by gathers, forward and backward: the only scatters are those of the integer plan and of one
    group's gradient of A or B."""
    arrays = problem("some_invalid", dtype=np.float32)
    run = partial(value_and_grads, summed=summed, implementation="blocks")
    jaxpr = str(jax.make_jaxpr(run)(*arrays, cotangent(summed, arrays[4], np.float32)))
    lines = [line for line in jaxpr.splitlines() if "= scatter" in line]
    assert lines
    for line in lines:
        assert line.split("=")[0].rstrip().split(":")[1].startswith(("i32", f"f32[{E},")), line


def test_auto_goes_by_columns():
    """A wide product multiplies all experts' columns; with one or two experts nothing is saved by sorting."""
    assert [choose(*of, "cpu") for of in ((1, 80), (2, 64), (8, 4))] == ["concat"] * 3
    assert [choose(*of, "cpu") for of in ((4, 16), (8, 16), (32, 16))] == ["blocks"] * 3
    assert [choose(*of, "cuda") for of in ((8, 4), (8, 64))] == ["concat"] * 2


def test_auto_of_a_program_is_that_of_its_platform():
    """Blocks on CPU, the wide product on GPU."""
    a, b = np.ones((E, D, 16), np.float32), np.ones((E, 16, O), np.float32)
    x, *_, weights, indices, _ = problem(dtype=np.float32)
    call = jax.jit(slot_lora_sum).trace(x, a, b, indices, weights)
    on_cpu, on_gpu = (call.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda"))
    assert "dynamic_update_slice" in on_cpu, "the walk over blocks"
    assert "dynamic_update_slice" not in on_gpu
    assert "ragged_dot" not in on_cpu + on_gpu


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((T, D))}, "x.shape"),
        ({"x": jnp.zeros((T, K + 1, D))}, rf"x.shape\[1\] = {K + 1}: expected 1 or K = {K}"),
        ({"a": jnp.zeros((E, D + 1, R))}, "a.shape"),
        ({"a": jnp.zeros((2, D, R))}, rf"a.shape\[0\] = 2: expected E = {E} or 1"),
        ({"b": jnp.zeros((E, R + 1, O))}, "b.shape"),
        ({"indices": jnp.zeros((T + 1, K), jnp.int32)}, "indices.shape"),
        ({"indices": jnp.zeros((T, K))}, "indices.dtype"),
        ({"implementation": "fast"}, "implementation = 'fast'"),
    ],
)
def test_bad_input_of_slots_names_field_and_value(change, message):
    x, a, b, weights, indices, valid = problem(dtype=np.float32)
    good = {"x": x, "a": a, "b": b, "indices": indices}
    with pytest.raises(ValueError, match=message):
        slot_lora(**(good | {"valid": valid} | change))
    with pytest.raises(ValueError, match=message):
        slot_lora_sum(**(good | {"weights": weights} | change))


def test_bad_input_of_one_function_names_field_and_value():
    x, a, b, weights, indices, valid = problem(dtype=np.float32)
    for call, message in [
        (lambda: slot_lora(x, a, b, indices, valid[:, :1]), "valid.shape"),
        (lambda: slot_lora(x, a, b, indices, weights), "valid.dtype"),
        (lambda: slot_lora_sum(x, a, b, indices, weights[:, :1]), "weights.shape"),
        (lambda: mixed_lora(x, a, b, weights), "x.shape"),
        (lambda: mixed_lora(x[:, 0], a, b, weights), "gates.shape"),
        (lambda: mixed_lora(x[:, 0], a, b[:2], weights), rf"a.shape\[0\] = {E}: expected E = 2 or 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
