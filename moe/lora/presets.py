"""Published adapters and mixtures of them, each an `AdapterConfig`; ranks and scales are the papers', to be replaced.

MoE-PEFT's defaults are meant where a paper is silent. Legend: E experts, k active.
"""

from __future__ import annotations

from typing import Any

from moe.lora.config import FEED_FORWARD, TARGETS, AdapterConfig, ExpertsConfig


def lora(rank: int = 80, alpha: float = 160.0, **more: Any) -> AdapterConfig:
    """LoRA (2106.09685) at MixLoRA's size for comparison: r = 80, about the parameters of 8 experts of 16."""
    return AdapterConfig(rank, alpha, **more)


def rslora(rank: int = 80, alpha: float = 160.0, **more: Any) -> AdapterConfig:
    """rsLoRA (2312.03732)."""
    return AdapterConfig(rank, alpha, rslora=True, **more)


def dora(rank: int = 80, alpha: float = 160.0, **more: Any) -> AdapterConfig:
    """DoRA (2402.09353)."""
    return AdapterConfig(rank, alpha, dora=True, **more)


def mixlora(rank: int = 16, alpha: float = 32.0, num_experts: int = 8, top_k: int = 2, **more: Any) -> AdapterConfig:
    """MixLoRA (2404.15159): k = 2 of 8 feed-forward experts, weights renormalised, LoRA on attention.

    Its balance loss: `moe.lora.losses.balance`, 1e-2 in the text, 1e-3 in the released code.
    """
    return AdapterConfig(rank, alpha, experts=ExpertsConfig(num_experts, top_k), **more)


def mixdora(rank: int = 16, alpha: float = 32.0, num_experts: int = 8, top_k: int = 2, **more: Any) -> AdapterConfig:
    """MixLoRA with DoRA at every map."""
    return mixlora(rank, alpha, num_experts, top_k, dora=True, **more)


def mixlora_dynamic(rank: int = 16, alpha: float = 32.0, num_experts: int = 8, **more: Any) -> AdapterConfig:
    """MixLoRA by top-p = 0.8, not renormalised, as released: with B = 0 it is not the frozen model but the sum of the
    kept probabilities times its feed-forward."""
    experts = ExpertsConfig(num_experts, 2, router="top_p(p=0.8)")
    return AdapterConfig(rank, alpha, experts=experts, **more)


def mixlora_switch(rank: int = 16, alpha: float = 32.0, num_experts: int = 8, **more: Any) -> AdapterConfig:
    """After MixLoRA's top-1 with a capacity for each sequence, repaired: a token over capacity goes through the frozen
    feed-forward. (The released one returns its normalised input, and at inference does so for all tokens.) Weights are
    Switch's, p of the chosen expert, so that with B = 0 it is not the frozen model but p times its feed-forward. The
    released capacity is 32 tokens, here 1.25 times the balanced load, and its z-loss of 1e-3 is the caller's to add."""
    policy = "capacity(factor=1.25, group=1, order='token')"
    experts = ExpertsConfig(num_experts, 1, router="switch(jitter=0.01)", policy=policy, router_std=1.0)
    return AdapterConfig(rank, alpha, experts=experts, **more)


def loramoe(rank: int = 16, alpha: float = 32.0, num_experts: int = 8, **more: Any) -> AdapterConfig:
    """LoRAMoE (2312.09979): all experts of every feed-forward map, in soft weights."""
    experts = ExpertsConfig(num_experts, num_experts, routing="linear")
    return AdapterConfig(rank, alpha, targets=FEED_FORWARD, experts=experts, **more)


def mola(rank: int = 8, alpha: float = 16.0, num_experts: int = 8, top_k: int = 2, **more: Any) -> AdapterConfig:
    """MoLA (2402.08562) with as many experts in every layer: k = 2 at each map, each with a router."""
    experts = ExpertsConfig(num_experts, top_k, targets=TARGETS, routing="linear")
    return AdapterConfig(rank, alpha, experts=experts, **more)


def hydralora(rank: int = 16, alpha: float = 32.0, num_experts: int = 3, **more: Any) -> AdapterConfig:
    """HydraLoRA (2404.19245): one A, E matrices B in soft weights, a router at each map."""
    experts = ExpertsConfig(num_experts, num_experts, targets=TARGETS, routing="linear", shared_a=True)
    return AdapterConfig(rank, alpha, experts=experts, **more)


def lora_mixer(
    rank: int = 16, alpha: float = 32.0, num_experts: int = 5, top_k: int | None = None, **more: Any
) -> AdapterConfig:
    """LoRA-Mixer (2507.00029): experts inside the attention's maps, q, k and v with one router, o with another.

    All experts (`top_k = None`) in training, the paper's three at inference: the parameters are the same. Loss:
    `moe.lora.losses.routing_specialization_loss`. Rank and alpha are a third party's; the paper gives none.
    """
    attention = ("q", "k", "v", "o")
    experts = ExpertsConfig(num_experts, top_k or num_experts, targets=attention, routing="input")
    return AdapterConfig(rank, alpha, targets=attention, experts=experts, **more)
