"""Upcycling: the dense model's logits at step 0, what each method puts where, what is refused."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import ModelConfig, MoEConfig
from moe.pretrained.model import load, save
from moe.transformer import Transformer, init_params
from moe.upcycle import check, copies, make_method, redrawn, shard_mass, upcycle, upcycled_config

V, S, F = 31, 12, 24
DENSE = ModelConfig(
    vocab_size=V, hidden=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=F, moe=None, init_std=0.3,
    context=64,
)  # fmt: skip
BIASED = replace(DENSE, ffn_bias=True)
V3 = "group_limited(score='sigmoid', renormalize=True, scaling=2.5, groups=4, kept_groups=2, group_score='top2')"


@functools.cache
def dense_params(config):
    """Drawn, biases and norms too, so that every leaf matters."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape, scale=0.3).astype(np.float32)
        return jnp.asarray(noise + (jax.tree_util.keystr(path).endswith("['scale']")))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def batch():
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, V, (2, S)))
    return tokens, jnp.ones((2, S), jnp.int32), jnp.broadcast_to(jnp.arange(S)[None], (2, S))


def scores(params, state, config, key):
    out: Any = Transformer(config).apply({"params": params}, *batch(), state, key)
    return out.hidden @ out.head.T


@functools.partial(jax.jit, static_argnames=("config", "training"))
def logits(params, state, *, config, training=False):
    key = jax.random.key(7) if training else None
    return scores(params, state, config, key)


def target_of(dense, method, experts, k, layers=None, **moe):
    return replace(upcycled_config(dense, method, experts, k, **{"dispatcher": "einsum"} | moe), **(layers or {}))


def distance(dense, target, method, *, training=False):
    """Largest difference of logits over their spread."""
    params, state = upcycle(dense, dense_params(dense), target, method, jax.random.key(3))
    want = logits(dense_params(dense), {}, config=dense)
    got = logits(params, state, config=target, training=training)
    return float(jnp.abs(got - want).max() / jnp.std(want))


EXACT = {  # of target_of: dense model, method, E, k, and options
    "copy": (DENSE, "copy", 4, 2, {}),
    "copy_top1": (DENSE, "copy", 4, 1, {}),
    "copy_blocks": (DENSE, "copy", 4, 2, {"dispatcher": "blocks", "block_size": 8}),
    "copy_v3": (DENSE, "copy", 8, 2, {"router": V3}),
    "copy_loss_free": (DENSE, "copy", 4, 2, {"router": "loss_free(renormalize=True)"}),
    "copy_gpt_oss": (DENSE, "copy", 4, 2, {"router": "learned_bias", "expert_bias": True}),
    "copy_biased": (BIASED, "copy", 4, 2, {}),
    "copy_tied": (replace(DENSE, tie_embeddings=True), "copy", 4, 2, {}),
    "copy_qk_norm": (replace(DENSE, qk_norm="head"), "copy", 4, 2, {}),
    "copy_some_layers": (
        replace(DENSE, num_layers=4), "copy", 4, 2, {"layers": {"moe_every": 2, "dense_layers": (3,)}}
    ),
    "split_2": (DENSE, "split(shards=2)", 8, 2, {}),
    "split_2_two_groups": (DENSE, "split(shards=2)", 8, 4, {}),
    "split_4_shared": (DENSE, "split(shards=4)", 8, 4, {"shared_dim": 8}),
    "split_2_gated": (DENSE, "split(shards=2)", 8, 2, {"shared_dim": 8, "shared_gate": True}),
    "split_2_v3": (DENSE, "split(shards=2)", 8, 2, {"shared_dim": 4, "router": V3}),
    "split_4_v3_halves": (DENSE, "split(shards=4)", 8, 4, {"router": V3}),  # two of its groups are a virtual group
    "split_2_biased": (BIASED, "split(shards=2)", 4, 2, {}),
}  # fmt: skip


@functools.cache
def exact(name):
    dense, method, experts, k, more = EXACT[name]
    return dense, target_of(dense, method, experts, k, **more), method


def slow_unless(fast, names):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slow_unless(("copy_v3", "split_2_gated"), EXACT))
def test_logits_at_step_zero_are_the_dense_models(name):
    assert distance(*exact(name)) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["split_2_gated", "copy"])
def test_and_in_training_too(name):
    assert distance(*exact(name), training=True) < 2e-5


