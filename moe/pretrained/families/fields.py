"""Values of a config.json, read with a check and a name for the error, and written again.

The names, and what a missing one means, are those of the configuration classes of Hugging Face transformers ([code],
read in 5.23; 4.x where it says so). Only what the forward pass depends on at evaluation is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moe.config import ModelConfig, RopeScaling, require

Raw = Mapping[str, Any]

# Fields that other families, or forks of these, use to change the function, and the values that leave it as it is.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1.0),
    "logit_scale": (None, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "scale_emb": (None, 1.0),
    "scale_depth": (None,),
    "dim_model_base": (None,),
    "attention_chunk_size": (None,),
    "no_rope_layers": (None, []),
    "no_rope_layer_interval": (None,),
    "alibi": (None, False),
    "use_mrope": (None, False),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}


def size(raw: Raw, name: str, default: int | None = None, least: int = 1) -> int:
    """A whole number; `default` for a missing or null one, an error without."""
    value = raw.get(name)
    value = default if value is None else value
    require(type(value) is int and value >= least, f"config.json {name}", value, f"a whole number, at least {least}")
    assert isinstance(value, int)
    return value


def number(raw: Raw, name: str, default: float | None = None) -> float:
    """A finite number; `default` for a missing or null one, an error without."""
    value = raw.get(name)
    value = default if value is None else value
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    require(ok, f"config.json {name}", value, "a number")
    assert isinstance(value, int | float)
    return float(value)


def flag(raw: Raw, name: str, default: bool) -> bool:
    """True or false; `default` for a missing or null one."""
    value = raw.get(name)
    value = default if value is None else value
    require(isinstance(value, bool), f"config.json {name}", value, "true or false")
    return bool(value)


def only(raw: Raw, name: str, *allowed: Any) -> None:
    """ValueError if the field is there with another value."""
    if name in raw:
        shown = " or ".join("null" if value is None else str(value) for value in allowed)
        require(raw[name] in allowed, f"config.json {name}", raw[name], f"{shown}; nothing else is implemented")


def common(raw: Raw, *, theta: float = 10_000.0, eps: float = 1e-6) -> dict[str, Any]:
    """What all families say in the same way, as fields of ModelConfig.

    Args:
      theta: RoPE base when none is given.
      eps: of the norms when none is given.

    Raises:
      ValueError: a field that is missing, of a wrong type, or that changes the function in a way that is not built.
    """
    for name, values in NEUTRAL.items():
        only(raw, name, *values)
    only(raw, "hidden_act", "silu", "swish")
    heads = size(raw, "num_attention_heads")
    base, scaling = rope(raw, theta)
    return {
        "vocab_size": size(raw, "vocab_size"),
        "hidden": size(raw, "hidden_size"),
        "num_layers": size(raw, "num_hidden_layers"),
        "num_heads": heads,
        "tie_embeddings": flag(raw, "tie_word_embeddings", False),
        "rope_theta": base,
        "rope_scaling": scaling,
        "norm_eps": number(raw, "rms_norm_eps", eps),
        "context": size(raw, "max_position_embeddings", 0, least=0),
        "init_std": number(raw, "initializer_range", 0.02),
    }


def head_dim(raw: Raw) -> int:
    """The width of a head: `head_dim`, or an equal share of the hidden width."""
    hidden, heads = size(raw, "hidden_size"), size(raw, "num_attention_heads")
    if raw.get("head_dim") is None:
        require(hidden % heads == 0, "config.json num_attention_heads", heads, f"a divisor of hidden_size = {hidden}")
    return size(raw, "head_dim", hidden // heads)


def kv_heads(raw: Raw, missing: int | None = None) -> int:
    """Key and value heads; null means one for each query head, and so does a missing one without `missing`."""
    heads = size(raw, "num_attention_heads")
    return size(raw, "num_key_value_heads", heads if "num_key_value_heads" in raw or missing is None else missing)


def experts(raw: Raw, default: int, least: int = 1) -> int:
    """Routed experts of a layer; the classes of transformers take these names for one another and may write either."""
    given = [name for name in ("num_experts", "num_local_experts", "n_routed_experts") if raw.get(name) is not None]
    values = [size(raw, name, least=least) for name in given]
    require(len(set(values)) < 2, f"config.json {', '.join(given)}", values, "one number")
    return values[0] if values else default


def sizes(config: ModelConfig, **more: Any) -> dict[str, Any]:
    """`common` the other way round, and the fields in `more`."""
    require(config.context > 0, "model.context", config.context, "the number of positions the model is made for")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else written_rope(config.rope_scaling),
        **more,
    }


# --- RoPE ---

YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
LLAMA3 = ("low_freq_factor", "high_freq_factor")
ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    *YARN, *LLAMA3,
}  # fmt: skip


def rope(raw: Raw, theta: float) -> tuple[float, RopeScaling | None]:
    """Base and stretch, from `rope_theta` and `rope_scaling` (transformers 4.x) or from `rope_parameters` (5.x)."""
    given = next((name for name in ("rope_scaling", "rope_parameters") if raw.get(name)), "rope_scaling")
    values = raw.get(given) or {}
    field = f"config.json {given}"
    require(isinstance(values, Mapping), field, values, "an object")
    unknown = sorted(set(values) - ROPE_KEYS)
    require(not unknown, f"{field}.{unknown[0] if unknown else ''}", values, f"only {', '.join(sorted(ROPE_KEYS))}")
    only(values, "partial_rotary_factor", None, 1.0)
    base = number({**raw, **{k: v for k, v in values.items() if k == "rope_theta" and v}}, "rope_theta", theta)
    require(base > 1, "config.json rope_theta", base, "a number above 1")

    kind = values.get("rope_type") or values.get("type") or "default"
    kinds = ("default", "linear", "dynamic", "yarn", "llama3")
    require(kind in kinds, f"{field}.rope_type", kind, f"one of {', '.join(kinds)}")
    if kind == "default":
        return base, None
    context = size(raw, "max_position_embeddings")
    # transformers 5.x: a field of this name outside the object wins; the dynamic stretch starts at the whole context.
    inner = size(values, "original_max_position_embeddings", context)
    original = context if kind == "dynamic" else size(raw, "original_max_position_embeddings", inner)
    factor = number(values, "factor", context / original if kind == "yarn" else None)
    scale = number(values, "mscale_all_dim", 0.0)  # DeepSeek's attention looks at this one whatever the kind
    if kind == "linear":
        return base, RopeScaling("linear", factor, mscale_all_dim=scale)
    if kind == "dynamic":
        return base, RopeScaling("dynamic", factor, original, mscale_all_dim=scale)
    if kind == "llama3":
        low, high = (number(values, name) for name in LLAMA3)
        require(low < high, f"{field}.low_freq_factor", low, f"below high_freq_factor = {high}")
        return base, RopeScaling(
            "llama3", factor, original, low_freq_factor=low, high_freq_factor=high, mscale_all_dim=scale
        )
    if values.get("attention_factor") is not None:
        require(number(values, "attention_factor") > 0, f"{field}.attention_factor", values["attention_factor"],
                "a positive number")
    return base, RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=number(values, "beta_fast") if values.get("beta_fast") else 32.0,
        beta_slow=number(values, "beta_slow") if values.get("beta_slow") else 1.0,
        truncate=flag(values, "truncate", True),
        attention_factor=number(values, "attention_factor", 0.0),
        mscale=number(values, "mscale", 0.0),
        mscale_all_dim=scale,
    )


def written_rope(scaling: RopeScaling) -> dict[str, Any]:
    """`rope_scaling` of a config.json."""
    out: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("yarn", "llama3"):
        out["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        out |= {name: getattr(scaling, name) for name in LLAMA3}
    if scaling.kind == "yarn":
        out |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        out |= {name: getattr(scaling, name) for name in ("attention_factor", "mscale") if getattr(scaling, name)}
    return out | ({"mscale_all_dim": scaling.mscale_all_dim} if scaling.mscale_all_dim else {})


# --- windows ---

FULL, SLIDING = "full_attention", "sliding_attention"


def windows(raw: Raw, default: Sequence[str], window: Any) -> tuple[int, ...]:
    """A window for each layer from `layer_types`, or from `default` without; () when no layer has one."""
    types = raw.get("layer_types")
    types = list(default) if types is None else types
    field = "config.json layer_types"
    known = isinstance(types, list) and all(kind in (FULL, SLIDING) for kind in types)
    require(known, field, types, f"a list of {FULL} and {SLIDING}")
    layers = size(raw, "num_hidden_layers")
    require(len(types) == layers, field, types, f"one for each of num_hidden_layers = {layers}")
    if SLIDING not in types:
        return ()
    require(type(window) is int and window >= 1, "config.json sliding_window", window, "a width for the sliding layers")
    return tuple(window if kind == SLIDING else 0 for kind in types)


def written_windows(config: ModelConfig) -> dict[str, Any]:
    """`layer_types` and `sliding_window`; one width is all that these can say."""
    each = config.windows or (0,) * config.num_layers
    return {"layer_types": [SLIDING if window else FULL for window in each], "sliding_window": max(each) or None}
