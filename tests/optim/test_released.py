"""Optimisers against the released ones, step by step, on their own golden file; and what each one promises."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from optim.apollo import apollo, apollo_mini, scale_by_apollo
from optim.fira import fira, scale_by_fira
from optim.galore import galore, scale_by_galore
from optim.projected import factors, limit_growth
from optim.subspaces import LowRank, gaussian

GOLDENS = Path(__file__).parents[1] / "goldens"


def load_inputs():
    spec = importlib.util.spec_from_file_location("golden_inputs", GOLDENS / "inputs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


inputs = load_inputs()
GOLDEN = dict(np.load(GOLDENS / "optimizers.npz"))
SETTINGS = inputs.OPTIMIZER
SHAPES = SETTINGS["shapes"]


def projections(name):
    """[windows, min(a, b), r]"""
    found = GOLDEN[f"{name}/projection"]
    return jnp.asarray(found if found.shape[1] > found.shape[2] else found.swapaxes(1, 2))


@dataclass(frozen=True)
class Drawn(LowRank):
    """The projection that the released code drew."""

    name: str = ""

    def refresh(self, choice, grad, key):
        return projections(self.name)[:1]


@dataclass(frozen=True)
class Signed(LowRank):
    """Our own singular vectors, with the signs that the released code's had in the window they are of."""

    name: str = ""

    def refresh(self, choice, grad, key):
        ours = super().refresh(choice, grad, key)
        products = jnp.einsum("nsr,wsr->wr", ours, projections(self.name))
        window = jnp.argmax(jnp.abs(products).sum(axis=1))
        return ours * jnp.sign(products[window])[None, None]


def trajectory(tx, shape):
    """Parameters after each step, [steps, a, b]."""
    parameter = jnp.asarray(inputs.draw("optimizer/start", shape))
    state, update, seen = tx.init({"w": parameter}), jax.jit(tx.update), []
    for step in range(SETTINGS["steps"]):
        updates, state = update({"w": jnp.asarray(inputs.draw(f"optimizer/{step}", shape))}, state)
        parameter = parameter - SETTINGS["lr"] * updates["w"]
        seen.append(parameter)
    return np.stack(seen)


@pytest.mark.parametrize("shape", SHAPES)
def test_galore_equals_the_released_one(shape):
    name = f"galore/{shape[0]}x{shape[1]}"
    inner = optax.scale_by_adam(eps=SETTINGS["eps"])
    subspace = Signed(SETTINGS["rank"], "svd", name)
    tx = scale_by_galore(SETTINGS["rank"], update_gap=SETTINGS["gap"], inner=inner, subspace=subspace)
    np.testing.assert_allclose(trajectory(tx, shape), GOLDEN[name], atol=5e-6)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("shape", SHAPES)
