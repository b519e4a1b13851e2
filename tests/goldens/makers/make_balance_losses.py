"""Writes balance_losses.npz: load balancing and z losses of four libraries on the inputs of `../inputs.py`.

For each k: value and gradient with respect to the logits, of one layer, without and with a padding mask
  hf        transformers `mixtral.load_balancing_loss_func` (not divided by k: k x ours)
  megatron  megatron-core `switch_load_balancing_loss_func` with coefficient 1
and of two layers without a mask
  megablocks  `batched_load_balancing_loss` (databricks/megablocks 0.7.0, megablocks/layers/moe.py), re-typed: the
              package cannot be imported without a GPU
z_loss: transformers `switch_transformers.router_z_loss_func`, value and gradient.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import inputs  # noqa: E402


def with_gradient(loss_of, logits):
    leaves = [torch.tensor(x, requires_grad=True) for x in logits]
    loss = loss_of(leaves)
    loss.backward()
    return loss.item(), np.stack([leaf.grad.numpy() for leaf in leaves])


def route(logits, k):
    """Probabilities [T, E] and selection map [T, E] of flattened logits."""
    probs = torch.softmax(logits.reshape(-1, inputs.NUM_EXPERTS), dim=-1)
    chosen = torch.zeros_like(probs).scatter(1, torch.topk(probs, k, dim=-1).indices, 1.0)
    return probs, chosen.detach()


def hf(k, mask):
    def loss(leaves):
        gates = tuple(leaf.reshape(-1, inputs.NUM_EXPERTS) for leaf in leaves)
        attention_mask = None if mask is None else torch.tensor(mask, dtype=torch.int64)
        return load_balancing_loss_func(gates, inputs.NUM_EXPERTS, k, attention_mask)

    return loss


def megatron(k, mask):
    def loss(leaves):
        probs, chosen = route(leaves[0], k)
        valid = torch.ones(len(probs), dtype=torch.bool) if mask is None else torch.tensor(mask.reshape(-1))
        counts = (chosen * valid[:, None]).sum(dim=0)
        return switch_load_balancing_loss_func(
            probs, counts, int(valid.sum()), k, inputs.NUM_EXPERTS, 1.0, padding_mask=valid
        )

    return loss


def megablocks(k):
    """Layers are laid side by side along the experts; one dot product, scaled by E / (layers * tokens * k)."""

    def loss(leaves):
        probs, chosen = zip(*[route(leaf, k) for leaf in leaves])
        mean_scores = torch.cat(probs, dim=1).mean(dim=0)
        counts = torch.cat([c.sum(dim=0) for c in chosen])
        tokens = probs[0].shape[0]
        return inputs.NUM_EXPERTS / (len(leaves) * tokens * k) * torch.dot(counts, mean_scores)

    return loss


def main():
    one = [inputs.balance_logits(0)]
    both = [inputs.balance_logits(layer) for layer in range(inputs.LAYERS)]
    out = {}
    for k in inputs.TOP_KS:
        for suffix, mask in (("", None), ("_masked", inputs.balance_mask())):
            for name, make in (("hf", hf), ("megatron", megatron)):
                value, gradient = with_gradient(make(k, mask), one)
                out[f"{name}{suffix}_k{k}"] = np.float32(value)
                out[f"{name}{suffix}_k{k}_grad"] = gradient[0]
        out[f"megablocks_k{k}"], out[f"megablocks_k{k}_grad"] = with_gradient(megablocks(k), both)
    value, gradient = with_gradient(lambda leaves: router_z_loss_func(leaves[0]), one)
    out["z_loss"], out["z_loss_grad"] = np.float32(value), gradient[0]
    np.savez_compressed(HERE.parent / "balance_losses.npz", **out)
    print({name: float(x) for name, x in out.items() if np.ndim(x) == 0})


if __name__ == "__main__":
    main()
