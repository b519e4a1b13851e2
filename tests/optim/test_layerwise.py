"""BAdam and LISA: Adam begun anew on the active layers, nothing on the others, state for the active ones alone."""

import importlib.util
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim.layerwise import badam, lisa, scale_by_layers

GOLDENS = Path(__file__).parents[1] / "goldens"
LABELS = {"w": "layers", "scale": "layers", "embedding": "adam"}


def params():
    rng = np.random.default_rng(0)
    leaf = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {"w": leaf(4, 3, 5), "scale": leaf(4, 6), "embedding": leaf(7, 3)}


def gradients(steps):
    rng = np.random.default_rng(1)
    return [jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), params())
            for _ in range(steps)]  # fmt: skip


def run(tx, steps):
    """Parameters before the first step and after each."""
    state, update, seen = tx.init(params()), jax.jit(tx.update), [params()]
    for grads in gradients(steps):
        updates, state = update(grads, state, seen[-1])
        seen.append(optax.apply_updates(seen[-1], updates))
    assert update._cache_size() == 1
    return seen, state


@pytest.mark.parametrize(("order", "visits"), [("ascending", [0, 1, 2, 3]), ("descending", [3, 2, 1, 0])])
def test_badam_is_adam_on_one_layer_after_another(order, visits):
    frozen = LABELS | {"embedding": "frozen"}
    seen, _ = run(badam(0.1, frozen, update_gap=3, order=order), 12)
    want, state, adam = params(), None, optax.adam(0.1)
    for i, grads in enumerate(gradients(12)):
        layer = visits[i // 3]
        part = {name: grads[name][layer] for name in ("w", "scale")}
        state = adam.init(part) if i % 3 == 0 else state
        updates, state = adam.update(part, state)
        want = want | {name: want[name].at[layer].add(updates[name]) for name in part}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), seen[i + 1], want)


def load_inputs():
    spec = importlib.util.spec_from_file_location("golden_inputs", GOLDENS / "inputs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_badam_equals_the_released_one():
    inputs = load_inputs()
    settings, want = inputs.OPTIMIZER, np.load(GOLDENS / "optimizers.npz")["badam"]
    shape = tuple(want.shape[1:])
    draw = lambda name: {"w": jnp.asarray(inputs.draw(f"optimizer/{name}", shape))}  # noqa: E731
    tx = badam(settings["lr"], {"w": "layers"}, update_gap=settings["gap"], order="descending", eps=settings["eps"])
    weights = draw("start")
    state, update = tx.init(weights), jax.jit(tx.update)
    for step, after in enumerate(want):
        updates, state = update(draw(step), state)
        weights = optax.apply_updates(weights, updates)
        np.testing.assert_allclose(weights["w"], after, atol=2e-6)


def test_shuffled_blocks_are_each_visited_once_a_round():
    seen, _ = run(badam(0.1, LABELS, update_gap=2, order="shuffled"), 16)
    moved = [np.flatnonzero(np.abs(np.asarray(b["w"] - a["w"])).max(axis=(1, 2))) for a, b in pairwise(seen)]
    assert all(len(layers) == 1 for layers in moved)
    visits = [int(layers[0]) for layers in moved[::2]]
    assert visits == [int(layers[0]) for layers in moved[1::2]]
    assert sorted(visits[:4]) == sorted(visits[4:]) == [0, 1, 2, 3]


def test_lisa_freezes_the_same_layers_in_every_leaf_and_never_the_embedding():
    seen, state = run(lisa(0.1, LABELS, active=2, update_gap=4), 12)
    for a, b in pairwise(seen):
        of_w = set(np.flatnonzero((a["w"] != b["w"]).any(axis=(1, 2))).tolist())
        of_scale = set(np.flatnonzero((a["scale"] != b["scale"]).any(axis=1)).tolist())
        assert of_w == of_scale
        assert len(of_w) == 2
        assert (a["embedding"] != b["embedding"]).all()
    stacked = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 3]
    assert sum(leaf.size for leaf in stacked) == 2 * (2 * 3 * 5 + 2 * 6)  # two moments of two layers


def test_lisa_with_every_layer_active_is_adam():
    seen, _ = run(lisa(0.1, LABELS, active=4, update_gap=10**6), 5)
    want, tx = params(), optax.adam(0.1)
    state = tx.init(want)
    for grads in gradients(5):
        updates, state = tx.update(grads, state)
        want = optax.apply_updates(want, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), seen[-1], want)


def test_bad_input():
    with pytest.raises(ValueError, match="active = 0"):
        scale_by_layers(0, update_gap=5)
    with pytest.raises(ValueError, match="update_gap = 0"):
        scale_by_layers(1, update_gap=0)
    with pytest.raises(ValueError, match=r"\['w'\]: active = 5: expected 1 to 4 layers"):
        lisa(0.1, {"w": "layers"}, active=5).init({"w": params()["w"]})
