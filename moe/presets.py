"""Published mixture-of-experts layers as configurations: recipes, not classes. `preset(name)` looks one up.

Each is the released model's MoE layer; the decoder around it (dense first layers, attention, vocabulary) is not here,
nor are load-balancing coefficients. n shared experts are one of n times the width. Sizes are those of the checkpoints'
configuration files, read in other codebases that quote them; [recalled] marks what is from memory alone.
"""

from __future__ import annotations

from collections.abc import Callable

from moe.config import MoEConfig, require


def mixtral() -> MoEConfig:
    """Mixtral 8x7B (2401.04088; expert width [recalled])."""
    return MoEConfig(8, 2, 14336, router="softmax_topk")


def olmoe() -> MoEConfig:
    """OLMoE-1B-7B (2409.02060; expert width [recalled])."""
    return MoEConfig(64, 8, 1024, router="softmax_topk(renormalize=False)")


def qwen1_5_moe() -> MoEConfig:
    """Qwen1.5-MoE-A2.7B (released configuration)."""
    return MoEConfig(60, 4, 1408, shared_dim=5632, shared_gate=True, router="softmax_topk(renormalize=False)")


def qwen2_moe() -> MoEConfig:
    """Qwen2-57B-A14B (2407.10671)."""
    return MoEConfig(64, 8, 2560, shared_dim=20480, shared_gate=True, router="softmax_topk(renormalize=False)")


def qwen3_moe() -> MoEConfig:
    """Qwen3-30B-A3B (2505.09388)."""
    return MoEConfig(128, 8, 768, router="softmax_topk")


def qwen3_moe_235b() -> MoEConfig:
    """Qwen3-235B-A22B (2505.09388)."""
    return MoEConfig(128, 8, 1536, router="softmax_topk")


def deepseek_moe() -> MoEConfig:
    """DeepSeekMoE 16B (2401.06066)."""
    return MoEConfig(64, 6, 1408, shared_dim=2 * 1408, router="softmax_topk(renormalize=False)")


def deepseek_v2() -> MoEConfig:
    """DeepSeek-V2 (2405.04434); its 8 groups are the devices, of which a token reaches 3."""
    router = "group_limited(groups=8, kept_groups=3, scaling=16.0)"
    return MoEConfig(160, 6, 1536, shared_dim=2 * 1536, router=router)


def deepseek_v2_lite() -> MoEConfig:
    """DeepSeek-V2-Lite (2405.04434, appendix B); no groups, scaling 1."""
    return MoEConfig(64, 6, 1408, shared_dim=2 * 1408, router="group_limited")


def deepseek_v3() -> MoEConfig:
    """DeepSeek-V3 (2412.19437); its 8 groups are the nodes, of which a token reaches 4."""
    return MoEConfig(256, 8, 2048, shared_dim=2048, router=_biased_sigmoid(2.5, ", groups=8, kept_groups=4"))


def glm4_5() -> MoEConfig:
    """GLM-4.5 355B-A32B (2508.06471)."""
    return MoEConfig(160, 8, 1536, shared_dim=1536, router=_biased_sigmoid(2.5))


def glm4_5_air() -> MoEConfig:
    """GLM-4.5-Air 106B-A12B (2508.06471)."""
    return MoEConfig(128, 8, 1408, shared_dim=1408, router=_biased_sigmoid(1.0))


def kimi_k2() -> MoEConfig:
    """Kimi-K2 1T-A32B (2507.20534 [recalled])."""
    return MoEConfig(384, 8, 2048, shared_dim=2048, router=_biased_sigmoid(2.827))


def gpt_oss_20b() -> MoEConfig:
    """gpt-oss-20b (2508.10925; expert width [recalled])."""
    return MoEConfig(32, 4, 2880, activation="swiglu_oai", expert_bias=True, router="learned_bias")


def gpt_oss_120b() -> MoEConfig:
    """gpt-oss-120b (2508.10925)."""
    return MoEConfig(128, 4, 2880, activation="swiglu_oai", expert_bias=True, router="learned_bias")


def llama4_scout() -> MoEConfig:
    """Llama 4 Scout 17B-16E (released configuration; widths, and that every layer is one [recalled])."""
    return MoEConfig(16, 1, 8192, shared_dim=8192, router="sigmoid_input")


def llama4_maverick() -> MoEConfig:
    """Llama 4 Maverick 17B-128E (released configuration; every second layer)."""
    return MoEConfig(128, 1, 8192, shared_dim=8192, router="sigmoid_input")


def switch() -> MoEConfig:
    """Switch-Base with 8 experts (2101.03961; every second layer; width [recalled]); capacity 1.25 of each sequence."""
    policy = "capacity(factor=1.25, group=1, order='token')"
    return MoEConfig(8, 1, 3072, activation="relu", router="switch(jitter=0.01)", policy=policy)


def _biased_sigmoid(scaling: float, groups: str = "") -> str:
    """The router of DeepSeek-V3 and its followers, whose bias moves by loads in training (score is sigmoid)."""
    return f"loss_free(renormalize=True, group_score='top2', scaling={scaling}{groups})"


FAMILIES: dict[str, Callable[[], MoEConfig]] = {
    family.__name__: family
    for family in (
        mixtral,
        olmoe,
        qwen1_5_moe,
        qwen2_moe,
        qwen3_moe,
        qwen3_moe_235b,
        deepseek_moe,
        deepseek_v2,
        deepseek_v2_lite,
        deepseek_v3,
        glm4_5,
        glm4_5_air,
        kimi_k2,
        gpt_oss_20b,
        gpt_oss_120b,
        llama4_scout,
        llama4_maverick,
        switch,
    )
}


def preset(name: str) -> MoEConfig:
    """The layer of a published family; ValueError for a name that `FAMILIES` lacks."""
    require(name in FAMILIES, "preset", name, f"one of {', '.join(FAMILIES)}")
    return FAMILIES[name]()
