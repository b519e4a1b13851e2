"""Every published family makes its router and policy, runs when it is small, and has the released sizes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.layer import MoELayer
from moe.policies import make_policy
from moe.presets import FAMILIES, preset
from moe.routing import make_router

RELEASED = {  # experts, active, width, width of the shared expert
    "mixtral": (8, 2, 14336, 0),
    "olmoe": (64, 8, 1024, 0),
    "qwen1_5_moe": (60, 4, 1408, 5632),
    "qwen2_moe": (64, 8, 2560, 20480),
    "qwen3_moe": (128, 8, 768, 0),
    "qwen3_moe_235b": (128, 8, 1536, 0),
    "deepseek_moe": (64, 6, 1408, 2816),
    "deepseek_v2": (160, 6, 1536, 3072),
    "deepseek_v2_lite": (64, 6, 1408, 2816),
    "deepseek_v3": (256, 8, 2048, 2048),
    "glm4_5": (160, 8, 1536, 1536),
    "glm4_5_air": (128, 8, 1408, 1408),
    "kimi_k2": (384, 8, 2048, 2048),
    "gpt_oss_20b": (32, 4, 2880, 0),
    "gpt_oss_120b": (128, 4, 2880, 0),
    "llama4_scout": (16, 1, 8192, 8192),
    "llama4_maverick": (128, 1, 8192, 8192),
    "switch": (8, 1, 3072, 0),
}
B, S, D = 2, 5, 8


def test_released_sizes() -> None:
    sizes = {name: preset(name) for name in FAMILIES}
    assert {n: (c.num_experts, c.top_k, c.expert_dim, c.shared_dim) for n, c in sizes.items()} == RELEASED
    assert {name for name, config in sizes.items() if config.shared_gate} == {"qwen1_5_moe", "qwen2_moe"}
    assert {name for name, config in sizes.items() if config.expert_bias} == {"gpt_oss_20b", "gpt_oss_120b"}
    assert all(family.__doc__ for family in FAMILIES.values())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow_after(6)
def test_family_runs_small_with_its_own_router_and_policy(name: str) -> None:
    full = preset(name)
    state = make_router(full).init_state()
    assert "bias" not in state or state["bias"].shape == (full.num_experts,)
    make_policy(full)

    config = replace(full, num_experts=16, expert_dim=4, shared_dim=4 if full.shared_dim else 0, dispatcher="einsum")
    layer, tokens = MoELayer(config, init_std=0.5, out_std=0.5), jnp.zeros((B, S), jnp.int32)
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(B, S, D)), jnp.float32)
    rest = (tokens == 0, tokens, make_router(config).init_state(), jax.random.key(1))  # a key: training
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x, *rest)  # drawing for real compiles for seconds
    params = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype), shapes)
    out, stats = jax.jit(layer.apply)(params, x, *rest)
    assert out.shape == x.shape
    assert jnp.isfinite(out).all()
    assert jnp.any(out != 0)
    assert stats.counts.sum() == B * S * config.top_k
    assert ("gate" in params["params"]) == name.startswith("gpt_oss")
    assert ("shared" in params["params"]) == (full.shared_dim > 0)


def test_unknown_family_is_named() -> None:
    with pytest.raises(ValueError, match=r"^preset = 'mixtrall': expected one of mixtral, olmoe, "):
        preset("mixtrall")
