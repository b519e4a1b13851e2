"""FRUGAL against its equations in float64 NumPy, against optimisers it becomes, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import sparse

from optim.frugal import FrugalState, frugal, scale_by_frugal
from optim.subspaces import MatrixAxes, block, columns, plain_axes, randk, random, rows, svd

STACKED = lambda name, leaf: MatrixAxes(leaf.ndim - 2, 1)  # noqa: E731
SUBSPACES = {
    "columns": columns(0.25),
    "rows": rows(0.25),
    "randk": randk(0.25),
    "svd": svd(0.25),
    "random": random(0.25),
    "block": block(0.5),
    "block_mirror": block(0.5, "mirror"),
}
INNER = {
    "adam": optax.scale_by_adam(0.9, 0.999, 1e-8),
    "lion": optax.scale_by_lion(0.9, 0.99),
    "momentum": optax.trace(0.9),
}


def params(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {"w": rng.standard_normal((4, 8, 12)).astype(dtype), "v": rng.standard_normal((4, 8, 8)).astype(dtype)}


def gradients(steps, dtype=np.float32):
    rng = np.random.default_rng(1)
    return [jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(dtype), params()) for _ in range(steps)]


def numpy_inner(kind, low, state, c):
    """One step of the inner optimiser: (direction, state), c = steps in this window."""
    if kind == "adam":
        m, v = (np.zeros_like(low), np.zeros_like(low)) if c == 1 else state
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low**2
        return m / (1 - 0.9**c) / (np.sqrt(v / (1 - 0.999**c)) + 1e-8), (m, v)
    m = np.zeros_like(low) if c == 1 else state
    if kind == "lion":
        return np.sign(0.9 * m + 0.1 * low), 0.99 * m + 0.01 * low
    m = 0.9 * m + low
    return m, m


def reference(name, subspace, choice, grad, kind, state, c, rule, free, scale):
    """W's direction by the algorithm, with projection matrices written out; the drawn choice is an input."""
    n, a, b = grad.shape
    if name in ("svd", "random"):
        right = a >= b
        short = np.einsum("nir,njr->nij", choice, choice)
        up_down = lambda x: np.einsum("nab,nbc->nac", x, short) if right else np.einsum("nab,nbc->nac", short, x)  # noqa: E731
        low = np.einsum("nab,nbr->nar", grad, choice) if right else np.einsum("nar,nab->nrb", choice, grad)
        direction, state = numpy_inner(kind, low, state, c)
        full = (
            np.einsum("nar,nbr->nab", direction, choice) if right else np.einsum("nar,nrb->nab", choice, direction)
        )
        residual = grad - up_down(grad)
    else:
        mask = np.zeros((n, a, b), bool)
        if name.startswith("block"):
            mask[choice] = True
        for i in range(n if not name.startswith("block") else 0):
            if name == "columns":
                mask[i][:, choice[i]] = True
            elif name == "rows":
                mask[i][choice[i]] = True
            else:
                mask[i].reshape(-1)[choice[i]] = True
        direction, state = numpy_inner(kind, np.where(mask, grad, 0), state, c)
        full, residual = np.where(mask, direction, 0), np.where(mask, 0, grad)
    return scale * (full + free * (np.sign(residual) if rule == "sign" else residual)), state


@pytest.mark.parametrize(
    ("name", "kind", "rule"),
    [*((name, "adam", "sign") for name in SUBSPACES), ("columns", "lion", "sign"), ("svd", "momentum", "sgd"),
     ("block", "lion", "sgd")],
)  # fmt: skip
@pytest.mark.slow_after(3)
def test_fifty_steps_equal_the_equations(name, kind, rule):
    gap, free, scale, rate = 7, 0.5, 0.8, 0.01
    with jax.enable_x64(True):
        subspace = SUBSPACES[name]
        tx = scale_by_frugal(subspace, update_gap=gap, inner=INNER[kind], rule=rule, stateless_scale=free,
                             subspace_scale=scale, axes=STACKED)  # fmt: skip
        ours = jax.tree.map(jnp.asarray, params(np.float64))
        theirs, states = params(np.float64), dict.fromkeys(ours)
        state, update = tx.init(ours), jax.jit(tx.update)
        for t, grads in enumerate(gradients(50, np.float64)):
            directions, state = update(jax.tree.map(jnp.asarray, grads), state)
            ours = jax.tree.map(lambda x, d: x - rate * d, ours, directions)
            for leaf, grad in grads.items():
                choice = state.choices[leaf]
                choice = np.asarray(choice if name in ("svd", "random") else choice.index)
                direction, states[leaf] = reference(
                    name, subspace, choice, grad, kind, states[leaf], t % gap + 1, rule, free, scale
                )
                theirs[leaf] = theirs[leaf] - rate * direction
        for leaf, want in theirs.items():
            np.testing.assert_allclose(ours[leaf], want, rtol=0, atol=1e-6)


