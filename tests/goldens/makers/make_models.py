"""Writes models.npz: Hugging Face's sparse blocks and whole decoders on the weights of `../inputs.py`.

  block/NAME/{output,indices}         OlmoeSparseMoeBlock, MixtralSparseMoeBlock: forward and chosen experts
  model/NAME/{logits,loss}            tiny OLMoE, Qwen3-MoE and Mixtral language models, mean cross-entropy
  model/NAME/grad/PARAMETER           for every parameter: the gradient's Euclidean norm and its product with a fixed
                                      direction of the same shape
Every parameter is drawn from its own name, so a test that maps names to another library's tree needs no weights here.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import inputs  # noqa: E402

MARGIN = 1e-4  # the k-th and the next expert must differ by this much, or another library may choose differently


def fill(module, prefix=""):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.tensor(inputs.weight(prefix + name, tuple(parameter.shape))))


def require_margin(router_logits, top_k):
    probs = torch.softmax(router_logits.float(), dim=-1).sort(dim=-1, descending=True).values
    margin = (probs[..., top_k - 1] - probs[..., top_k]).min().item()
    assert margin > MARGIN, f"router margin {margin}: choose other inputs"


def moe_fields(shape):
    return {
        "hidden_size": shape["hidden"], "intermediate_size": shape["expert_dim"], "num_experts_per_tok": shape["top_k"],
    }  # fmt: skip


def block(name):
    shape = inputs.BLOCK
    if name == "olmoe":
        config = transformers.OlmoeConfig(num_experts=shape["experts"], norm_topk_prob=False, **moe_fields(shape))
        module = OlmoeSparseMoeBlock(config)
    else:
        config = transformers.MixtralConfig(num_local_experts=shape["experts"], **moe_fields(shape))
        module = MixtralSparseMoeBlock(config)
    module = module.float().eval()
    fill(module, f"block/{name}/")
    x = torch.tensor(inputs.draw("block/x", (shape["batch"], shape["seq"], shape["hidden"])))
    with torch.no_grad():
        logits, _, indices = module.gate(x)
        require_margin(logits, shape["top_k"])
        output = module(x)
    return {"output": output.numpy(), "indices": indices.reshape(*x.shape[:2], -1).numpy().astype(np.int32)}


def language_model(name):
    shape, heads = inputs.MODEL, inputs.HEADS[name]
    common = {
        **moe_fields(shape), "vocab_size": shape["vocab"], "num_hidden_layers": shape["layers"],
        "num_attention_heads": heads["heads"], "num_key_value_heads": heads["kv_heads"], "head_dim": heads["head_dim"],
        "rms_norm_eps": inputs.NORM_EPS, "rope_theta": inputs.ROPE_THETA, "tie_word_embeddings": False,
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "use_cache": False,
        "attn_implementation": "eager", "experts_implementation": "eager",
    }  # fmt: skip
    if name == "olmoe":
        config = transformers.OlmoeConfig(num_experts=shape["experts"], norm_topk_prob=False, **common)
        return transformers.OlmoeForCausalLM(config)
    if name == "qwen3_moe":
        common["moe_intermediate_size"] = common.pop("intermediate_size")
        config = transformers.Qwen3MoeConfig(
            num_experts=shape["experts"], norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], **common
        )
        return transformers.Qwen3MoeForCausalLM(config)
    config = transformers.MixtralConfig(num_local_experts=shape["experts"], sliding_window=None, **common)
    return transformers.MixtralForCausalLM(config)


def model(name):
    shape = inputs.MODEL
    net = language_model(name).float().eval()
    fill(net)
    tokens = torch.tensor(inputs.draw_integers("model/tokens", (shape["batch"], shape["seq"] + 1), shape["vocab"]))
    out = net(input_ids=tokens[:, :-1], output_router_logits=True)
    for router_logits in out.router_logits:
        require_margin(router_logits, shape["top_k"])
    loss = torch.nn.functional.cross_entropy(out.logits.reshape(-1, shape["vocab"]), tokens[:, 1:].reshape(-1))
    loss.backward()
    found = {"logits": out.logits.detach().numpy(), "loss": np.float32(loss.item())}
    for parameter_name, parameter in net.named_parameters():
        gradient = parameter.grad.double().numpy()
        projected = np.sum(gradient * inputs.direction(parameter_name, gradient.shape))
        found[f"grad/{parameter_name}"] = np.array([np.linalg.norm(gradient), projected], np.float32)
    return found


def main():
    transformers.logging.set_verbosity_error()
    out = {}
    for name in ("olmoe", "mixtral"):
        out |= {f"block/{name}/{key}": value for key, value in block(name).items()}
    for name in inputs.HEADS:
        found = model(name)
        print(name, "loss", found["loss"], "parameters", sum(key.startswith("grad/") for key in found))
        out |= {f"model/{name}/{key}": value for key, value in found.items()}
    np.savez_compressed(HERE.parent / "models.npz", **out)


if __name__ == "__main__":
    main()
