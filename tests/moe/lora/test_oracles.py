"""Closed forms and reductions of LoRA experts (sheets: MixLoRA 2404.15159, LoRA-Mixer 2507.00029)."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import ModelConfig, MoEConfig
from moe.layer import MoELayer
from moe.lora import presets
from moe.lora.adapters import init_adapters, matched_modules, require_adapters
from moe.lora.config import AdapterConfig, ExpertsConfig
from moe.lora.dense import Choice, LoRA, column_norms, direction_scale, mixed
from moe.lora.feed_forward import mix_lora_feed_forward
from moe.lora.losses import balance, mixlora_balance, proximal_loss, routing_specialization_loss
from moe.losses import RoutingStats, routing_stats
from moe.routing import token_choice, top_k_indices
from tests.moe.lora.models import CONFIG, assert_close, base, logits, run, trained

T, D, F, E, K, R = 24, 16, 20, 4, 2, 3
T_FREE = 256  # tokens whose logits are free


def arrays(seed: int = 0, experts: int = E) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, LoRA]]:
    keys = iter(jax.random.split(jax.random.key(seed), 9))
    normal = lambda *shape: jax.random.normal(next(keys), shape) * shape[-2] ** -0.5  # noqa: E731
    x, gate_up, down = normal(T, D) * T**0.5, normal(D, 2 * F), normal(F, D)
    sides = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    loras = {name: LoRA(normal(experts, wide, R), normal(experts, R, out), None) for name, (wide, out) in sides.items()}
    return x, gate_up, down, loras


def chosen(k: int = K, experts: int = E) -> Choice:
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(9), (T, experts)))
    indices = top_k_indices(probs, k)
    weights = jnp.take_along_axis(probs, indices, axis=1)
    return Choice(indices, weights / weights.sum(axis=1, keepdims=True), jnp.ones(indices.shape, bool))


def naive(x, gate_up, down, loras, choice, scale, magnitudes=None):
    """Every token through every expert's own weights, in float64."""
    x, gate_up, down = (np.asarray(a, np.float64) for a in (x, gate_up, down))
    out = np.zeros_like(x)
    for e in range(loras["down"].b.shape[0]):
        weight = {"gate": gate_up[:, :F], "up": gate_up[:, F:], "down": down}
        for name, lora in loras.items():
            own = weight[name] + scale * np.asarray(lora.a[e], np.float64) @ np.asarray(lora.b[e], np.float64)
            if lora.magnitude is not None:
                own = own * np.asarray(lora.magnitude[e], np.float64) / np.linalg.norm(own, axis=0)
            weight[name] = own
        gate = x @ weight["gate"]
        expert = (gate / (1 + np.exp(-gate)) * (x @ weight["up"])) @ weight["down"]
        share = np.where(np.asarray(choice.indices) == e, np.asarray(choice.weights, np.float64), 0.0).sum(axis=1)
        out += share[:, None] * expert
    return out


def test_shared_products_are_the_naive_experts():
    x, gate_up, down, loras = arrays()
    found = mix_lora_feed_forward(x, gate_up, down, loras, chosen(), 2.0)
    np.testing.assert_allclose(found, naive(x, gate_up, down, loras, chosen(), 2.0), atol=2e-5)


def test_experts_with_magnitudes_are_the_naive_ones():
    x, gate_up, down, loras = arrays()
    keys = jax.random.split(jax.random.key(5), 3)
    loras = {name: lora._replace(magnitude=1 + jax.random.uniform(key, (E, lora.b.shape[-1])))
             for key, (name, lora) in zip(keys, loras.items())}  # fmt: skip
    found = mix_lora_feed_forward(x, gate_up, down, loras, chosen(), 2.0)
    np.testing.assert_allclose(found, naive(x, gate_up, down, loras, chosen(), 2.0), atol=5e-5)


