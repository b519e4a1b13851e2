"""State of subspaces on a mesh: where it lies, and that the mesh changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optim.apollo import apollo
from optim.fira import fira
from optim.frugal import FrugalState, frugal
from optim.galore import galore
from optim.layerwise import lisa
from optim.sharding import bytes_per_device, opt_state_shardings
from optim.subspaces import MatrixAxes, block, columns, randk, rows, svd
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


OPTIMIZERS = {
    "columns": frugal(0.01, columns(0.25), labels=labels("frugal"), axes=axes, update_gap=2),
    "columns_sharded": frugal(0.01, columns(0.5, shards=2), labels=labels("frugal"), axes=axes, update_gap=2),
    "rows": frugal(0.01, rows(0.25), labels=labels("frugal"), axes=axes, update_gap=2),
    "randk": frugal(0.01, randk(0.25), labels=labels("frugal"), axes=axes, update_gap=2),
    "svd": frugal(0.01, svd(0.25), labels=labels("frugal"), axes=axes, update_gap=2),
    "block": frugal(0.01, block(0.5), labels=labels("frugal"), axes=axes, update_gap=2),
    "galore": galore(0.01, 2, labels=labels("galore"), axes=axes, update_gap=2),
    "fira": fira(0.01, 2, labels=labels("fira"), axes=axes, update_gap=2),
    "lisa": lisa(0.01, labels("layers"), active=1, update_gap=2),
    "apollo": apollo(0.01, 2, labels=labels("apollo"), axes=axes, update_gap=2),
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
def test_a_mesh_changes_nothing(name):
    want, _ = trained(OPTIMIZERS[name])
    got, _ = trained(OPTIMIZERS[name], make_mesh(data=2, fsdp=2, expert=2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def inner_specs(tx, mesh):
    found = opt_state_shardings(tx, tree(0), placed(mesh))
    ours = lambda x: isinstance(x, FrugalState)  # noqa: E731
    (state,) = filter(ours, jax.tree.leaves(found, is_leaf=ours))
    return jax.tree.map(lambda sharding: sharding.spec, state)


@pytest.mark.parametrize(
    ("name", "wq", "down"),
    [
        ("columns", P(None, "fsdp", None), P(None, None, None)),
        ("rows", P(None, None, None), P(None, None, "fsdp")),
        ("block", P(None, "fsdp", None), P(None, None, "fsdp")),
        ("randk", P(), P()),
    ],
)
def test_moments_are_split_along_the_axes_that_are_whole(name, wq, down):
    """Of [L * E] matrices the experts' axis is no longer one, so that split is not taken over."""
    specs = inner_specs(OPTIMIZERS[name], make_mesh(data=2, fsdp=2, expert=2))
    assert specs.inner.mu["wq"] == wq
    assert specs.inner.nu["experts"]["down"] == down
    assert specs.count == P()


def test_adams_part_is_split_as_its_parameters():
    mesh, tx = make_mesh(fsdp=8), OPTIMIZERS["columns"]
    state = jax.eval_shape(tx.init, tree(0))
    on = opt_state_shardings(tx, tree(0), placed(mesh))
    (adam,) = [s for s in jax.tree.leaves(on, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
               if isinstance(s, optax.ScaleByAdamState) and isinstance(s.mu["embedding"], NamedSharding)]  # fmt: skip
    assert adam.mu["embedding"].spec == P("fsdp", None)
    assert adam.mu["scale"].spec == P()
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert bytes_per_device(state, on) <= whole - 2 * 4 * 16 * 8 * 7 / 8  # the embedding's two moments, eight ways
