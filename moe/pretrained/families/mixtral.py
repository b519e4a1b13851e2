"""Mixtral (2401.04088): every layer a mixture, weights renormalised over the chosen experts."""

from __future__ import annotations

from typing import Any

from moe.config import ModelConfig, MoEConfig
from moe.pretrained.families.fields import Raw, common, experts, head_dim, kv_heads, size, sizes
from moe.pretrained.families.parts import ATTENTION, ENDS, NORMS, Family
from moe.pretrained.layouts import GateUp, Linear, entry, in_layers

MOE = in_layers([
    entry("moe.router", "block_sparse_moe.gate.weight", Linear()),
    entry(
        "moe.experts.gate_up",
        ("block_sparse_moe.experts.{e}.w1.weight", "block_sparse_moe.experts.{e}.w3.weight"),
        GateUp(),
    ),
    entry("moe.experts.down", "block_sparse_moe.experts.{e}.w2.weight", Linear()),
])  # fmt: skip
ENTRIES = ENDS + NORMS + ATTENTION + MOE


def read(raw: Raw) -> ModelConfig:
    layers, width = size(raw, "num_hidden_layers"), size(raw, "intermediate_size")
    window = None if raw.get("sliding_window") is None else size(raw, "sliding_window")
    return ModelConfig(
        **common(raw, theta=1e6, eps=1e-5),
        num_kv_heads=kv_heads(raw, missing=8),
        head_dim=head_dim(raw),
        ffn_dim=width,
        moe=MoEConfig(experts(raw, 8), size(raw, "num_experts_per_tok", 2), width),
        windows=() if window is None else (window,) * layers,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe or MoEConfig()
    return sizes(
        config,
        head_dim=config.head_dim,
        intermediate_size=moe.expert_dim,
        num_local_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        sliding_window=max(config.windows, default=0) or None,
    )


MIXTRAL = Family("mixtral", "MixtralForCausalLM", read, write, lambda _: ENTRIES)
