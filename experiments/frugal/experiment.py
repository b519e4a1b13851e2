"""FRUGAL: moments for a quarter of each weight, a rule without state for the rest, against its family.

Paper:     Zmushko et al., arXiv 2411.07837, ICML 2025. Peers: GaLore 2403.03507, BAdam 2404.02827, LISA 2403.17919,
           Fira 2410.01623, APOLLO 2412.05270, LDAdam 2410.16103. All of them are in optim/.
Claim:     the update without state closes most of the gap to AdamW, for any choice of the subspace.
Command:   python -m experiments run frugal --preset cpu
Time:      cpu about 10 minutes on 2 quiet cores, cpu-long 25, moe 8; the committed ones shared them: 16, 65, 17.
Result:    cpu, two seeds: 0.112 nats better than its twin (columns), 0.300 (block), 0.121 and 0.107 better than GaLore,
           0.037 and 0.023 than density 0; but 0.069 and 0.084 behind AdamW, where the paper has 0.037. cpu-long, with
           higher rates: twins and GaLore get no better; columns are 0.035 behind AdamW (inconclusive), 0.022 behind
           svd, 0.20 before BAdam; APOLLO is best of all, 0.021 before AdamW. moe, 150 steps: AdamW, block and density
           0 within 0.002 of each other, columns 0.017 better, so that moments of a quarter bring less than claimed.
           All of it in REPRODUCTIONS.md, made from results/.

Protocol, fixed beforehand. On CPU every arm tries three learning rates at a seed of its own, the lowest validation loss
is taken, and two fresh seeds are trained with it; claims are about the test split. GaLore's rates are three times as
high: its direction is scaled by 0.25 and the published rate is ten times the others'. No decay, betas (0.9, 0.999), as
published; clipping at norm 1, which signs do not see. Density is 0.25; a window has 30 of 300 steps here, 200 of
20,000 and more in the paper.

    adamw           two moments of everything
    columns, block  FRUGAL with the sign of the rest
    zero            FRUGAL of density 0: every weight matrix moves by the sign of its gradient
    *_alone         the same subspace, nothing for the rest: the twin of the claim
    galore          rank d / 4, moments kept when directions change, as published

`block` counts matrices leaf by leaf (optim/subspaces.py): with four layers one is active at a time, so that
`block_alone` is close to BAdam.

Sizes are the paper's: FRUGAL 0.25 against BAdam 0.25 at 60M, log(24.86 / 23.59) = 0.0524; against density 0,
log(24.06 / 23.59) = 0.0197; from AdamW, log(23.59 / 22.73) = 0.0371 nats [perplexities recalled, not read again]. Bytes
of state have the project's own bound: 8% of this model's parameters are the embedding's, which Adam keeps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments import recipes
from experiments.claims import Claim
from experiments.config import DataConfig, InitConfig, OptimizerConfig, RunConfig
from experiments.experiment import Experiment, Preset, Tuning
from experiments.upcycling.experiment import LEAST_KNOWN, SMOLLM2_CORPUS
from moe.config import ModelConfig

TWIN, DENSITY, ADAMW = 0.0524, 0.0197, 0.0371  # nats, see above
RATES, HIGHER = (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2)
COLUMNS, BLOCK = "columns(density=0.25)", "block(density=0.25, order='descending')"


def frugal(subspace: str, gap: int, **options: Any) -> str:
    rest = "".join(f", {name}={value!r}" for name, value in options.items())
    return f"frugal(subspace={subspace!r}, update_gap={gap}{rest})"


def named(base: RunConfig, name: str) -> RunConfig:
    return replace(base, optimizer=replace(base.optimizer, name=name))


def main_arms(base: RunConfig, gap: int) -> dict[str, RunConfig]:
    """The method, its baseline, and density 0."""
    names = {"adamw": "adamw", "columns": frugal(COLUMNS, gap), "block": frugal(BLOCK, gap),
             "zero": frugal("none", gap)}  # fmt: skip
    return {arm: named(base, name) for arm, name in names.items()}


def twins(base: RunConfig, gap: int) -> dict[str, RunConfig]:
    """Without an update for the rest; and GaLore."""
    names = {
        "columns_alone": frugal(COLUMNS, gap, rule="none"),
        "block_alone": frugal(BLOCK, gap, rule="none"),
        "galore": f"galore(rank={base.model.hidden // 4}, update_gap={gap})",
    }
    return {arm: named(base, name) for arm, name in names.items()}


def family(base: RunConfig, gap: int) -> dict[str, RunConfig]:
    """The other subspaces, and the methods beside FRUGAL at the same rank or as many layers. BAdam trains embedding and
    last norm too, as all others do: frozen at random values they would decide the comparison."""
    rank, active = base.model.hidden // 4, max(1, base.model.num_layers // 4)
    names = {
        "svd": frugal("svd(density=0.25)", gap),
        "random": frugal("random(density=0.25)", gap),
        "randk": frugal("randk(density=0.25)", gap),
        "fira": f"fira(rank={rank}, update_gap={gap})",
        "apollo": f"apollo(rank={rank}, update_gap={gap})",
        "apollo_mini": f"apollo_mini(update_gap={gap})",
        "ldadam": f"ldadam(rank={rank})",
        "badam": f"badam(active={active}, update_gap={gap}, others='adam')",
        "lisa": f"lisa(active={active}, update_gap={gap})",
    }
    return {arm: named(base, name) for arm, name in names.items()}


def tuning(arms: Mapping[str, RunConfig], rates: tuple[float, ...] = RATES) -> Tuning:
    scale = {"galore": 3}
    return Tuning("optimizer.learning_rate", {arm: tuple(scale.get(arm, 1) * r for r in rates) for arm in arms})


def better(text: str, arm: str, baseline: str, size: float, paper: str) -> Claim:
    return Claim(f"{text} (nats)", "test_ce", arm, baseline, "difference", "lower", size, paper)


def within(text: str, arm: str, baseline: str, size: float, paper: str) -> Claim:
    return Claim(f"{text} (nats)", "test_ce", arm, baseline, "margin", "lower", size, paper)


def state(arm: str, most: float) -> Claim:
    text = f"{arm}: bytes of state per parameter, where AdamW has 8"
    return Claim(text, "state_bytes_per_parameter", arm, None, "value", "lower", most, "2 and what is not a matrix")


def near_claims() -> tuple[Claim, ...]:
    """About `main_arms` alone."""
    return (
        *(better(f"{arm}: a quarter with moments is better than none", arm, "zero", DENSITY, "PPL 24.06 -> 23.59, 60M")
          for arm in ("columns", "block")),
        *(within(f"{arm}: close to AdamW", arm, "adamw", ADAMW, "PPL 23.59, AdamW 22.73, 60M")
          for arm in ("columns", "block")),
    )  # fmt: skip


def twin_claims() -> tuple[Claim, ...]:
    return (
        *(better(f"{arm}: updating the rest without state helps", arm, f"{arm}_alone", TWIN, "PPL 24.86 (BAdam), 23.59")
          for arm in ("columns", "block")),
        *(better(f"{arm}: better than GaLore", arm, "galore", 0.0, "at every size") for arm in ("columns", "block")),
    )  # fmt: skip


def family_claims() -> tuple[Claim, ...]:
    return (
        within("columns: no worse than singular vectors", "columns", "svd", DENSITY, "as good, whatever the choice"),
        within("block: no worse than singular vectors", "block", "svd", DENSITY, "as good, whatever the choice"),
        *(better(f"columns: better than {arm}", "columns", arm, size, paper)
          for arm, size, paper in (("badam", TWIN, "PPL 24.86 -> 23.59, 60M"), ("lisa", 0.0, "none"))),
        state("svd", 3.0),
    )  # fmt: skip


def as_published(base: RunConfig) -> RunConfig:
    """No decay, Adam's own betas; the rate stays."""
    return replace(base, optimizer=replace(base.optimizer, weight_decay=0.0, b2=0.999))


