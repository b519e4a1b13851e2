"""Writes mixlora.npz: MoE-PEFT's mixtures of LoRA experts on a SwiGLU feed-forward, in float32 with dropout 0.

    python make_mixlora.py FOLDER    where FOLDER holds a checkout of github.com/TUDB-Labs/MoE-PEFT (see README.md)

E = 4 experts, r = 4, alpha = 8 (s = 2), k = 2, top_p = 0.8; d = 32, f = 48. For PROJ of gate_proj, up_proj, down_proj,
matrices as torch has them, [out, in]:
  weights/PROJ                            frozen
  weights/PROJ/lora_A, weights/PROJ/lora_B    [E, r, in], [E, out, r]
  weights/PROJ/magnitude                  [E, out], for mixdora alone
  weights/router                          [E, d], of the router before the feed-forward (mixlora, mixdora, dynamic)
  weights/PROJ/router                     [E, in], of the router before each map (loramoe, mola)
  input, direction                        [B, S, d]; the gradients are those of sum(output * direction)
For each CASE of mixlora, mixdora, mixlora_dynamic, loramoe, mola:
  CASE/output                             [B, S, d]
  CASE/router_logits                      [B S, E]; CASE/router_logits/PROJ where each map has a router
  CASE/grads/input, CASE/grads/WEIGHT     with respect to the input and what is trained, WEIGHT named as above
mixlora_dynamic keeps the experts by falling p until their sum first exceeds top_p, and does not renormalise; loramoe
mixes all E in the softmax's weights; mola renormalises its top k at each map, as mixlora does.

Balance losses, coefficient 1, of balance/logits [L, B, S, E], which MoE-PEFT concatenates over the L layers before the
product, and balance/mask [B, S], 0 at padding:
  balance/top_k, balance/top_k_masked     E sum_i F_i P_i, F_i the mean over tokens of how many of the k slots choose i
                                          (so sum_i F_i = k), P_i the mean of the whole softmax; mola's is the same
  balance/top_p                           likewise with the experts that top_p keeps; the released one ignores the mask
  balance/NAME_grad                       with respect to balance/logits
"""

import importlib
import sys
import types
from pathlib import Path

import numpy as np
import torch
from make_moe_blocks import MARGIN, inputs, require_margin

HERE = Path(__file__).parent
BATCH, SEQ, LAYERS = 2, 10, 2
HIDDEN, FEED_FORWARD, EXPERTS, TOP_K, TOP_P = 32, 48, 4, 2, 0.8
SHAPES = {
    "gate_proj": (FEED_FORWARD, HIDDEN), "up_proj": (FEED_FORWARD, HIDDEN), "down_proj": (HIDDEN, FEED_FORWARD),
}  # fmt: skip
SETTINGS = {
    "name": "adapter", "num_experts": EXPERTS, "r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "act_fn": "silu",
    "target_modules": list(SHAPES), "router_aux_loss_coef": 1.0, "top_k": TOP_K, "top_p": TOP_P,
}  # fmt: skip
# strategy, settings, and whether each map has a router
CASES = {
    "mixlora": ("mixlora", {}, False),
    "mixdora": ("mixlora", {"use_dora": True}, False),
    "mixlora_dynamic": ("mixlora-dynamic", {}, False),
    "loramoe": ("loramoe", {}, True),
    "mola": ("mola", {"router_loss": True}, True),
}


