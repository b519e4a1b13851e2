"""DeepSeek-V3 and R1 (2412.19437), Kimi-K2's form: latent attention, dense layers first, sigmoid routing with a bias.

The layers beyond num_hidden_layers predict further tokens (section 2.2 of the paper); generation one token at a time
does not use them and they are left out.
"""

from __future__ import annotations

from typing import Any

from moe.config import LatentConfig, ModelConfig, MoEConfig, require
from moe.pretrained.families.fields import Raw, common, experts, flag, number, only, size, sizes
from moe.pretrained.families.parts import ENDS, FFN, MOE, NORMS, OUT_BIAS, Family
from moe.pretrained.families.qwen_moe import renormalizes
from moe.pretrained.layouts import Entry, GateUp, KeyValueUp, Layout, Linear, Rotary, Same, entry, in_layers
from moe.routers.group_limited import GroupLimited
from moe.routing import make_router

SHARED = in_layers([
    entry(
        "moe.shared.ffn.gate_up", ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"), GateUp()
    ),
    entry("moe.shared.ffn.down", "mlp.shared_experts.down_proj.weight", Linear()),
    entry("moe.state.bias", "mlp.gate.e_score_correction_bias", Same()),
])  # fmt: skip


def entries(raw: Raw) -> tuple[Entry, ...]:
    dims, pairs = size(raw, "qk_rope_head_dim", 64), flag(raw, "rope_interleave", True)

    def turned(inner: Layout) -> Layout:
        return Rotary(inner, dims) if pairs else inner

    attention = in_layers([
        entry("attention.wq", "self_attn.q_proj.weight", turned(Linear())),
        entry("attention.wq_down", "self_attn.q_a_proj.weight", Linear()),
        entry("attention.bq_down", "self_attn.q_a_proj.bias", Same()),
        entry("attention.q_norm.scale", "self_attn.q_a_layernorm.weight", Same()),
        entry("attention.wq_up", "self_attn.q_b_proj.weight", turned(Linear())),
        entry("attention.wkv_down", "self_attn.kv_a_proj_with_mqa.weight", turned(Linear())),
        entry("attention.bkv_down", "self_attn.kv_a_proj_with_mqa.bias", turned(Same())),
        entry("attention.kv_norm.scale", "self_attn.kv_a_layernorm.weight", Same()),
        entry(("attention.wk_up", "attention.wv_up"), "self_attn.kv_b_proj.weight", KeyValueUp()),
        entry("attention.wo", "self_attn.o_proj.weight", Linear(inputs=2)),
    ])  # fmt: skip
    return ENDS + NORMS + attention + OUT_BIAS + FFN + MOE + SHARED


def read(raw: Raw) -> ModelConfig:
    only(raw, "topk_method", "noaux_tc")
    only(raw, "scoring_func", "sigmoid")
    only(raw, "moe_layer_freq", 1)
    fields, layers = common(raw), size(raw, "num_hidden_layers")
    heads = fields["num_heads"]
    require(raw.get("num_key_value_heads") in (None, heads), "config.json num_key_value_heads",
            raw.get("num_key_value_heads"), f"num_attention_heads = {heads}")
    nope, turned = size(raw, "qk_nope_head_dim", 128), size(raw, "qk_rope_head_dim", 64)
    direct = "q_lora_rank" in raw and raw["q_lora_rank"] is None
    latent = LatentConfig(
        q_rank=0 if direct else size(raw, "q_lora_rank", 1536),
        kv_rank=size(raw, "kv_lora_rank", 512),
        nope_dim=nope,
        rope_dim=turned,
        value_dim=size(raw, "v_head_dim", 128),
    )
    first = min(size(raw, "first_k_dense_replace", 3, least=0), layers)
    return ModelConfig(
        **fields,
        num_kv_heads=heads,
        head_dim=nope + turned,
        ffn_dim=size(raw, "intermediate_size", 18432),
        moe=mixture(raw) if first < layers else None,
        first_dense=first if first < layers else 0,
        attention_bias="all" if flag(raw, "attention_bias", False) else "none",
        latent=latent,
    )


def mixture(raw: Raw) -> MoEConfig:
    width = size(raw, "moe_intermediate_size", 2048)
    # A null is one group; a missing value is the class's.
    groups, kept = (size(raw, name, 1 if name in raw else n) for name, n in (("n_group", 8), ("topk_group", 4)))
    shared = size(raw, "n_shared_experts", 0 if "n_shared_experts" in raw else 1, least=0)
    options = {
        "score": "sigmoid",
        "groups": groups,
        "kept_groups": kept,
        "group_score": "top2",
        "selection_bias": True,
        "renormalize": flag(raw, "norm_topk_prob", True),
        "scaling": number(raw, "routed_scaling_factor", 2.5),
    }
    called = ", ".join(f"{name}={value!r}" for name, value in options.items())
    top_k = size(raw, "num_experts_per_tok", 8)
    return MoEConfig(experts(raw, 256), top_k, width, shared_dim=shared * width, router=f"group_limited({called})")


def write(config: ModelConfig) -> dict[str, Any]:
    moe, latent = config.moe or MoEConfig(), config.latent or LatentConfig()
    require(moe.shared_dim % moe.expert_dim == 0, "model.moe.shared_dim", moe.shared_dim,
            f"a multiple of expert_dim = {moe.expert_dim} (shared experts have its width)")
    router = make_router(moe)
    groups = router if isinstance(router, GroupLimited) else None
    kinds = config.layer_kinds
    return sizes(
        config,
        intermediate_size=config.ffn_dim,
        moe_intermediate_size=moe.expert_dim,
        first_k_dense_replace=kinds.index("moe") if "moe" in kinds else config.num_layers,
        n_routed_experts=moe.num_experts,
        n_shared_experts=moe.shared_dim // moe.expert_dim,
        num_experts_per_tok=moe.top_k,
        n_group=groups.groups if groups else 1,
        topk_group=groups.kept_groups if groups else 1,
        norm_topk_prob=renormalizes(config),
        routed_scaling_factor=groups.scaling if groups else 1.0,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        q_lora_rank=latent.q_rank or None,
        kv_lora_rank=latent.kv_rank,
        qk_nope_head_dim=latent.nope_dim,
        qk_rope_head_dim=latent.rope_dim,
        v_head_dim=latent.value_dim,
        attention_bias=config.attention_bias == "all",
    )


def further_layers(raw: Raw) -> tuple[tuple[str, str], ...]:
    first, more = size(raw, "num_hidden_layers"), size(raw, "num_nextn_predict_layers", 1, least=0)
    layers = "|".join(str(i) for i in range(first, first + more))
    why = "the layers for multi-token prediction are left out"
    return ((rf"model\.layers\.({layers})\..*", why),) if more else ()


DEEPSEEK_V3 = Family("deepseek_v3", "DeepseekV3ForCausalLM", read, write, entries, further_layers)
