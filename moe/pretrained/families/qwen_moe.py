"""Qwen1.5-MoE and Qwen2-MoE (2407.10671): a shared expert with a gate. Qwen3-MoE (2505.09388): none, norms of heads.

Trap: `norm_topk_prob` is false unless config.json says otherwise, in both.
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
    size,
    sizes,
    windows,
    written_windows,
)
from moe.pretrained.families.parts import ATTENTION, ENDS, FFN, MOE, NORMS, OUT_BIAS, QK_NORM, QKV_BIAS, Family
from moe.pretrained.layouts import GateUp, Linear, entry, in_layers
from moe.routing import make_router

SHARED = in_layers([
    entry(
        "moe.shared.ffn.gate_up", ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"), GateUp()
    ),
    entry("moe.shared.ffn.down", "mlp.shared_expert.down_proj.weight", Linear()),
    entry("moe.shared.gate", "mlp.shared_expert_gate.weight", Linear()),
])  # fmt: skip


def renormalizes(config: ModelConfig) -> bool:
    """What the router says, or False where it has no such option."""
    return config.moe is not None and bool(getattr(make_router(config.moe), "renormalize", False))


def mixture(raw: Raw, missing_experts: int, missing_k: int, missing_width: int, **more: Any) -> dict[str, Any]:
    """The fields of ModelConfig that say which layers are mixtures; the `missing` values are the class's."""
    dense = raw.get("mlp_only_layers") or []
    whole = isinstance(dense, list) and all(type(i) is int for i in dense)
    require(whole, "config.json mlp_only_layers", dense, "a list of layers")
    layers, every = size(raw, "num_hidden_layers"), size(raw, "decoder_sparse_step", 1)
    number = experts(raw, missing_experts, least=0)
    if number == 0 or not any((i + 1) % every == 0 and i not in dense for i in range(layers)):
        return {"moe": None}
    moe = MoEConfig(
        number,
        size(raw, "num_experts_per_tok", missing_k),
        size(raw, "moe_intermediate_size", missing_width),
        router=f"softmax_topk(renormalize={flag(raw, 'norm_topk_prob', False)})",
        **more,
    )
    inside = tuple(sorted({i for i in dense if 0 <= i < layers}))
    return {"moe": moe, "moe_every": every, "dense_layers": inside}


def lower_windows(raw: Raw) -> tuple[int, ...]:
    """Qwen2-MoE: every other layer below max_window_layers, the lowest first, unless layer_types says otherwise."""
    used, first = flag(raw, "use_sliding_window", False), size(raw, "max_window_layers", 28, least=0)
    layers = size(raw, "num_hidden_layers")
    default = [SLIDING if used and i % 2 == 0 and i < first else FULL for i in range(layers)]
    missing = 4096 if "sliding_window" not in raw else None
    return windows(raw, default, raw.get("sliding_window", missing) if used else None)


def read2(raw: Raw) -> ModelConfig:
    shared = size(raw, "shared_expert_intermediate_size", 5632)
    return ModelConfig(
        **common(raw),
        num_kv_heads=kv_heads(raw, missing=16),
        head_dim=head_dim(raw),
        ffn_dim=size(raw, "intermediate_size", 5632),
        attention_bias="qkv" if flag(raw, "qkv_bias", True) else "none",
        windows=lower_windows(raw),
        **mixture(raw, 60, 4, 1408, shared_dim=shared, shared_gate=True),
    )


def read3(raw: Raw) -> ModelConfig:
    window = raw.get("sliding_window", 4096) if flag(raw, "use_sliding_window", False) else None
    width = None if window is None else size(raw, "sliding_window", 4096)
    layers = size(raw, "num_hidden_layers")
    types = raw.get("layer_types")
    only = SLIDING if width else FULL  # transformers gives all layers one mask and does not look at layer_types
    same = types is None or types == [only] * layers
    require(same, "config.json layer_types", types, f"{only} in every layer, as use_sliding_window says")
    return ModelConfig(
        **common(raw),
        num_kv_heads=kv_heads(raw, missing=4),
        head_dim=head_dim(raw),
        ffn_dim=size(raw, "intermediate_size", 6144),
        qk_norm="head",
        attention_bias="all" if flag(raw, "attention_bias", False) else "none",
        windows=() if width is None else (width,) * layers,
        **mixture(raw, 128, 8, 768),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    moe, kinds = config.moe or MoEConfig(), config.layer_kinds
    plain = config.first_dense == 0  # else a list of all dense layers says it
    dense = list(config.dense_layers) if plain else [i for i, kind in enumerate(kinds) if kind == "dense"]
    return sizes(
        config,
        head_dim=config.head_dim,
        intermediate_size=config.ffn_dim,
        moe_intermediate_size=moe.expert_dim,
        num_experts=moe.num_experts if config.moe else 0,
        num_experts_per_tok=moe.top_k,
        norm_topk_prob=renormalizes(config),
        decoder_sparse_step=config.moe_every if plain else 1,
        mlp_only_layers=dense,
        use_sliding_window=any(config.windows),
    )


def write2(config: ModelConfig) -> dict[str, Any]:
    shared = config.moe.shared_dim if config.moe else 1
    fields = {"shared_expert_intermediate_size": shared, "qkv_bias": config.attention_bias == "qkv"}
    return write(config) | written_windows(config) | fields


def write3(config: ModelConfig) -> dict[str, Any]:
    bias = config.attention_bias == "all"
    return write(config) | {"sliding_window": max(config.windows, default=0) or None, "attention_bias": bias}


ENTRIES2 = ENDS + NORMS + ATTENTION + QKV_BIAS + FFN + MOE + SHARED
ENTRIES3 = ENDS + NORMS + ATTENTION + QKV_BIAS + OUT_BIAS + QK_NORM + FFN + MOE
QWEN2_MOE = Family("qwen2_moe", "Qwen2MoeForCausalLM", read2, write2, lambda _: ENTRIES2)
QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", read3, write3, lambda _: ENTRIES3)
