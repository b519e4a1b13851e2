"""Llama 2 and 3 (2307.09288, 2407.21783) and models of their form, SmolLM2 among them."""

from __future__ import annotations

from typing import Any

from moe.config import ModelConfig
from moe.pretrained.families.fields import Raw, common, flag, head_dim, kv_heads, size, sizes
from moe.pretrained.families.parts import ATTENTION, ENDS, FFN, NORMS, OUT_BIAS, QKV_BIAS, Family
from moe.pretrained.layouts import GateUp, Same, entry, in_layers

FFN_BIAS = in_layers([
    entry("ffn.gate_up_bias", ("mlp.gate_proj.bias", "mlp.up_proj.bias"), GateUp()),
    entry("ffn.down_bias", "mlp.down_proj.bias", Same()),
])  # fmt: skip
ENTRIES = ENDS + NORMS + ATTENTION + QKV_BIAS + OUT_BIAS + FFN + FFN_BIAS


def read(raw: Raw) -> ModelConfig:
    return ModelConfig(
        **common(raw),
        num_kv_heads=kv_heads(raw),
        head_dim=head_dim(raw),
        ffn_dim=size(raw, "intermediate_size"),
        moe=None,
        attention_bias="all" if flag(raw, "attention_bias", False) else "none",
        ffn_bias=flag(raw, "mlp_bias", False),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    return sizes(
        config,
        head_dim=config.head_dim,
        intermediate_size=config.ffn_dim,
        attention_bias=config.attention_bias == "all",
        mlp_bias=config.ffn_bias,
    )


LLAMA = Family("llama", "LlamaForCausalLM", read, write, lambda _: ENTRIES)