def smoke() -> Preset:
    made = recipes.smoke()
    base = as_published(replace(made, model=replace(made.model, moe=None, ffn_dim=48, num_layers=4), steps=4))
    arms = main_arms(base, 2) | twins(base, 2)
    return Preset(arms, 1, (*twin_claims(), *near_claims()), "shows that it runs", tuning=tuning(arms, (1e-3, 1e-2)))


def small() -> RunConfig:
    """217 thousand parameters, 2048 bytes of text a step."""
    made = recipes.cpu()
    model = ModelConfig(
        vocab_size=256, hidden=64, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=16, ffn_dim=176, moe=None,
        tie_embeddings=True, init_std=made.model.init_std,
    )  # fmt: skip
    optimizer = replace(made.optimizer, warmup_steps=30)
    return as_published(replace(made, model=model, optimizer=optimizer, batch_size=16, steps=300, checkpoint_every=0))


def cpu() -> Preset:
    arms = main_arms(small(), 30) | twins(small(), 30)
    claims = (*twin_claims(), *near_claims(), state("columns", 2.5), state("block", 2.5))
    return Preset(arms, 2, claims, tuning=tuning(arms))


def cpu_long() -> Preset:
    """The whole family on the same model. Its rates were raised once `cpu` had run: the best of five of its seven arms
    was the highest."""
    arms = main_arms(small(), 30) | twins(small(), 30) | family(small(), 30)
    return Preset(arms, 2, (*twin_claims(), *near_claims(), *family_claims()), tuning=tuning(arms, HIGHER))