def import_peer(folder):
    """MoE-PEFT's adapters, common code and Llama; its packages' own __init__ want all that its trainer needs."""
    assert (folder / "moe_peft" / "adapters").is_dir(), f"{folder} holds no checkout of MoE-PEFT"
    for name in ("moe_peft", "moe_peft.models"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    names = ("moe_peft.adapters", "moe_peft.common", "moe_peft.models.modeling_llama")
    return tuple(importlib.import_module(name) for name in names)


def weights():
    """Widths that let every part be felt: the adapters' change is about as large as what they stand beside."""
    out = {"router": inputs.draw("mixlora/router", (EXPERTS, HIDDEN), 0.6)}
    for proj, (rows, columns) in SHAPES.items():
        draw = lambda name, shape, scale, proj=proj: inputs.draw(f"mixlora/{proj}/{name}", shape, scale)  # noqa: E731
        out[proj] = draw("base", (rows, columns), 0.25)
        out[f"{proj}/lora_A"] = draw("lora_A", (EXPERTS, 4, columns), 0.25)
        out[f"{proj}/lora_B"] = draw("lora_B", (EXPERTS, rows, 4), 0.25)
        out[f"{proj}/magnitude"] = 1.0 + draw("magnitude", (EXPERTS, rows), 0.4)
        out[f"{proj}/router"] = draw("router", (EXPERTS, columns), 0.6)
    return out


def build(case, peer, held):
    """The feed-forward module of the case, and its trained tensors: [experts' parameters] under the weights' names."""
    adapters, common, llama = peer
    strategy, settings, per_map = CASES[case]
    config = adapters.lora_config_factory(SETTINGS | {"routing_strategy": strategy} | settings)
    config.adapter_name = SETTINGS["name"]
    base = {}
    for proj, (rows, columns) in SHAPES.items():
        base[proj] = torch.nn.Linear(columns, rows, bias=False)
        base[proj].weight.data = torch.tensor(held[proj])
    model = common.LLMModelConfig(device_="cpu", hidden_act_="silu")
    mlp = llama.LlamaMLP(base["gate_proj"], base["down_proj"], base["up_proj"], model)
    ffn = common.FeedForward(mlp)
    trained = {}
    for proj, linear in mlp.state_dict().items():
        for expert in range(EXPERTS):
            pair = tuple(torch.tensor(held[f"{proj}/{name}"][expert]) for name in ("lora_A", "lora_B"))
            name = f"moe.{config.adapter_name}.experts.{expert}"
            linear.init_lora_weight(config, pair, name)
            lora = linear.loras_[name]
            lora.dropout_.p = 0.0  # its constructor asks for more
            trained.setdefault(f"{proj}/lora_A", []).append(lora.lora_a_.weight)
            trained.setdefault(f"{proj}/lora_B", []).append(lora.lora_b_.weight)
            if config.use_dora_:
                lora.magnitude_vector_.data = torch.tensor(held[f"{proj}/magnitude"][expert])
                trained.setdefault(f"{proj}/magnitude", []).append(lora.magnitude_vector_)
    sites = {f"{proj}/router": linear for proj, linear in mlp.state_dict().items()} if per_map else {"router": ffn}
    for name, site in sites.items():
        block = adapters.moe_layer_factory(held[name].shape[1], "cpu", config, torch.tensor(held[name]))
        site.moes_[config.adapter_name] = block
        trained[name] = [block.gate_.weight]
    return ffn, trained


def run(case, ffn, x, common, efficient=False):
    """Output, and router logits by the name that they have in the golden file."""
    name = SETTINGS["name"]
    arguments = common.LLMModelInput(
        batch_configs_=[common.LLMBatchConfig(name, 0, len(x))], efficient_operator_=efficient
    )
    if not CASES[case][2]:
        output, logits = ffn(x, arguments)
        return output, {"router_logits": logits[0]}
    output = ffn.mlp_._batch_forward(x, arguments)
    return output, {f"router_logits/{p}": m.moes_[name].router_logits_ for p, m in ffn.mlp_.state_dict().items()}


def require_clear(case, logits):
    """No choice that another library's rounding could turn."""
    probs = logits.softmax(dim=-1)
    if case == "mixlora_dynamic":
        total = probs.sort(dim=-1, descending=True).values.cumsum(dim=-1)
        assert (total[..., :-1] - TOP_P).abs().min() > MARGIN, "top_p: choose other inputs"
        kept = (total <= TOP_P).sum(dim=-1) + 1
        assert len(kept.unique()) > 2, "top_p keeps as many for all tokens"
        require_margin(probs, EXPERTS - 1, case)
    elif case != "loramoe":
        require_margin(probs, TOP_K, case)


def make(case, peer, held):
    ffn, trained = build(case, peer, held)
    x = torch.tensor(held["input"], requires_grad=True)
    output, logits = run(case, ffn, x, peer[1])
    for each in logits.values():
        require_clear(case, each.detach())
    (output * torch.tensor(held["direction"])).sum().backward()
    with torch.no_grad():
        frozen = ffn.mlp_._lora_forward("none", ffn.mlp_.act_, x)
        change = ((output - frozen).std() / frozen.std()).item()
        if not CASES[case][2]:  # the path that shares x W1 and x W3 between experts
            torch.testing.assert_close(run(case, ffn, x, peer[1], efficient=True)[0], output)
    assert 0.1 < change < 10, f"{case}: the adapters change {change}"
    gradients = {"input": x.grad.numpy()}
    for name, parameters in trained.items():
        parts = [parameter.grad.numpy() for parameter in parameters]
        gradients[name] = np.stack(parts) if len(parts) > 1 else parts[0]
        assert gradients[name].shape == held[name].shape, name
        assert all(np.abs(part).max() > 1e-3 for part in parts), f"{case}: {name} has no gradient"
    print(f"{case}: output {output.std().item():.3f}, change {change:.3f}")
    out = {"output": output.detach().numpy()} | {name: value.detach().numpy() for name, value in logits.items()}
    return out | {f"grads/{name}": value for name, value in gradients.items()}


def balance(adapters):
    """MoE-PEFT's own losses of two layers' logits, with and without padding."""
    values = inputs.draw("mixlora/balance", (LAYERS, BATCH, SEQ, EXPERTS), 2.0)
    mask = (np.arange(SEQ)[None] < np.array([[SEQ], [SEQ - 4]])).astype(np.int32)
    out = {"logits": values, "mask": mask}
    for name, strategy, masked in (
        ("top_k", "mixlora", False), ("top_k_masked", "mixlora", True), ("top_p", "mixlora-dynamic", False),
        ("mola", "mola", True),
    ):  # fmt: skip
        config = adapters.lora_config_factory(SETTINGS | {"routing_strategy": strategy, "router_loss": True})
        logits = torch.tensor(values, requires_grad=True)
        require_clear("mixlora_dynamic" if name == "top_p" else "mixlora", logits.detach())
        loss = adapters.router_loss_factory(config)(logits.reshape(-1, EXPERTS), torch.tensor(mask) if masked else None)
        loss.backward()
        out |= {name: np.float32(loss.item()), f"{name}_grad": logits.grad.numpy()}
    assert out.pop("mola") == out["top_k_masked"]
    assert np.array_equal(out.pop("mola_grad"), out["top_k_masked_grad"])
    print({name: float(value) for name, value in out.items() if value.ndim == 0})
    return out


def main():
    torch.set_num_threads(1)
    peer = import_peer(Path(sys.argv[1]))
    shape = (BATCH, SEQ, HIDDEN)
    held = weights() | {"input": inputs.draw("mixlora/input", shape), "direction": inputs.direction("mixlora", shape)}
    out = {name if name in ("input", "direction") else f"weights/{name}": value for name, value in held.items()}
    for case in CASES:
        out |= {f"{case}/{key}": value for key, value in make(case, peer, held).items()}
    out |= {f"balance/{key}": value for key, value in balance(peer[0]).items()}
    np.savez_compressed(HERE.parent / "mixlora.npz", **out)


if __name__ == "__main__":
    main()