@pytest.mark.slow
def test_is_the_materialised_mixture_of_the_generic_layer():
    """W_e = W + s A_e B_e as experts of a MoE layer: values, and gradients of A, B, router and input."""
    x, gate_up, down, loras = arrays()
    router = 0.5 * jax.random.normal(jax.random.key(4), (D, E))
    config = MoEConfig(num_experts=E, top_k=K, expert_dim=F, router="softmax_topk", dispatcher="blocks")
    layer = MoELayer(config, 0.02, 0.02)

    def materialised(x, loras, router):
        own = {name: 2.0 * jnp.einsum("edr,ero->edo", lora.a, lora.b) for name, lora in loras.items()}
        wide = gate_up[None] + jnp.concatenate([own["gate"], own["up"]], axis=-1)
        params = {"router": router, "experts": {"gate_up": wide, "down": down[None] + own["down"]}}
        ones = jnp.ones((1, T), bool)
        out, _ = layer.apply({"params": params}, x[None], ones, jnp.zeros((1, T), jnp.int32), {}, None)
        return out[0]

    def ours(x, loras, router):
        probs = jax.nn.softmax(jnp.dot(x, router, precision="float32"))
        indices = top_k_indices(probs, K)
        weights = jnp.take_along_axis(probs, indices, axis=1)
        choice = Choice(indices, weights / weights.sum(axis=1, keepdims=True), jnp.ones(indices.shape, bool))
        return mix_lora_feed_forward(x, gate_up, down, loras, choice, 2.0)

    found, wanted = (jax.value_and_grad(lambda *a, fn=fn: jnp.sum(jnp.sin(fn(*a))), argnums=(0, 1, 2))(
        x, loras, router) for fn in (ours, materialised))  # fmt: skip
    np.testing.assert_allclose(ours(x, loras, router), materialised(x, loras, router), atol=2e-5)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_a_slot_not_kept_goes_through_the_frozen_feed_forward():
    x, gate_up, down, loras = arrays()
    nobody = chosen()._replace(kept=jnp.zeros((T, K), bool))
    frozen = naive(x, gate_up, down, jax.tree.map(jnp.zeros_like, loras), chosen(), 2.0)
    np.testing.assert_allclose(mix_lora_feed_forward(x, gate_up, down, loras, nobody, 2.0), frozen, atol=2e-5)


def test_equal_weights_of_all_experts_are_their_mean():
    x, gate_up, down, loras = arrays()
    indices = jnp.tile(jnp.arange(E)[None], (T, 1))
    everyone = Choice(indices, jnp.full((T, E), 1 / E), jnp.ones((T, E), bool))
    each = [Choice(jnp.full((T, 1), e), jnp.ones((T, 1)), jnp.ones((T, 1), bool)) for e in range(E)]
    mean = sum(mix_lora_feed_forward(x, gate_up, down, loras, one, 2.0) for one in each) / E
    np.testing.assert_allclose(mix_lora_feed_forward(x, gate_up, down, loras, everyone, 2.0), mean, atol=2e-5)


# --- whole models ---


def plain(tree, expert: int = 0):
    """One expert of each map as a plain adapter; routers left out."""
    if "b" in tree:
        return {name: leaf if leaf.shape[1] == 1 else leaf[:, expert : expert + 1] for name, leaf in tree.items()}
    return {name: plain(part, expert) for name, part in tree.items() if not name.startswith("router_")}


def with_equal_experts(tree):
    def same(path, leaf):
        return leaf if path[-1].key == "weight" else jnp.repeat(leaf[:, :1], leaf.shape[1], axis=1)

    return jax.tree_util.tree_map_with_path(same, tree)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["mixlora", "mola", "lora_mixer", "loramoe"])
@pytest.mark.slow_after(2)
def test_one_expert_is_lora(name: str, dora: bool):
    params, chosen = base(), {"top_k": 1} if name in ("mixlora", "mola") else {}
    config = getattr(presets, name)(4, 8.0, num_experts=1, dora=dora, **chosen)
    tree = trained(config)
    single = replace(config, experts=None)
    assert_close(logits(params, config, tree), logits(params, single, plain(tree)))


@pytest.mark.parametrize("name", ["mixlora", "mixdora", "mola", "lora_mixer", "loramoe"])
def test_equal_experts_are_one_adapter_whatever_the_router(name: str):
    params, config = base(), getattr(presets, name)(4, 8.0)
    tree = with_equal_experts(trained(config))
    single = replace(config, experts=None)
    assert_close(logits(params, config, tree), logits(params, single, plain(tree)))