def moe() -> Preset:
    """The spine recipe's mixture of experts with a layer more: subspaces of every expert, blocks of single experts."""
    made = recipes.cpu()
    sized = replace(made, model=replace(made.model, num_layers=4), steps=150, batch_size=16, checkpoint_every=0)
    base = as_published(replace(sized, optimizer=replace(sized.optimizer, warmup_steps=15)))
    arms = main_arms(base, 15)
    return Preset(arms, 2, near_claims(), tuning=tuning(arms))


def fine_tuning() -> Preset:
    """SmolLM2-135M on text it knows least: all matrices by the sign of their gradients, against AdamW. The corpus is
    made beforehand, see README.md. `stateless_scale` 0.1 is the paper's for fine-tuning."""
    from experiments.data.corpus import data_root

    base = RunConfig(
        model=recipes.smollm2(),
        data=DataConfig(corpus=str(data_root() / SMOLLM2_CORPUS), seq_len=128, domains=LEAST_KNOWN),
        optimizer=OptimizerConfig(warmup_steps=2),
        init=InitConfig("smollm2"),
        batch_size=4,
        steps=16,
        checkpoint_every=0,
        eval_tokens_per_domain=1024,
    )
    base = as_published(base)
    arms = {"adamw": base, "zero": named(base, frugal("none", 500, stateless_scale=0.1))}
    claim = within("density 0: close to AdamW in fine-tuning", "zero", "adamw", ADAMW, "GLUE: on par (not recovered)")
    return Preset(arms, 2, (claim,), "SmolLM2-135M", tuning=tuning(arms, (3e-5, 1e-4, 3e-4)))


LLAMA = {  # hidden, layers, heads, ffn, steps; perplexities of AdamW, density 0.25 and 0 [recalled]
    "60m": (512, 8, 8, 1376, 200_000, (22.73, 23.59, 24.06)),
    "130m": (768, 12, 12, 2048, 200_000, (18.13, 18.60, 18.90)),
    "350m": (1024, 24, 16, 2736, 240_000, (14.43, 14.79, 15.03)),
    "1b": (2048, 24, 32, 5461, 300_000, (12.02, 12.32, 12.63)),
}


def llama(size: str) -> RunConfig:
    """The C4 recipe: sequences of 256 of T5's 32,000 tokens, 512 of them a step, rate 1e-3. Steps and heads are of the
    released scripts [recalled]; their cosine restarts ten times, this one does not."""
    hidden, layers, heads, ffn, steps, _ = LLAMA[size]
    model = ModelConfig(
        vocab_size=32_000, hidden=hidden, num_layers=layers, num_heads=heads, num_kv_heads=heads,
        head_dim=hidden // heads, ffn_dim=ffn, moe=None, norm_eps=1e-6, compute_dtype="bfloat16", remat="dots",
    )  # fmt: skip
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=steps // 10)
    data = DataConfig(seq_len=256)
    base = RunConfig(model=model, data=data, optimizer=optimizer, batch_size=512, steps=steps, checkpoint_every=1000)
    return as_published(base)


def gpu() -> Preset:
    """One H100: the 130M model for 20,000 steps, 2.6B tokens; the paper has 200,000. Not tuned: published rates."""
    base = replace(llama("130m"), steps=20_000, accumulation=4)
    base = replace(base, optimizer=replace(base.optimizer, warmup_steps=2_000))
    arms = main_arms(base, 200) | twins(base, 200)
    arms["galore"] = replace(arms["galore"], optimizer=replace(arms["galore"].optimizer, learning_rate=1e-2))
    return Preset(arms, 1, (*twin_claims(), *near_claims()), "one H100; set data.corpus to C4 made with `data build`")


def paper() -> Preset:
    """60M to 1B on C4 (`--set data.corpus=DIR`, from `data build`): the perplexities themselves are the claims."""
    arms, claims = {}, []
    for size, (*_, perplexities) in LLAMA.items():
        made = main_arms(llama(size), 200)
        for arm, perplexity in zip(("adamw", "block", "zero"), perplexities, strict=True):
            name = f"{size}_{arm}"
            arms[name] = made[arm]
            text, shown = f"{name}: validation loss on C4 (nats)", f"PPL {perplexity} [recalled]"
            claims.append(Claim(text, "val_ce", name, None, "value", "lower", math.log(perplexity), shown))
    return Preset(arms, 1, tuple(claims), "C4, the released scripts' sizes")


def figure(content: dict[str, Any], path: Path) -> None:
    """Loss against memory, over steps, and over what was tried."""
    from experiments.frugal.figure import draw

    draw(content, path)


EXPERIMENT = Experiment(
    name="frugal",
    title="FRUGAL: full-rank updates by gradient splitting, and its family",
    paper="Zmushko et al., 2024, arXiv 2411.07837",
    presets={"smoke": smoke, "cpu": cpu, "cpu-long": cpu_long, "moe": moe, "smollm2": fine_tuning, "gpu": gpu,
             "paper": paper},
    figure=figure,
)  # fmt: skip
