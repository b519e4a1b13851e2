"""Every optimiser, one battery: what must hold of any of them, inside and around Optax, on disk and on a mesh.

A new optimiser joins by one line of OPTIMIZERS. Gradients are multiples of 1/32 below 4, so that bfloat16 holds them
exactly and a mean of two is exact; where a parameter's are drawn, all optimisers see the same ones.
"""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optim.adamw import adamw
from optim.apollo import apollo, apollo_mini
from optim.fira import fira
from optim.frugal import frugal
from optim.galore import galore
from optim.layerwise import badam, lisa
from optim.ldadam import ldadam
from optim.sharding import opt_state_shardings
from optim.subspaces import MatrixAxes, block, columns, randk, random, rows, svd
from parallel.checkpoint import Checkpoints
from parallel.mesh import make_mesh

# Embedding [V, d], experts [L, E, d, f], norms [L, d], a last scale [d], a stack [L, a, b], heads [L, d, H, D].
SHAPES = {
    "embedding": (16, 8),
    "experts": {"down": (2, 4, 8, 16)},
    "norm": (2, 8),
    "scale": (8,),
    "w": (2, 16, 8),
    "wq": (2, 8, 8, 2),
}
AXES = {"['experts']['down']": MatrixAxes(2, 1), "['w']": MatrixAxes(1, 1), "['wq']": MatrixAxes(1, 1)}
STACKED = (*AXES, "['norm']")
RATE, B1, B2, GAP = 0.05, 0.8, 0.9, 3
# These programs run in no time: what LLVM makes faster it takes longer to make.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def axes(name, leaf):
    return AXES[name]


def labels(method, names=tuple(AXES)):
    """(params) -> `method` for these leaves, `adam` for all others, of which some may be masked."""
    which = lambda path, _: method if jax.tree_util.keystr(path) in names else "adam"  # noqa: E731
    return lambda params: jax.tree_util.tree_map_with_path(which, params)


def with_inner(inner, learning_rate, *, b1, **options):
    return frugal(learning_rate, b1=b1, inner=inner(b1), **options)


MATRIX = {"axes": axes, "update_gap": GAP}
ours = partial(frugal, labels=labels("frugal"), **MATRIX)
lion = partial(with_inner, optax.scale_by_lion, labels=labels("frugal"), **MATRIX)
momentum = partial(with_inner, optax.trace, labels=labels("frugal"), **MATRIX)

