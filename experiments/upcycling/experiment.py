"""Sparse upcycling: a trained dense model goes on as a mixture of experts, against itself going on dense.

Papers:    Komatsuzaki et al., arXiv 2212.05055, ICLR 2023 (copy); He et al., arXiv 2410.07524 (neuron split, virtual
           groups); Nakamura et al., arXiv 2502.19261, ICLR 2025 (drop-upcycling). The methods are in moe/upcycle.py.
Claim:     an upcycled model starts as the dense one and, trained on, is better than the dense one trained on: at equal
           tokens, and at equal arithmetic.
Command:   python -m experiments run upcycling --preset cpu      (SmolLM2-135M: --preset cpu-long, see README.md)
Time:      cpu 10 minutes on 2 cores, the dense parents included; cpu-long is made for at most 60.
Result:    cpu, two seeds: both starts are exact; at equal tokens `copy` is 0.074 nats better; at equal arithmetic it is
           0.065 worse, and `split` equal within noise (-0.006). All of it in REPRODUCTIONS.md, made from results/.

Protocol, fixed beforehand. The arms train on the four domains of the corpus that SmolLM2 knows least (above 2 bits per
byte, measured before this was written): tunes, messages in 95 languages, and Chinese twice. The parents of the other
presets train on the other five, so these four are the ones they know least. All arms of a seed start from one parent,
with a fresh optimiser at one rate, and read the same data in the same order. Nothing is tuned: rate, initialisation and
balance weight are the spine recipe's (experiments/recipes.py), chosen on other experiments' baselines; a router's
deviation and the share of redrawn neurons are the papers'.

    dense        goes on as it is
    dense_flops  the same for longer: as much arithmetic as `copy`
    copy         every FFN is E experts, 2 active: twice the FFN's arithmetic
    split        a quarter of the neurons is a shared expert, the others are 2 shards; 2E experts, 2 active: the
                 arithmetic of `dense` but for router and gate, under 2%
    drop         `copy` with half of each expert's neurons drawn anew

Arithmetic is 6 FLOPs per active parameter and token; attention's products, equal in all arms, are left out. The sizes:
0.02 nats at equal tokens and 0.3 for the balance are the project's own, as in moe-baselines; at equal arithmetic the
sign is claimed alone. No claim is about `drop`: its paper speaks of hundreds of billions of tokens.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from experiments import recipes
from experiments.claims import Claim
from experiments.config import PARENT, BalanceConfig, DataConfig, InitConfig, OptimizerConfig, RunConfig
from experiments.experiment import Experiment, Preset
from moe.config import ModelConfig

KNOWN = ("python-code", "docstrings", "legal", "biomedical", "film-reviews")
LEAST_KNOWN = ("music-abc", "ui-text", "chinese-news", "chinese-reviews")
SPLIT = "split(shards=2)"
SMOLLM2_CORPUS = "smollm2-least-known"  # under the data folder; README.md has the command that makes it


def claims() -> tuple[Claim, ...]:
    exact = [
        Claim(f"{arm}: the first loss is the dense model's (nats)", "start_gap", arm, None, "value", "lower", 1e-4,
              "0 (2410.07524)")
        for arm in ("copy", "split")
    ]  # fmt: skip
    balanced = [
        Claim(f"{arm}: balanced after training", "max_violation", arm, None, "value", "lower", 0.3, "none")
        for arm in ("copy", "split")
    ]
    return (
        *exact,
        Claim(
            "at equal tokens the upcycled model is better (nats)", "val_ce", "copy", "dense", "difference", "lower",
            0.02, "MMLU 67.6 against 65.3% (2410.07524)",
        ),
        Claim(
            "at equal arithmetic too: experts twice as many active (nats)", "val_ce", "copy", "dense_flops",
            "difference", "lower", 0.0, "better for the same extra compute (2212.05055)",
        ),
        Claim(
            "at equal arithmetic and tokens: neurons split (nats)", "val_ce", "split", "dense", "difference", "lower",
            0.0, "better at equal compute (2410.07524)",
        ),
        *balanced,
    )  # fmt: skip


def dense(model: ModelConfig, ffn_dim: int) -> ModelConfig:
    return replace(model, moe=None, ffn_dim=ffn_dim)


def upcycled(config: RunConfig, method: str, num_experts: int, **moe: Any) -> RunConfig:
    """`config`, which goes on dense, as a mixture of experts of which 2 are active."""
    from moe.upcycle import upcycled_config  # it needs JAX, looking around does not

    model = upcycled_config(config.model, method, num_experts, 2, **moe)
    return replace(config, model=model, init=replace(config.init, upcycle=method))


@cache
def flops(model: ModelConfig) -> int:
    """Per token, forward and backward."""
    from experiments.dry_run import flops_per_token, parameter_counts
    from moe.transformer import abstract_params

    return flops_per_token(parameter_counts(abstract_params(model), model)[1])


def arms(goes_on: RunConfig, num_experts: int) -> dict[str, RunConfig]:
    """The five of the module, from the run of the dense model going on."""
    copy = upcycled(goes_on, "copy", num_experts)
    quarter = {"shared_dim": goes_on.model.ffn_dim // 4, "shared_gate": True}
    return {
        "dense": goes_on,
        "dense_flops": replace(goes_on, steps=round(goes_on.steps * flops(copy.model) / flops(goes_on.model))),
        "copy": copy,
        "split": upcycled(goes_on, SPLIT, 2 * num_experts, **quarter),
        "drop": upcycled(goes_on, "drop(ratio=0.5)", num_experts),
    }


def family(parent: RunConfig, steps: int, domains: tuple[str, ...], num_experts: int, seeds: int, note: str) -> Preset:
    """A parent trained beforehand, and the arms that go on from it on other domains."""
    init = InitConfig(f"{PARENT}dense")
    goes_on = replace(parent, init=init, steps=steps, data=replace(parent.data, domains=domains))
    return Preset(arms(goes_on, num_experts), seeds, claims(), note, parents={"dense": parent})


def smoke() -> Preset:
    made = recipes.smoke()
    first, others = (tuple(f"chain-{i}" for i in part) for part in (range(4), range(4, 8)))
    parent = replace(made, model=dense(made.model, 48), data=replace(made.data, domains=first))
    return family(parent, made.steps, others, 4, 1, "seconds; shows that it runs, nothing else")


def cpu() -> Preset:
    """The dense model of equal arithmetic to the spine recipe's: 300 steps on five domains, then 160 on the others."""
    made = recipes.cpu()
    data = replace(made.data, domains=KNOWN)
    parent = replace(made, model=dense(made.model, 192), data=data, steps=300)
    return family(parent, 160, LEAST_KNOWN, 8, 2, "")


