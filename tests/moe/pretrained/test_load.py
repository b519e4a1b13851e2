"""Whole models against the logits of Hugging Face's: on one device, on a mesh, with a cache."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moe.generate import cached_forward, empty_caches, unstacked
from moe.pretrained import checkpoint as opening
from moe.pretrained.checkpoint import open_checkpoint
from moe.pretrained.model import convert, load, read_config
from moe.pretrained.safetensors import open_safetensors
from moe.transformer import Transformer
from parallel.mesh import BATCH, make_mesh
from parallel.sharding import tree_shardings

TOLERANCE = 1e-4  # of the logits' spread


def logits(model, tokens, place=jnp.asarray):
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32)[None], tokens.shape)

    @jax.jit
    def forward(params, router_state, tokens, positions):
        segment_ids = jnp.ones_like(tokens)
        out = Transformer(model.config).apply({"params": params}, tokens, segment_ids, positions, router_state, None)
        return jnp.einsum("bsd,vd->bsv", out.hidden, out.head)

    return np.asarray(forward(model.params, model.router_state, place(tokens), place(positions)))


def assert_close(got, wanted):
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= TOLERANCE * wanted.std()


def trees_equal(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_the_golden_checkpoints_are_those_the_logits_were_computed_from(golden, tmp_path):
    for case in golden.CASES:
        golden.write_checkpoint(case, tmp_path / case, shards=2)
        source = open_safetensors(tmp_path / case)
        assert golden.digest_of({name: source.read(name) for name in source.tensors}) == golden.digest(case)


@pytest.mark.slow_after(3)
def test_logits_equal_those_of_the_released_model(golden, checkpoint, golden_case):
    model = load(checkpoint(golden_case, shards=3))
    assert model.family == golden.config(golden_case)["model_type"]
    assert_close(logits(model, golden.tokens(golden_case)), golden.logits(golden_case))


@pytest.mark.slow
def test_prefill_and_decoding_with_a_cache_give_the_logits_of_the_released_model(golden, checkpoint, family_case):
    model, tokens = load(checkpoint(family_case)), golden.tokens(family_case)
    weights = unstacked(model.config, model.params, model.router_state)
    forward = jax.jit(lambda *args: cached_forward(model.config, weights, *args))
    (batch, length), first = tokens.shape, tokens.shape[1] // 2
    caches, begin, hidden = empty_caches(model.config, batch, length), 0, []
    for end in (first, *range(first + 1, length + 1)):
        part = tokens[:, begin:end]
        positions = np.broadcast_to(np.arange(begin, end, dtype=np.int32)[None], part.shape)
        new, caches = forward(part, np.ones_like(part), positions, caches)
        hidden.append(new)
        begin = end
    got = np.concatenate([np.asarray(new @ weights.head) for new in hidden], axis=1)
    assert_close(got, golden.logits(family_case))


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("qwen2_moe_mixed", {"fsdp": 2, "expert": 2, "data": 2}),
        pytest.param("deepseek_v3", {"fsdp": 2, "expert": 4}, marks=pytest.mark.slow),
        pytest.param("gpt_oss", {"fsdp": 8}, marks=pytest.mark.slow),
        pytest.param("llama_tied_gqa", {"fsdp": 4, "data": 2}, marks=pytest.mark.slow),
    ],
)
def test_on_a_mesh_every_device_holds_its_part_and_the_logits_are_the_same(golden, checkpoint, name, axes):
    folder, mesh = checkpoint(name), make_mesh(**axes)
    model, alone = load(folder, mesh=mesh), load(folder)
    split = 0
    for tree, whole in ((model.params, alone.params), (model.router_state, alone.router_state)):
        assert jax.tree.map(lambda leaf: leaf.sharding, tree) == tree_shardings(whole, mesh)
        for leaf, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(whole), strict=True):
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(expected)[shard.index])
            split += leaf.addressable_shards[0].data.size < leaf.size
    assert split > 4
    tokens = np.concatenate([golden.tokens(name)] * (8 // golden.tokens(name).shape[0]))
    with jax.set_mesh(mesh):
        got = logits(model, tokens, lambda array: jax.device_put(array, NamedSharding(mesh, BATCH)))
    assert_close(got[: len(golden.logits(name))], golden.logits(name))


def test_experts_that_are_not_wanted_are_not_read(checkpoint, monkeypatch):
    model = open_checkpoint(checkpoint("mixtral"))
    read, source = [], model.tensors.source
    monkeypatch.setattr(source, "read", lambda name, was=source.read: read.append(name) or was(name))
    pieces = list(model.tensors.pieces("layers.1.moe.experts.down", lambda expert: expert in (1, 4)))
    assert [piece.place for piece in pieces] == [(1,), (4,)]
    assert read == [f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight" for e in (1, 4)]


def test_our_form_loads_as_the_released_one(checkpoint, tmp_path, family_case):
    folder, seen = checkpoint(family_case, shards=2), []
    convert(folder, tmp_path / "ours")
    released = load(folder)
    ours = load(tmp_path / "ours", progress=lambda done, total: seen.append((done, total)))
    assert (released.family, ours.family) == (read_config(folder)[0], "switchyard")
    assert released.config == ours.config == read_config(folder)[1] == read_config(tmp_path / "ours")[1]
    assert trees_equal((released.params, released.router_state), (ours.params, ours.router_state))
    assert seen[-1][0] == seen[-1][1] == sum(leaf.size for leaf in jax.tree.leaves((ours.params, ours.router_state)))
    assert seen == sorted(seen)


def test_bfloat16_rounds_parameters_and_leaves_the_routers_state(checkpoint):
    folder = checkpoint("deepseek_v3")
    half, full = load(folder, dtype="bfloat16"), load(folder)
    assert (half.config.compute_dtype, full.config.compute_dtype) == ("bfloat16", "float32")
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16), full.params)
    assert trees_equal(half.params, rounded)
    assert trees_equal(half.router_state, full.router_state)
    assert full.router_state["bias"].dtype == jnp.float32
    with pytest.raises(ValueError, match=r"dtype = 'float16': expected one of float32, bfloat16"):
        load(folder, dtype="float16")


def test_the_packaged_model_by_its_name(golden, checkpoint, monkeypatch, tmp_path):
    """Its GGUF file's tensors come under Hugging Face's names."""
    monkeypatch.setenv("SWITCHYARD_DATA", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="smollm2 is missing.*data fetch"):
        load("smollm2")
    folder = checkpoint("llama")
    source = open_safetensors(folder)
    source.config, source.notes = golden.config("llama"), ("a note",)
    monkeypatch.setattr(opening, "open_smollm2", lambda: source)
    model = load("smollm2")
    assert (model.family, model.notes) == ("llama", ("a note",))
    assert trees_equal(model.params, load(folder).params)


@pytest.mark.parametrize("name", ["smollm3", "no/such/folder"])
def test_an_unknown_model_is_named(name):
    with pytest.raises(ValueError, match=rf"model = '{name}': expected smollm2, or a folder"):
        load(name)
