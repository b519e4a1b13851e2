"""Writes moe_blocks.npz: Hugging Face's other sparse blocks, with the settings and inputs of `../inputs.py`.

For each NAME of `inputs.MOE_BLOCKS`, in float32 and evaluation mode, every parameter (and the selection bias, a buffer)
drawn from "block/NAME/" + its name:
  NAME/output           the block on `inputs.block_input(NAME)`
  NAME/indices          chosen experts [batch, seq, k], int32, best selection score first, -1 where dropped
  NAME/weights          the weights the experts' outputs (Llama 4: inputs) are multiplied by, 0 where dropped
  NAME/grad_x           gradient of sum(output * direction("block/NAME/output")) with respect to the input
  NAME/grad/PARAMETER   that loss's gradient: its Euclidean norm and its product with direction("block/NAME/PARAMETER")
Losses, float64, value and (`_grad`) gradient with respect to the logits, which are `inputs.balance_logits(0)`:
  losses/switch_aux     transformers' `switch_transformers.load_balancing_loss_func` of the softmax and its argmax:
                        E sum_i f_i P_i of each sequence, then their mean
  losses/v3_sequence    the sequence-wise balance loss of the DeepSeek-V3 report (its formula re-typed, alpha 1), k = 2
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
    load_balancing_loss_func,
)

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import inputs  # noqa: E402

MARGIN = 1e-4  # neighbours among the first k + 1 must differ by this much, or another library may choose differently
SEQUENCE_TOP_K = 2


def fill(module, prefix):
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            tensor.copy_(torch.tensor(inputs.weight(prefix + name, tuple(tensor.shape))))


def require_margin(scores, top_k, what):
    best = scores.sort(dim=-1, descending=True).values[..., : top_k + 1]
    margin = (best[..., :-1] - best[..., 1:]).min().item()
    assert margin > MARGIN, f"{what}: margin {margin}: choose other inputs"


def make(name):
    """The block of that name; transformers' settings from ours."""
    shape = inputs.MOE_BLOCKS[name]
    hidden, dim = inputs.BLOCK["hidden"], shape["expert_dim"]
    common = {"experts_implementation": "eager", "num_attention_heads": 2, "num_key_value_heads": 2}
    common |= {"hidden_size": hidden, "num_experts_per_tok": shape["top_k"]}
    if name.startswith("qwen"):
        common |= {"moe_intermediate_size": dim, "num_experts": shape["experts"], "norm_topk_prob": shape["normalize"]}
        if name == "qwen2_moe":
            config = transformers.Qwen2MoeConfig(shared_expert_intermediate_size=shape["shared"], **common)
            return Qwen2MoeSparseMoeBlock(config)
        return Qwen3MoeSparseMoeBlock(transformers.Qwen3MoeConfig(**common))
    if name.startswith("deepseek"):
        common |= {
            "moe_intermediate_size": dim, "n_routed_experts": shape["experts"],
            "n_shared_experts": shape["shared"] // dim, "routed_scaling_factor": shape["scale"],
            "n_group": shape.get("groups"), "topk_group": shape.get("keep"),
        }  # fmt: skip
        if name.startswith("deepseek_v3"):
            return DeepseekV3MoE(transformers.DeepseekV3Config(norm_topk_prob=shape["normalize"], **common))
        method = "group_limited_greedy" if "groups" in shape else "greedy"
        return DeepseekV2Moe(transformers.DeepseekV2Config(topk_method=method, **common))
    if name.startswith("switch"):
        config = transformers.SwitchTransformersConfig(
            d_model=hidden, d_ff=dim, num_experts=shape["experts"], expert_capacity=shape["capacity"],
            router_bias=False, dense_act_fn="relu",
        )  # fmt: skip
        return SwitchTransformersSparseMLP(config)
    common |= {"intermediate_size": dim, "num_local_experts": shape["experts"]}
    if name == "llama4":
        return Llama4TextMoe(transformers.Llama4TextConfig(**common))
    return GptOssMLP(transformers.GptOssConfig(swiglu_alpha=shape["alpha"], swiglu_limit=shape["limit"], **common))


def route(name, module, x):
    """Logits [T, E], combine weights [T, k] and chosen experts [T, k] as the block's own router gives them."""
    flat = x.reshape(-1, x.shape[-1])
    if name.startswith("switch"):
        kept, weights, logits = module.router(x)
        kept = kept.sum(dim=-1, keepdim=True) > 0
        indices = torch.where(kept, logits.argmax(dim=-1, keepdim=True), -1)
        weights = torch.where(kept, weights, 0.0)
        return logits.flatten(0, 1), weights.flatten(0, 1), indices.flatten(0, 1)
    if name == "llama4":
        scores, logits = module.router(flat)
        return logits, *torch.topk(scores, module.top_k, dim=-1)
    return (module.router if name.startswith("gpt_oss") else module.gate)(flat)


