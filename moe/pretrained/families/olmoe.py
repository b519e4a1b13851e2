"""OLMoE (2409.02060): norms over the width of all query and key heads, clipped projections, weights as they are."""

from __future__ import annotations

from typing import Any

from moe.config import ModelConfig, MoEConfig, require
from moe.pretrained.families.fields import Raw, common, experts, flag, head_dim, kv_heads, number, size, sizes
from moe.pretrained.families.parts import ATTENTION, ENDS, MOE, NORMS, OUT_BIAS, QK_NORM, QKV_BIAS, Family
from moe.pretrained.families.qwen_moe import renormalizes

ENTRIES = ENDS + NORMS + ATTENTION + QKV_BIAS + OUT_BIAS + QK_NORM + MOE


def read(raw: Raw) -> ModelConfig:
    width, dim = size(raw, "intermediate_size"), head_dim(raw)
    share = size(raw, "hidden_size") // size(raw, "num_attention_heads")
    require(dim == share, "config.json head_dim", dim, f"hidden_size / num_attention_heads = {share}")
    clip = 0.0 if raw.get("clip_qkv") is None else number(raw, "clip_qkv")
    require(clip > 0 or raw.get("clip_qkv") is None, "config.json clip_qkv", clip, "null or a positive bound")
    renormalize = flag(raw, "norm_topk_prob", False)
    return ModelConfig(
        **common(raw, eps=1e-5),
        num_kv_heads=kv_heads(raw),
        head_dim=dim,
        ffn_dim=width,
        moe=MoEConfig(
            experts(raw, 64),
            size(raw, "num_experts_per_tok", 8),
            width,
            router=f"softmax_topk(renormalize={renormalize})",
        ),
        qk_norm="width",
        attention_bias="all" if flag(raw, "attention_bias", False) else "none",
        clip_qkv=clip,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe or MoEConfig()
    return sizes(
        config,
        intermediate_size=moe.expert_dim,
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        norm_topk_prob=renormalizes(config),
        attention_bias=config.attention_bias == "all",
        clip_qkv=config.clip_qkv or None,
    )


OLMOE = Family("olmoe", "OlmoeForCausalLM", read, write, lambda _: ENTRIES)
