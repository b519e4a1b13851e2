"""The fused expert FFN against a dense oracle: values, all gradients, extreme routings, transformations."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels.grouped_ffn import grouped_ffn
from kernels.grouped_matmul import automatic_block_sizes

T, K, E, D, F, B = 45, 2, 5, 8, 6, 8

ACTIVATIONS = {
    "swiglu": lambda gate, up: gate / (1 + np.exp(-gate)) * up,
    "swiglu_oai": lambda gate, up: (
        (np.clip(up, -7, 7) + 1) * np.minimum(gate, 7) / (1 + np.exp(-1.702 * np.minimum(gate, 7)))
    ),
    "relu": lambda h: np.maximum(h, 0),
    "gelu": lambda h: h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))),
}
PARTS = {"swiglu": 2, "swiglu_oai": 2, "relu": 1, "gelu": 1}


def problem(routing="uneven", dtype=np.float32, seed=0, parts=2):
    """x, weights, gate_up, down, indices, valid, cotangent."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape).astype(dtype))

    scores = rng.standard_normal((T, E)) + np.linspace(2, 0, E)
    indices = np.argsort(-scores, axis=1)[:, :K]
    valid = np.ones((T, K), bool)
    if routing == "some_invalid":
        valid = rng.random((T, K)) < 0.6
    elif routing == "all_invalid":
        valid[:] = False
    elif routing == "empty_experts":
        indices = np.where(indices[:, :1] > 2, [[1, 3]], [[3, 1]])
    elif routing == "one_takes_all":
        indices, valid = np.full((T, K), 4), np.repeat([[True, False]], T, axis=0)
    weights = jnp.asarray(rng.random((T, K)).astype(dtype))
    params = normal(E, D, parts * F) / 2, normal(E, F, D) / 2
    return normal(T, D), weights, *params, jnp.asarray(indices, jnp.int32), jnp.asarray(valid), normal(T, D)


def make_biases(dtype=np.float32, parts=2, size=1.0):
    """Keyword arguments; a `size` of 5 puts pre-activations on both sides of the bounds of swiglu_oai."""
    rng = np.random.default_rng(3)
    shapes = {"gate_up_bias": (E, parts * F), "down_bias": (E, D)}
    return {name: jnp.asarray((size * rng.standard_normal(shape)).astype(dtype)) for name, shape in shapes.items()}


@partial(jax.jit, static_argnames=("implementation", "scale_on", "block_size", "activation"))
def value_and_grads(x, weights, gate_up, down, indices, valid, g, biases={}, **options):  # noqa: B006
    """The output, the gradients of x, weights, gate_up and down, then those of the biases by name."""

    def call(x, w, gu, dn, biases):
        return grouped_ffn(x, indices, w, valid, gu, dn, **biases, **options)

    out, vjp = jax.vjp(call, x, weights, gate_up, down, biases)
    return jax.tree.leaves((out, vjp(g.astype(out.dtype))))


def assert_close(got, want, tolerance):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-2), err_msg=f"result {i}")


# Every activation and implementation, biased or not, on both sides: a program each. Biases and sides of the other
# activations are those of swiglu, so they are slow.
FORMS = [*product(("swiglu",), ("blocks", "ragged_dot"), (False, True), ("output", "input"))]
FORMS += [("swiglu", "auto", False, "output")]
FORMS += [(name, how, True, "output") for name in ACTIVATIONS for how in ("blocks", "ragged_dot") if name != "swiglu"]
EVERY_FORM = [
    (name, how, *rest)
    for name, how in [*product(ACTIVATIONS, ("blocks", "ragged_dot")), ("swiglu", "auto")]
    for rest in product((False, True), ("output", "input"))
]
SLOW_FORMS = [pytest.param(*form, marks=pytest.mark.slow) for form in EVERY_FORM if form not in FORMS]


@pytest.mark.parametrize(("activation", "implementation", "biased", "scale_on"), [*FORMS, *SLOW_FORMS])
def test_values_and_gradients_match_the_dense_oracle(activation, implementation, biased, scale_on):
    with jax.enable_x64(True):
        biases = make_biases(np.float64, PARTS[activation], size=5.0) if biased else {}
        run = partial(value_and_grads, biases=biases, activation=activation, scale_on=scale_on)
        for routing in ("uneven", "some_invalid", "all_invalid", "empty_experts", "one_takes_all"):
            inputs = problem(routing, np.float64, parts=PARTS[activation])
            got = run(*inputs, implementation=implementation, block_size=B)
            assert_close(got, run(*inputs, implementation="reference"), 1e-12)


