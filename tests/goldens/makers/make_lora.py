"""Writes lora.npz and `../lora_adapters/`: HF PEFT's adapters, with dropout 0, on the checkpoint "llama" of
`../language_models.py` (2 layers, hidden 32, 4 heads of 8, 2 of keys and values, feed-forward 20, 40 tokens).

For each CASE below:
  lora_adapters/CASE/     adapter_config.json and adapter_model.safetensors as save_pretrained writes them, A, B and
                          magnitudes drawn from the case's and the tensors' names, no B zero
  CASE/logits             float32 [B, S, V], of the base with the adapter as `PeftModel.from_pretrained` loads it
  CASE/loss               mean cross-entropy of tokens[:, 1:] from logits[:, :-1]
  CASE/grads/TENSOR       that loss's gradient, for every tensor under its name and shape in the file
and `tokens` [B, S], int32, for all. `bites` of a case are settings that must change the logits when the config lacks
them, so that a reader that ignores one fails.
"""

import copy
import shutil
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from make_language_models import CHANGE, golden, load
from safetensors.numpy import load_file

HERE = Path(__file__).parent
FOLDER = HERE.parent / "lora_adapters"
BASE = "llama"
OFFLINE = {"save_embedding_layers": False}  # else PEFT looks for the base's config on its hub
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]

# name -> settings beside r = 4, alpha = 8, and what each must matter against
CASES = {
    "lora": ({"target_modules": ALL}, [{"lora_alpha": 4}]),
    "rslora": ({"target_modules": ["q_proj", "v_proj"], "use_rslora": True}, [{"use_rslora": False}]),
    "dora": ({"target_modules": ALL, "use_dora": True}, [{"use_dora": False}, {"lora_alpha": 4}]),
    "patterns": (
        {
            "target_modules": ALL, "rank_pattern": {"down_proj": 2, "k_proj": 3},
            "alpha_pattern": {"down_proj": 6, "gate_proj": 16},
        },
        [{"alpha_pattern": {}}, {"alpha_pattern": {"down_proj": 6}}, {"alpha_pattern": {"gate_proj": 16}}],
    ),
    "patterns_by_layer": (
        {
            "target_modules": ALL, "rank_pattern": {"layers.1.self_attn.q_proj": 2, "layers.0.mlp.down_proj": 6},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 12, "layers.0.mlp.up_proj": 2},
        },
        [{"alpha_pattern": {}}, {"alpha_pattern": {"self_attn.q_proj": 12, "layers.0.mlp.up_proj": 2}}],
    ),
}  # fmt: skip


def fill(case, net):
    """Wide A and B, and magnitudes up to 0.3 away from the norms that they start as."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                drawn = torch.tensor(golden.inputs.draw(f"lora/{case}/{name}", tuple(parameter.shape), 0.3))
                parameter.copy_(parameter * (1.0 + drawn) if "magnitude" in name else drawn)


def save(case, settings, base, folder):
    """Makes the adapter and writes its two files; the targets, a set, in the order above, no path, no model card."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, **copy.deepcopy(settings))
    net = peft.get_peft_model(base, config)
    fill(case, net)
    written = net.peft_config["default"]
    written.base_model_name_or_path, written.target_modules = "tiny-llama", settings["target_modules"]
    net.save_pretrained(folder, **OFFLINE)
    (folder / "README.md").unlink()
    for file in folder.iterdir():
        file.chmod(0o644)


def read(checkpoint, folder, **changes):
    """The base with the adapter in folder, as the file's readers load it, for training."""
    config = peft.PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    for name, value in changes.items():
        assert hasattr(config, name), name
        setattr(config, name, copy.deepcopy(value))
    return peft.PeftModel.from_pretrained(load("Llama", checkpoint), folder, config=config, is_trainable=True).eval()


def run(net, tokens):
    return net(input_ids=tokens, use_cache=False).logits


def make(case, settings, bites, checkpoint, tokens):
    folder = FOLDER / case
    shutil.rmtree(folder, ignore_errors=True)
    save(case, settings, load("Llama", checkpoint), folder)
    net = read(checkpoint, folder)
    logits = run(net, tokens)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    found = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.requires_grad}
    gradients = peft.get_peft_model_state_dict(net, state_dict=found, **OFFLINE)
    held = load_file(folder / "adapter_model.safetensors")
    assert {name: value.shape for name, value in held.items()} == {k: tuple(v.shape) for k, v in gradients.items()}
    assert all(np.abs(value).max() > 0 and gradients[name].abs().max() > 1e-5 for name, value in held.items())
    with torch.no_grad():
        spread = logits.std().item()
        moved = [(logits - run(load("Llama", checkpoint), tokens)).abs().max().item() / spread]
        for change in bites:
            moved.append((logits - run(read(checkpoint, folder, **change), tokens)).abs().max().item() / spread)
    assert min(moved) > CHANGE, f"{case}: {moved}"
    print(f"{case}: {len(held)} tensors, loss {loss.item():.4f}, changes {[round(value, 3) for value in moved]}")
    out = {f"{case}/logits": logits.detach().numpy(), f"{case}/loss": np.float32(loss.item())}
    return out | {f"{case}/grads/{name}": value.numpy() for name, value in gradients.items()}


def main():
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    tokens = golden.tokens(BASE)
    out = {"tokens": tokens}
    with tempfile.TemporaryDirectory() as checkpoint:
        golden.write_checkpoint(BASE, Path(checkpoint))
        for case, (settings, bites) in CASES.items():
            out |= make(case, settings, bites, Path(checkpoint), torch.tensor(tokens, dtype=torch.long))
    np.savez_compressed(HERE.parent / "lora.npz", **out)


if __name__ == "__main__":
    main()