@pytest.mark.parametrize("name", ["mixlora", "mola", "lora_mixer", "hydralora"])
def test_a_label_is_that_expert(name: str):
    params, config = base(), getattr(presets, name)(4, 8.0)
    tree = trained(config)
    labels = jnp.array([2, 0])
    found = logits(params, config, tree, labels=labels)
    for row, label in enumerate((2, 0)):
        alone = logits(params, replace(config, experts=None), plain(tree, label))
        assert_close(found[row], alone[row])


def test_a_label_leaves_other_experts_alone():
    """Their gradients are exactly zero: an optimiser without decay leaves them bit by bit."""
    params, config = base(), presets.lora_mixer(4, 8.0)
    tree = trained(config)
    found = jax.grad(lambda tree: jnp.sum(run(params, config, tree, labels=jnp.array([1, 3])).hidden ** 2 * 1.7))(tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        if path[-1].key == "weight":
            assert np.abs(leaf).max() == 0
            continue
        assert all(np.abs(leaf[:, e]).max() == 0 for e in (0, 2, 4))
        assert all(np.abs(leaf[:, e]).max() > 0 for e in (1, 3))


def test_all_experts_softly_are_all_of_them_chosen():
    params, soft = base(), presets.lora_mixer(4, 8.0)
    tree = trained(soft)
    assert soft.experts is not None
    unnormalised = replace(soft, experts=replace(soft.experts, router="softmax_topk(renormalize=False)"))
    assert_close(logits(params, soft, tree), logits(params, unnormalised, tree))


def test_top_p_is_the_kept_probability_of_the_frozen_model():
    """As released it does not renormalise: with B = 0 the feed-forward is scaled by the kept probabilities' sum."""
    one = replace(CONFIG, num_layers=1)
    params, config = base(one), presets.mixlora_dynamic(4, 8.0, targets=("gate", "up", "down"))
    tree = init_adapters(one, config, params, jax.random.key(0))
    out = run(params, config, tree, config=one)
    kept = out.adapter_stats["ffn"].top_score_sums / out.adapter_stats["ffn"].tokens
    assert np.all((kept > 0.8) & (kept < 1.0))
    assert np.abs(logits(params, config, tree, config=one) - logits(params, config=one)).max() > 0.01


def test_column_norms_without_the_product():
    lora = LoRA(jax.random.normal(jax.random.key(0), (E, D, R)), jax.random.normal(jax.random.key(1), (E, R, F)), None)
    weight = jax.random.normal(jax.random.key(2), (D, F))
    own = np.asarray(weight)[None] + 1.5 * np.einsum("edr,ero->edo", lora.a, lora.b)
    np.testing.assert_allclose(column_norms(weight, lora, 1.5), np.linalg.norm(own, axis=1), rtol=1e-5)


@pytest.mark.parametrize("name", ["dora", "mixdora"])
@pytest.mark.slow_after(1)
def test_magnitudes_are_not_rounded_to_the_compute_type(name: str):
    """In bfloat16 DoRA starts as the frozen model, every column of it, and a magnitude 0.3% larger is seen."""
    low, config = replace(CONFIG, compute_dtype="bfloat16"), getattr(presets, name)(4, 8.0)
    params = base()
    fresh = init_adapters(CONFIG, config, params, jax.random.key(0))
    np.testing.assert_allclose(run(params, config, fresh, config=low).hidden.astype(np.float32),
                               run(params, config=low).hidden.astype(np.float32), atol=0.05)  # fmt: skip
    weight, lora = params["runs_0"]["ffn"]["down"][0].astype(jnp.bfloat16), fresh["runs_0"]["ffn"]["lora_down"]
    held = LoRA(lora["a"][0].astype(jnp.bfloat16), lora["b"][0].astype(jnp.bfloat16), 1.003 * lora["magnitude"][0])
    np.testing.assert_allclose(direction_scale(weight, held, 2.0), 1.003, atol=1e-3)
    x = jnp.ones((1, 48), jnp.bfloat16)
    grown = mixed(x, x @ weight, weight, jax.tree.map(lambda leaf: leaf[:1], held._replace(
        magnitude=1.02 * lora["magnitude"][0])), None, 2.0)  # fmt: skip
    assert np.median((grown / (x @ weight)).astype(np.float32)) == pytest.approx(1.02, abs=0.006)


# --- losses ---


def stats(logits: jax.Array, k: int = 1) -> RoutingStats:
    """One layer's statistics of logits [T, E], one sequence, stacked."""
    probs = jax.nn.softmax(logits)
    indices = top_k_indices(probs, k)
    routing = token_choice(probs, logits, indices, jnp.take_along_axis(probs, indices, axis=1))
    ones = jnp.ones((1, logits.shape[0]), bool)
    return jax.tree.map(lambda leaf: leaf[None], routing_stats(routing, ones, {}, routing.valid))


def test_specialisation_loss_of_a_uniform_router():
    """The first term is its weight (with the factor E), the entropy log E."""
    sites = {"site": stats(jnp.zeros((T, E)), k=E)}
    for sign, factor in (("as_claimed", 1), ("as_printed", -1)):
        found = routing_specialization_loss(sites, 1.0, 0.1, top_k=E, sign=sign)
        assert found == pytest.approx(1 + factor * 0.1 * math.log(E), rel=1e-6)


def test_specialisation_loss_of_a_balanced_one_hot_router():
    sites = {"site": stats(100.0 * jax.nn.one_hot(jnp.arange(T) % E, E))}
    assert routing_specialization_loss(sites, 1.0, 0.1, top_k=1) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("sign", "factor"), [("as_claimed", 1), ("as_printed", -1)])
