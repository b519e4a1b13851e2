"""Causal segment-masked attention against a position-by-position oracle and the einsum reference."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import kernels.attention as attention_module
from kernels.attention import attention


def problem(batch=2, length=37, heads=4, groups=2, width=8, dtype=np.float32, seed=0):
    """q, k, v, packed segment ids (documents 1.., padding 0 at the end and one all-padding row), cotangent."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape).astype(dtype))

    segments = np.sort(rng.integers(1, 4, (batch, length)), axis=1)
    segments[0, -length // 4 :] = 0
    segments[-1] = 0 if batch > 2 else segments[-1]
    q, g = normal(batch, length, heads, width), normal(batch, length, heads, width)
    k, v = normal(batch, length, groups, width), normal(batch, length, groups, width)
    return q, k, v, jnp.asarray(segments, jnp.int32), g


@partial(jax.jit, static_argnames=("implementation", "scale"))
def value_and_grads(q, k, v, segments, g, implementation="blocks", **options):
    def call(q, k, v):
        return attention(q, k, v, segments, implementation=implementation, **options)

    out, vjp = jax.vjp(call, q, k, v)
    return out, *vjp(g.astype(out.dtype))


def assert_close(got, want, tolerance):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 0.1), err_msg=f"result {i}")


@pytest.fixture
def small_query_blocks(monkeypatch):
    """Two query blocks at tiny lengths, the last one ragged."""
    monkeypatch.setattr(attention_module, "_QUERY_BLOCK", 15)
    value_and_grads.clear_cache()
    yield
    value_and_grads.clear_cache()


def naive(q, k, v, segments, scale, window=0, sinks=None):
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, s, h in np.ndindex(*q.shape[:3]):
        oldest = max(0, s + 1 - window) if window else 0
        seen = [t for t in range(oldest, s + 1) if segments[b, t] == segments[b, s] != 0]
        if seen:
            group = h // (q.shape[2] // k.shape[2])
            scores = scale * k[b, seen, group] @ q[b, s, h]
            weights = np.exp(scores)
            out[b, s, h] = weights @ v[b, seen, group] / (weights.sum() + (0 if sinks is None else np.exp(sinks[h])))
    return out


@pytest.mark.parametrize("implementation", ["reference", "blocks"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_match_a_position_by_position_oracle(small_query_blocks, implementation, scale):
    with jax.enable_x64(True):
        q, k, v, segments, g = problem(batch=3, length=37, dtype=np.float64)
        got = value_and_grads(q, k, v, segments, g, implementation=implementation, scale=scale)[0]
        want = naive(*(np.asarray(a) for a in (q, k, v, segments)), scale or 8**-0.5)
        np.testing.assert_allclose(got, want, atol=1e-12)


WINDOWS = [(None, False), (0, True), (1, False), (5, True), (23, False), (99, True)]


@pytest.mark.parametrize("implementation", ["reference", "blocks"])
@pytest.mark.parametrize(("window", "with_sinks"), WINDOWS)
def test_windows_sinks_and_wider_values(small_query_blocks, implementation, window, with_sinks):
    with jax.enable_x64(True):
        q, k, v, segments, _ = problem(batch=3, length=37, dtype=np.float64)
        v = jnp.concatenate([v, 2 * v[..., :3]], axis=-1)
        sinks = jnp.array([0.5, -1.0, 2.0, 4.0]) if with_sinks else None
        limit = None if window is None else jnp.int32(window)
        run = jax.jit(partial(attention, implementation=implementation))
        got = run(q, k, v, segments, window=limit, sinks=sinks)
        want = naive(*(np.asarray(a) for a in (q, k, v, segments)), 8**-0.5, window or 0, sinks)
        np.testing.assert_allclose(got, want, atol=1e-12)


def test_gradients_with_window_and_sinks(small_query_blocks):
    """Of q, k, v (wider than the keys) and the sinks; the reference is differentiated by JAX."""
    with jax.enable_x64(True):
        q, k, v, segments, g = problem(batch=3, length=37, dtype=np.float64)
        v, g = jnp.concatenate([v, v[..., :3] ** 2], axis=-1), jnp.concatenate([g, g[..., :3]], axis=-1)
        sinks, window = jnp.array([0.5, -1.0, 2.0, 4.0]), jnp.int32(9)

        @partial(jax.jit, static_argnums=4)
        def gradients(q, k, v, sinks, implementation):
            _, vjp = jax.vjp(
                lambda *a: attention(*a[:3], segments, window=window, sinks=a[3], implementation=implementation),
                q, k, v, sinks,
            )  # fmt: skip
            return vjp(g)

        got, want = (gradients(q, k, v, sinks, name) for name in ("blocks", "reference"))
        assert float(jnp.abs(want[3]).min()) > 1e-3
        assert_close(got, want, 1e-12)


@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (6, 2), (5, 5), (6, 6)])
def test_gradients_match_the_reference_for_all_head_ratios(small_query_blocks, heads, groups):
    with jax.enable_x64(True):
        inputs = problem(batch=3, heads=heads, groups=groups, dtype=np.float64)
        got, want = (value_and_grads(*inputs, implementation=name) for name in ("blocks", "reference"))
        assert_close(got, want, 1e-12)


