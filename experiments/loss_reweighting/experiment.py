"""Loss-based reweighting: each sequence of a batch weighs by its own loss, against the plain mean.

Paper:     Sow et al., arXiv 2502.06733, ICLR 2025. The weights are in optim/reweighting.py, the step's hook in
           experiments/weighted_loss.py.
Claim:     less weight for what is learned already (LinUpper) lowers the loss at no cost; so does weight for the middle
           (Quadratic), not weight for both ends (Extremes).
Command:   python -m experiments run loss-reweighting --preset cpu
Time:      cpu about 8 minutes on 2 quiet cores (estimated; the committed run shared them: 14); cpu-long 31, shared.
Result:    cpu, three seeds: LinUpper is 0.032 nats better than the mean on every seed and 0.090 better than Extremes
           (hold); Quadratic is as good as the mean (0.008 worse, inconclusive). All methods do best at 1e-2, so the row
           at one rate is the tuned row, and the gain is not one of the rate.
           cpu-long, two seeds: with experts LinUpper is 0.047 better than the mean (holds). On noised text, where a
           high loss is noise, it is 0.549 worse, Quadratic 0.294, and LinUpper is 0.351 worse than Extremes (none
           holds).
           On redundant text focal weights (1.676) and r = 1 (1.659) do as well as LinUpper (1.674; the mean has 1.706),
           hard examples alone (1.735) and weights of single tokens (1.767) are worse than the mean.

Protocol, fixed beforehand. Pre-training on redundant text: 80% of what is read are eight documents of one domain over
and over, 20% its other documents; loss is of held-out documents of both, without weights. A gain may be one of the
learning rate alone (on redundant linear regression it is, says the sheet this follows): so every method tries
three rates at a seed of its own, the lowest validation loss is taken, and the claims are about these. `*_same` all
have the rate in the middle: no claim speaks of them. r is 0.4, of the paper's two larger GPT-2 models, delta 1; the
first 5% of the steps have plain weights, as published. Sequences have equal lengths, so that `uniform` is the mean over
tokens.

`noisy` in the names of cpu-long: half of the text has half of its characters replaced. High losses are noise there, and
LinUpper keeps their full weight.

Sizes: the signs. The paper's tables were not recovered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments import recipes
from experiments.claims import Claim
from experiments.config import DataConfig, OptimizerConfig, ReweightingConfig, RunConfig
from experiments.experiment import Experiment, Preset, Tuning
from experiments.scalebio.experiment import large, small

METHODS = ("uniform", "lin_upper", "quadratic", "extremes")
RATES = (3e-3, 1e-2, 3e-2)
R, BURN_IN = 0.4, 0.05
SHARE = 0.8
REDUNDANT = DataConfig(corpus=f"redundant(share={SHARE}, documents=8)", seq_len=64, weights=(1 - SHARE, SHARE))
NOISY = DataConfig(corpus="noised(levels=(0.0, 0.5))", seq_len=64)


def weighted(base: RunConfig, strategy: str, r: float = R) -> RunConfig:
    warm = round(BURN_IN * base.steps)
    scope = "global" if base.accumulation > 1 else ""
    weights = ReweightingConfig(strategy, r=r, warmup_steps=warm, warm_r=float("inf"), scope=scope)
    return replace(base, reweighting=weights)


def at_rate(run: RunConfig, rate: float) -> RunConfig:
    return replace(run, optimizer=replace(run.optimizer, learning_rate=rate))


def arms(base: RunConfig, prefix: str = "", methods: tuple[str, ...] = METHODS) -> dict[str, RunConfig]:
    """Every method, to be tuned, and again at one rate."""
    made = {f"{prefix}{name}": weighted(base, name) for name in methods}
    return made | {f"{name}_same": at_rate(run, RATES[1]) for name, run in made.items()}


def tuning(made: Mapping[str, RunConfig], rates: tuple[float, ...] = RATES) -> Tuning:
    return Tuning("optimizer.learning_rate", {name: rates for name in made if not name.endswith("_same")})


def claims(prefix: str = "") -> tuple[Claim, ...]:
    def lower(text: str, ours: str, theirs: str, paper: str) -> Claim:
        return Claim(f"{prefix}{text}, each at its best rate (nats)", "test_ce", prefix + ours, prefix + theirs,
                     "difference", "lower", 0.0, paper)  # fmt: skip

    return (
        lower("LinUpper is better than the mean", "lin_upper", "uniform", "best overall"),
        lower("Quadratic is better than the mean", "quadratic", "uniform", "often"),
        lower("LinUpper is better than Extremes", "lin_upper", "extremes", "Extremes no better than the mean"),
    )


def smoke() -> Preset:
    made = recipes.smoke()
    data = replace(made.data, corpus="redundant(base='synthetic', documents=4)", weights=(1 - SHARE, SHARE))
    base = replace(made, model=replace(made.model, moe=None, ffn_dim=48), data=data, steps=4)
    all_arms = arms(base)
    return Preset(all_arms, 1, claims(), "shows that it runs", tuning=tuning(all_arms, (1e-3, 1e-2)))


def cpu() -> Preset:
    all_arms = arms(small(REDUNDANT))
    return Preset(all_arms, 3, claims(), tuning=tuning(all_arms))


def cpu_long() -> Preset:
    """Noise instead of redundancy; r = 1 of the paper's smallest model; focal, hard examples; tokens in place of
    sequences; a mixture of experts."""
    redundant, noisy = small(REDUNDANT), small(NOISY)
    made = arms(noisy, "noisy_") | {
        "uniform": weighted(redundant, "uniform"),
        "lin_upper": weighted(redundant, "lin_upper"),
        "lin_upper_r1": weighted(redundant, "lin_upper", 1.0),
        "focal": weighted(redundant, "focal", 1.0),
        "ohem": weighted(redundant, "ohem(share=0.5)"),
    }
    by_token = weighted(redundant, "lin_upper")
    made["lin_upper_tokens"] = replace(by_token, reweighting=replace(by_token.reweighting, level="token"))
    moe = replace(recipes.cpu(), data=REDUNDANT, steps=redundant.steps, checkpoint_every=0)
    made |= {f"moe_{name}": weighted(moe, name) for name in ("uniform", "lin_upper")}
    moe_claim = Claim("with experts LinUpper is better than the mean (nats)", "test_ce", "moe_lin_upper", "moe_uniform",
                      "difference", "lower", 0.0, "none: dense models alone")  # fmt: skip
    return Preset(made, 2, (*claims("noisy_"), moe_claim), tuning=tuning(made))


def gpu() -> Preset:
    """One H100: GPT-2's 124M on two domains, 20,000 steps, r = 1."""
    base = replace(large(768, 12, 12, 12, 2048, 256), steps=20_000, accumulation=2, batch_size=32)
    data = DataConfig(corpus="packaged", seq_len=512, domains=("docstrings", "legal"))
    base = replace(base, data=data, optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=500, weight_decay=0.01))
    return Preset({name: weighted(base, name, 1.0) for name in METHODS}, 1, claims(), "one H100, published rate alone")