def test_apollo_equals_the_released_one(shape, granularity):
    name = f"apollo/{granularity}/{shape[0]}x{shape[1]}"
    options = {"update_gap": 1000, "scale": 4.0, "eps": SETTINGS["eps"]}
    subspace = Drawn(SETTINGS["rank"], "gaussian", name)
    tx = scale_by_apollo(SETTINGS["rank"], granularity=granularity, subspace=subspace, **options)
    np.testing.assert_allclose(trajectory(tx, shape), GOLDEN[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("gap", "inner"), [(100, optax.scale_by_adam()), (3, optax.identity())])
def test_galore_equals_optaxs_on_square_matrices(gap, inner):
    """Which projects the longer side: on a square matrix that is ours of the transpose. With moments only inside one
    window, since later on they depend on the signs of singular vectors."""
    shape, rank, scale = (8, 8), 3, 0.25
    ours = scale_by_galore(rank, update_gap=gap, scale=scale, inner=inner)
    theirs = optax.contrib.scale_by_galore(rank, gap, scale, inner)
    states = [tx.init({"w": jnp.zeros(shape)}) for tx in (ours, theirs)]
    for step in range(8):
        grad = jnp.asarray(inputs.draw(f"optimizer/{step}", shape))
        got, states[0] = ours.update({"w": grad}, states[0])
        want, states[1] = theirs.update({"w": grad.T}, states[1])
        np.testing.assert_allclose(got["w"], want["w"].T, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_fira_equals_its_equations(shape):
    """In NumPy, float64, one window; the projection is the state's own."""
    rate, b1, b2, rank, (a, b) = 0.05, 0.9, 0.999, 3, shape
    tx = scale_by_fira(rank, eps=1e-12)
    weights = {"w": jnp.asarray(inputs.draw("optimizer/start", shape))}
    state, update, want = tx.init(weights), jax.jit(tx.update), np.asarray(weights["w"], np.float64)
    m = v = before = 0.0
    for t in range(1, 9):
        grad = inputs.draw(f"optimizer/{t}", shape).astype(np.float64)
        updates, state = update({"w": jnp.asarray(grad, jnp.float32)}, state)
        weights = {"w": weights["w"] - rate * updates["w"]}
        p = np.asarray(state.choices["w"][0], np.float64)
        right = a >= b
        low = grad @ p if right else p.T @ grad
        m, v = b1 * m + (1 - b1) * low, b2 * v + (1 - b2) * low**2
        d, axis = m / np.sqrt(v), 1 if right else 0
        phi = np.linalg.norm(d, axis=axis, keepdims=True) / np.linalg.norm(low, axis=axis, keepdims=True)
        outside = phi * (grad - (low @ p.T if right else p @ low))
        norm = np.linalg.norm(outside)
        if t > 1 and norm > 1.01 * before:
            outside *= 1.01 * before / norm
        before = np.linalg.norm(outside)
        inside = d @ p.T if right else p @ d
        want = want - rate * np.sqrt(1 - b2**t) / (1 - b1**t) * (inside + outside)
        np.testing.assert_allclose(weights["w"], want, atol=2e-5)


def test_galore_moves_within_its_directions_and_apollo_along_the_gradient():
    grad = {"w": jnp.asarray(inputs.draw("g", (12, 8)))}
    low, _ = scale_by_galore(3).update(grad, scale_by_galore(3).init(grad))
    assert np.linalg.matrix_rank(np.asarray(low["w"]), tol=1e-4) == 3
    for granularity in ("channel", "tensor"):
        tx = scale_by_apollo(2, granularity=granularity)
        scaled, _ = tx.update(grad, tx.init(grad))
        ratio = np.asarray(scaled["w"] / grad["w"])
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-4)
        assert (ratio > 0).all()
        assert (np.ptp(ratio) < 1e-4) == (granularity == "tensor")


def test_factors_are_along_the_longer_side():
    direction, low = jnp.full((1, 12, 2), 3.0), jnp.full((1, 12, 2), 1.5)
    assert factors(direction, low, (1, 12, 8), "channel").shape == (1, 12, 1)
    assert factors(direction.mT, low.mT, (1, 8, 12), "channel").shape == (1, 1, 12)
    np.testing.assert_allclose(factors(direction, low, (1, 12, 8), "tensor"), 2.0, rtol=1e-6)


def test_the_limiter_lets_norms_grow_by_its_share_and_fall_freely():
    ones, norm = jnp.ones((2, 2, 2)), jnp.zeros(2)
    first, norm = limit_growth(ones, norm, 1.01)
    np.testing.assert_array_equal(first, ones)
    second, norm = limit_growth(ones * jnp.array([5.0, 0.5])[:, None, None], norm, 1.01)
    np.testing.assert_allclose(norm, [2 * 1.01, 1.0], rtol=1e-6)
    np.testing.assert_allclose(second[0], 1.01, rtol=1e-6)
    np.testing.assert_allclose(second[1], 0.5)


def test_gaussian_directions_keep_lengths_on_average():
    subspace, shape = gaussian(rank=4), (400, 20, 6)
    choice = subspace.refresh(subspace.init(shape), jnp.zeros(shape), jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    ratio = jnp.sum(subspace.down(choice, x) ** 2) / jnp.sum(x**2)
    assert float(ratio) == pytest.approx(1.0, abs=0.05)


WHOLE = {
    "galore": lambda: galore(0.1, 2),
    "fira": lambda: fira(0.03, 2),
    "apollo": lambda: apollo(0.1, 2),
    "apollo_mini": lambda: apollo_mini(0.01),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_descend(name):
    """Least squares with a bias; matrices by the method, the bias by Adam."""
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((64, 12)).astype("f"), rng.standard_normal((64, 8)).astype("f")
    loss = lambda p: jnp.mean((x @ p["w"] + p["b"][None] - target) ** 2)  # noqa: E731
    params = {"w": jnp.zeros((12, 8)), "b": jnp.zeros(8)}
    tx = WHOLE[name]()
    state, start = tx.init(params), loss(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(30):
        params, state = step(params, state)
    assert loss(params) < 0.95 * start


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scale_by_apollo(0), "rank = 0"),
        (lambda: scale_by_apollo(2, granularity="row"), "granularity = 'row'"),
        (lambda: scale_by_apollo(2, update_gap=0), "update_gap = 0"),
        (lambda: scale_by_apollo(2, seed=None), "seed = None"),
        (lambda: scale_by_fira(2, update_gap=0), "update_gap = 0"),
        (lambda: scale_by_galore(9).init({"w": jnp.ones((12, 8))}), r"\['w'\]: rank = 9"),
        (lambda: scale_by_apollo(9).init({"w": jnp.ones((12, 8))}), r"\['w'\]: rank = 9"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
