"""gpt-oss (2508.10925): sinks, alternating windows, biases everywhere, gate and up interleaved and clamped.

Trap: no rope_scaling is none in transformers 4.x and the released YaRN in 5.x, so it must be written out.
"""

from __future__ import annotations

from typing import Any

from moe.config import ModelConfig, MoEConfig, require
from moe.pretrained.families.fields import (
    FULL,
    SLIDING,
    Raw,
    common,
    experts,
    flag,
    head_dim,
    kv_heads,
    only,
    size,
    sizes,
    windows,
    written_windows,
)
from moe.pretrained.families.parts import ATTENTION, ENDS, NORMS, OUT_BIAS, QKV_BIAS, Family
from moe.pretrained.layouts import Interleaved, Linear, Same, entry, in_layers

MOE = in_layers([
    entry("attention.sinks", "self_attn.sinks", Same()),
    entry("moe.router", "mlp.router.weight", Linear()),
    entry("moe.gate.bias", "mlp.router.bias", Same()),
    entry("moe.experts.gate_up", "mlp.experts.gate_up_proj", Interleaved()),
    entry("moe.experts.gate_up_bias", "mlp.experts.gate_up_proj_bias", Interleaved()),
    entry("moe.experts.down", "mlp.experts.down_proj", Same()),
    entry("moe.experts.down_bias", "mlp.experts.down_proj_bias", Same()),
])  # fmt: skip
ENTRIES = ENDS + NORMS + ATTENTION + QKV_BIAS + OUT_BIAS + MOE

RELEASED_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read(raw: Raw) -> ModelConfig:
    only(raw, "swiglu_alpha", 1.702)
    only(raw, "swiglu_limit", 7.0)
    if not raw.get("rope_scaling") and not raw.get("rope_parameters"):
        clear = "rope_scaling" not in raw
        require(clear, "config.json rope_scaling", None, 'an object; {"rope_type": "default"} for none')
        raw = {**raw, "rope_scaling": RELEASED_ROPE}
    layers = size(raw, "num_hidden_layers")
    width = size(raw, "intermediate_size", 2880)
    default = [FULL if i % 2 else SLIDING for i in range(layers)]
    return ModelConfig(
        **common(raw, theta=150_000.0, eps=1e-5),
        num_kv_heads=kv_heads(raw, missing=8),
        head_dim=head_dim(raw) if "head_dim" in raw else 64,
        ffn_dim=width,
        moe=MoEConfig(
            experts(raw, 128),
            size(raw, "num_experts_per_tok", 4),
            width,
            activation="swiglu_oai",
            expert_bias=True,
            router="learned_bias",
        ),
        attention_bias="all" if flag(raw, "attention_bias", True) else "none",
        sinks=True,
        windows=windows(raw, default, raw.get("sliding_window", 128)),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe or MoEConfig()
    fields = sizes(
        config,
        head_dim=config.head_dim,
        intermediate_size=moe.expert_dim,
        num_local_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        attention_bias=config.attention_bias == "all",
        swiglu_limit=7.0,
        **written_windows(config),
    )
    # transformers wants a window even where no layer slides.
    window, rope = fields["sliding_window"] or 128, fields["rope_scaling"] or {"rope_type": "default"}
    return fields | {"sliding_window": window, "rope_scaling": rope}


GPT_OSS = Family("gpt_oss", "GptOssForCausalLM", read, write, lambda _: ENTRIES)
