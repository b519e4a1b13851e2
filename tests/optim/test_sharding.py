"""State of subspaces on a mesh: where it lies, and that the mesh changes nothing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optim.apollo import apollo
from optim.fira import fira
from optim.frugal import FrugalState, frugal, scale_by_frugal
from optim.galore import galore
from optim.layerwise import lisa
from optim.sharding import bytes_per_device, opt_state_shardings
from optim.subspaces import MatrixAxes, block, columns, layers, randk, random, rows, svd
from parallel.mesh import make_mesh

SHAPES = {"wq": (2, 16, 4, 8), "experts": {"down": (2, 4, 8, 16)}, "embedding": (16, 8), "scale": (8,)}
SPECS = {
    "wq": P(None, "fsdp", None, None),
    "experts": {"down": P(None, "expert", None, "fsdp")},
    "embedding": P("fsdp", None),
    "scale": P(),
}
AXES = {"['wq']": MatrixAxes(1, 1), "['experts']['down']": MatrixAxes(2, 1)}


def axes(name, leaf):
    return AXES[name]


def labels(name):
    return {"wq": name, "experts": {"down": name}, "embedding": "adam", "scale": "adam"}


OPTIONS = {"axes": axes, "update_gap": 2}
FRUGAL, ADAM = labels("frugal"), labels("adam")
OPTIMIZERS = {
    "columns": frugal(0.01, columns(0.25), labels=ADAM | {"wq": "frugal"}, **OPTIONS),
    "columns_sharded": frugal(0.01, columns(0.5, shards=2), labels=FRUGAL, **OPTIONS),
    "columns_finer": frugal(0.01, columns(0.5, shards=4), labels=FRUGAL, at_refresh="move", **OPTIONS),
    "rows": frugal(0.01, rows(0.25), labels=ADAM | {"experts": {"down": "frugal"}}, **OPTIONS),
    "rows_sharded": frugal(0.01, rows(0.5, shards=2), labels=FRUGAL, **OPTIONS),
    "randk": frugal(0.01, randk(0.25), labels=FRUGAL, **OPTIONS),
    "svd": frugal(0.01, svd(0.25), labels=FRUGAL, **OPTIONS),
    "block": frugal(0.01, block(0.5), labels=FRUGAL, **OPTIONS),
    "galore": galore(0.01, 2, labels=labels("galore"), **OPTIONS),
    "fira": fira(0.01, 2, labels=labels("fira"), **OPTIONS),
    "lisa": lisa(0.01, labels("layers"), active=1, update_gap=2),
    "apollo": apollo(0.01, 2, labels=labels("apollo"), **OPTIONS),
}


def tree(seed):
    rng = np.random.default_rng(seed)
    leaf = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return jax.tree.map(leaf, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def placed(mesh):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS, is_leaf=lambda x: isinstance(x, P))


def trained(tx, mesh=None, steps=5):
    params = tree(0)
    if mesh is None:
        step, state = jax.jit(tx.update), tx.init(params)
    else:
        shardings = placed(mesh)
        params, on = jax.device_put(params, shardings), opt_state_shardings(tx, params, shardings)
        state = jax.jit(tx.init, out_shardings=on)(params)
        step = jax.jit(tx.update, out_shardings=(shardings, on))
    for i in range(steps):
        updates, state = step(tree(i + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.slow_after(3)
def test_a_mesh_changes_nothing(name):
    want, _ = trained(OPTIMIZERS[name])
    got, _ = trained(OPTIMIZERS[name], make_mesh(data=2, fsdp=2, expert=2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def inner_specs(tx, mesh):
    found = opt_state_shardings(tx, tree(0), placed(mesh))
    ours = lambda x: isinstance(x, FrugalState)  # noqa: E731
    (state,) = filter(ours, jax.tree.leaves(found, is_leaf=ours))
    return jax.tree.map(lambda sharding: sharding.spec, state)


HELD_AS_ADAM = optax.MaskedNode()


@pytest.mark.parametrize(
    ("name", "wq", "down"),
    [
        ("columns", P(None, "fsdp", None), HELD_AS_ADAM),
        ("columns_sharded", P(None, "fsdp", None, None), P("expert", None, "fsdp", None)),
        ("columns_finer", P(None, "fsdp", None, None), P("expert", None, "fsdp", None)),
        ("rows", HELD_AS_ADAM, P("expert", None, "fsdp")),
        ("rows_sharded", P(None, "fsdp", None, None), P("expert", None, None, "fsdp")),
        ("block", P(None, "fsdp", None), P(None, "expert", "fsdp")),
        ("svd", P(None, None, "fsdp"), P("expert", None, "fsdp")),
        ("randk", P(None, "fsdp"), P("expert", "fsdp")),
    ],
)
def test_moments_are_split_along_the_axes_that_are_whole_and_along_parts(name, wq, down):
    """Matrices of experts lie where the experts do; a block of some of them is on every device."""
    specs = inner_specs(OPTIMIZERS[name], make_mesh(data=2, fsdp=2, expert=2))
    assert specs.inner.mu["wq"] == wq
    assert specs.inner.nu["experts"]["down"] == down
    assert specs.count == P()


def test_indices_are_split_as_the_parts_they_are_of():
    mesh = make_mesh(data=2, fsdp=2, expert=2)
    specs = inner_specs(OPTIMIZERS["columns_sharded"], mesh).choices
    assert specs["experts"]["down"].index == P("expert", "fsdp", None)
    assert specs["wq"].index == P(None, None, None)
    specs = inner_specs(OPTIMIZERS["rows_sharded"], mesh).choices
    assert specs["wq"].index == P(None, "fsdp", None)


def test_bytes_on_a_device_are_the_closed_form():
    """Two moments and the indices of half of all columns, whose parts lie on two devices each."""
    mesh, tx = make_mesh(fsdp=2), scale_by_frugal(columns(0.5, shards=2), axes=lambda *_: MatrixAxes(1, 1))
    params, on = {"w": jnp.ones((2, 8, 16))}, {"w": NamedSharding(mesh, P(None, None, "fsdp"))}
    placed = opt_state_shardings(tx, params, on)
    moments, indices, counts = 2 * 2 * 8 * 8 // 2, 2 * 8 // 2, 2
    assert bytes_per_device(jax.eval_shape(tx.init, params), placed) == 4 * (moments + indices + counts)
    held = jax.jit(tx.init, out_shardings=placed)(jax.device_put(params, on))
    assert sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(held)) == 4 * (moments + indices + counts)


def everywhere(tx, params, shardings):
    return jax.tree.map(lambda _: NamedSharding(make_mesh(fsdp=8), P()), jax.eval_shape(tx.init, params))


def collectives(subspace, shape, spec, split, state_shardings):
    """What eight devices exchange in a step, by the names HLO has for it."""
    tx = scale_by_frugal(subspace, axes=lambda *_: MatrixAxes(*split))
    params, on = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, {"w": NamedSharding(make_mesh(fsdp=8), spec)}
    state, state_on = jax.eval_shape(tx.init, params), state_shardings(tx, params, on)
    give = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    step = jax.jit(tx.update, out_shardings=(on, state_on))
    lowered = step.lower(jax.tree.map(give, params, on), jax.tree.map(give, state, state_on))
    return re.findall(r" ([\w-]*(?:all-|collective-|reduce-scatter)[\w-]*)\(", lowered.compile().as_text())


@pytest.mark.parametrize(
    ("make", "shape", "spec", "split"),
    [
        (columns, (2, 16, 64), P(None, None, "fsdp"), (1, 1)),
        (columns, (2, 16, 8, 8), P(None, None, "fsdp", None), (1, 1)),
        (columns, (2, 4, 16, 64), P(None, None, None, "fsdp"), (2, 1)),
        (columns, (3, 8, 4, 64), P(None, "fsdp", None, None), (2, 1)),
        (rows, (2, 64, 16), P(None, "fsdp", None), (1, 1)),
        (rows, (2, 8, 8, 16), P(None, "fsdp", None, None), (1, 2)),
    ],
)
@pytest.mark.slow_after(2)
def test_parts_of_a_split_axis_need_no_exchange(make, shape, spec, split):
    """Neither of gradients nor of anything else, a new choice included; without parts every device sums its own."""
    assert collectives(make(0.25, shards=8), shape, spec, split, opt_state_shardings) == []
    assert collectives(make(0.25), shape, spec, split, everywhere) != []


def sharded(spec, shape, subspace, split):
    """Shardings of FRUGAL's state for a leaf "w" beside one that Adam has; `data` has one device."""
    tx = frugal(0.1, subspace, labels={"w": "frugal", "v": "adam"}, axes=lambda *_: MatrixAxes(*split))
    params = {"w": jnp.zeros(shape), "v": jnp.zeros((8,))}
    found = NamedSharding(make_mesh(fsdp=2, expert=2), spec)
    return opt_state_shardings(tx, params, {"w": found, "v": NamedSharding(found.mesh, P())})