OPTIMIZERS = {  # (learning rate, b1, b2) -> optimiser
    "adamw": partial(adamw, clip_norm=100.0),
    "columns": partial(ours, subspace=columns(0.5)),
    "rows_moved": partial(ours, subspace=rows(0.5), at_refresh="move"),
    "randk": partial(ours, subspace=randk(0.25)),
    "svd": partial(ours, subspace=svd(0.25)),
    "random_kept": partial(ours, subspace=random(rank=2), at_refresh="keep"),
    "block": partial(ours, subspace=block(0.5)),
    "density_0": partial(ours, subspace=None),
    "lion": partial(lion, subspace=block(0.5, "ascending")),
    "momentum": partial(momentum, subspace=svd(rank=2), rule="sgd"),
    "galore": partial(galore, rank=2, scale=1.0, labels=labels("galore"), **MATRIX),
    "fira": partial(fira, rank=2, labels=labels("fira"), **MATRIX),
    "apollo": partial(apollo, rank=2, labels=labels("apollo"), **MATRIX),
    "apollo_mini": partial(apollo_mini, scale=8.0, labels=labels("apollo"), **MATRIX),
    "ldadam": partial(ldadam, rank=2, labels=labels("ldadam"), axes=axes),
    "badam": partial(badam, labels=labels("layers", STACKED), update_gap=GAP),
    "lisa": partial(lisa, active=1, labels=labels("layers", STACKED), update_gap=GAP),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    leaf = lambda shape: np.clip(np.round(32 * scale * rng.standard_normal(shape)), -127, 127) / 32  # noqa: E731
    drawn = jax.tree.map(leaf, SHAPES, is_leaf=lambda node: isinstance(node, tuple))
    return placed(jax.tree.map(np.float32, drawn))


def placed(tree):
    """Committed to a device, as what is read from disk: for JAX what is not is another program's."""
    return jax.device_put(tree, jax.devices()[0])


@functools.cache
def gradients(step):
    return tree(100 + step)


@functools.cache
def built(name):
    return OPTIMIZERS[name](RATE, b1=B1, b2=B2)


def started(name):
    return placed(built(name).init(tree(0)))


@functools.cache
def compiled(name):
    """The update, which takes its state over: one for all tests here."""
    return jit(built(name).update, donate_argnums=1)


def run(update, state, params, steps, place=lambda x: x):
    """(updates of each step, parameters, state) after these steps."""
    seen = []
    for i in steps:
        updates, state = update(place(gradients(i)), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(updates)
    return seen, params, state


@functools.cache
def trajectory(name):
    """Updates of nine steps, three windows."""
    return run(compiled(name), started(name), tree(0), range(9))[0]


def by_name(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_close(got, want, atol):
    got, want = by_name(got), by_name(want)
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=10 * atol, atol=atol, err_msg=name)


@every
@pytest.mark.slow_after(6)
def test_it_converges(name):
    """|p - target|^2 / 2 is halved in 90 steps of about 0.05, in each leaf and however often a layer is frozen."""
    target, params, state = tree(2), jax.tree.map(lambda x, y: x + y, tree(1), tree(2)), started(name)
    apart = lambda params: {k: 0.5 * float(np.sum(x**2)) for k, x in by_name(minus(params, target)).items()}  # noqa: E731
    start = apart(params)
    for _ in range(90):
        updates, state = compiled(name)(minus(params, target), state, params)
        params = optax.apply_updates(params, updates)
    share = {leaf: loss / start[leaf] for leaf, loss in apart(params).items()}
    assert max(share.values()) < 0.5, share


def minus(a, b):
    return jax.tree.map(lambda x, y: x - y, a, b)


@every
def test_an_update_takes_its_state_over_and_is_compiled_once(name):
    state, update = started(name), compiled(name)
    given = jax.tree.leaves(state)
    run(update, state, tree(0), range(2 * GAP + 1))
    assert all(leaf.is_deleted() for leaf in given)
    assert update._cache_size() == 1


@pytest.mark.slow
@every
def test_a_compiled_update_is_the_plain_one(name):
    """To rounding. A plain update compiles the branches of its refresh at every step."""
    plain, _, _ = run(built(name).update, started(name), tree(0), range(GAP + 2))
    for got, want in zip(trajectory(name), plain):
        assert_close(got, want, 1e-6)


@every
@pytest.mark.slow_after(5)
def test_low_precision_of_parameters_is_not_that_of_the_state(name):
    """Two moments and a choice are float32 and int32, so that matrices are updated as those of float32 parameters;
    Optax's Adam, for the rest, keeps moments in the parameters' type."""
    low = lambda x: x.astype(jnp.bfloat16)  # noqa: E731
    tx, params = built(name), jax.tree.map(low, tree(0))
    state, update = placed(tx.init(params)), jit(tx.update)
    for i in range(GAP + 1):
        updates, state = update(jax.tree.map(low, gradients(i)), state, params)
        params = optax.apply_updates(params, updates)
        if name != "adamw":
            got, want = by_name(updates), by_name(trajectory(name)[i])
            for leaf in AXES:
                np.testing.assert_allclose(got[leaf], want[leaf], rtol=0, atol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    for leaf, value in by_name(state).items():
        of_adam = name == "adamw" or not any(matrix in leaf for matrix in AXES)
        allowed = ("float32", "int32", "bfloat16") if of_adam else ("float32", "int32")
        assert str(value.dtype) in allowed, leaf


@every
@pytest.mark.slow_after(5)
def test_rate_and_momentum_may_be_part_of_the_state(name):
    make = lambda learning_rate, b1: OPTIMIZERS[name](learning_rate, b1=b1, b2=B2)  # noqa: E731
    tx = optax.inject_hyperparams(make)(learning_rate=2 * RATE, b1=0.9)
    state, params, update = placed(tx.init(tree(0))), tree(0), jit(tx.update)
    state.hyperparams.update(placed({"learning_rate": jnp.float32(RATE), "b1": jnp.float32(B1)}))
    seen, params, state = run(update, state, params, range(GAP + 2))
    for got, want in zip(seen, trajectory(name)):
        assert_close(got, want, 2e-6)
    before, _ = update(gradients(9), state, params)
    state.hyperparams.update(placed({"learning_rate": jnp.float32(2 * RATE)}))
    after, _ = update(gradients(9), state, params)
    assert_close(after, jax.tree.map(lambda x: 2 * x, before), 0)
    assert update._cache_size() == 1


OTHERS = ("['scale']", "['wq']")  # the last of those that Adam and the method have


@every
@pytest.mark.slow_after(5)
def test_masks_and_accumulation_around_it_change_nothing(name):
    """Beside SGD on other leaves, and by halves of gradients: what is its own is as it was."""
    others = lambda params: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: jax.tree_util.keystr(path) in OTHERS, params
    )
    mine = lambda params: jax.tree.map(lambda other: not other, others(params))  # noqa: E731
    parts = optax.chain(optax.masked(built(name), mine), optax.masked(optax.sgd(0.5), others))
    tx = optax.MultiSteps(parts, every_k_schedule=2)
    params, state, update = tree(0), placed(tx.init(tree(0))), jit(tx.update)
    for i in range(GAP + 1):
        apart = tree(200 + i, 0.25)
        updates, state = update(minus(gradients(i), apart), state, params)
        assert not any(value.any() for value in by_name(updates).values())
        updates, state = update(jax.tree.map(jnp.add, gradients(i), apart), state, params)
        params = optax.apply_updates(params, updates)
        by_sgd = by_name(jax.tree.map(lambda x: -0.5 * x, gradients(i)))
        want = {leaf: by_sgd[leaf] if leaf in OTHERS else x for leaf, x in by_name(trajectory(name)[i]).items()}
        for leaf, value in by_name(updates).items():
            np.testing.assert_allclose(value, want[leaf], rtol=0, atol=1e-6, err_msg=leaf)


# Split along the axes that no columns are chosen of, and for rows along those that no rows are.
BY_INPUTS = {
    "embedding": P("fsdp", None),
    "experts": {"down": P(None, "expert", "fsdp", None)},
    "norm": P(),
    "scale": P(),
    "w": P(None, "fsdp", None),
    "wq": P(None, "fsdp", None, None),
}
BY_OUTPUTS = BY_INPUTS | {
    "experts": {"down": P(None, "expert", None, "fsdp")},
    "w": P(None, None, "fsdp"),
    "wq": P(None, None, "fsdp", None),
}


@every
@pytest.mark.parametrize(
    "sizes", [pytest.param({"fsdp": 8}, marks=pytest.mark.slow), {"data": 2, "fsdp": 2, "expert": 2}], ids=str
)
@pytest.mark.slow_after(5)
def test_a_mesh_changes_nothing(name, sizes):
    """Seven steps, two refreshes after the first."""
    specs, mesh, tx = BY_OUTPUTS if name == "rows_moved" else BY_INPUTS, make_mesh(**sizes), built(name)
    on = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))
    params = jax.device_put(tree(0), on)
    state_on = opt_state_shardings(tx, params, on)
    update = jit(tx.update, out_shardings=(on, state_on), donate_argnums=1)
    state = jax.device_put(tx.init(tree(0)), state_on)
    seen, _, _ = run(update, state, params, range(7), lambda grads: jax.device_put(grads, on))
    for got, want in zip(seen, trajectory(name)):
        assert_close(got, want, 1e-5)
    assert update._cache_size() == 1


