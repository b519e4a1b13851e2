"""Every subspace: a projection, of the stated size, drawn as stated; one line here is a new member."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optim.subspaces import (
    MatrixAxes,
    block,
    columns,
    from_matrices,
    layers,
    matrices,
    mirrored,
    randk,
    random,
    rows,
    svd,
)

SHAPES = [(3, 8, 12), (3, 12, 8)]
SUBSPACES = {
    "columns": (columns(0.3), lambda n, a, b: (n, a, int(0.3 * b))),
    "columns_sharded": (columns(0.5, shards=2), lambda n, a, b: (n, a, 2, b // 4)),
    "rows": (rows(0.4), lambda n, a, b: (n, int(0.4 * a), b)),
    "rows_sharded": (rows(0.5, shards=2), lambda n, a, b: (n, 2, a // 4, b)),
    "randk": (randk(0.25), lambda n, a, b: (n, a * b // 4)),
    "svd": (svd(0.25), lambda n, a, b: (n, a, 2) if a >= b else (n, 2, b)),
    "random": (random(0.25), lambda n, a, b: (n, a, 2) if a >= b else (n, 2, b)),
    "block": (block(0.67), lambda n, a, b: (2, a, b)),
    "block_mirror": (block(0.67, "mirror"), lambda n, a, b: (2, a, b)),
    "block_ascending": (block(0.34, "ascending"), lambda n, a, b: (1, a, b)),
    "layers": (layers(2), lambda n, a, b: (2, a, b)),
}


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def chosen(name, shape, seed=0):
    subspace, _ = SUBSPACES[name]
    return subspace, jax.jit(subspace.refresh)(subspace.init(shape), draw(shape), jax.random.key(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SUBSPACES)
@pytest.mark.slow_after(6)
def test_up_of_down_is_an_orthogonal_projection_of_the_stated_size(name, shape):
    subspace, choice = chosen(name, shape)
    x, y = draw(shape, 1), draw(shape, 2)
    project = jax.jit(lambda x: subspace.up(choice, subspace.down(choice, x), shape))
    low = subspace.down(choice, x)
    assert low.shape == SUBSPACES[name][1](*shape)
    np.testing.assert_allclose(project(project(x)), project(x), atol=2e-6)
    np.testing.assert_allclose(jnp.vdot(project(x), y), jnp.vdot(x, project(y)), rtol=2e-5)
    np.testing.assert_allclose(jnp.vdot(project(x), x - project(x)), 0, atol=2e-4)
    np.testing.assert_allclose(subspace.down(choice, subspace.up(choice, low, shape)), low, atol=2e-6)
    assert 0 < jnp.linalg.norm(project(x)) < jnp.linalg.norm(x)
    if subspace.coordinates:
        kept = project(x) != 0
        np.testing.assert_array_equal(project(x), jnp.where(kept, x, 0))
        assert kept.sum() == low.size


@pytest.mark.parametrize("name", SUBSPACES)
def test_a_choice_keeps_its_shapes_and_is_a_function_of_its_key(name):
    shape = SHAPES[0]
    subspace, first = chosen(name, shape)
    _, again = chosen(name, shape)
    _, other = chosen(name, shape, seed=5)
    start = subspace.init(shape)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(start), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
    jax.tree.map(np.testing.assert_array_equal, first, again)
    drawn = name not in ("svd", "block_mirror", "block_ascending", "layers")
    same = all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other)))
    assert drawn != same


def test_matrices_of_a_leaf_draw_for_themselves():
    _, choice = chosen("columns", (40, 6, 20))
    assert len({tuple(row) for row in choice.index.tolist()}) > 30
    assert all(len(set(row)) == 6 for row in choice.index.tolist())
    counts = np.bincount(choice.index.ravel(), minlength=20)
    assert counts.min() > 2  # of 12 expected each


@pytest.mark.parametrize("make", [columns, rows])
def test_stratified_draws_take_as_many_from_each_part(make):
    """Against NumPy's own indexing of the whole axis; down and up move numbers and change none."""
    subspace, full = make(0.5, shards=4), draw((40, 16, 16), 2)
    choice = subspace.refresh(subspace.init(full.shape), full, jax.random.key(1))
    assert choice.index.shape == (40, 4, 2)
    assert choice.index.nbytes == 40 * 4 * 8
    assert all(0 <= low < high < 4 for low, high in choice.index.reshape(-1, 2).tolist())
    assert len({tuple(drawn) for drawn in choice.index.reshape(-1, 2).tolist()}) == 6  # all pairs of four
    places = (np.asarray(choice.index) + 4 * np.arange(4)[:, None]).reshape(40, 8)
    low, again = subspace.down(choice, full), np.zeros(full.shape, np.float32)
    for i, at in enumerate(places):
        taken = low[i].reshape(16, 8) if make is columns else low[i].reshape(8, 16)
        part = (i, slice(None), at) if make is columns else (i, at)
        np.testing.assert_array_equal(taken, np.asarray(full[i])[part[1:]])
        again[part] = np.asarray(full)[part]
    np.testing.assert_array_equal(subspace.up(choice, low, full.shape), again)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_vectors_keep_the_most(shape):
    """Eckart-Young: what is left has the norm of the other singular values, on the shorter side's rank."""
    subspace, choice = chosen("svd", shape)
    grad = draw(shape)
    rest = grad - subspace.up(choice, subspace.down(choice, grad), shape)
    values = np.linalg.svd(np.asarray(grad, np.float64), compute_uv=False)
    np.testing.assert_allclose(jnp.linalg.norm(rest, axis=(1, 2)), np.sqrt((values[:, 2:] ** 2).sum(-1)), rtol=1e-4)