def cpu_long() -> Preset:
    """SmolLM2 on the domains it knows least. Rate and batch are a plain continued training's, not tuned. The last ten
    layers are upcycled: the optimiser's state of all 30 fits no laptop."""
    from experiments.data.corpus import data_root

    goes_on = RunConfig(
        model=replace(recipes.smollm2(), first_dense=20),
        data=DataConfig(corpus=str(data_root() / SMOLLM2_CORPUS), seq_len=128, domains=LEAST_KNOWN),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=5),
        balance=BalanceConfig(weight=0.1),
        init=InitConfig("smollm2"),
        batch_size=8,
        steps=32,
        checkpoint_every=16,
        eval_tokens_per_domain=1024,
    )
    return Preset(arms(goes_on, 4), seeds=1, claims=claims(), note="SmolLM2-135M; its corpus is made beforehand")


def gpu() -> Preset:
    """One H100: a dense model of 180M parameters; copies have 8 experts."""
    made = recipes.gpu()
    model = dense(made.model, 4096)
    parent = replace(made, model=model, data=replace(made.data, domains=KNOWN), steps=10_000)
    return family(parent, 5_000, LEAST_KNOWN, 8, 2, "one H100")


def paper() -> Preset:
    """The 8 x 1.5B model of drop-upcycling on 64 GPUs: 1T tokens dense, then 500B [shape recalled: llm-jp-3-1.8b's;
    batch and rates are ours]. Of bytes here, and the packaged corpus' unless `data.corpus` says otherwise."""
    made = recipes.cluster()
    model = replace(
        dense(made.model, 7168), hidden=2048, num_layers=24, num_heads=16, num_kv_heads=16, head_dim=128, qk_norm="none"
    )
    data = replace(made.data, seq_len=4096, domains=KNOWN)
    parent = replace(made, model=model, data=data, batch_size=1024, steps=240_000)
    return family(parent, 120_000, LEAST_KNOWN, 8, 1, "64 GPUs")


def figure(content: dict[str, Any], path: Path) -> None:
    """Loss over tokens and over arithmetic, differences from going on dense, and balance."""
    from experiments.upcycling.figure import draw

    draw(content, path)


EXPERIMENT = Experiment(
    name="upcycling",
    title="Sparse upcycling: copy, neuron split, drop",
    paper="Komatsuzaki et al., 2022, arXiv 2212.05055; He et al., 2024, arXiv 2410.07524; Nakamura et al., 2025, arXiv "
    "2502.19261",
    presets={"smoke": smoke, "cpu": cpu, "cpu-long": cpu_long, "gpu": gpu, "paper": paper},
    figure=figure,
)