def selection_scores(name, module, logits):
    """What the top-k is taken of, -inf outside of the kept groups; asserts that bias and groups change the choice."""
    shape = inputs.MOE_BLOCKS[name]
    if name.startswith("deepseek_v3"):
        scores = logits.sigmoid()
        biased = scores + module.gate.e_score_correction_bias
        assert not same_choice(scores, biased, shape["top_k"]), f"{name}: the bias changes nothing"
        scores = biased
    else:
        scores = logits if name.startswith(("gpt_oss", "llama4")) else logits.softmax(dim=-1)
    if "groups" not in shape:
        return scores
    grouped = scores.unflatten(-1, (shape["groups"], -1))
    best = grouped.topk(2 if name.startswith("deepseek_v3") else 1, dim=-1).values.sum(dim=-1)
    require_margin(best, shape["keep"], f"{name}, groups")
    kept = torch.zeros_like(best).scatter(-1, best.topk(shape["keep"], dim=-1).indices, 1.0)
    limited = grouped.masked_fill(kept[..., None] == 0, float("-inf")).flatten(-2)
    assert not same_choice(scores, limited, shape["top_k"]), f"{name}: the groups change nothing"
    return limited


def same_choice(first, second, top_k):
    chosen = [scores.topk(top_k, dim=-1).indices.sort(dim=-1).values for scores in (first, second)]
    return torch.equal(*chosen)


def require_clamped(name, module, x, indices):
    """The clamp bites on all three sides, and no value lies so near to it that rounding decides."""
    experts, limit = module.experts, inputs.MOE_BLOCKS[name]["limit"]
    flat, chosen = x.reshape(-1, 1, 1, x.shape[-1]), experts.gate_up_proj[indices]
    gate_up = (flat @ chosen).squeeze(-2) + experts.gate_up_proj_bias[indices]
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    hit = [(gate > limit).sum().item(), (up > limit).sum().item(), (up < -limit).sum().item()]
    assert (gate_up.abs() - limit).abs().min() > MARGIN, f"{name}: values at the clamp"
    assert all(hit) == name.endswith("_large"), f"{name}: clamped {hit}"
    return hit


def block(name):
    shape = inputs.MOE_BLOCKS[name]
    module = make(name).float().eval()
    fill(module, f"block/{name}/")
    x = torch.tensor(inputs.block_input(name), requires_grad=True)
    with torch.no_grad():
        logits, weights, indices = route(name, module, x)
        scores = selection_scores(name, module, logits)
        require_margin(scores, shape["top_k"], name)
        order = scores.gather(-1, indices.clamp(min=0)).argsort(dim=-1, descending=True)
        weights, indices = weights.gather(-1, order), indices.gather(-1, order)
        expected = torch.where(indices < 0, -1, scores.topk(shape["top_k"], dim=-1).indices)
        assert torch.equal(indices, expected), f"{name}: the block chooses otherwise"
        if "limit" in shape:
            print(name, "clamped", require_clamped(name, module, x, indices))
    if "capacity" in shape:
        dropped = int((indices < 0).sum())
        print(name, "dropped", dropped)
        assert (dropped > 0) == name.endswith("_capacity")
    output = module(x)
    output = (output[0] if isinstance(output, tuple) else output).reshape(x.shape)
    (output * torch.tensor(inputs.direction(f"block/{name}/output", tuple(output.shape)))).sum().backward()
    found = {
        "output": output.detach().numpy(),
        "indices": indices.reshape(*x.shape[:2], -1).numpy().astype(np.int32),
        "weights": weights.reshape(*x.shape[:2], -1).numpy(),
        "grad_x": x.grad.numpy(),
    }
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name}: {parameter_name} has no gradient"
        gradient = parameter.grad.double().numpy()
        projected = np.sum(gradient * inputs.direction(f"block/{name}/{parameter_name}", gradient.shape))
        found[f"grad/{parameter_name}"] = np.array([np.linalg.norm(gradient), projected], np.float32)
    return found


def switch_aux(logits):
    require_margin(logits.softmax(dim=-1), 1, "switch_aux")
    probs = logits.softmax(dim=-1)
    return load_balancing_loss_func(probs, probs.argmax(dim=-1))


def v3_sequence(logits):
    """f_i = E / (k T) times how often the sequence chooses i (without bias), P_i its mean normalised affinity."""
    _, seq, experts = logits.shape
    affinity = logits.sigmoid()
    require_margin(affinity, SEQUENCE_TOP_K, "v3_sequence")
    chosen = torch.zeros_like(affinity).scatter(-1, affinity.topk(SEQUENCE_TOP_K, dim=-1).indices, 1.0)
    frequency = chosen.sum(dim=1) * experts / (SEQUENCE_TOP_K * seq)
    mean_affinity = (affinity / affinity.sum(dim=-1, keepdim=True)).mean(dim=1)
    return (frequency * mean_affinity).sum(dim=-1).mean()


def main():
    transformers.logging.set_verbosity_error()
    out = {}
    for name in inputs.MOE_BLOCKS:
        out |= {f"{name}/{key}": value for key, value in block(name).items()}
    for loss in (switch_aux, v3_sequence):
        logits = torch.tensor(inputs.balance_logits(0).astype(np.float64), requires_grad=True)
        value = loss(logits)
        value.backward()
        out[f"losses/{loss.__name__}"] = np.float64(value.item())
        out[f"losses/{loss.__name__}_grad"] = logits.grad.numpy()
        print(loss.__name__, value.item())
    np.savez_compressed(HERE.parent / "moe_blocks.npz", **out)


if __name__ == "__main__":
    main()
