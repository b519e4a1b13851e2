"""The exchange maps: every valid assignment arrives once, at its expert's device, and comes back to its place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

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