@pytest.mark.parametrize(
    ("router", "experts", "k", "shards", "mass"),
    [
        ("softmax_topk", 8, 2, 1, 1.0),
        ("softmax_topk", 8, 4, 2, 0.5),
        ("softmax_topk", 8, 4, 4, 0.25),
        ("learned_bias", 8, 4, 2, 0.5),
        (V3, 8, 2, 1, 2.5),
        (V3, 8, 2, 2, 1.25),
    ],
)
def test_the_weights_of_one_shard_add_up_to(router, experts, k, shards, mass):
    assert shard_mass(MoEConfig(experts, k, 8, router=router), shards) == pytest.approx(mass, rel=1e-5)


def test_split_puts_neurons_where_the_module_says():
    """Shared first, then G shards; expert n G + j holds shard j; gate, up and down of a neuron stay together."""
    _, target, method = exact("split_2_gated")
    source = dense_params(DENSE)["runs_0"]["ffn"]
    params, _ = upcycle(DENSE, dense_params(DENSE), target, method, jax.random.key(3))
    made = params["runs_0"]["moe"]
    gate, up = np.split(np.asarray(source["gate_up"]), 2, axis=-1)
    down = np.asarray(source["down"])
    for expert in range(8):
        held = slice(8 + 8 * (expert % 2), 16 + 8 * (expert % 2))
        mine = np.split(np.asarray(made["experts"]["gate_up"][:, expert]), 2, axis=-1)
        np.testing.assert_array_equal(mine[0], gate[..., held])
        np.testing.assert_array_equal(mine[1], up[..., held])
        np.testing.assert_allclose(made["experts"]["down"][:, expert], 2 * down[:, held], rtol=1e-6)
    np.testing.assert_array_equal(made["shared"]["ffn"]["down"], 2 * down[:, :8])
    np.testing.assert_array_equal(made["shared"]["gate"], 0 * down[:, 0, :, None])
    router = np.asarray(made["router"])
    np.testing.assert_array_equal(router[..., 0::2], router[..., 1::2])
    assert len(np.unique(router[0, 0])) == 4  # virtual groups
    assert router.std() == pytest.approx(0.02 * 0.88, rel=0.25)  # a normal cut at two deviations


def test_the_key_decides_the_router_alone_and_equal_keys_agree():
    target = exact("copy")[1]
    made = [upcycle(DENSE, dense_params(DENSE), target, "copy", jax.random.key(seed))[0] for seed in (1, 1, 2)]
    same, other = (jax.tree.map(np.array_equal, made[0], one) for one in made[1:])
    assert all(jax.tree.leaves(same))
    assert not other["runs_0"]["moe"].pop("router")
    assert all(jax.tree.leaves(other))


