"""config.json of every family: both forms of transformers, the classes' defaults, what is not built and refused."""

import json
from dataclasses import replace

import pytest

from moe.config import RopeScaling
from moe.pretrained.checkpoint import FAMILIES, config_of, released_config, router_of, same_model

# Sizes without which no family is read.
LEAST = {"vocab_size": 40, "hidden_size": 128, "intermediate_size": 20, "num_hidden_layers": 4,
         "num_attention_heads": 16, "max_position_embeddings": 64}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
OSS = {"num_local_experts": 6, "num_experts_per_tok": 2}


def read(family, **changes):
    return config_of({"model_type": family, **LEAST, **changes})


# Fields with which one thing can be said in several ways.
MANY_WAYS = {"rope_scaling", "mlp_only_layers", "decoder_sparse_step", "sliding_window", "max_window_layers",
             "use_sliding_window", "head_dim"}  # fmt: skip


@pytest.mark.parametrize("old", ["llama_llama3", "deepseek_v3", "gpt_oss", "llama_linear"])
def test_both_forms_of_transformers_say_the_same(golden, old):
    """4.x: rope_theta and rope_scaling, torch_dtype. 5.x: rope_parameters, dtype."""
    new, before = golden.config(old), golden.config(f"{old}_released")
    assert "rope_parameters" in new
    assert "rope_scaling" in before
    assert config_of(new) == config_of(before)


def test_what_is_written_reads_the_same(golden):
    """All cases of the golden file; the config.json that the family writes holds what it needs to be read by others."""
    for case in golden.CASES:
        raw = golden.config(case)
        config, family = config_of(raw), FAMILIES[raw["model_type"]]
        written = json.loads(json.dumps(released_config(family, config)))
        assert config_of(written) == config, case
        assert same_model(config, written), case
        assert (written["model_type"], written["architectures"]) == (raw["model_type"], raw["architectures"])
        same = raw.keys() & written.keys() - MANY_WAYS
        assert len(same) >= 12
        for name in same:
            assert written[name] == raw[name], (case, name)


def test_gpt_oss_without_sliding_layers_still_has_a_window():
    """transformers builds the mask of sliding layers whether there are any or not."""
    config = read("gpt_oss", **OSS, num_key_value_heads=4, layer_types=["full_attention"] * 4, sliding_window=8)
    written = released_config(FAMILIES["gpt_oss"], config)
    assert config.windows == ()
    assert written["sliding_window"] > 0
    assert config_of(written) == config


# --- what a missing value means ---