def test_entropy_gradient(sign, factor: int):
    """Of mean H with respect to a logit: -p_i (log p_i + H) / T."""
    logits = jax.random.normal(jax.random.key(0), (T, E))
    found = jax.grad(lambda x: routing_specialization_loss({"a": stats(x)}, 0.0, 0.3, top_k=1, sign=sign))(logits)
    p = jax.nn.softmax(logits)
    entropy = -jnp.sum(p * jnp.log(p), axis=1, keepdims=True)
    np.testing.assert_allclose(found, -factor * 0.3 * p * (jnp.log(p) + entropy) / T, atol=1e-7)


def test_printed_sign_ends_uniform_and_claimed_sign_special():
    """On free logits: the printed loss makes every token's choice uniform, the other one peaked and balanced."""
    ends = {}
    for sign in ("as_printed", "as_claimed"):
        fn = jax.grad(lambda x, sign=sign: routing_specialization_loss({"a": stats(x)}, 0.2, 0.1, top_k=1, sign=sign))
        step = lambda _, x, fn=fn: x - T_FREE * fn(x)  # noqa: E731
        first = jax.random.normal(jax.random.key(1), (T_FREE, 5))
        ends[sign] = stats(jax.jit(lambda x, step=step: jax.lax.fori_loop(0, 2000, step, x))(first))
    entropy = {sign: float(end.entropy_sums.sum() / T_FREE) for sign, end in ends.items()}
    assert entropy["as_printed"] > 0.98 * math.log(5)
    assert entropy["as_claimed"] < 0.1 * math.log(5)
    np.testing.assert_allclose(ends["as_claimed"].prob_sums[0, 0] / T_FREE, 0.2, atol=0.03)


def test_released_balance_is_k_when_uniform_and_cancels_over_layers():
    uniform = stats(jnp.zeros((T, E)), k=E)
    assert mixlora_balance(uniform, E) == pytest.approx(E)
    first, second = (stats(50.0 * jax.nn.one_hot(jnp.full(T, e), 2)) for e in (0, 1))
    both = jax.tree.map(lambda *x: jnp.concatenate(x), first, second)
    assert mixlora_balance(both, 2) == pytest.approx(1.0, abs=1e-5)  # as if balanced
    assert balance({"a": both}, 1) == pytest.approx(2.0, abs=1e-5)  # both layers have collapsed