PARTS_OF_TWO = r"expected shards a multiple of 2, as {0}\(density, shards=2\), or a subspace along another axis"
PARTS_OF_FOUR = r"expected shards a multiple of 4, as columns\(density, shards=4\), or a subspace along another axis"
TWO = r"\['w'\]: devices along {0} = {{'fsdp': 2}}: " + PARTS_OF_TWO
FOUR = r"\['w'\]: devices along columns = {'fsdp': 2, 'expert': 2}: " + PARTS_OF_FOUR


@pytest.mark.parametrize(
    ("subspace", "shape", "spec", "split", "message"),
    [
        (columns(0.5), (2, 8, 8), P(None, None, "fsdp"), (1, 1), TWO.format("columns")),
        (columns(1.0), (2, 8, 8), P(None, None, "fsdp"), (1, 1), TWO.format("columns")),
        (columns(0.5, shards=3), (2, 8, 12), P(None, None, "fsdp"), (1, 1), TWO.format("columns")),
        (columns(0.5, shards=2), (2, 8, 8), P(None, None, ("fsdp", "expert")), (1, 1), FOUR),
        (columns(0.5), (2, 8, 4, 8), P(None, None, "fsdp", None), (1, 1), TWO.format("columns")),
        (rows(0.5), (8, 8), P("fsdp", None), (0, 1), TWO.format("rows")),
        (rows(0.5), (1, 8, 8), P(None, "fsdp"), (1, 1), TWO.format("rows")),
        (rows(0.5), (2, 4, 2, 8), P(None, "fsdp", None, None), (1, 2), TWO.format("rows")),
        (columns(0.5, shards=2), (2, 8, 4, 8), P(None, None, None, "fsdp"), (1, 1), "expected a subspace along anoth"),
        (columns(0.5, shards=4), (2, 8, 4, 8), P(None, None, "fsdp", "expert"), (1, 1), "expected a subspace along"),
    ],
)
def test_a_split_axis_without_its_parts_is_refused(subspace, shape, spec, split, message):
    with pytest.raises(ValueError, match=message):
        sharded(spec, shape, subspace, split)