DEFAULTS = {  # family, what is given -> fields of the model
    "llama": ("llama", {}, {"num_kv_heads": 16, "head_dim": 8, "rope_theta": 1e4, "norm_eps": 1e-6,
                            "attention_bias": "none", "ffn_bias": False, "tie_embeddings": False}),
    "llama heads": ("llama", {"num_key_value_heads": 2, "head_dim": 6}, {"num_kv_heads": 2, "head_dim": 6}),
    "llama null heads": ("llama", {"num_key_value_heads": None, "head_dim": None}, {"num_kv_heads": 16, "head_dim": 8}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}, {"attention_bias": "qkv", "windows": ()}),
    "qwen2 window off": ("qwen2", {"num_key_value_heads": 2, "sliding_window": 8, "max_window_layers": 1},
                         {"windows": ()}),
    "qwen2 window": (
        "qwen2", {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
        {"windows": (0, 0, 0, 8)},
    ),
    "qwen2 layer types": (
        "qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 8,
         "layer_types": ["sliding_attention", "full_attention"] * 2},
        {"windows": (8, 0, 8, 0)},
    ),
    "qwen3": ("qwen3", {"num_key_value_heads": 2}, {"head_dim": 128, "qk_norm": "head", "attention_bias": "none"}),
    "mixtral": ("mixtral", {"num_key_value_heads": 2}, {"rope_theta": 1e6, "norm_eps": 1e-5, "windows": ()}),
    "mixtral window": ("mixtral", {"num_key_value_heads": 2, "sliding_window": 8}, {"windows": (8,) * 4}),
    "olmoe": ("olmoe", {}, {"qk_norm": "width", "clip_qkv": 0.0, "norm_eps": 1e-5}),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"num_key_value_heads": 2}, {"attention_bias": "qkv", "dense_layers": ()}),
    "qwen2_moe lower windows": (
        "qwen2_moe",
        EXPERTS | {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        {"windows": (8, 0, 0, 0)},
    ),
    "qwen3_moe dense": ("qwen3_moe", EXPERTS | {"mlp_only_layers": [0, 1, 2, 3]}, {"moe": None}),
    "qwen3_moe mixed": (
        "qwen3_moe", EXPERTS | {"mlp_only_layers": [1], "decoder_sparse_step": 2},
        {"layer_kinds": ("dense", "dense", "dense", "moe")},
    ),
    "deepseek_v3": ("deepseek_v3", {}, {"first_dense": 3, "head_dim": 192}),
    "gpt_oss": ("gpt_oss", OSS, {"windows": (128, 0, 128, 0), "sinks": True, "attention_bias": "all", "head_dim": 64,
                                 "rope_scaling": RopeScaling("yarn", 32.0, 4096, truncate=False),
                                 "rope_theta": 150_000.0}),
    "gpt_oss unstretched": ("gpt_oss", OSS | {"rope_scaling": {"rope_type": "default"}}, {"rope_scaling": None}),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_missing_value_is_the_classes_default(name):
    family, given, wanted = DEFAULTS[name]
    config = read(family, **given)
    assert {field: getattr(config, field) for field in wanted} == wanted


ROUTERS = {  # family, what is given -> what the router does
    "mixtral": ("mixtral", {}, {"num_experts": 8, "top_k": 2, "renormalize": True}),
    "olmoe": ("olmoe", {}, {"num_experts": 64, "top_k": 8, "renormalize": False}),
    "qwen2_moe": ("qwen2_moe", {}, {"num_experts": 60, "top_k": 4, "renormalize": False}),
    "qwen3_moe": ("qwen3_moe", {}, {"num_experts": 128, "top_k": 8, "renormalize": False}),
    "qwen3_moe yes": ("qwen3_moe", {"norm_topk_prob": True}, {"renormalize": True}),
    "5.x's other name": ("qwen3_moe", {"num_local_experts": 6, "num_experts_per_tok": 2}, {"num_experts": 6}),
    "deepseek_v3": ("deepseek_v3", {}, {"num_experts": 256, "top_k": 8, "groups": 8, "kept_groups": 4,
                                        "score": "sigmoid", "group_score": "top2", "scaling": 2.5,
                                        "renormalize": True, "selection_bias": True}),
    "gpt_oss": ("gpt_oss", {}, {"num_experts": 128, "top_k": 4}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name):
    family, given, wanted = ROUTERS[name]
    router = router_of(read(family, **given).moe)
    assert {field: getattr(router, field) for field in wanted} == wanted


def test_routers_that_choose_alike_are_equal():
    moe = read("deepseek_v3", n_group=4, topk_group=2, num_experts_per_tok=4).moe
    assert router_of(moe) == router_of(replace(moe, router=moe.router.replace("top2", "topk")))
    assert router_of(moe) != router_of(replace(moe, router=moe.router.replace("top2", "max")))
    whole = replace(moe, router=moe.router.replace("kept_groups=2", "kept_groups=4"))
    assert router_of(whole) == router_of(replace(whole, router=whole.router.replace("top2", "max")))
    assert router_of(whole) != router_of(moe)


ROPE = {  # rope_scaling -> what it means
    "none": (None, None),
    "old name": ({"type": "linear", "factor": 2}, RopeScaling("linear", 2.0)),
    "linear": ({"rope_type": "linear", "factor": 2.0}, RopeScaling("linear", 2.0)),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, RopeScaling("dynamic", 2.0, 64)),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0},
        RopeScaling("llama3", 8.0, 32),
    ),
    "yarn": ({"rope_type": "yarn", "factor": 4.0}, RopeScaling("yarn", 4.0, 64)),
    "yarn in full": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2, "beta_slow": 0.5,
         "attention_factor": 0.9, "truncate": False, "mscale": 0.7, "mscale_all_dim": 1.0},
        RopeScaling("yarn", 4.0, 16, beta_fast=2.0, beta_slow=0.5, attention_factor=0.9, truncate=False, mscale=0.7,
                    mscale_all_dim=1.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROPE)
