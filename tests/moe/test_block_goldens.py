"""Hugging Face's sparse blocks (tests/goldens/moe_blocks.npz) against our presets, and their routers by hand.

Legend: B sequences, S positions, T tokens, E experts, k active, d hidden, f expert width.
"""

import functools
import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import MoEConfig
from moe.layer import MoELayer
from moe.losses import RoutingStats, routing_stats, scoped_balance_loss
from moe.policies import make_policy
from moe.presets import preset
from moe.routers import group_limited
from moe.routers.group_limited import choose
from moe.routing import drop_padding, make_router, parse_call, top_k_indices

GOLDENS = Path(__file__).parents[1] / "goldens"


def _load_inputs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_inputs", GOLDENS / "inputs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


inputs = _load_inputs()


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDENS / "moe_blocks.npz") as archive:
        return dict(archive)


# Blocks

FAMILY = {
    "qwen2_moe": "qwen2_moe",
    "qwen3_moe": "qwen3_moe",
    "qwen3_moe_raw": "qwen3_moe",
    "deepseek_v2_greedy": "deepseek_v2_lite",
    "deepseek_v2_grouped": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "deepseek_v3_wide": "deepseek_v3",
    "gpt_oss": "gpt_oss_20b",
    "gpt_oss_large": "gpt_oss_20b",
    "switch": "switch",
    "switch_capacity": "switch",
    "llama4": "llama4_scout",
}
OPTIONS = {"groups": "groups", "keep": "kept_groups", "scale": "scaling"}  # theirs -> ours
B, S, D = inputs.BLOCK["batch"], inputs.BLOCK["seq"], inputs.BLOCK["hidden"]


def with_options(spec: str, **options: object) -> str:
    name, old = parse_call(spec, "spec")
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in {**old, **options}.items())})"


def config_of(name: str) -> MoEConfig:
    """The family's preset with the golden's sizes; what decides the routing stays the preset's."""
    shape, family = inputs.MOE_BLOCKS[name], preset(FAMILY[name])
    options = {ours: shape[theirs] for theirs, ours in OPTIONS.items() if theirs in shape}
    if name == "qwen3_moe_raw":
        options["renormalize"] = False
    policy = family.policy
    if "capacity" in shape:  # theirs is a number of tokens; the half keeps the ceiling from rounding up
        policy = with_options(policy, factor=(shape["capacity"] - 0.5) * shape["experts"] / (shape["top_k"] * S))
    return replace(
        family,
        num_experts=shape["experts"],
        top_k=shape["top_k"],
        expert_dim=shape["expert_dim"],
        shared_dim=shape.get("shared", 0),
        router=with_options(family.router, **options),
        policy=policy,
    )


