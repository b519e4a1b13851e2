"""A LoRA of SmolLM2 trained by PEFT, computed with here; one of ours, computed with there. No golden file: a check.

    python -m experiments convert --from smollm2 --to WORK/model --family llama   # here
    python tests/goldens/makers/exchange_smollm2.py train WORK            # with torch, transformers, peft
    python tests/goldens/makers/exchange_smollm2.py compare WORK          # here; also writes ours
    python tests/goldens/makers/exchange_smollm2.py back WORK             # with torch, transformers, peft

`compare` and `back` print the largest difference of logits as a share of the largest logit, and fail above 1e-4.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

TEXT = np.random.default_rng(0).integers(5, 40_000, (2, 24))
STEPS = 8


def their_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(TEXT)).logits.numpy()


def train(work: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    frozen = their_logits(base)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    rows = torch.tensor(TEXT)
    for step in range(STEPS):
        loss = model(rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} loss {loss.item():.4f}")
    model.eval()
    model.save_pretrained(work / "theirs", save_embedding_layers=False)
    np.savez(work / "theirs.npz", adapted=their_logits(model), frozen=frozen)


def compare(work: Path) -> None:
    import jax
    import jax.numpy as jnp

    from moe.lora.peft import read_peft, write_peft
    from moe.pretrained.model import load
    from moe.transformer import Transformer

    base = load("smollm2")
    found = dict(np.load(work / "theirs.npz"))
    rows = jnp.asarray(TEXT, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1])[None], rows.shape)

    def logits(config: Any, tree: Any) -> np.ndarray:
        variables = {"params": base.params} | ({} if config is None else {"adapters": tree})
        run = jax.jit(lambda variables: Transformer(base.config, config).apply(
            variables, rows, jnp.ones_like(rows), positions, {}, None))  # fmt: skip
        out: Any = run(variables)
        return np.asarray(out.hidden @ out.head.T)

    within("frozen", logits(None, None), found["frozen"])
    config, tree = read_peft(work / "theirs", base.config)
    mine = logits(config, tree)
    within("trained by PEFT, here", mine, found["adapted"])
    print(f"what the adapter changes: {np.abs(mine - found['frozen']).max() / np.abs(mine).max():.3f} of the largest")
    wave = lambda leaf: 0.01 * jnp.sin(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape)  # noqa: E731
    moved = jax.tree.map(lambda leaf: leaf + wave(leaf), tree)
    write_peft(work / "ours", base.config, config, moved)
    np.savez(work / "ours.npz", adapted=logits(config, moved))


def back(work: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, work / "ours").eval()
    within("ours, in PEFT", their_logits(model), np.load(work / "ours.npz")["adapted"])


def within(what: str, found: np.ndarray, wanted: np.ndarray) -> None:
    share = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    print(f"{what}: {share:.2e}")
    if share > 1e-4:
        raise SystemExit(f"{what}: {share} of the largest logit, expected at most 1e-4")


if __name__ == "__main__":
    {"train": train, "compare": compare, "back": back}[sys.argv[1]](Path(sys.argv[2]))
