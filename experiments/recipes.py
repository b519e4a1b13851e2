"""Recipes: functions that return a whole run. A variant replaces fields of another recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from experiments.config import BalanceConfig, DataConfig, MeshConfig, OptimizerConfig, RunConfig
from moe.config import ModelConfig, MoEConfig


def smoke() -> RunConfig:
    """Seconds on one core, on text made in memory: for tests and for a first look."""
    moe = MoEConfig(num_experts=8, top_k=2, expert_dim=32)
    return RunConfig(
        model=ModelConfig(vocab_size=64, hidden=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, moe=moe),
        data=DataConfig(corpus="synthetic", seq_len=32),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        balance=BalanceConfig(weight=0.01, micro_batch_size=2),
        batch_size=8,
        steps=8,
        checkpoint_every=4,
        eval_tokens_per_domain=512,
    )


def cpu() -> RunConfig:
    """A small byte-level model on the packaged corpus: about a minute and a half on two cores.

    Rate and initialisation were chosen by the validation loss of 200 steps of the *baseline* (micro-batch balance at
    weight 0.1, seed 0), in nats: rate 3e-3 with std 0.02: 2.581, 3e-3 with 0.1: 2.360, 1e-2 with 0.1: 2.362, 1e-2 with
    0.02: 2.766, 2e-2 with 0.1: 2.486.
    """
    moe = MoEConfig(num_experts=16, top_k=2, expert_dim=96)
    return RunConfig(
        model=ModelConfig(
            vocab_size=256, hidden=96, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=24, moe=moe, init_std=0.1
        ),
        data=DataConfig(corpus="packaged", seq_len=128),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=40),
        balance=BalanceConfig(weight=0.1, micro_batch_size=2),
        batch_size=32,
        steps=350,
    )


def gpu() -> RunConfig:
    """One H100: 183M active of 1.24B parameters in bfloat16, 32 experts top-4, 131k tokens a step."""
    moe = MoEConfig(num_experts=32, top_k=4, expert_dim=1024)
    model = ModelConfig(
        vocab_size=256,
        hidden=1024,
        num_layers=12,
        num_heads=16,
        num_kv_heads=4,
        head_dim=64,
        moe=moe,
        qk_norm="head",
        compute_dtype="bfloat16",
        remat="dots",
    )
    return RunConfig(
        model=model,
        data=DataConfig(corpus="packaged", seq_len=2048),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=500),
        balance=BalanceConfig(weight=0.008, micro_batch_size=4),
        batch_size=64,
        accumulation=16,  # at 4 the step's temporaries are 65 GiB, which an H100 does not have beside the state
        steps=20_000,
        checkpoint_every=500,
    )


def cluster() -> RunConfig:
    """`gpu` on 64 devices: 2 data x 4 fsdp x 8 expert, one accumulation pass."""
    return replace(gpu(), mesh=MeshConfig(data=2, fsdp=4, expert=8), batch_size=256, accumulation=1)


def smollm2() -> ModelConfig:
    """The shape of SmolLM2-135M (2502.02737)."""
    return ModelConfig(
        vocab_size=49_152, hidden=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, ffn_dim=1536, moe=None,
        tie_embeddings=True, rope_theta=100_000.0, context=8192,
    )  # fmt: skip


def dense_shape(hidden: int, layers: int, heads: int, kv_heads: int, ffn_dim: int, vocab_size: int) -> ModelConfig:
    """A released dense model's sizes in bfloat16, to be counted where its weights are not there; the rest of its config
    comes with them."""
    return ModelConfig(
        vocab_size=vocab_size, hidden=hidden, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=hidden // heads, ffn_dim=ffn_dim, moe=None, compute_dtype="bfloat16", remat="dots",
    )  # fmt: skip


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "smoke": smoke,
    "cpu": cpu,
    "gpu": gpu,
    "cluster": cluster,
}
