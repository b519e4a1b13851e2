"""LDAdam against its equations in float64 NumPy, against Adam where it is Adam, and what it keeps and refuses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim.ldadam import LDAdamState, ldadam, scale_by_ldadam
from optim.subspaces import MatrixAxes, from_matrices

STACKED = lambda name, leaf: MatrixAxes(leaf.ndim - 2, 1)  # noqa: E731
SHAPES = {"tall": (1, 12, 8), "wide": (1, 8, 12), "square": (1, 8, 8), "stacked": (2, 3, 6, 10)}
B1, B2, Q, EPS = 0.908, 0.99, 0.908, 1e-8


def draws(steps, dtype=np.float32, shapes=SHAPES, seed=0):
    """Gradients with a part that grows: there is something to follow, and squares of m above v."""
    rng = np.random.default_rng(seed)
    draw = lambda: {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}  # noqa: E731
    mean = draw()
    return [{name: t / 4 * mean[name] + noise for name, noise in draw().items()} for t in range(steps)]


def run(tx, gradients, dtype=None):
    """(direction, state) after each step."""
    as_arrays = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)  # noqa: E731
    state, update, seen = tx.init(as_arrays(gradients[0])), jax.jit(tx.update), []
    for grads in gradients:
        direction, state = update(as_arrays(grads), state)
        seen.append((direction, state))
    assert update._cache_size() == 1
    return seen


class Reference:
    """One matrix, projected from the left: U [short, r], moments [r, long]; a taller matrix is given transposed."""

    def __init__(self, shape, rank, feedback):
        self.rank, self.feedback, self.t, self.negative = rank, feedback, 0, 0
        self.error = np.zeros(shape)

    def __call__(self, grad):
        seen, r = grad + self.error, self.rank
        if self.t == 0:
            u = np.linalg.svd(seen)[0][:, :r]
            m_half, v_half, lost = np.zeros((r, grad.shape[1])), np.zeros((r, grad.shape[1])), np.zeros_like(grad)
        else:
            m_hat, v_hat = self.m / (1 - B1**self.t), self.v / (1 - B2**self.t)
            followed = Q * self.u @ m_hat + (1 - Q) * seen
            u = np.linalg.qr(followed @ followed.T @ self.u)[0]
            change = u.T @ self.u
            m_half = change @ self.m
            square = change**2 @ (v_hat - m_hat**2) + (change @ m_hat) ** 2
            self.negative += (square < 0).sum()
            v_half = (1 - B2**self.t) * np.abs(square)
            lost = self.u @ self.m - u @ m_half
        low = u.T @ seen
        if self.feedback:
            self.error = seen - u @ low + B1 / (1 - B1) * lost
        self.t, self.u = self.t + 1, u
        self.m, self.v = B1 * m_half + (1 - B1) * low, B2 * v_half + (1 - B2) * low**2
        return u @ (self.m / (1 - B1**self.t) / (np.sqrt(self.v / (1 - B2**self.t)) + EPS))


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("rank", [1, 3])
def test_thirty_steps_equal_the_equations(rank, feedback):
    rate, gradients = 0.01, draws(30, np.float64)
    theirs = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    flat = {name: x.reshape(-1, *x.shape[-2:]) for name, x in theirs.items()}
    short_first = lambda x: x if x.shape[0] <= x.shape[1] else x.T  # noqa: E731
    steps = {name: [Reference(short_first(x).shape, rank, feedback) for x in flat[name]] for name in flat}
    # A square matrix is projected from the right, as `LowRank` has it.
    orient = lambda name, x: x.T if name == "square" else short_first(x)  # noqa: E731
    back = lambda name, x, d: d.T if name == "square" or d.shape != x.shape else d  # noqa: E731
    with jax.enable_x64(True):
        seen = run(scale_by_ldadam(rank, error_feedback=feedback, axes=STACKED), gradients)
        ours = jax.tree.map(lambda *d: -rate * sum(np.asarray(x) for x in d), *(direction for direction, _ in seen))
    for grads in gradients:
        for name, each in steps.items():
            matrices = grads[name].reshape(flat[name].shape)
            flat[name] -= rate * np.stack([back(name, g, one(orient(name, g))) for one, g in zip(each, matrices)])
    for name, want in theirs.items():
        np.testing.assert_allclose(ours[name], want, rtol=0, atol=1e-6)
    made_positive = sum(one.negative for each in steps.values() for one in each)
    assert made_positive > 0 or rank == 1  # where there is nothing to mix


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
@pytest.mark.parametrize("rank", [3, 8])
def test_it_is_adam_where_singular_vectors_stay(rank, shape):
    """Gradients O D with `rank` orthogonal directions fixed and their sizes drawn: the axes are the subspace."""
    rng = np.random.default_rng(0)
    outer = np.linalg.qr(rng.standard_normal((12, 8)))[0]
    sizes = [np.where(np.arange(8) < rank, 1 + rng.random(8), 0) for _ in range(20)]
    tall = [outer * size[None] for size in sizes]
    gradients = [{"w": (g if shape[0] > shape[1] else g.T)[None]} for g in tall]
    with jax.enable_x64(True):
        ours = run(scale_by_ldadam(rank, axes=STACKED), gradients)
        adam = run(optax.scale_by_adam(b1=B1, b2=B2, eps=EPS), gradients)
    for (got, state), (want, _) in zip(ours, adam):
        np.testing.assert_allclose(got["w"], want["w"], atol=1e-6)
        np.testing.assert_allclose(state.error["w"], 0, atol=1e-12)


def test_full_rank_has_no_error_and_adams_momentum():
    gradients = draws(12, np.float64)
    with jax.enable_x64(True):
        ours = run(scale_by_ldadam(8, axes=STACKED), [{k: g[k] for k in ("tall", "wide", "square")} for g in gradients])
    momentum = {name: 0.0 for name in ("tall", "wide", "square")}
    for grads, (_, state) in zip(gradients, ours):
        for name in momentum:
            momentum[name] = B1 * momentum[name] + (1 - B1) * grads[name]
            np.testing.assert_allclose(state.error[name], 0, atol=1e-11)
            np.testing.assert_allclose(up(state, name), momentum[name], atol=1e-11)


def up(state, name):
    """The momentum in full size."""
    p, m = np.asarray(state.projection[name]), np.asarray(state.mu[name])
    return m @ np.swapaxes(p, 1, 2) if m.shape[2] == p.shape[2] else p @ m


def test_no_gradient_is_lost():
    """All momenta applied, what the last one has still to give, and the error are the gradients."""
    gradients = draws(15, np.float64)
    with jax.enable_x64(True):
        seen = run(scale_by_ldadam(2, axes=STACKED), gradients)
    for name, shape in SHAPES.items():
        total, applied = np.zeros(shape), np.zeros(shape)
        for grads, (_, state) in zip(gradients, seen):
            total, last = total + grads[name], from_matrices(up(state, name), shape, STACKED(name, grads[name]))
            applied = applied + last
            error = np.asarray(state.error[name])
            np.testing.assert_allclose(applied + B1 / (1 - B1) * last + error, total, atol=1e-10)
        assert np.abs(error).max() > 0.1


def test_projections_stay_orthonormal_and_second_moments_positive():
    for _, state in run(scale_by_ldadam(3, axes=STACKED), draws(40)):
        for name in SHAPES:
            p, nu = np.asarray(state.projection[name]), np.asarray(state.nu[name])
            np.testing.assert_allclose(np.swapaxes(p, 1, 2) @ p, np.broadcast_to(np.eye(3), (len(p), 3, 3)), atol=2e-6)
            assert (nu >= 0).all()
            assert np.isfinite(nu).all()


def test_signs_of_directions_change_nothing():
    """Flipping columns of a projection, with the moments below them, leaves later steps as they were."""
    gradients, tx, signs = draws(8), scale_by_ldadam(2, axes=STACKED), jnp.array([-1.0, 1.0])
    state = run(tx, gradients[:4])[-1][1]
    low = lambda m, p: m * signs[None, None] if m.shape[2] == p.shape[2] else m * signs[None, :, None]  # noqa: E731
    flipped = state._replace(
        projection=jax.tree.map(lambda p: p * signs[None, None], state.projection),
        mu=jax.tree.map(low, state.mu, state.projection),
    )
    for grads in gradients[4:]:
        (one, state), (other, flipped) = tx.update(grads, state), tx.update(grads, flipped)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one, other)


def test_an_expert_without_gradients_is_left_alone():
    gradients = draws(6)
    for grads in gradients:
        grads["stacked"][1, 2] = 0
    for direction, state in run(scale_by_ldadam(2, axes=STACKED), gradients):
        np.testing.assert_array_equal(direction["stacked"][1, 2], 0)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_float32_stays_float32_where_float64_is_enabled():
    with jax.enable_x64(True):
        for direction, state in run(scale_by_ldadam(2, axes=STACKED), draws(2)):
            assert {str(leaf.dtype) for leaf in jax.tree.leaves((direction, state))} == {"float32", "int32"}


@pytest.mark.parametrize("feedback", [True, False])
def test_low_precision_keeps_float32_state_of_the_closed_form(feedback):
    """8 r max(a, b) of moments, 4 r min(a, b) of projections, 4 a b of error, for each matrix; a count."""
    rank = 2
    _, state = run(scale_by_ldadam(rank, error_feedback=feedback, axes=STACKED), draws(3), jnp.bfloat16)[-1]
    leaves = jax.tree.leaves(state)
    assert {str(leaf.dtype) for leaf in leaves} == {"float32", "int32"}
    flat = [np.zeros(shape).reshape(-1, *shape[-2:]).shape for shape in SHAPES.values()]
    want = sum(n * (8 * rank * max(a, b) + 4 * rank * min(a, b) + 4 * a * b * feedback) for n, a, b in flat)
    assert sum(leaf.nbytes for leaf in leaves) == want + 4
    if feedback:
        assert jax.tree.map(jnp.shape, state.error) == SHAPES


def test_whole_models_descend():
    """Least squares with a bias; the matrix by the method, the bias by Adam."""
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((64, 12)).astype("f"), rng.standard_normal((64, 8)).astype("f")
    loss = lambda p: jnp.mean((x @ p["w"] + p["b"][None] - target) ** 2)  # noqa: E731
    params = {"w": jnp.zeros((12, 8)), "b": jnp.zeros(8)}
    tx = ldadam(0.01, 2)
    state, start = tx.init(params), loss(params)
    ours = lambda x: isinstance(x, LDAdamState)  # noqa: E731
    (found,) = filter(ours, jax.tree.leaves(state, is_leaf=ours))
    assert found.mu["w"].shape == (1, 12, 2)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(100):
        params, state = step(params, state)
    inputs = np.c_[x, np.ones(64)]
    best = np.mean((target - inputs @ np.linalg.lstsq(inputs, target)[0]) ** 2)
    assert loss(params) - best < 0.2 * (start - best)


@pytest.mark.parametrize(
    ("options", "leaf", "message"),
    [
        ({"rank": 0}, np.ones((8, 8), np.float32), "rank = 0"),
        ({"rank": 2.0}, np.ones((8, 8), np.float32), "rank = 2.0"),
        ({"interpolation": 1.0}, np.ones((8, 8), np.float32), "interpolation = 1.0"),
        ({"rank": 9}, np.ones((12, 8), np.float32), r"\['w'\]: rank = 9"),
        ({}, np.ones((2, 8, 8), np.float32), r"\['w'\].shape = \(2, 8, 8\): expected two axes"),
        ({}, np.ones((8, 8), np.int32), r"\['w'\].dtype = 'int32'"),
    ],
)
def test_bad_input(options, leaf, message):
    with pytest.raises(ValueError, match=message):
        scale_by_ldadam(**({"rank": 2} | options)).init({"w": leaf})


def test_integer_gradients_are_refused():
    tx = scale_by_ldadam(2)
    with pytest.raises(ValueError, match=r"\['w'\].dtype = 'int32'"):
        tx.update({"w": jnp.ones((8, 8), jnp.int32)}, tx.init({"w": jnp.ones((8, 8))}))
