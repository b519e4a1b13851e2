"""Parts of the parameters that train: LISA and BAdam without full gradients, against their transforms of full ones."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim.layerwise import adam_of_part, badam, lisa, restarted, scale_by_layers
from optim.parts import active_layers, whole

GAP = 3
LABELS = {"embedding": "adam", "head": "adam", "runs": {"scale": "layers", "w": "layers"}, "top": "layers"}
SHAPES = {"embedding": (7, 3), "head": (6,), "runs": {"scale": (4, 6), "w": (4, 3, 5)}, "top": (3, 2)}
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tree(seed):
    rng = np.random.default_rng(seed)
    leaf = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return jax.tree.map(leaf, SHAPES, is_leaf=lambda node: isinstance(node, tuple))


def merged(seen):
    """The parameters that an `ActiveLayers` stands for, layer by layer."""

    def leaf(own, fixed):
        if own is None:
            return fixed
        if own.shape == fixed.shape:
            return own
        for place, layer in enumerate(np.asarray(seen.index[fixed.shape[0]])):
            fixed = fixed.at[layer].set(own[place])
        return fixed

    return jax.tree.map(leaf, seen.trained, seen.frozen, is_leaf=lambda node: node is None)


def by_part(part, tx, steps):
    """Parameters before the first step and after each, from the rows of full gradients that the part takes; the state.
    One compiled program."""

    @jit
    def update(params, state, grads, step):
        trained = part.take(params, step)
        updates, state = tx.update(part.take(grads, step), state, trained)
        return part.put(params, optax.apply_updates(trained, updates), step), state

    seen = [tree(0)]
    state = tx.init(part.take(seen[0], 0))
    for step in range(steps):
        params, state = update(seen[-1], state, tree(10 + step), jnp.int32(step))
        seen.append(params)
    assert update._cache_size() == 1
    return seen, state


def by_full_gradients(tx, steps):
    seen, state, update = [tree(0)], tx.init(tree(0)), jit(tx.update)
    for step in range(steps):
        updates, state = update(tree(10 + step), state, seen[-1])
        seen.append(optax.apply_updates(seen[-1], updates))
    return seen


def assert_equal(got, want, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), got, want)


@pytest.mark.parametrize("seed", [0, 5])
def test_lisa_step_for_step_over_several_windows(seed):
    rate = optax.linear_schedule(0.1, 0.01, 12)
    part = active_layers(LABELS, 2, GAP, seed=seed)
    seen, _ = by_part(part, adam_of_part(rate, LABELS, update_gap=GAP), 12)
    assert_equal(seen, by_full_gradients(lisa(rate, LABELS, active=2, update_gap=GAP, seed=seed), 12))
    for step, (before, after) in enumerate(pairwise(seen)):
        index = part.view(before, part.take(before, step), step).index
        idle = np.setdiff1d(np.arange(4), index[4])
        for name in ("w", "scale"):
            old, new = before["runs"][name], after["runs"][name]
            np.testing.assert_array_equal(old[idle], new[idle])
            assert (old[index[4]] != new[index[4]]).all()
        assert (before["embedding"] != after["embedding"]).all()
    drawn = {tuple(map(int, part.view(tree(0), None, step).index[4])) for step in range(0, 12, GAP)}
    assert len(drawn) > 1


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
def test_badam_with_all_else_frozen_step_for_step(order):
    labels = LABELS | {"embedding": "frozen", "head": "frozen"}
    part = active_layers(labels, 1, GAP, order=order, seed=2)
    seen, state = by_part(part, adam_of_part(0.1, labels, update_gap=GAP), 9)
    assert_equal(seen, by_full_gradients(badam(0.1, labels, update_gap=GAP, order=order, seed=2), 9))
    np.testing.assert_array_equal(seen[0]["embedding"], seen[-1]["embedding"])
    assert part.take(tree(0), 0)["head"] is None
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * (6 + 3 * 5 + 2)


def test_every_layer_active_is_adam_and_with_decay_adamw():
    labels = LABELS | {"top": "adam"}
    part = active_layers(lambda params: labels, 4, 100)
    for decay, want in ((0.0, optax.adam(0.1)), (0.3, optax.adamw(0.1, weight_decay=0.3))):
        seen, _ = by_part(part, adam_of_part(0.1, lambda trained: labels, update_gap=100, weight_decay=decay), 5)
        assert_equal(seen, by_full_gradients(want, 5))


def test_frozen_layers_do_not_decay():
    part = active_layers(LABELS, 1, GAP)
    seen, _ = by_part(part, adam_of_part(0.1, LABELS, update_gap=GAP, weight_decay=0.5), GAP)
    moved = (seen[0]["runs"]["w"] != seen[-1]["runs"]["w"]).any(axis=(1, 2))
    assert moved.tolist() == [layer in part.view(seen[0], None, 0).index[4] for layer in range(4)]


def test_draws_are_those_of_the_transform():
    part, tx = active_layers(LABELS, 2, GAP, seed=7), scale_by_layers(2, update_gap=GAP, seed=7)
    state = tx.init({"w": tree(0)["runs"]["w"]})
    for step in range(4 * GAP):
        _, state = tx.update({"w": tree(0)["runs"]["w"]}, state)
        seen = part.view(tree(0), None, jnp.int32(step))
        np.testing.assert_array_equal(seen.index[4], state.choices["w"].index)


def test_a_gradient_through_the_view_is_of_the_trained_rows():
    part, params, target = active_layers(LABELS | {"head": "frozen"}, 2, GAP), tree(0), tree(1)

    def loss(full):
        return sum(jnp.vdot(a, b) ** 2 for a, b in zip(jax.tree.leaves(full), jax.tree.leaves(target), strict=True))

    trained = part.take(params, 4)
    assert_equal(merged(part.view(params, trained, 4)), params, 0)
    got = jax.grad(lambda trained: loss(merged(part.view(params, trained, 4))))(trained)
    assert_equal(got, part.take(jax.grad(loss)(params), 4), 1e-4)
    frozen = jax.grad(lambda params: loss(merged(part.view(params, trained, 4))))(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen))


def test_the_whole_is_the_parameters():
    params, other = tree(0), tree(1)
    assert whole.take(params, 0) is params
    assert whole.view(params, other, 0) is other
    assert whole.put(params, other, 0) is other


@pytest.mark.parametrize("active", [1, 3])
def test_bytes_of_state_are_those_of_the_active_layers_and_of_what_always_trains(active):
    part, tx = active_layers(LABELS, active, GAP), adam_of_part(0.1, LABELS, update_gap=GAP)
    state = tx.init(part.take(tree(0), 0))
    of_layers = {4: 4 * (6 + 3 * 5), 3: 3 * 2}  # numbers in the leaves of L layers
    moments = 2 * (sum(active * size // total for total, size in of_layers.items()) + 7 * 3 + 6)
    counts = 3  # of two Adams and of the window
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == 4 * (moments + counts)


def test_values_are_written_in_place_where_parameters_are_donated():
    labels, params = {"w": "layers"}, {"w": jnp.ones((8, 64, 64))}
    part = active_layers(labels, 2, GAP)

    def step(params, at):
        return part.put(params, jax.tree.map(lambda leaf: 2 * leaf, part.take(params, at)), at)

    memory = jax.jit(step, donate_argnums=0).lower(params, jnp.int32(0)).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= params["w"].nbytes
    assert memory.temp_size_in_bytes < params["w"].nbytes / 2


def test_restarted_forgets_at_each_gap():
    tx, grads = restarted(optax.trace(1.0), 2), {"w": jnp.ones(3)}
    state, sums = tx.init(grads), []
    for _ in range(5):
        updates, state = tx.update(grads, state)
        sums.append(float(updates["w"][0]))
    assert sums == [1, 2, 1, 2, 1]


def test_bad_input():
    with pytest.raises(ValueError, match="active = 0"):
        active_layers(LABELS, 0, GAP)
    with pytest.raises(ValueError, match="update_gap = 0"):
        active_layers(LABELS, 1, 0)
    with pytest.raises(ValueError, match="update_gap = 0"):
        adam_of_part(0.1, LABELS, update_gap=0)
    with pytest.raises(ValueError, match="order = 'other'"):
        active_layers(LABELS, 1, GAP, order="other")
    with pytest.raises(ValueError, match=r"\['top'\]: active = 4: expected 1 to 3 layers"):
        active_layers(LABELS, 4, GAP).take(tree(0), 0)
    with pytest.raises(ValueError, match=r"\['head'\]: label = 'lora': expected layers, adam or frozen"):
        active_layers(LABELS | {"head": "lora"}, 1, GAP).take(tree(0), 0)