def paper() -> Preset:
    """A 1.4B and a 7B LLaMA on 8 and 64 devices (`--set data.corpus=DIR`), r = 0.4 after 2,000 steps at 100."""
    made: dict[str, RunConfig] = {}
    for size, shape, fsdp, batch in (
        ("1b", (2048, 24, 16, 16, 5461, 32_000), 8, 512),
        ("7b", (4096, 32, 32, 32, 11_008, 32_000), 64, 512),
    ):
        base = replace(large(*shape), batch_size=batch, steps=50_000, data=DataConfig(seq_len=2048))
        base = replace(base, mesh=replace(base.mesh, fsdp=fsdp), optimizer=OptimizerConfig(learning_rate=3e-4))
        for name in METHODS:
            weights = ReweightingConfig(name, r=R, warmup_steps=2_000)
            made[f"{size}_{name}"] = replace(base, reweighting=weights)
    return Preset(made, 1, (*claims("1b_"), *claims("7b_")), "8 and 64 devices")


def figure(content: dict[str, Any], path: Path) -> None:
    """Loss by method, tuned and at one rate; what was tried; the share of a batch that counts."""
    from experiments.loss_reweighting.figure import draw

    draw(content, path)


EXPERIMENT = Experiment(
    name="loss-reweighting",
    title="Dynamic loss-based sample reweighting for pre-training",
    paper="Sow et al., 2025, arXiv 2502.06733",
    presets={"smoke": smoke, "cpu": cpu, "cpu-long": cpu_long, "gpu": gpu, "paper": paper},
    figure=figure,
)
