"""Qwen2 and Qwen2.5 (2407.10671): biases of q, k and v. Qwen3 (2505.09388): norms of the query and key heads."""

from __future__ import annotations

from typing import Any

from moe.config import ModelConfig
from moe.pretrained.families.fields import (
    FULL,
    SLIDING,
    Raw,
    common,
    flag,
    head_dim,
    kv_heads,
    size,
    sizes,
    windows,
    written_windows,
)
from moe.pretrained.families.parts import ATTENTION, ENDS, FFN, NORMS, OUT_BIAS, QK_NORM, QKV_BIAS, Family


def upper_windows(raw: Raw) -> tuple[int, ...]:
    """Layers from max_window_layers on have the window, unless layer_types says otherwise."""
    window = size(raw, "sliding_window", 4096) if flag(raw, "use_sliding_window", False) else None
    window = None if "sliding_window" in raw and raw["sliding_window"] is None else window
    first, layers = size(raw, "max_window_layers", 28, least=0), size(raw, "num_hidden_layers")
    default = [SLIDING if window is not None and i >= first else FULL for i in range(layers)]
    return windows(raw, default, window)


def written_upper_windows(config: ModelConfig) -> dict[str, Any]:
    """As `written_windows`, and for readers that know no layer_types the first layer with a window."""
    each = config.windows or (0,) * config.num_layers
    first = next((i for i, window in enumerate(each) if window), config.num_layers)
    return written_windows(config) | {"use_sliding_window": any(each), "max_window_layers": first}


def read2(raw: Raw) -> ModelConfig:
    return ModelConfig(
        **common(raw),
        num_kv_heads=kv_heads(raw, missing=32),
        head_dim=head_dim(raw),
        ffn_dim=size(raw, "intermediate_size"),
        moe=None,
        attention_bias="qkv",
        windows=upper_windows(raw),
    )


def read3(raw: Raw) -> ModelConfig:
    return ModelConfig(
        **common(raw),
        num_kv_heads=kv_heads(raw, missing=32),
        head_dim=size(raw, "head_dim", None if "head_dim" in raw else 128),
        ffn_dim=size(raw, "intermediate_size"),
        moe=None,
        qk_norm="head",
        attention_bias="all" if flag(raw, "attention_bias", False) else "none",
        windows=upper_windows(raw),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    return sizes(config, head_dim=config.head_dim, intermediate_size=config.ffn_dim, **written_upper_windows(config))


def write3(config: ModelConfig) -> dict[str, Any]:
    return write(config) | {"attention_bias": config.attention_bias == "all"}


ENTRIES2 = ENDS + NORMS + ATTENTION + QKV_BIAS + FFN
ENTRIES3 = ENDS + NORMS + ATTENTION + QKV_BIAS + OUT_BIAS + QK_NORM + FFN
QWEN2 = Family("qwen2", "Qwen2ForCausalLM", read2, write, lambda _: ENTRIES2)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", read3, write3, lambda _: ENTRIES3)