@pytest.mark.parametrize(
    ("subspace", "shape", "spec", "split"),
    [
        (columns(0.5), (2, 8, 8), P(None, "fsdp", None), (1, 1)),
        (columns(0.5), (2, 8, 8), P("fsdp", None, None), (1, 1)),
        (columns(0.5), (2, 8, 8), P(None, None, "data"), (1, 1)),
        (columns(0.5, shards=2), (2, 8, 4, 8), P(None, None, "fsdp", "data"), (1, 1)),
        (columns(0.5, shards=4), (2, 8, 8), P(None, None, ("fsdp", "expert")), (1, 1)),
        (rows(0.5, shards=2), (8, 8), P("fsdp"), (0, 1)),
        *((subspace, (2, 8, 8), P(None, "fsdp", "expert"), (1, 1)) for subspace in
          (svd(0.25), random(0.25), randk(0.25), block(0.5), layers(1))),
    ],
)  # fmt: skip
def test_nothing_else_is_refused(subspace, shape, spec, split):
    sharded(spec, shape, subspace, split)


def test_adams_part_is_split_as_its_parameters():
    mesh, tx = make_mesh(fsdp=8), OPTIMIZERS["svd"]
    state = jax.eval_shape(tx.init, tree(0))
    on = opt_state_shardings(tx, tree(0), placed(mesh))
    (adam,) = [s for s in jax.tree.leaves(on, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
               if isinstance(s, optax.ScaleByAdamState) and isinstance(s.mu["embedding"], NamedSharding)]  # fmt: skip
    assert adam.mu["embedding"].spec == P("fsdp", None)
    assert adam.mu["scale"].spec == P()
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert bytes_per_device(state, on) <= whole - 2 * 4 * 16 * 8 * 7 / 8  # the embedding's two moments, eight ways