def their_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Their parameters. Most keep products as [out, in], gpt-oss and Llama 4 their experts as [in, out]."""
    shape = inputs.MOE_BLOCKS[name]
    e, f = shape["experts"], shape["expert_dim"]
    if name.startswith("switch"):
        expert = {"wi": (f, D), "wo": (D, f)}
        experts = {f"experts.expert_{i}.{key}.weight": expert[key] for i in range(e) for key in expert}
        return {"router.classifier.weight": (e, D), **experts}
    if name.startswith(("gpt_oss", "llama4")):
        shapes = {"router.weight": (e, D), "experts.gate_up_proj": (e, D, 2 * f), "experts.down_proj": (e, f, D)}
    else:
        shapes = {"gate.weight": (e, D), "experts.gate_up_proj": (e, 2 * f, D), "experts.down_proj": (e, D, f)}
    if name.startswith("gpt_oss"):
        shapes |= {"router.bias": (e,), "experts.gate_up_proj_bias": (e, 2 * f), "experts.down_proj_bias": (e, D)}
    if "shared" in shape:
        module, s = "shared_experts" if name.startswith("deepseek") else "shared_expert", shape["shared"]
        shapes |= {f"{module}.{key}_proj.weight": (s, D) for key in ("gate", "up")}
        shapes |= {f"{module}.down_proj.weight": (D, s)}
    if name == "qwen2_moe":
        shapes["shared_expert_gate.weight"] = (1, D)
    return shapes


def in_halves(interleaved: jax.Array) -> jax.Array:
    """gpt-oss alternates gate and up columns; ours are all gates, then all ups."""
    return jnp.concatenate([interleaved[..., ::2], interleaved[..., 1::2]], axis=-1)


def our_params(name: str, theirs: dict[str, jax.Array]) -> dict:
    """Linear in theirs, so that gradients with respect to theirs come back in their layout."""
    w = {key.removesuffix(".weight"): value for key, value in theirs.items()}
    if name.startswith("switch"):
        stacked = (jnp.stack([w[f"experts.expert_{i}.{key}"].T for i in range(len(w) // 2)]) for key in ("wi", "wo"))
        gate_up, down = stacked
    else:
        gate_up, down = w["experts.gate_up_proj"], w["experts.down_proj"]
    experts = {"gate_up": gate_up, "down": down}
    if name.startswith("gpt_oss"):
        experts["gate_up"] = in_halves(gate_up)
        experts["gate_up_bias"] = in_halves(w["experts.gate_up_proj_bias"])
        experts["down_bias"] = w["experts.down_proj_bias"]
    elif not name.startswith(("switch", "llama4")):
        experts = {key: value.swapaxes(1, 2) for key, value in experts.items()}
    router = next(w[key] for key in ("gate", "router", "router.classifier") if key in w)
    params = {"router": router.T, "experts": experts}
    if "router.bias" in w:
        params["gate"] = {"bias": w["router.bias"]}
    if "shared" in inputs.MOE_BLOCKS[name]:
        module = "shared_experts" if name.startswith("deepseek") else "shared_expert"
        gate, up, down = (w[f"{module}.{key}_proj"].T for key in ("gate", "up", "down"))
        params["shared"] = {"ffn": {"gate_up": jnp.concatenate([gate, up], axis=1), "down": down}}
    if name == "qwen2_moe":
        params["shared"]["gate"] = w["shared_expert_gate"].T
    return params


def drawn(name: str) -> dict[str, jax.Array]:
    return {key: jnp.asarray(inputs.weight(f"block/{name}/{key}", shape)) for key, shape in their_shapes(name).items()}


def state_of(name: str, num_experts: int) -> dict[str, jax.Array]:
    if not name.startswith("deepseek_v3"):
        return {}
    bias = jnp.asarray(inputs.weight(f"block/{name}/gate.e_score_correction_bias", (num_experts,)))
    return {"bias": bias, "updates": jnp.int32(0)}


def expected(name: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(f"{name}/"): value for key, value in golden().items() if key.startswith(f"{name}/")}


def test_every_block_of_the_file_is_compared() -> None:
    assert set(FAMILY) == set(inputs.MOE_BLOCKS) == {key.split("/")[0] for key in golden()} - {"losses"}


@pytest.mark.parametrize("name", FAMILY)
def test_choice_and_weights(name: str) -> None:
    config, params, theirs = config_of(name), our_params(name, drawn(name)), expected(name)
    flat = jnp.asarray(inputs.block_input(name)).reshape(B * S, D)
    logits = jnp.dot(flat, params["router"], precision="float32")
    router, rest = make_router(config), (jnp.zeros(B * S, jnp.int32), state_of(name, config.num_experts), None)
    if "gate" in params:
        routing, losses = router.apply({"params": params["gate"]}, flat, logits, *rest)  # pyright: ignore
    else:
        routing, losses = router(flat, logits, *rest)
    assert losses == {}
    kept = make_policy(config)(routing, num_sequences=B, training=False)
    indices, weights = jnp.where(kept.valid, kept.indices, -1), jnp.where(kept.valid, kept.weights, 0.0)
    np.testing.assert_array_equal(indices, theirs["indices"].reshape(B * S, -1))
    np.testing.assert_allclose(weights, theirs["weights"].reshape(B * S, -1), rtol=1e-5)
    assert routing.scale_on == ("input" if name == "llama4" else "output")
    np.testing.assert_allclose(routing.probs.sum(axis=-1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("dispatcher", ["einsum", "auto"])
@pytest.mark.parametrize("name", FAMILY)
def test_block(name: str, dispatcher: str) -> None:
    # of `auto`, blocks of one size: those of several compile for long
    config = replace(config_of(name), dispatcher=dispatcher, block_size=8)  # pyright: ignore[reportArgumentType]
    layer, state = MoELayer(config, init_std=0.02, out_std=0.02), state_of(name, config.num_experts)
    tokens = jnp.zeros((B, S), jnp.int32)
    direction = jnp.asarray(inputs.direction(f"block/{name}/output", (B, S, D)))

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(theirs: dict[str, jax.Array], x: jax.Array):
        variables = {"params": our_params(name, theirs)}
        out, stats = layer.apply(variables, x, tokens == 0, tokens, state, None)
        return jnp.sum(out * direction), (out, stats.dropped)

    (_, (out, dropped)), (gradients, grad_x) = jax.jit(loss)(drawn(name), jnp.asarray(inputs.block_input(name)))
    theirs = expected(name)
    np.testing.assert_allclose(out, theirs["output"], rtol=1e-5, atol=1e-6)
    assert dropped.sum() == (theirs["indices"] < 0).sum()
    np.testing.assert_allclose(grad_x, theirs["grad_x"], rtol=1e-5, atol=1e-6 * np.abs(theirs["grad_x"]).max())
    fingerprints = {key.removeprefix("grad/"): value for key, value in theirs.items() if key.startswith("grad/")}
    assert set(fingerprints) == set(gradients)
    for key, (norm, projected) in fingerprints.items():
        gradient = np.asarray(gradients[key], np.float64)
        along = np.asarray(inputs.direction(f"block/{name}/{key}", gradient.shape), np.float64)
        assert np.linalg.norm(gradient) == pytest.approx(norm, rel=1e-5), key
        # The product is exact only relative to the lengths it was made from.
        tolerance = 1e-5 * norm * np.linalg.norm(along)
        assert np.sum(gradient * along) == pytest.approx(projected, abs=tolerance), key


# Losses


def sequence_loss(config: MoEConfig, state: dict, logits: jax.Array) -> jax.Array:
    """The balance loss of scope `sequence` of one layer's logits [B, S, E], all tokens valid."""
    b, s, e = logits.shape
    flat, token_valid = logits.reshape(b * s, e), jnp.ones((b, s), bool)
    routing, losses = make_router(config)(flat, flat, jnp.zeros(b * s, jnp.int32), state, None)
    routing = drop_padding(routing, token_valid.reshape(-1))
    stats: RoutingStats = routing_stats(routing, token_valid, losses, kept=routing.valid)
    stats = jax.tree.map(lambda x: x[None], stats)
    return scoped_balance_loss(stats, "sequence", top_k=config.top_k, total_tokens=float(b * s))


