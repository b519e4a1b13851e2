"""The fused expert SwiGLU against a dense oracle: values, all four gradients, extreme routings, transformations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels.grouped_ffn import automatic_block_sizes, grouped_swiglu

T, K, E, D, F, B = 45, 2, 5, 8, 6, 8


def problem(routing="uneven", dtype=np.float32, seed=0):
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
    params = normal(E, D, 2 * F) / 2, normal(E, F, D) / 2
    return normal(T, D), weights, *params, jnp.asarray(indices, jnp.int32), jnp.asarray(valid), normal(T, D)


@partial(jax.jit, static_argnames=("implementation", "scale_on", "block_size"))
def value_and_grads(x, weights, gate_up, down, indices, valid, g, **options):
    def call(x, w, gu, dn):
        return grouped_swiglu(x, indices, w, valid, gu, dn, **options)

    out, vjp = jax.vjp(call, x, weights, gate_up, down)
    return out, *vjp(g.astype(out.dtype))


def assert_close(got, want, tolerance):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-2), err_msg=f"result {i}")


@pytest.mark.parametrize("scale_on", ["output", "input"])
@pytest.mark.parametrize("implementation", ["blocks", "ragged_dot", "auto"])
def test_values_and_gradients_match_the_dense_oracle(implementation, scale_on):
    with jax.enable_x64(True):
        run = jax.jit(partial(value_and_grads, implementation=implementation, scale_on=scale_on, block_size=B))
        oracle = jax.jit(partial(value_and_grads, implementation="reference", scale_on=scale_on))
        for routing in ("uneven", "some_invalid", "all_invalid", "empty_experts", "one_takes_all"):
            inputs = problem(routing, np.float64)
            assert_close(run(*inputs), oracle(*inputs), 1e-12)


def test_the_oracle_is_the_equation():
    x, weights, gate_up, down, indices, valid, _ = (np.asarray(a) for a in problem("some_invalid", np.float64))
    want = np.zeros_like(x)
    for t in range(T):
        for k in range(K):
            h = x[t] @ gate_up[indices[t, k]]
            activation = h[:F] / (1 + np.exp(-h[:F])) * h[F:]
            want[t] += valid[t, k] * weights[t, k] * (activation @ down[indices[t, k]])
    got = grouped_swiglu(*map(jnp.asarray, (x, indices, weights, valid, gate_up, down)), implementation="reference")
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("scale_on", ["output", "input"])
def test_gradients_match_finite_differences(scale_on):
    with jax.enable_x64(True):
        *params, indices, valid, g = problem("some_invalid", np.float64)
        rng = np.random.default_rng(1)
        direction = [rng.standard_normal(a.shape) for a in params]
        run = partial(value_and_grads, scale_on=scale_on, block_size=B)

        def output(step):
            moved = (np.asarray(a) + step * b for a, b in zip(params, direction))
            return np.asarray(run(*moved, indices, valid, g)[0])

        numeric = np.vdot(g, output(1e-5) - output(-1e-5)) / 2e-5
        exact = sum(np.vdot(a, b) for a, b in zip(run(*params, indices, valid, g)[1:], direction))
        np.testing.assert_allclose(exact, numeric, rtol=1e-8)


@pytest.mark.parametrize("routing", ["some_invalid", "one_takes_all"])
@pytest.mark.parametrize("block_size", [1, 7, 64, 0])
def test_block_size_changes_nothing(block_size, routing):
    inputs = problem(routing)
    assert_close(
        value_and_grads(*inputs, implementation="blocks", block_size=block_size),
        value_and_grads(*inputs, implementation="reference"),
        2e-6,
    )


def test_bfloat16_compute_with_float32_parameters():
    x, weights, gate_up, down, indices, valid, g = problem()
    run = partial(value_and_grads, block_size=B)
    got = run(x.astype(jnp.bfloat16), weights, gate_up, down, indices, valid, g)
    assert [a.dtype.name for a in got] == ["bfloat16", "bfloat16", "float32", "float32", "float32"]
    assert_close(got, run(x, weights, gate_up, down, indices, valid, g), 0.03)


def test_dropped_assignments_are_inert():
    """Garbage behind an invalid assignment, even NaN rows and weights and indices out of range, changes no bit."""
    x, weights, gate_up, down, indices, valid, g = problem("some_invalid")
    valid = valid.at[:4].set(False)
    wild = jnp.where(valid, weights, jnp.nan), jnp.where(valid, indices, 999), x.at[:4].set(jnp.nan)
    got = value_and_grads(wild[2], wild[0], gate_up, down, wild[1], valid, g, block_size=B)
    want = value_and_grads(x, weights, gate_up, down, indices, valid, g, block_size=B)
    for a, b in zip(got, want):
        np.testing.assert_array_equal(a, b)
    assert not np.asarray(want[2])[~np.asarray(valid)].any(), "a dropped assignment's weight has zero gradient"


def test_inside_a_rematerialised_scan_over_layers():
    x, weights, gate_up, down, indices, valid, g = problem("some_invalid")
    layers = jnp.stack([gate_up, gate_up[::-1]]), jnp.stack([down, down[::-1]])

    def loss(x, layers, implementation):
        def step(x, p):
            return (x + grouped_swiglu(x, indices, weights, valid, *p, implementation=implementation), None)

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
        return grouped_swiglu(
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


def test_the_loop_never_scatters_rows():
    """Dispatch, combine and their transposes are gathers: the only scatters are those of the integer plan."""
    jaxpr = str(jax.make_jaxpr(partial(value_and_grads, implementation="blocks"))(*problem()))
    for line in jaxpr.splitlines():
        if "= scatter" in line:
            assert line.split("=")[0].rstrip().split(":")[1].startswith(("i32", f"f32[{E},")), line


def test_the_gpu_program_holds_grouped_gemms():
    text = jax.jit(value_and_grads).trace(*problem()).lower(lowering_platforms=("cuda",)).as_text()
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
        ({"gate_up": jnp.zeros((E, D, 2 * F + 1))}, "an even number"),
        ({"gate_up": jnp.zeros((E, D + 1, 2 * F))}, "gate_up.shape"),
        ({"down": jnp.zeros((E, F, D + 1))}, "down.shape"),
        ({"block_size": -1}, "block_size = -1"),
        ({"scale_on": "middle"}, "scale_on = 'middle'"),
        ({"implementation": "fast"}, "implementation = 'fast'"),
    ],
)
def test_bad_input_names_field_and_value(change, message):
    names = ("x", "weights", "gate_up", "down", "indices", "valid")
    with pytest.raises(ValueError, match=message):
        grouped_swiglu(**(dict(zip(names, problem())) | change))


@pytest.mark.parametrize(("mean", "unit"), [(1, 16), (64, 16), (128, 16), (256, 32), (512, 64), (4096, 64)])
def test_automatic_block_sizes_follow_the_mean_load(mean, unit):
    sizes = automatic_block_sizes(16 * mean, 16)
    assert sizes == tuple(range(unit, min(12 * unit, 16 * mean) + 1, unit))