def test_bfloat16_stays_bfloat16_and_the_trunk_is_taken_as_it_is():
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), dense_params(DENSE))
    params, _ = upcycle(DENSE, narrow, exact("copy")[1], "copy", jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    for name in ("embedding", "head", "final_norm"):
        assert jax.tree.all(jax.tree.map(np.array_equal, params[name], narrow[name]))
    attention = jax.tree.map(np.array_equal, params["runs_0"]["attention"], narrow["runs_0"]["attention"])
    assert jax.tree.all(attention)


def test_drop_redraws_its_share_of_neurons_and_no_other():
    target = target_of(DENSE, "drop(ratio=0.4)", 4, 2)
    params, _ = upcycle(DENSE, dense_params(DENSE), target, "drop(ratio=0.4)", jax.random.key(3))
    source, made = dense_params(DENSE)["runs_0"]["ffn"], params["runs_0"]["moe"]["experts"]
    halves = jnp.split(made["gate_up"], 2, axis=-1)
    wanted = jnp.split(source["gate_up"], 2, axis=-1)
    kept = [np.asarray((mine == theirs[:, None]).all(axis=-2)) for mine, theirs in zip(halves, wanted)]
    kept.append(np.asarray((made["down"] == source["down"][:, None]).all(axis=-1)))
    np.testing.assert_array_equal(kept[0], kept[1])
    np.testing.assert_array_equal(kept[0], kept[2])
    np.testing.assert_array_equal((~kept[0]).sum(axis=-1), np.full((2, 4), int(0.4 * F)))
    assert len({row.tobytes() for row in kept[0].reshape(-1, F)}) == 8  # each layer and expert its own
    changed = jnp.where(jnp.asarray(kept[2])[..., None], jnp.nan, made["down"] - source["down"][:, None])
    assert float(jnp.nanmin(jnp.abs(changed))) > 0


def test_redrawn_weights_have_the_mean_and_deviation_of_those_they_replace():
    rng = np.random.default_rng(0)
    width, hidden = 200, 300
    gate_up = np.concatenate([rng.normal(0.5, 2.0, (hidden, width)), rng.normal(-3.0, 0.1, (hidden, width))], axis=1)
    down = rng.normal(1.0, 0.5, (width, hidden))
    new_gate_up, new_down = redrawn(jnp.asarray(gate_up), jnp.asarray(down), jax.random.key(1), ratio=1.0)
    new_gate, new_up = np.split(np.asarray(new_gate_up), 2, axis=1)
    for new, mean, std in ((new_gate, 0.5, 2.0), (new_up, -3.0, 0.1), (np.asarray(new_down), 1.0, 0.5)):
        assert new.mean() == pytest.approx(mean, abs=4 * std / 60_000**0.5 * 2)
        assert new.std() == pytest.approx(std, rel=0.02)


def test_copies_repeat_the_whole_row_of_shards():
    np.testing.assert_array_equal(copies(jnp.arange(4).reshape(2, 2), 3), [[0, 1] * 3, [2, 3] * 3])


def loss(params, state, config):
    likely = jax.nn.log_softmax(scores(params, state, config, jax.random.key(0)))
    return -jnp.mean(jnp.take_along_axis(likely[:, :-1], batch()[0][:, 1:, None], axis=-1))


def test_copies_hide_the_router_from_the_loss_until_they_differ_shards_do_not():
    """The docstring's trap, and that training moves on from it."""
    sizes = {}
    for name in ("copy", "split_2"):
        _, config, method = exact(name)
        dense, config = (replace(one, num_layers=1) for one in (DENSE, config))
        params, state = upcycle(dense, dense_params(dense), config, method, jax.random.key(3))
        step = jax.jit(jax.value_and_grad(functools.partial(loss, state=state, config=config)))
        before, first = step(params)
        after, second = step(jax.tree.map(lambda p, g: p - 0.3 * g, params, first))
        sizes[name] = [float(jnp.abs(g["runs_0"]["moe"]["router"]).max()) for g in (first, second)]
        assert after < before
    assert sizes["copy"][0] < 1e-5
    assert sizes["copy"][1] > 1e-3
    assert sizes["split_2"][0] > 1e-3


def moe(**changes):
    return replace(DENSE, moe=replace(MoEConfig(num_experts=8, top_k=2, expert_dim=F), **changes))


HALVES = {"expert_dim": F // 2}
REFUSED = [
    (DENSE, moe(router="softmax_topk(renormalize=False)"), "copy", "moe.router = .*one sum"),
    (DENSE, moe(router="group_limited(score='sigmoid')"), "copy", "moe.router = .*one sum"),
    (DENSE, moe(router="switch", top_k=1), "copy", "moe.router = .*one sum"),
    (DENSE, moe(router="gshard"), "copy", "moe.router = .*one sum"),
    (DENSE, moe(router="remoe"), "copy", "moe.router = .*one sum"),
    (DENSE, moe(router="sigmoid_input", top_k=1), "copy", "moe.router = .*not ones of the experts' input"),
    (DENSE, moe(router="expert_choice", allow_noncausal=True), "copy", "moe.router = .*one sum"),
    # its groups of three cut virtual groups of two
    (DENSE, moe(num_experts=12, top_k=4, router=V3, **HALVES), "split(shards=2)", "moe.router = .*over every shard"),
    (DENSE, moe(policy="capacity(factor=1.25)"), "copy", "moe.policy"),
    (DENSE, moe(activation="swiglu_oai"), "copy", "moe.activation"),
    (DENSE, moe(shared_dim=4), "copy", "moe.shared_dim = 4: expected 0"),
    (DENSE, moe(expert_dim=F // 2), "copy", "moe.expert_dim = 12: .* = 12 to be the dense ffn_dim = 24"),
    (DENSE, moe(shared_dim=4, **HALVES), "split(shards=2)", "moe.expert_dim = 12: .* = 28 to be the dense"),
    (DENSE, moe(num_experts=7, **HALVES), "split(shards=2)", "moe.num_experts = 7: expected a multiple of 2"),
    (DENSE, moe(top_k=3, **HALVES), "split(shards=2)", "moe.top_k = 3: expected a multiple of 2"),
    (moe(), moe(), "copy", "upcycle model.moe = .*dense model"),
    (DENSE, DENSE, "copy", "model.moe = None"),
    (DENSE, replace(moe(), dense_layers=(0, 1)), "copy", "model.moe = .*MoE layers"),
    (DENSE, replace(moe(), rope_theta=5e5), "copy", "model.rope_theta = 500000.0: expected 10000.0"),
    (DENSE, replace(moe(), hidden=32), "copy", "model.hidden = 32"),
    (BIASED, replace(moe(), ffn_bias=True), "copy", "moe.expert_bias"),
    (
        BIASED, replace(moe(expert_bias=True, shared_dim=4, expert_dim=10), ffn_bias=True), "split(shards=2)",
        "moe.shared_dim = 4: expected 0: a shared expert has no biases",
    ),
    (DENSE, moe(), "melt", "upcycle = 'melt': expected one of copy, split, drop"),
    (DENSE, moe(), "copy(shards=2)", "upcycle = "),
    (DENSE, moe(), "split", "upcycle = 'split'"),
    (DENSE, moe(), "split(shards=0)", "upcycle shards = 0"),
    (DENSE, moe(), "drop(ratio=0.0)", "upcycle ratio = 0.0"),
    (DENSE, moe(), "drop(ratio=1.5)", "upcycle ratio = 1.5"),
    (DENSE, moe(), "copy(router_std=0.0)", "upcycle router_std = 0.0"),
    (DENSE, moe(), "moe.upcycle:check", "upcycle = 'moe.upcycle:check'"),
    (DENSE, moe(), "functools:partial", "upcycle = 'functools:partial'"),
]  # fmt: skip


@pytest.mark.parametrize(("dense", "target", "method", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_exact_or_does_not_fit_is_refused(dense, target, method, words):
    with pytest.raises(ValueError, match=words):
        check(dense, target, method)


def test_a_width_that_does_not_divide_and_parameters_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"moe\.shared_dim = 3: .*ffn_dim - shared_dim = 21"):
        upcycled_config(DENSE, "split(shards=2)", 4, 2, shared_dim=3)
    with pytest.raises(ValueError, match=r"moe\.shared_dim = 24"):
        upcycled_config(DENSE, "split(shards=2)", 4, 2, shared_dim=24)
    params = dense_params(replace(DENSE, ffn_dim=20))
    with pytest.raises(ValueError, match=r"params runs_0\.ffn\.down\.shape = \(2, 20, 16\): expected \(2, 24, 16\)"):
        upcycle(DENSE, params, exact("copy")[1], "copy", jax.random.key(0))


def test_a_method_of_ones_own_by_import_path():
    assert make_method("moe.upcycle:drop(ratio=0.25)") == make_method("drop(ratio=0.25)")


WRITTEN = {  # a family that holds it, or why none of these does
    "copy": ("mixtral", ""),
    "copy_qk_norm": ("qwen3_moe", ""),
    "split_2_gated": ("qwen2_moe", ""),
    "split_4_shared": ("qwen2_moe", "shared_gate = False"),
    "split_2": ("mixtral", ""),
    "copy_v3": ("mixtral", "router"),
    "copy_some_layers": ("mixtral", "moe_every|layer"),
    "copy_biased": ("qwen3_moe", "bias"),
}


FAST_WRITTEN = ("split_2_gated", "split_4_shared")


@pytest.mark.parametrize("name", slow_unless(FAST_WRITTEN, WRITTEN))
def test_what_a_family_can_hold_is_saved_as_one_and_the_rest_is_refused(name, tmp_path):
    dense, target, method = exact(name)
    params, state = upcycle(dense, dense_params(dense), target, method, jax.random.key(3))
    family, refusal = WRITTEN[name]
    if refusal:
        with pytest.raises(ValueError, match=refusal):
            save(tmp_path / "model", target, params, state, family=family)
        assert not (tmp_path / "model").exists()
        return
    save(tmp_path / "model", target, params, state, family=family)
    held = load(tmp_path / "model")
    assert held.family == family
    assert held.config.moe is not None
    config = replace(held.config, moe=replace(held.config.moe, dispatcher="einsum"))
    want = logits(dense_params(dense), {}, config=dense)
    got = logits(held.params, held.router_state, config=config)
    assert float(jnp.abs(got - want).max() / jnp.std(want)) < 2e-5