@pytest.mark.parametrize("scale_on", ["output", "input"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_oracle_is_the_equation(activation, biased, scale_on):
    parts = PARTS[activation]
    with jax.enable_x64(True):
        inputs = problem("some_invalid", np.float64, parts=parts)
        biases = make_biases(np.float64, parts, size=5.0) if biased else {}
        got = value_and_grads(
            *inputs, biases=biases, activation=activation, scale_on=scale_on, implementation="reference"
        )[0]
    x, weights, gate_up, down, indices, valid, _ = map(np.asarray, inputs)
    gate_up_bias, down_bias = (np.asarray(biases.get(name, np.zeros(E))) for name in ("gate_up_bias", "down_bias"))
    want = np.zeros_like(x)
    for t in range(T):
        for k in range(K):
            e, w = indices[t, k], weights[t, k]
            on_input, on_output = (w, 1) if scale_on == "input" else (1, w)
            h = (on_input * x[t]) @ gate_up[e] + gate_up_bias[e]
            y = ACTIVATIONS[activation](*np.split(h, parts)) @ down[e] + down_bias[e]
            want[t] += valid[t, k] * on_output * y
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * np.abs(want).max())


@pytest.mark.parametrize("scale_on", ["output", "input"])
@pytest.mark.parametrize(("activation", "biased"), [("swiglu", False), ("swiglu_oai", True)])
def test_gradients_match_finite_differences(activation, biased, scale_on):
    with jax.enable_x64(True):
        *params, indices, valid, g = problem("some_invalid", np.float64)
        params.append(make_biases(np.float64, size=5.0) if biased else {})
        rng = np.random.default_rng(1)
        direction = jax.tree.map(lambda a: rng.standard_normal(a.shape), params)
        run = partial(value_and_grads, activation=activation, scale_on=scale_on, block_size=B)

        def output(step):
            *moved, biases = jax.tree.map(lambda a, b: a + step * b, params, direction)
            return np.asarray(run(*moved, indices, valid, g, biases)[0])

        numeric = np.vdot(g, output(1e-5) - output(-1e-5)) / 2e-5
        gradients = run(*params[:-1], indices, valid, g, params[-1])[1:]
        exact = sum(np.vdot(a, b) for a, b in zip(gradients, jax.tree.leaves(direction), strict=True))
        np.testing.assert_allclose(exact, numeric, rtol=1e-8)
        if activation == "swiglu_oai":
            h = np.einsum("td,edf->tef", params[0], params[2]) + np.asarray(params[-1]["gate_up_bias"])
            gate, up = np.split(h, 2, axis=-1)
            for clipped in (gate > 7, up > 7, up < -7):
                assert 0.02 < clipped.mean() < 0.5, "points on both sides of every bound"


@pytest.mark.parametrize("routing", ["some_invalid", "one_takes_all"])
@pytest.mark.parametrize("block_size", [1, 7, 64, 0])
@pytest.mark.slow_after(3)
def test_block_size_changes_nothing(block_size, routing):
    inputs = problem(routing)
    assert_close(
        value_and_grads(*inputs, implementation="blocks", block_size=block_size),
        value_and_grads(*inputs, implementation="reference"),
        2e-6,
    )


@pytest.mark.parametrize(
    ("activation", "biased"),
    [("swiglu", False), ("swiglu_oai", True), pytest.param("gelu", True, marks=pytest.mark.slow)],
)
@pytest.mark.slow_after(1)
def test_bfloat16_compute_with_float32_parameters(activation, biased):
    x, *params, indices, valid, g = problem(parts=PARTS[activation])
    biases = make_biases(parts=PARTS[activation]) if biased else {}
    run = partial(value_and_grads, biases=biases, activation=activation, block_size=B)
    got = run(x.astype(jnp.bfloat16), *params, indices, valid, g)
    assert [a.dtype.name for a in got] == ["bfloat16"] * 2 + ["float32"] * (3 + len(biases))
    assert_close(got, run(x, *params, indices, valid, g), 0.03)


@pytest.mark.parametrize("implementation", ["blocks", "ragged_dot"])
@pytest.mark.parametrize(("activation", "biased"), [("swiglu", False), ("swiglu_oai", True), ("relu", True)])
@pytest.mark.slow_after(2)
def test_dropped_assignments_are_inert(activation, biased, implementation):
    """Garbage behind an invalid assignment, even NaN rows and weights and indices out of range, changes no bit."""
    x, weights, gate_up, down, indices, valid, g = problem("some_invalid", parts=PARTS[activation])
    biases = make_biases(parts=PARTS[activation]) if biased else {}
    run = partial(value_and_grads, biases=biases, activation=activation, implementation=implementation, block_size=B)
    valid = valid.at[:4].set(False)
    wild = jnp.where(valid, weights, jnp.nan), jnp.where(valid, indices, 999), x.at[:4].set(jnp.nan)
    got = run(wild[2], wild[0], gate_up, down, wild[1], valid, g)
    want = run(x, weights, gate_up, down, indices, valid, g)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.asarray(want[0])[:4].any(), "a token without experts gets nothing, no bias either"
    assert not np.asarray(want[2])[~np.asarray(valid)].any(), "a dropped assignment's weight has zero gradient"


def test_inside_a_rematerialised_scan_over_layers():
    x, weights, gate_up, down, indices, valid, g = problem("some_invalid")
    layers = jnp.stack([gate_up, gate_up[::-1]]), jnp.stack([down, down[::-1]])

    def loss(x, layers, implementation):
        def step(x, p):
            return (x + grouped_ffn(x, indices, weights, valid, *p, implementation=implementation), None)

        return jnp.vdot(g, jax.lax.scan(jax.checkpoint(step), x, layers)[0])

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    assert_close(jax.tree.leaves(run(x, layers, "auto")), jax.tree.leaves(run(x, layers, "reference")), 5e-6)


def test_inside_shard_map_as_the_expert_exchange_calls_it():
    """Eight devices, each with its own tokens and experts: K = 1, weights one, many invalid rows."""
    rng = np.random.default_rng(1)
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape).astype(np.float32))

    x, gate_up, down = normal(8 * 16, D), normal(8 * 2, D, 2 * F), normal(8 * 2, F, D)
    indices = jnp.asarray(rng.integers(0, 2, (8 * 16, 1)), jnp.int32)
    valid = jnp.asarray(rng.random((8 * 16, 1)) < 0.3).at[:16].set(False)  # the first device received nothing

    def local(x, indices, valid, gate_up, down, implementation):
        return grouped_ffn(
            x, indices, jnp.ones_like(valid, x.dtype), valid, gate_up, down, implementation=implementation
        )

    def loss(x, gate_up, down, implementation):
        body = partial(local, implementation=implementation)
        specs = (P("expert"),) * 5
        y = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P("expert"), check_vma=False)(
            x, indices, valid, gate_up, down
        )
        return jnp.sum(jnp.sin(y))

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    got, want = (jax.tree.leaves(run(x, gate_up, down, name)) for name in ("auto", "reference"))
    assert_close(got, want, 5e-6)


