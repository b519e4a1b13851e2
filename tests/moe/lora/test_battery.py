"""What every kind of adapter must do; a new one joins by one line."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe.generate import Generator, cached_forward, empty_caches, unstacked
from moe.lora import presets
from moe.lora.adapters import Adapted, init_adapters, matched_modules, parameter_count
from moe.lora.config import AdapterConfig
from parallel.mesh import BATCH, make_mesh
from tests.moe.lora.models import CONFIG, LENGTH, assert_close, base, logits, run, tokens, trained

SIDES = {"q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32), "gate": (32, 48), "up": (32, 48), "down": (48, 32)}


class Member(NamedTuple):
    """`frozen_at_first`: with B = 0 it is the frozen model. `routers`: width of what each of a layer's routers sees."""

    config: AdapterConfig
    frozen_at_first: bool = True
    routers: tuple[int, ...] = ()


EACH_MAP = (32, 32, 32, 32, 32, 32, 48)
MEMBERS = {
    "lora": Member(presets.lora(4, 8.0)),
    "rslora": Member(presets.rslora(4, 8.0)),
    "dora": Member(presets.dora(4, 8.0)),
    "attention_only": Member(presets.lora(4, 8.0, targets=("q", "v"))),
    "mixlora": Member(presets.mixlora(4, 8.0), routers=(32,)),
    "mixdora": Member(presets.mixdora(4, 8.0), routers=(32,)),
    "mixlora_dynamic": Member(presets.mixlora_dynamic(4, 8.0), frozen_at_first=False, routers=(32,)),
    "mixlora_switch": Member(presets.mixlora_switch(4, 8.0), frozen_at_first=False, routers=(32,)),
    "loramoe": Member(presets.loramoe(4, 8.0), routers=(32, 32, 48)),
    "mola": Member(presets.mola(4, 8.0), routers=EACH_MAP),
    "mola_dora": Member(presets.mola(4, 8.0, dora=True), routers=EACH_MAP),
    "hydralora": Member(presets.hydralora(4, 8.0), routers=EACH_MAP),
    "lora_mixer": Member(presets.lora_mixer(4, 8.0), routers=(32, 32)),
    "lora_mixer_top3": Member(presets.lora_mixer(4, 8.0, top_k=3), routers=(32, 32)),
}
every = pytest.mark.parametrize("name", MEMBERS)
with_routers = pytest.mark.parametrize("name", [name for name, member in MEMBERS.items() if member.routers])
# Capacity counts the tokens before, so a token's expert depends on what is in its pass.
token_by_token = pytest.mark.parametrize("name", [name for name in MEMBERS if name != "mixlora_switch"])


def loss(params: Any, adapters: AdapterConfig, tree: Any, rows: jax.Array | None = None) -> jax.Array:
    """Some number that everything goes into."""
    out = run(params, adapters, tree, rows)
    routed = sum(jnp.sum(one.prob_sums**2) + jnp.sum(one.z_sums) for one in out.adapter_stats.values())
    return jnp.mean(out.hidden**2 * jnp.linspace(0.5, 1.5, 32)[None, None]) + 1e-4 * routed


@every
@pytest.mark.slow_after(4)
def test_starts_as_the_frozen_model(name: str):
    member, params = MEMBERS[name], base()
    fresh = init_adapters(CONFIG, member.config, params, jax.random.key(0))
    frozen = logits(params)
    same = np.allclose(logits(params, member.config, fresh), frozen, rtol=0, atol=1e-5 * float(jnp.abs(frozen).max()))
    assert same == member.frozen_at_first


@every
@pytest.mark.slow_after(4)
def test_trained_adapters_change_it(name: str):
    params, config = base(), MEMBERS[name].config
    assert np.abs(logits(params, config, trained(config)) - logits(params)).max() > 0.05