def test_balance_by_the_likeliest_expert():
    logits = jnp.log(jnp.array([[0.6, 0.4, 1e-9], [0.6, 1e-9, 0.4]]))
    counted = jnp.array([1.0, 0, 0])
    wanted = 3 * jnp.sum(counted * jnp.mean(jax.nn.softmax(logits), axis=0))
    assert balance({"a": stats(logits, k=2)}, 2, "argmax") == pytest.approx(float(wanted), rel=1e-5)


def test_proximal_loss():
    tree = {"a": jnp.ones((2, 3)), "b": jnp.zeros(4)}
    assert proximal_loss(tree, tree) == 0
    assert proximal_loss(tree, {"a": jnp.zeros((2, 3)), "b": jnp.full(4, 2.0)}) == pytest.approx(6 + 16)


# --- bad input ---


def specialised(balance_weight: float, entropy_weight: float) -> jax.Array:
    return routing_specialization_loss({"a": stats(jnp.zeros((2, 2)))}, balance_weight, entropy_weight, top_k=1)


def routed(router: str) -> dict[str, int]:
    return matched_modules(CONFIG, AdapterConfig(4, experts=ExpertsConfig(router=router)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdapterConfig(rank=0), "adapters.rank = 0: expected at least 1"),
        (lambda: AdapterConfig(alpha=0.0), "adapters.alpha = 0.0"),
        (lambda: AdapterConfig(dropout=1.0), "adapters.dropout = 1.0: expected at least 0 and below 1"),
        (lambda: AdapterConfig(targets=()), "adapters.targets = ()"),
        (lambda: AdapterConfig(targets=("q", "q")), "each target once"),
        (lambda: ExpertsConfig(2, 3), "experts.top_k = 3: expected 1 <= top_k <= num_experts = 2"),
        (lambda: ExpertsConfig(0, 0), "experts.num_experts = 0"),
        (lambda: ExpertsConfig(targets=("q",)), "experts.targets = ['q']: expected some of gate, up, down"),
        (lambda: presets.mixlora(targets=("q", "v")), "experts.targets = ['gate', 'up', 'down']: expected some of"),
        (lambda: matched_modules(CONFIG, AdapterConfig(targets=("q", "x_proj"))), "adapters.targets = 'x_proj'"),
        (lambda: matched_modules(CONFIG, AdapterConfig(rank=17)), "adapters.rank = 17: expected at most min(in, out)"),
        (lambda: routed("nobody"), "nobody"),
        (lambda: routed("loss_free"), "keeps no state"),
        (lambda: routed("top_p(p=1.5)"), "router p = 1.5: expected"),
        (lambda: proximal_loss({"a": jnp.ones(2)}, None), "anchor = None"),
        (lambda: specialised(-1.0, 0.1), "balance_weight = -1.0"),
        (lambda: specialised(1.0, -0.1), "entropy_weight = -0.1"),
        (lambda: routing_specialization_loss({}, 1.0, 0.1, top_k=1), "adapter_stats"),
    ],
)  # fmt: skip
def test_bad_input(make, message: str):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_feed_forward_that_is_a_mixture_matches_nothing():
    mixture = ModelConfig(vocab_size=64, hidden=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48,
                          moe=MoEConfig(num_experts=4, expert_dim=16))  # fmt: skip
    with pytest.raises(ValueError, match=r"'gate': expected maps of the model.*2 layers' feed-forward is a mixture"):
        matched_modules(mixture, presets.mixlora(4, 8.0))
    assert matched_modules(mixture, presets.lora(4, 8.0, targets=("q", "o"))) == {"q": 2, "o": 2}


def test_adapters_of_another_base_or_number_of_experts():
    config = presets.mixlora(4, 8.0)
    tree = trained(config)
    require_adapters(CONFIG, config, tree)
    with pytest.raises(ValueError, match=r"adapters runs_0.*shape = .*: expected"):
        require_adapters(replace(CONFIG, ffn_dim=64), config, tree)
    with pytest.raises(ValueError, match=r"adapters runs_0.*shape"):
        require_adapters(CONFIG, presets.mixlora(4, 8.0, num_experts=4), tree)