@pytest.mark.parametrize("length", [1, 300, 700])
def test_lengths_around_the_query_block(length):
    inputs = problem(batch=2, length=length, heads=2, groups=1)
    assert_close(value_and_grads(*inputs), value_and_grads(*inputs, implementation="reference"), 3e-6)


def test_gradients_match_finite_differences(small_query_blocks):
    with jax.enable_x64(True):
        q, k, v, segments, g = problem(dtype=np.float64)
        rng = np.random.default_rng(1)
        direction = tuple(rng.standard_normal(a.shape) for a in (q, k, v))

        def output(step):
            moved = (np.asarray(a) + step * b for a, b in zip((q, k, v), direction))
            return np.asarray(value_and_grads(*moved, segments, g)[0])

        numeric = np.vdot(g, output(1e-5) - output(-1e-5)) / 2e-5
        exact = sum(np.vdot(a, b) for a, b in zip(value_and_grads(q, k, v, segments, g)[1:], direction))
        np.testing.assert_allclose(exact, numeric, rtol=1e-7)


def test_neither_future_nor_other_documents_nor_padding_leak(small_query_blocks):
    q, k, v, _, _ = problem(batch=1, length=30)
    segments = jnp.array([[1] * 12 + [2] * 13 + [0] * 5], jnp.int32)
    position = 18

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, segments, implementation="blocks")[0, position] ** 2)

    for name, gradient in zip("qkv", jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)):
        touched = np.flatnonzero(np.abs(np.asarray(gradient[0])).sum(axis=(1, 2)))
        want = [position] if name == "q" else list(range(12, position + 1))
        assert touched.tolist() == want, name


def test_padding_and_extreme_scores_give_zeros_never_nan(small_query_blocks):
    q, k, v, segments, g = problem(batch=3)
    results = value_and_grads(q * 1e4, k * 1e4, v, segments, g)
    padding = np.asarray(segments == 0)
    for result in results:
        assert np.isfinite(result).all()
        assert not np.asarray(result)[padding].any()


def test_bfloat16_stays_within_its_rounding():
    inputs = problem(length=140)
    low = tuple(a.astype(jnp.bfloat16) for a in inputs[:3])
    got = value_and_grads(*low, *inputs[3:])
    assert all(a.dtype == jnp.bfloat16 for a in got)
    assert_close(got, value_and_grads(*inputs, implementation="reference"), 0.03)


def test_inside_a_rematerialised_scan_over_layers():
    q, k, v, segments, g = problem()

    def loss(q, k, v, implementation):
        def step(x, _):
            return (x + attention(x, k, v, segments, implementation=implementation), None)

        return jnp.vdot(g, jax.lax.scan(jax.checkpoint(step), q, None, length=3)[0])

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    got, want = (jax.tree.leaves(run(q, k, v, name)) for name in ("auto", "reference"))
    assert_close(got, want, 5e-6)


def test_inside_shard_map_over_the_batch():
    q, k, v, segments, g = problem(batch=16, length=20)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def sharded(q, k, v):
        specs = (P("data"),) * 4
        return jax.shard_map(attention, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)(
            q, k, v, segments
        )

    @jax.jit
    def run(q, k, v):
        out, vjp = jax.vjp(sharded, q, k, v)
        return out, *vjp(g)

    assert_close(run(q, k, v), value_and_grads(q, k, v, segments, g, implementation="reference"), 3e-6)


def test_no_square_of_the_length_outlives_a_loop_step():
    """Residuals and results hold no [.., S, S] array: memory is linear in the sequence length."""
    length = 96
    inputs = problem(batch=4, length=length)

    def call(q, k, v):
        return attention(q, k, v, inputs[3], implementation="blocks")

    _, vjp = jax.vjp(call, *inputs[:3])
    for leaf in jax.tree.leaves(vjp):
        assert leaf.size <= inputs[0].size


def test_the_gpu_program_is_batched_einsums_without_a_loop():
    program = jax.jit(lambda *a: value_and_grads(*a, implementation="auto")).trace(*problem())
    assert "stablehlo.while" not in program.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" in program.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((2, 37, 8))}, "q.shape"),
        ({"k": jnp.zeros((2, 37, 2, 4))}, "k.shape"),
        ({"v": jnp.zeros((2, 37, 4, 8))}, "v.shape"),
        ({"k": jnp.zeros((2, 37, 3, 8)), "v": jnp.zeros((2, 37, 3, 8))}, "a divisor of the 4 query heads"),
        ({"segment_ids": jnp.zeros((2, 36), jnp.int32)}, "segment_ids.shape"),
        ({"segment_ids": jnp.zeros((2, 37))}, "segment_ids.dtype"),
        ({"sinks": jnp.zeros((2,))}, "sinks.shape"),
        ({"implementation": "flash"}, "implementation = 'flash'"),
    ],
)
def test_bad_input_names_field_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        attention(**(dict(zip(("q", "k", "v", "segment_ids"), problem())) | change))