def run(tx, steps=6):
    ours = jax.tree.map(jnp.asarray, params())
    state, update = tx.init(ours), jax.jit(tx.update)
    for grads in gradients(steps):
        updates, state = update(jax.tree.map(jnp.asarray, grads), state, ours)
        ours = optax.apply_updates(ours, updates)
    return ours


EVERYTHING = {"columns": columns(1.0), "rows": rows(1.0), "randk": randk(1.0), "block": block(1.0)}
LABELS = {"w": "frugal", "v": "frugal"}


@pytest.mark.parametrize("name", EVERYTHING)
def test_density_one_without_refresh_is_adamw(name):
    options = {"labels": LABELS, "axes": STACKED, "weight_decay": 0.1, "update_gap": 10**6}
    got = run(frugal(0.01, EVERYTHING[name], **options))
    want = run(optax.adamw(0.01, weight_decay=0.1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


@pytest.mark.parametrize("name", EVERYTHING)
def test_density_one_is_adam_begun_anew_at_each_refresh(name):
    got = run(frugal(0.01, EVERYTHING[name], labels=LABELS, axes=STACKED, update_gap=3))
    adam = optax.adam(0.01)
    want, state = jax.tree.map(jnp.asarray, params()), None
    for t, grads in enumerate(gradients(6)):
        state = adam.init(want) if t % 3 == 0 else state
        updates, state = adam.update(grads, state)
        want = optax.apply_updates(want, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


@pytest.mark.parametrize("make", [svd, random])
def test_the_sign_of_rounding_is_no_step(make):
    """An expert that saw few tokens has a gradient of low rank: inside the subspace, or not inside it at all."""
    rng = np.random.default_rng(3)
    grad = {"w": jnp.asarray(rng.standard_normal((4, 32, 2)) @ rng.standard_normal((4, 2, 48)), jnp.float32)}
    tx = scale_by_frugal(make(rank=4), axes=STACKED)
    direction, _ = tx.update(grad, tx.init(grad))
    ranks = np.linalg.matrix_rank(np.asarray(direction["w"]), tol=1e-3)
    assert (ranks <= 4).all() == (make is svd)


def test_density_zero_is_the_sign_and_keeps_nothing():
    got = run(frugal(0.01, None, labels=LABELS, axes=STACKED))
    want = run(optax.sign_sgd(0.01))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert sum(leaf.size for leaf in jax.tree.leaves(scale_by_frugal(None, axes=STACKED).init(params()))) == 1


@pytest.mark.parametrize("name", ["columns", "rows", "randk", "block"])
@pytest.mark.slow_after(1)
def test_the_first_step_is_the_sign(name):
    tx = scale_by_frugal(SUBSPACES[name], axes=STACKED)
    (grads,) = gradients(1)
    direction, _ = tx.update(grads, tx.init(params()))
    jax.tree.map(lambda d, g: np.testing.assert_allclose(d, np.sign(g), atol=1e-3), direction, grads)


@pytest.mark.parametrize("name", ["svd", "columns"])
def test_the_update_has_full_rank_where_a_subspaces_alone_has_not(name):
    ranks = {}
    for free in (1.0, 0.0):
        tx = scale_by_frugal(SUBSPACES[name], stateless_scale=free, axes=STACKED)
        state, total = tx.init(params()), np.zeros((8, 8))
        for grads in gradients(5):  # within one window
            direction, state = tx.update(grads, state)
            total += np.asarray(direction["v"][0])
        ranks[free] = int(np.linalg.matrix_rank(total, tol=1e-3))
    assert ranks == {1.0: 8, 0.0: 2}


@pytest.mark.parametrize("name", ["columns", "rows", "randk", "block"])
def test_moved_state_keeps_what_both_subspaces_share(name):
    """Without a reset, a coordinate that stays chosen has Adam's moments of all its steps; a new one begins at zero."""
    tx = scale_by_frugal(SUBSPACES[name], update_gap=2, at_refresh="move", axes=STACKED)
    state = tx.init(params())
    masks, moments = [], {leaf: np.zeros_like(x) for leaf, x in params().items()}
    for grads in gradients(3):
        _, state = jax.jit(tx.update)(grads, state)
        mask = {}
        for leaf, grad in grads.items():
            ones = jnp.ones_like(SUBSPACES[name].down(state.choices[leaf], jnp.asarray(grad)))
            mask[leaf] = np.asarray(SUBSPACES[name].up(state.choices[leaf], ones, grad.shape)) > 0
            moments[leaf] = np.where(mask[leaf], 0.9 * moments[leaf] + 0.1 * grad, 0)
        masks.append(mask)
    shared = sum((masks[1][leaf] & masks[2][leaf]).sum() for leaf in moments)
    assert 0 < shared < sum(mask.sum() for mask in masks[2].values())
    for leaf, want in moments.items():
        got = SUBSPACES[name].up(state.choices[leaf], state.inner.mu[leaf], want.shape)
        np.testing.assert_allclose(got, want, atol=1e-6)
    assert int(state.inner.count) == 3


def test_bytes_of_state_are_the_closed_form():
    """Moments and choices: (8 rho + 4 k / size) bytes a parameter, projectors 4 min(a, b) r; counts beside them."""
    sizes = {leaf: x.size for leaf, x in params().items()}
    matrices = {"w": (4, 8, 12), "v": (4, 8, 8)}
    wanted = {
        "columns": sum(8 * n * a * (b // 4) + 4 * n * (b // 4) for n, a, b in matrices.values()),
        "rows": sum(8 * n * (a // 4) * b + 4 * n * (a // 4) for n, a, b in matrices.values()),
        "randk": sum((8 + 4) * n * (a * b // 4) for n, a, b in matrices.values()),
        "svd": sum(8 * n * 2 * max(a, b) + 4 * n * min(a, b) * 2 for n, a, b in matrices.values()),
        "random": sum(8 * n * 2 * max(a, b) + 4 * n * min(a, b) * 2 for n, a, b in matrices.values()),
        "block": sum(8 * size // 2 for size in sizes.values()) + 2 * (4 * 2 + 4),
    }
    for name, expected in wanted.items():
        state = jax.eval_shape(scale_by_frugal(SUBSPACES[name], axes=STACKED).init, params())
        found = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        assert found == expected + 8, name  # two counts


@pytest.mark.parametrize("name", SUBSPACES)
def test_a_refresh_compiles_nothing_and_low_precision_keeps_float32_state(name):
    tx = scale_by_frugal(SUBSPACES[name], update_gap=2, axes=STACKED)
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params())
    state, update = tx.init(low), jax.jit(tx.update)
    for grads in gradients(5):
        _, state = update(jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), grads), state)
    assert update._cache_size() == 1
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} <= {"float32", "int32"}


def test_hyperparameters_are_injected_and_not_a_number_stays_one():
    static = ("subspace", "labels", "axes", "update_gap", "inner", "rule", "at_refresh", "seed")
    made = optax.inject_hyperparams(frugal, static_args=static)
    tx = made(learning_rate=0.01, subspace=columns(0.25), labels=LABELS, axes=STACKED, update_gap=2)
    start = jax.tree.map(jnp.asarray, params())
    state = tx.init(start)
    (grads,) = gradients(1)
    small, _ = tx.update(grads, state, start)
    state.hyperparams["learning_rate"] = jnp.asarray(0.1)
    large, _ = tx.update(grads, state, start)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(10 * a, b, rtol=1e-5), small, large)
    grads["w"][0, 0, 0] = np.nan
    updates, _ = tx.update(grads, state, start)
    assert np.isnan(np.asarray(updates["w"][0, 0, 0]))


def test_the_default_labels_are_matrices():
    model = {"w": jnp.ones((8, 8)), "scale": jnp.ones(8)}
    tx = frugal(0.1, columns(0.25))
    state = tx.init(model)
    ours = lambda x: isinstance(x, FrugalState)  # noqa: E731
    (found,) = filter(ours, jax.tree.leaves(state, is_leaf=ours))
    assert found.inner.mu["w"].shape == (1, 8, 2)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, model), state, model)
    np.testing.assert_allclose(updates["scale"], -0.1, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "tree", "message"),
    [
        ({"update_gap": 0}, {}, "update_gap = 0"),
        ({"update_gap": 0.5}, {}, "update_gap = 0.5: expected a whole number"),
        ({"rule": "signum"}, {}, "rule = 'signum'"),
        ({"subspace": svd(1.0)}, {"w": np.ones((4, 6), np.float32)}, r"\['w'\]: subspace = .*directions left over"),
        ({"subspace": svd(0.5), "at_refresh": "move"}, {}, "at_refresh = 'move'"),
        ({"at_refresh": "shake"}, {}, "at_refresh = 'shake'"),
        ({"subspace": None, "rule": "none"}, {}, "rule = 'none'"),
        ({"axes": plain_axes}, {"w": np.ones((2, 3, 4), np.float32)}, r"\['w'\].shape = \(2, 3, 4\): expected two"),
        ({}, {"w": np.ones((4, 4), np.int32)}, r"\['w'\].dtype = 'int32'"),
        ({}, {"w": np.ones((4, 4), np.complex64)}, r"\['w'\].dtype = 'complex64'"),
        ({}, {"w": sparse.BCOO.fromdense(np.ones((4, 4), np.float32))}, r"\['w'\].*expected"),
        ({"subspace": random(0.5), "seed": None}, {}, "seed = None"),
        ({"subspace": block(0.5, "mirror"), "axes": STACKED}, {"w": np.ones((2, 4, 4), np.float32)}, "mirror': .*even"),
        ({"subspace": columns(0.1)}, {"w": np.ones((4, 4), np.float32)}, r"\['w'\]: density = 0.1"),
        ({"inner": optax.adamw(1.0)}, {"w": np.ones((4, 4), np.float32)}, "inner = .*needs no parameters"),
    ],
)
def test_bad_input(options, tree, message):
    with pytest.raises(ValueError, match=message):
        scale_by_frugal(**({"subspace": columns(0.5)} | options)).init(tree)