@pytest.mark.parametrize(
    ("order", "seen"),
    [
        ("ascending", [[0, 1], [2, 3], [0, 4], [1, 2]]),
        ("descending", [[3, 4], [1, 2], [0, 4], [2, 3]]),
        ("mirror", [[0, 4], [1, 3], [0, 2], [1, 4]]),
    ],
)
def test_blocks_take_their_turns(order, seen):
    subspace, shape = block(0.4, order), (5, 2, 3)
    choice, found = subspace.init(shape), []
    for _ in range(4):
        choice = subspace.refresh(choice, jnp.zeros(shape), jax.random.key(0))
        found.append(choice.index.tolist())
    assert found == seen
    assert mirrored(5).tolist() == [0, 4, 1, 3, 2]


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled", "random"])
def test_layers_are_the_same_in_every_leaf_and_take_their_turns(order):
    subspace = layers(2, order, seed=3)
    found = []
    for shape, seed in (((6, 2, 3), 0), ((6, 5, 1), 9)):
        choice, turns = subspace.init(shape), []
        for i in range(12):
            choice = subspace.refresh(choice, draw(shape, seed), jax.random.key(seed + i))
            turns.append(choice.index.tolist())
        found.append(turns)
    assert found[0] == found[1]
    rounds = [sorted(i for turn in found[0][j : j + 3] for i in turn) for j in (0, 3, 6, 9)]
    assert all(len(set(turn)) == 2 for turn in found[0])
    assert (rounds == [list(range(6))] * 4) == (order != "random")
    assert (found[0][:3] == found[0][3:6]) == (order in ("ascending", "descending"))


@pytest.mark.parametrize("make", [svd, random])
def test_no_batch_is_decomposed_at_once_on_cpu(make):
    """Two batches at a time, on as many threads, never end: the call must be of one matrix."""
    subspace, shape = make(0.25), (3, 16, 8)
    refresh = jax.jit(lambda grad: subspace.refresh(subspace.init(shape), grad, jax.random.key(0)))
    text = refresh.lower(jax.ShapeDtypeStruct(shape, jnp.float32)).as_text()
    calls = [line for line in text.splitlines() if "@lapack_" in line]
    assert calls
    assert all(re.search(r"\(tensor<\d+x\d+xf32>", line) for line in calls), calls


def test_a_leaf_as_matrices():
    leaf = draw((2, 3, 4, 5))
    np.testing.assert_array_equal(matrices(leaf, MatrixAxes(1, 1)), leaf.reshape(2, 3, 20))
    np.testing.assert_array_equal(matrices(leaf, MatrixAxes(1, 2)), leaf.reshape(2, 12, 5))
    view = matrices(leaf, MatrixAxes(2, 1))
    np.testing.assert_array_equal(view.reshape(3, 2, 4, 5), leaf.swapaxes(0, 1))  # the last stacked axis is slowest
    for axes in (MatrixAxes(1, 1), MatrixAxes(1, 2), MatrixAxes(2, 1)):
        np.testing.assert_array_equal(from_matrices(matrices(leaf, axes), leaf.shape, axes), leaf)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: columns(0.0), "density = 0.0: expected above 0"),
        (lambda: svd(1.5), "density = 1.5"),
        (lambda: svd(rank=0), "rank = 0"),
        (lambda: random(0.5, rank=2), "density = 0.5: expected none beside rank = 2"),
        (lambda: svd(), "density = None"),
        (lambda: svd(rank=9).init((2, 8, 8)), "rank = 9: expected a rank of 1 to 8"),
        (lambda: layers(0), "active = 0"),
        (lambda: layers(1, "mirror"), "order = 'mirror'"),
        (lambda: layers(3).init((2, 4, 4)), "active = 3: expected 1 to 2 layers"),
        (lambda: block(0.5, "upwards"), "order = 'upwards'"),
        (lambda: columns(0.05).init((2, 4, 4)), "at least one of 4 columns"),
        (lambda: columns(0.5, shards=4).init((2, 4, 12)), "shards = 4"),
        (lambda: rows(0.5, shards=0), "shards = 0: expected at least 1"),
        (lambda: replace(randk(0.5), shards=2), "shards = 2: expected .* 1 for randk"),
        (lambda: svd(0.01).init((2, 8, 8)), "a rank of 1 to 8"),
        (lambda: block(0.1).init((2, 4, 4)), "1 to 2 of 2 matrices, not 0"),
        (lambda: block(0.5, "mirror").init((6, 4, 4)), "an even number of active matrices, not 3"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