@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
def test_rope(name, form):
    given, wanted = ROPE[name]
    if form == "rope_parameters":
        config = read("llama", rope_parameters={"rope_theta": 500.0} | (given or {"rope_type": "default"}))
    else:
        config = read("llama", rope_scaling=given, rope_theta=500.0)
    assert (config.rope_scaling, config.rope_theta) == (wanted, 500.0)


# --- what is refused ---

REFUSED = {
    "no layers": ("llama", {"num_hidden_layers": 0}, "config.json num_hidden_layers = 0: expected a whole number"),
    "a size as text": ("llama", {"hidden_size": "32"}, "config.json hidden_size = '32'"),
    "a flag as a number": ("llama", {"attention_bias": 1}, "config.json attention_bias = 1: expected true or false"),
    "not a number": ("llama", {"rms_norm_eps": float("nan")}, "config.json rms_norm_eps = nan: expected a number"),
    "heads that do not divide": ("llama", {"num_key_value_heads": 3}, "num_kv_heads = 3: expected a divisor"),
    "hidden that heads do not divide": ("llama", {"num_attention_heads": 5}, "config.json num_attention_heads = 5"),
    "part of RoPE": ("llama", {"partial_rotary_factor": 0.5}, "config.json partial_rotary_factor = 0.5"),
    "multiplied logits": ("llama", {"logits_scaling": 8.0}, "config.json logits_scaling = 8.0"),
    "capped logits": ("qwen2", {"final_logit_softcapping": 30.0}, "config.json final_logit_softcapping = 30.0"),
    "gelu": ("mixtral", {"hidden_act": "gelu_pytorch_tanh"}, "config.json hidden_act = 'gelu_pytorch_tanh'"),
    "longrope": ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type = 'longrope'"),
    "an unknown RoPE setting": (
        "llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "offset": 1}}, "rope_scaling.offset",
    ),
    "RoPE without a factor": ("llama", {"rope_scaling": {"rope_type": "linear"}}, "config.json factor = None"),
    "layers of an unknown type": (
        "qwen2", {"layer_types": ["chunked_attention"] * 4}, "config.json layer_types = .*chunked",
    ),
    "too few layer types": ("qwen2", {"layer_types": ["full_attention"]}, "config.json layer_types = .*one for each"),
    "a sliding layer without a window": (
        "qwen2", {"layer_types": ["sliding_attention"] * 4}, "config.json sliding_window = None",
    ),
    "layer types that are not looked at": (
        "qwen3_moe", EXPERTS | {"layer_types": ["sliding_attention"] * 4}, "config.json layer_types = ",
    ),
    "more chosen than there are": ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 3}, "top_k = 3"),
    "two numbers of experts": (
        "mixtral", {"num_local_experts": 2, "num_experts": 3}, r"num_experts, num_local_experts = \[3, 2\]",
    ),
    "dense layers that are none": ("qwen2_moe", EXPERTS | {"mlp_only_layers": ["0"]}, "config.json mlp_only_layers"),
    "clip below zero": ("olmoe", {"clip_qkv": -1.0}, "config.json clip_qkv = -1.0"),
    "OLMoE's head": ("olmoe", {"head_dim": 16}, "config.json head_dim = 16"),
    "V2's choice": ("deepseek_v3", {"topk_method": "group_limited_greedy"}, "topk_method = 'group_limited_greedy'"),
    "V2's score": ("deepseek_v3", {"scoring_func": "softmax"}, "config.json scoring_func = 'softmax'"),
    "mixtures between": ("deepseek_v3", {"moe_layer_freq": 2}, "config.json moe_layer_freq = 2"),
    "fewer keys than heads": ("deepseek_v3", {"num_key_value_heads": 2}, "config.json num_key_value_heads = 2"),
    "another clamp": ("gpt_oss", OSS | {"swiglu_limit": 5.0}, "config.json swiglu_limit = 5.0"),
    "RoPE that means two things": ("gpt_oss", OSS | {"rope_scaling": None}, "config.json rope_scaling = None"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_built_is_refused_by_name(name):
    family, changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        read(family, **changes)