@pytest.mark.parametrize("bias", [0.0, 3.0], ids=["unbiased", "biased"])
def test_sequence_loss_of_deepseek_v3_counts_the_choice_without_bias(bias: float) -> None:
    config = replace(preset("deepseek_v3"), num_experts=inputs.NUM_EXPERTS, top_k=2)
    config = replace(config, router=with_options(config.router, groups=3, kept_groups=1))
    state = {"bias": bias * jnp.arange(inputs.NUM_EXPERTS, dtype=jnp.float32)}
    compare_loss("v3_sequence", config, state)


def test_balance_loss_of_switch_by_sequences() -> None:
    compare_loss("switch_aux", replace(preset("switch"), num_experts=inputs.NUM_EXPERTS), {})


def compare_loss(name: str, config: MoEConfig, state: dict) -> None:
    logits = jnp.asarray(inputs.balance_logits(0))
    value, gradient = jax.jit(jax.value_and_grad(functools.partial(sequence_loss, config, state)))(logits)
    np.testing.assert_allclose(value, golden()[f"losses/{name}"], rtol=1e-6)
    np.testing.assert_allclose(gradient, golden()[f"losses/{name}_grad"], atol=3e-8)


# Groups and biases


def route(logits: jax.Array, state: dict, top_k: int, **options):
    router = group_limited.make(logits.shape[-1], top_k, **options)
    return router(logits, logits, jnp.zeros(len(logits), jnp.int32), state, None)[0]


def test_experts_of_other_groups_are_out_even_where_every_biased_score_is_negative() -> None:
    scores, bias = jnp.array([[0.1, 0.2, 0.3, 0.4]]), jnp.full(4, -1.0)
    np.testing.assert_array_equal(choose(scores, bias, 2, groups=2, kept_groups=1, group_score="top2"), [[3, 2]])
    masked_with_zero = jnp.where(jnp.arange(4)[None] >= 2, scores + bias[None], 0.0)  # what a 0 for -inf would choose
    np.testing.assert_array_equal(top_k_indices(masked_with_zero, 2), [[0, 1]])


@pytest.mark.parametrize(("group_score", "chosen"), [("max", [0, 1]), ("top2", [2, 3]), ("topk", [2, 3])])
def test_best_expert_or_best_pair_makes_the_best_group(group_score: str, chosen: list[int]) -> None:
    scores = jnp.array([[0.9, 0.0, 0.6, 0.5, 0.55, 0.45]])
    indices = choose(scores, None, 2, groups=3, kept_groups=1, group_score=group_score)  # pyright: ignore
    np.testing.assert_array_equal(indices, [chosen])


