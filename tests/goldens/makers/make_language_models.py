"""Writes language_models.npz: logits of tiny checkpoints in the released layout, loaded by Hugging Face's own loader.

For each CASE below (`../language_models.py` reads them and writes the checkpoint again):
  CASE/config    config.json as save_pretrained writes it, or in the released models' older form (`released`)
  CASE/tensors   JSON, name in the file -> shape, as save_pretrained writes them
  CASE/tokens    int32 [B, S], the first draw whose routers' margins are all clear
  CASE/logits    float32 [B, S, V]
  CASE/digest    SHA-256 of the tensors
`bites` of a case lists settings to change in the config one by one: each must change the logits, so that a reader that
ignores the setting fails.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors
import torch
import transformers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import language_models as golden  # noqa: E402

VOCAB, BATCH, SEQ = 40, 2, 12
MARGIN = 1e-3  # the last chosen and the first rejected score differ by this much, or another library may choose others
CHANGE = 0.01  # what a setting must change, relative to the logits' spread
PLAIN = {"rope_type": "default", "rope_theta": 500.0}  # a small base: all pairs turn within few positions
STRETCH = {"rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", **STRETCH, "beta_fast": 1.0, "beta_slow": 0.25}  # ramp over pairs 1.9 to 4.7 at D = 16
LLAMA3 = {"rope_type": "llama3", **STRETCH, "low_freq_factor": 0.5, "high_freq_factor": 2.0}
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-3, "rope_parameters": PLAIN,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN_MOE = {"moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
QWEN2_MOE = QWEN_MOE | {"shared_expert_intermediate_size": 18}
MIXTRAL = {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None}
OLMOE = {"num_experts": 6, "num_experts_per_tok": 2}
LATENT = {
    "moe_intermediate_size": 12, "num_key_value_heads": 4, "num_hidden_layers": 3, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "n_shared_experts": 1, "routed_scaling_factor": 2.5, "kv_lora_rank": 10,
    "q_lora_rank": 14, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6, "v_head_dim": 5, "n_group": 4, "topk_group": 2,
    "first_k_dense_replace": 1,
}  # fmt: skip
LATENT_YARN = YARN | {"beta_fast": 2.0, "mscale": 0.7, "mscale_all_dim": 1.0}
OSS = {
    "head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 4, "num_hidden_layers": 3,
    "rope_parameters": YARN | {"truncate": False}, "swiglu_limit": 7.0, "tie_word_embeddings": False,
}  # fmt: skip
UNSTRETCHED = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}

# name -> family's class prefix, settings beside COMMON, settings that must matter, and the tokens' length
CASES = {
    "llama": ("Llama", {}, [{"rms_norm_eps": 1e-6}]),
    "llama_tied_gqa": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 6}, []),
    "llama_biases": (
        "Llama", {"attention_bias": True, "mlp_bias": True}, [{"attention_bias": False}, {"mlp_bias": False}],
    ),
    "llama_linear": (
        "Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}}, [UNSTRETCHED],
    ),
    "llama_dynamic": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 2.0},
            "max_position_embeddings": 10,
        },
        [UNSTRETCHED, {"max_position_embeddings": 20}], 24,
    ),
    "llama_yarn": (
        "Llama", {"rope_parameters": YARN, "head_dim": 16},
        [UNSTRETCHED, {"rope_parameters": YARN | {"truncate": False}}], 24,
    ),
    "llama_llama3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16}, [UNSTRETCHED], 24),
    "qwen2": ("Qwen2", {}, []),
    "qwen2_window": (
        "Qwen2",
        {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
        [{"sliding_window": 5}, {"layer_types": ["full_attention"] * 4}],
    ),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}, []),
    "qwen3": ("Qwen3", {"head_dim": 12}, []),
    "qwen3_tied": ("Qwen3", {"head_dim": 16, "num_key_value_heads": 4, "tie_word_embeddings": True}, []),
    "qwen3_biases": ("Qwen3", {"head_dim": 8, "attention_bias": True}, [{"attention_bias": False}]),
    "mixtral": ("Mixtral", MIXTRAL, []),
    "mixtral_window": ("Mixtral", MIXTRAL | {"sliding_window": 4}, [{"sliding_window": 5}, {"sliding_window": None}]),
    "mixtral_top1": ("Mixtral", MIXTRAL | {"num_experts_per_tok": 1, "head_dim": 10}, []),
    "olmoe": ("Olmoe", OLMOE, []),
    "olmoe_clip": ("Olmoe", OLMOE | {"clip_qkv": 0.8, "num_key_value_heads": 4}, [{"clip_qkv": None}]),
    "olmoe_renormalized": ("Olmoe", OLMOE | {"norm_topk_prob": True}, [{"norm_topk_prob": False}]),
    "qwen2_moe": ("Qwen2Moe", QWEN2_MOE, [{"norm_topk_prob": True}]),
    "qwen2_moe_mixed": (
        "Qwen2Moe",
        QWEN2_MOE
        | {"num_hidden_layers": 4, "mlp_only_layers": [1], "decoder_sparse_step": 2, "norm_topk_prob": True},
        [{"norm_topk_prob": False}],
    ),
    "qwen3_moe": ("Qwen3Moe", QWEN_MOE | {"head_dim": 12, "norm_topk_prob": True}, [{"norm_topk_prob": False}]),
    "qwen3_moe_raw": ("Qwen3Moe", QWEN_MOE | {"head_dim": 8, "norm_topk_prob": False}, [{"norm_topk_prob": True}]),
    "qwen3_moe_mixed": (
        "Qwen3Moe",
        QWEN_MOE | {"head_dim": 8, "num_hidden_layers": 3, "mlp_only_layers": [0, 2], "norm_topk_prob": True}, [],
    ),
    "deepseek_v3": (
        "DeepseekV3", LATENT | {"rope_parameters": LATENT_YARN},
        [
            UNSTRETCHED, {"rope_parameters": LATENT_YARN | {"mscale": 1.0}}, {"rope_interleave": False},
            {"topk_group": 4}, {"norm_topk_prob": False}, {"routed_scaling_factor": 2.0},
        ], 24,
    ),
    "deepseek_v3_direct": (
        "DeepseekV3",
        LATENT
        | {
            "q_lora_rank": None, "n_shared_experts": 2, "norm_topk_prob": False, "attention_bias": True, "n_group": 1,
            "topk_group": 1, "routed_scaling_factor": 1.0, "first_k_dense_replace": 2,
        },
        [{"attention_bias": False}, {"norm_topk_prob": True}],
    ),
    "deepseek_v3_halves": ("DeepseekV3", LATENT | {"rope_interleave": False}, [{"rope_interleave": True}]),
    "gpt_oss": (
        "GptOss", OSS,
        [UNSTRETCHED, {"rope_parameters": YARN | {"truncate": True}}, {"sliding_window": 5}, {"swiglu_limit": 70.0}],
        24,
    ),
    "gpt_oss_top1": ("GptOss", OSS | {"num_experts_per_tok": 1, "num_hidden_layers": 2}, []),
}  # fmt: skip

# config.json as the released models of the family have it: the base beside `rope_scaling`, and `torch_dtype`
RELEASED = {
    "llama_llama3_released": "llama_llama3",
    "deepseek_v3_released": "deepseek_v3",
    "gpt_oss_released": "gpt_oss",
    "llama_linear_released": "llama_linear",
}


def classes(prefix):
    return getattr(transformers, f"{prefix}Config"), getattr(transformers, f"{prefix}ForCausalLM")


def fresh(prefix, settings, folder):
    """config.json and the tensors' shapes as save_pretrained writes them for a new model."""
    make_config, make_model = classes(prefix)
    make_model(make_config(**copy.deepcopy(COMMON | settings))).save_pretrained(folder)
    with safetensors.safe_open(folder / "model.safetensors", "np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return (folder / "config.json").read_text(), shapes


def released(text):
    found = json.loads(text)
    rope = found.pop("rope_parameters")
    found["rope_theta"] = rope.pop("rope_theta")
    # the oldest models say `type`
    if rope["rope_type"] in ("linear", "yarn") and found["model_type"] != "gpt_oss":
        rope["type"] = rope.pop("rope_type")
    found["rope_scaling"] = rope
    found["torch_dtype"] = found.pop("dtype")
    return json.dumps(found, indent=2)


def load(prefix, folder, **changes):
    make_config, make_model = classes(prefix)
    config = make_config.from_pretrained(folder)
    for name, value in copy.deepcopy(changes).items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    net, report = make_model.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    if not changes:
        assert not any(report.values()), report
    return net.eval()


def margins(net):
    """Collects, for every call of a router, the least gap between a chosen and a rejected score."""
    found, config = [], net.config

    def clear(scores, k):
        best = scores.sort(dim=-1, descending=True).values
        if k < best.shape[-1]:
            found.append((best[..., k - 1] - best[..., k]).min().item())

    def look(module, _, output):
        logits, chosen = output[0], output[-1]
        scores = logits if "GptOss" in type(module).__name__ else logits.softmax(dim=-1)
        if "Deepseek" in type(module).__name__:
            scores = logits.sigmoid() + module.e_score_correction_bias
            plain = logits.sigmoid().topk(chosen.shape[-1]).indices.sort().values
            assert not torch.equal(plain, scores.topk(chosen.shape[-1]).indices.sort().values), "the bias does nothing"
            grouped = scores.unflatten(-1, (config.n_group, -1))
            best = grouped.topk(2, dim=-1).values.sum(dim=-1)
            clear(best, config.topk_group)
            kept = torch.zeros_like(best).scatter(-1, best.topk(config.topk_group).indices, 1.0)
            scores = grouped.masked_fill(kept[..., None] == 0, -9.0).flatten(-2)
        expected = scores.topk(chosen.shape[-1]).indices.sort().values
        assert torch.equal(expected, chosen.sort().values), "the router chooses otherwise"
        clear(scores, chosen.shape[-1])

    routers = [module for module in net.modules() if type(module).__name__.lower().endswith("topkrouter")]
    assert bool(routers) == any(part in type(net).__name__.lower() for part in ("moe", "mixtral", "deepseek", "oss"))
    for module in routers:
        module.register_forward_hook(look)
    return found


@torch.no_grad()
def run(net, tokens):
    return net(input_ids=torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()


def clear_tokens(case, net, seq):
    """The first draw with clear margins, and its logits."""
    found = margins(net)
    for attempt in range(1000):
        found.clear()
        tokens = golden.inputs.draw_integers(f"language_models/{case}/tokens/{attempt}", (BATCH, seq), VOCAB)
        logits = run(net, tokens)
        if min(found, default=1.0) > MARGIN:
            return tokens.astype(np.int32), logits, attempt, min(found, default=1.0)
    raise AssertionError(f"{case}: no inputs with clear margins")


def same_file(net, folder, again):
    """What was loaded is written back bit by bit, so nothing was left out or rounded."""
    net.save_pretrained(again)
    files = [safetensors.numpy.load_file(path / "model.safetensors") for path in (folder, again)]
    assert golden.digest_of(files[0]) == golden.digest_of(files[1])
    return golden.digest_of(files[0])


def make(case, prefix, settings, bites, seq=SEQ, form=str):
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        text, shapes = fresh(prefix, settings, root / "fresh")
        text = form(text)
        golden.write_files(case, text, shapes, root / "checkpoint", 1)
        net = load(prefix, root / "checkpoint")
        digest = same_file(net, root / "checkpoint", root / "again")
        tokens, logits, attempt, margin = clear_tokens(case, net, seq)
        spread = logits.std()
        for change in bites:
            moved = np.abs(run(load(prefix, root / "checkpoint", **change), tokens) - logits).max() / spread
            assert moved > CHANGE, f"{case}: {change} changes {moved}"
    print(f"{case}: {len(shapes)} tensors, spread {spread:.3f}, draw {attempt}, margin {margin:.4f}", flush=True)
    return {
        f"{case}/config": np.array(text), f"{case}/tensors": np.array(json.dumps(shapes)), f"{case}/tokens": tokens,
        f"{case}/logits": logits, f"{case}/digest": np.array(digest),
    }  # fmt: skip


def main():
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    out = {}
    for case, row in CASES.items():
        out |= make(case, *row)
    for case, original in RELEASED.items():
        prefix, settings, _, *seq = CASES[original]
        out |= make(case, prefix, settings, [], *seq, form=released)
    np.savez_compressed(golden.FILE, **out)
    print(golden.FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