@every
@pytest.mark.slow_after(2)
def test_gradients_are_of_adapters_alone_and_of_all_of_them(name: str):
    """No arrays of zeros either: the gradient is the adapters' tree."""
    params, config = base(), MEMBERS[name].config
    tree = trained(config)
    found = jax.grad(partial(loss, params, config))(tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@every
def test_parameters_are_counted_by_the_formula(name: str):
    """Each layer: E r (in + out) a map with experts, r (in + out) a plain one, in E a router, out a magnitude."""
    config, total = MEMBERS[name].config, 0
    for target in config.targets:
        wide, out = SIDES[target]
        number = config.experts.num_experts if config.experts and config.holds_experts(target) else 1
        ones = 1 if config.experts and config.experts.shared_a else number
        total += config.rank * (ones * wide + number * out) + config.dora * number * out
    if config.experts:
        total += sum(MEMBERS[name].routers) * config.experts.num_experts
    assert parameter_count(CONFIG, config) == total * CONFIG.num_layers


@every
def test_counts_what_it_matched(name: str):
    found = matched_modules(CONFIG, MEMBERS[name].config)
    routers = [target for target in found if target.startswith("router_")]
    assert {t: n for t, n in found.items() if t not in routers} == dict.fromkeys(MEMBERS[name].config.targets, 3)
    assert len(routers) == len(MEMBERS[name].routers)


@with_routers
def test_experts_have_no_order(name: str):
    params, config = base(), MEMBERS[name].config
    tree = trained(config)
    assert config.experts is not None
    order = np.random.default_rng(0).permutation(config.experts.num_experts)

    def permuted(path: Any, leaf: jax.Array) -> jax.Array:
        if path[-1].key == "weight":
            return leaf[..., order]
        return leaf if leaf.shape[1] == 1 else leaf[:, order]

    other = jax.tree_util.tree_map_with_path(permuted, tree)
    assert_close(logits(params, config, other), logits(params, config, tree))


@with_routers
def test_tells_its_routing(name: str):
    params, config = base(), MEMBERS[name].config
    found = run(params, config, trained(config)).adapter_stats
    assert config.experts is not None
    assert len(found) == len(MEMBERS[name].routers)
    for one in found.values():
        assert one.counts.shape == (3, 2, config.experts.num_experts)
        np.testing.assert_allclose(one.tokens, LENGTH)
        np.testing.assert_allclose(one.prob_sums.sum(axis=-1), LENGTH, rtol=1e-5)


@token_by_token
@pytest.mark.slow_after(1)
def test_decoding_with_a_cache_is_the_full_forward(name: str):
    """Keys and values keep their own token's routing."""
    params, config = base(), MEMBERS[name].config
    tree = trained(config)
    rows, weights = tokens(), unstacked(CONFIG, params, {}, tree)
    caches, hidden = empty_caches(CONFIG, 2, LENGTH), []
    for part in (slice(0, 7), *(slice(i, i + 1) for i in range(7, LENGTH))):
        new = rows[:, part]
        positions = jnp.broadcast_to(jnp.arange(LENGTH)[None, part], new.shape)
        out, caches = cached_forward(CONFIG, weights, new, jnp.ones_like(new), positions, caches, config)
        hidden.append(out)
    assert_close(jnp.concatenate(hidden, axis=1), run(params, config, tree).hidden)


@pytest.mark.slow
def test_generates_with_adapters():
    params, config = base(), MEMBERS["mixlora"].config
    tree = trained(config)
    prompts = [[int(token) for token in row] for row in tokens()]
    made = list(Generator(Adapted(CONFIG, params, {}, config, tree))(prompts, max_new_tokens=4))
    rows = tokens()
    for new in made:
        np.testing.assert_array_equal(new, jnp.argmax(logits(params, config, tree, rows)[:, -1], axis=-1))
        rows = jnp.concatenate([rows, new[:, None]], axis=1)


@every
@pytest.mark.slow_after(3)
def test_several_adapters_share_a_base(name: str):
    params, config = base(), MEMBERS[name].config
    trees = [trained(config, seed=seed) for seed in (3, 5)]
    both = jax.vmap(lambda tree: run(params, config, tree).hidden)(jax.tree.map(lambda *x: jnp.stack(x), *trees))
    for one, tree in zip(both, trees):
        assert_close(one, run(params, config, tree).hidden)


@every
@pytest.mark.slow
def test_eight_devices_are_one(name: str):
    params, config, rows = base(), MEMBERS[name].config, tokens(8)
    tree = trained(config)
    one = jax.value_and_grad(partial(loss, params, config))(tree, rows)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        spread = jax.device_put(rows, NamedSharding(mesh, BATCH))
        whole = jax.device_put((params, tree), NamedSharding(mesh, P()))
        fn = jax.jit(lambda params, tree, rows: jax.value_and_grad(partial(loss, params, config))(tree, rows))
        many = fn(*whole, spread)
    assert_close(many, one)


@every
@pytest.mark.slow_after(1)
def test_bfloat16_is_near(name: str):
    """One layer: a token near a tie chooses another expert, and over layers most tokens are near one."""
    one, config = replace(CONFIG, num_layers=1), MEMBERS[name].config
    params, tree = base(one), trained(config, one)
    low = run(params, config, tree, config=replace(one, compute_dtype="bfloat16")).hidden
    assert low.dtype == jnp.bfloat16
    assert np.median(np.abs(low.astype(jnp.float32) - run(params, config, tree, config=one).hidden)) < 0.05


@pytest.mark.slow
def test_dropout_is_drawn_in_training_alone():
    params = base()
    config = presets.mixlora(4, 8.0, dropout=0.5)
    tree = trained(config)
    still = run(params, config, tree).hidden
    np.testing.assert_array_equal(still, run(params, replace(config, dropout=0.0), tree).hidden)
    one, same, other = (run(params, config, tree, key=jax.random.key(i)).hidden for i in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01
    assert np.abs(one - still).max() > 0.01