def test_results_are_reproducible_bit_for_bit():
    inputs = problem("some_invalid")
    first, second = (value_and_grads(*inputs, block_size=B) for _ in range(2))
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("biased", [False, True])
def test_the_loop_never_scatters_rows(biased):
    """Dispatch, combine and their transposes are gathers: the only scatters are those of the integer plan."""
    biases = make_biases() if biased else {}
    jaxpr = str(jax.make_jaxpr(partial(value_and_grads, implementation="blocks"))(*problem(), biases))
    assert (f"f32[{E},{D}]" in jaxpr) == biased, "an absent bias leaves no trace"
    for line in jaxpr.splitlines():
        if "= scatter" in line:
            assert line.split("=")[0].rstrip().split(":")[1].startswith(("i32", f"f32[{E},")), line


@pytest.mark.parametrize("biased", [False, True])
def test_the_gpu_program_holds_grouped_gemms(biased):
    inputs = *problem(), make_biases() if biased else {}
    text = jax.jit(value_and_grads).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("chlo.ragged_dot") >= 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((D,))}, "x.shape"),
        ({"indices": jnp.zeros((T + 1, K), jnp.int32)}, "indices.shape"),
        ({"indices": jnp.zeros((T, K))}, "indices.dtype"),
        ({"weights": jnp.zeros((T, K + 1))}, "weights.shape"),
        ({"valid": jnp.zeros((T,), bool)}, "valid.shape"),
        ({"valid": jnp.zeros((T, K))}, "valid.dtype"),
        ({"x": jnp.zeros((T, D), jnp.int8)}, "x.dtype = 'int8'"),
        ({"down": jnp.zeros((E, F, D), jnp.float8_e5m2)}, "down.dtype = 'float8_e5m2'"),
        ({"gate_up": jnp.zeros((E, D, 2 * F + 1))}, "an even number"),
        ({"gate_up": jnp.zeros((E, D + 1, 2 * F))}, "gate_up.shape"),
        ({"down": jnp.zeros((E, F, D + 1))}, "down.shape"),
        ({"down": jnp.zeros((E, F + 1, D))}, "down.shape"),
        ({"activation": "relu"}, rf"down.shape = .*\[E, f, d\] = \({E}, {2 * F}, {D}\)"),
        ({"activation": "tanh"}, "activation = 'tanh'"),
        ({"gate_up_bias": jnp.zeros((E, F))}, "gate_up_bias.shape"),
        ({"down_bias": jnp.zeros((D,))}, "down_bias.shape"),
        ({"block_size": -1}, "block_size = -1"),
        ({"scale_on": "middle"}, "scale_on = 'middle'"),
        ({"implementation": "fast"}, "implementation = 'fast'"),
    ],
)
def test_bad_input_names_field_and_value(change, message):
    names = ("x", "weights", "gate_up", "down", "indices", "valid")
    with pytest.raises(ValueError, match=message):
        grouped_ffn(**(dict(zip(names, problem())) | change))


@pytest.mark.parametrize(("mean", "unit"), [(1, 16), (64, 16), (128, 16), (256, 32), (512, 64), (4096, 64)])
def test_automatic_block_sizes_follow_the_mean_load(mean, unit):
    sizes = automatic_block_sizes(16 * mean, 16)
    assert sizes == tuple(range(unit, min(12 * unit, 16 * mean) + 1, unit))