def test_topk_group_score_is_the_sum_of_k_over_kept_groups() -> None:
    scores = jnp.array([[0.9, 0.1, 0.1, 0.6, 0.5, 0.0, 0.5, 0.5, 0.5]])  # sums of 1: .9 .6 .5; of 3: 1.1 1.1 1.5
    by = functools.partial(choose, scores, None, groups=3, group_score="topk")
    np.testing.assert_array_equal(by(2, kept_groups=2), [[0, 3]])
    np.testing.assert_array_equal(by(3, kept_groups=1), [[6, 7, 8]])


def test_a_token_reaches_at_most_the_kept_devices() -> None:
    logits = jax.random.normal(jax.random.key(0), (200, 16))
    devices = lambda routing: [len(set(row)) for row in np.asarray(routing.indices) // 2]  # noqa: E731
    assert max(devices(route(logits, {}, 6, groups=8, kept_groups=3))) == 3
    assert max(devices(route(logits, {}, 6))) > 3
    limited = route(logits, {}, 6, groups=8, kept_groups=3)
    assert all(len(set(row)) == 6 for row in np.asarray(limited.indices))
    assert limited.balance_indices is None
    np.testing.assert_array_equal(limited.counts, np.bincount(np.asarray(limited.indices).ravel(), minlength=16))


def test_the_bias_moves_the_choice_and_never_a_weight() -> None:
    logits = jax.random.normal(jax.random.key(1), (50, 8))
    options = {"score": "sigmoid", "selection_bias": True, "renormalize": True, "scaling": 2.5}
    state = {"bias": jnp.linspace(-0.4, 0.4, 8)}
    plain, biased = route(logits, {"bias": jnp.zeros(8)}, 3, **options), route(logits, state, 3, **options)
    assert (plain.indices != biased.indices).any()
    np.testing.assert_array_equal(plain.probs, biased.probs)
    assert biased.balance_indices is not None
    np.testing.assert_array_equal(biased.balance_indices, plain.indices)
    kept = jnp.take_along_axis(jax.nn.sigmoid(logits), biased.indices, axis=-1)
    np.testing.assert_allclose(biased.weights, 2.5 * kept / kept.sum(axis=-1, keepdims=True), rtol=1e-6)
    same = (jnp.sort(plain.indices) == jnp.sort(biased.indices)).all(axis=-1)
    assert 0 < same.sum() < len(same)
    np.testing.assert_allclose(jnp.sort(plain.weights)[same], jnp.sort(biased.weights)[same], rtol=1e-6)
    into_bias = jax.grad(lambda bias: jnp.sum(route(logits, {"bias": bias}, 3, **options).weights[:, 0]))
    np.testing.assert_array_equal(into_bias(state["bias"]), 0.0)


def test_the_bias_starts_at_zero_and_only_where_it_is_asked_for() -> None:
    state = group_limited.make(8, 2, selection_bias=True).init_state()
    np.testing.assert_array_equal(state["bias"], np.zeros(8, np.float32))
    assert group_limited.make(8, 2).init_state() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("score='tanh'", r"moe.router score = 'tanh': expected one of softmax, sigmoid"),
        ("groups=3", r"moe.router groups = 3: expected a divisor of 8"),
        ("groups=0", r"moe.router groups = 0: "),
        ("groups=4, kept_groups=5", r"moe.router kept_groups = 5: expected 1 to groups = 4"),
        ("groups=4, kept_groups=0", r"moe.router kept_groups = 0: "),
        ("groups=4, kept_groups=1", r"moe.router kept_groups = 1: expected groups of 2 to hold k = 3"),
        ("groups=4, kept_groups=2, fused=True", r"moe.router fused = True: expected False where groups are left out"),
        ("groups=4, kept_groups=2, group_score='mean'", r"moe.router group_score = 'mean': expected one of max, "),
        ("groups=4, kept_groups=2, group_score='topk'", r"moe.router group_score = 'topk': expected k = 3 to be "),
        ("groups=8, kept_groups=3, group_score='top2'", r"moe.router group_score = 'top2': expected two experts "),
        ("selection_bias=1", r"moe.router selection_bias = 1: expected True or False"),
        ("renormalize='yes'", r"moe.router renormalize = 'yes': expected True or False"),
        ("scaling=0.0", r"moe.router scaling = 0.0: expected a finite number above 0"),
    ],
)
def test_bad_options_are_named(options: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make_router(MoEConfig(8, 3, router=f"group_limited({options})"))