@every
def test_a_run_that_stops_in_a_window_goes_on_bit_by_bit(name, tmp_path):
    tx, params = built(name), tree(0)
    _, params, state = run(compiled(name), started(name), params, range(4))
    like = jax.eval_shape(lambda: {"params": tree(0), "opt_state": tx.init(tree(0))})
    with Checkpoints(tmp_path / "checkpoints") as saved:
        saved.save(4, {"params": params, "opt_state": state})
        read = saved.restore(like)
    seen, _, _ = run(compiled(name), read["opt_state"], read["params"], range(4, 9))
    for got, want in zip(seen, trajectory(name)[4:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, want)


@every
@pytest.mark.slow_after(6)
def test_not_a_number_comes_through_and_stays_in_its_leaf(name):
    """At a refresh and after it, in any entry that the optimiser moves. Clipping by the norm of all has NaN spread."""
    params = tree(0)
    for step in range(2):
        finite = by_name(trajectory(name)[step])
        for leaf, moved in finite.items():
            if not moved.any():
                continue  # frozen
            place = tuple(axis[0] for axis in np.nonzero(moved))
            _, _, state = run(compiled(name), started(name), params, range(step))
            broken = lambda path, x: x.at[place].set(jnp.nan) if jax.tree_util.keystr(path) == leaf else x  # noqa: B023, E731
            updates, _ = compiled(name)(jax.tree_util.tree_map_with_path(broken, gradients(step)), state, params)
            updates = by_name(updates)
            assert np.isnan(updates.pop(leaf)[place]), (leaf, place)
            if name != "adamw":
                for other, value in updates.items():
                    np.testing.assert_allclose(value, finite[other], rtol=0, atol=1e-6, err_msg=other)
