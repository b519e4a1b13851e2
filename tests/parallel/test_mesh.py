"""Mesh construction and sharding rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from parallel.mesh import AXES, expert_axis_size, make_mesh, on_shards
from parallel.sharding import spec_for, tree_shardings

MESH = make_mesh(2, 2, 2)


@pytest.mark.parametrize(
    ("name", "shape", "spec"),
    [
        ("runs_0/moe/experts/gate_up", (3, 8, 16, 32), P(None, "expert", "fsdp", None)),
        ("runs_0/moe/experts/down", (3, 8, 16, 16), P(None, "expert", None, "fsdp")),
        ("runs_0/moe/router", (3, 16, 8), P(None, None, None)),
        ("runs_0/attention/wq", (3, 16, 4, 8), P(None, ("fsdp", "expert"), None, None)),
        ("runs_0/attention/wo", (3, 4, 8, 16), P(None, None, None, ("fsdp", "expert"))),
        ("embedding", (256, 16), P(("fsdp", "expert"), None)),
        ("head", (255, 16), P(None, None)),  # 255 rows do not divide: left whole
        ("runs_0/ffn_norm/scale", (3, 16), P(None, None)),
        ("0/mu/runs_0/moe/experts/down", (3, 8, 16, 16), P(None, "expert", None, "fsdp")),
    ],
)
def test_rules(name, shape, spec):
    assert spec_for(name, shape, MESH) == spec


def test_tree_shardings_follow_the_rules_and_split_what_they_say():
    tree = {"moe": {"experts": {"gate_up": jnp.zeros((8, 4, 6))}}, "scale": jnp.zeros((4,))}
    shardings = tree_shardings(tree, MESH)
    assert shardings["moe"]["experts"]["gate_up"].shard_shape((8, 4, 6)) == (4, 2, 6)
    assert shardings["scale"].shard_shape((4,)) == (4,)


def test_on_shards_sees_local_arrays_and_is_the_function_itself_without_a_mesh():
    fn = lambda x: x.sum(keepdims=True)  # noqa: E731
    x = jnp.arange(16.0)
    assert on_shards(fn, P(AXES), P(AXES)) is fn
    assert expert_axis_size() == 1
    with jax.set_mesh(MESH):
        assert expert_axis_size() == 2
        np.testing.assert_array_equal(on_shards(fn, P(AXES), P(AXES))(x), x.reshape(8, 2).sum(axis=1))


@pytest.mark.parametrize(("shape", "words"), [((0, 1, 1), "mesh.data = 0"), ((4, 2, 2), "needs 16")])
def test_bad_meshes_are_named(shape, words):
    with pytest.raises(ValueError, match=words):
        make_mesh(*shape)
