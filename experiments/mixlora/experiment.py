"""MixLoRA: LoRA experts in the feed-forward of a frozen model, against LoRA of equal size, on tasks that conflict.

Paper:     Li et al., arXiv 2404.15159. Peers: DoRA 2402.09353, LoRAMoE 2312.09979, MoLA 2402.08562, HydraLoRA
           2404.19245. All of them are one block, in moe/lora/.
Claim:     trained on several tasks at once, LoRA is worse on each than trained on it alone, and MixLoRA is not; the
           balance loss is needed for balance.
Command:   python -m experiments run mixlora --preset cpu
Time:      cpu 7.5 minutes on 2 cores.
Result:    cpu, two seeds: LoRA drops by 0.236 and 0.034, MixLoRA by 0.016 and 0.031 (holds), but the difference is one
           task of one seed: LoRA learns to add alone (0.99) at seed 0, MixLoRA at neither, and together no method
           does. Together MixLoRA is no better than LoRA: 0.737 against 0.735 (inconclusive). Without the balance loss
           the largest violation is 1.26 instead of 0.48 (holds), and accuracy no worse: 0.741.

Protocol, fixed beforehand. A model is pretrained once for each seed, on other maps of digits than the tasks, and
frozen; all methods of the seed stand beside it. Every method trains an adapter for each of the four tasks and one for
all four, which takes four times the steps: it sees the very examples, in their order, that the four see. Every method
has the number of trainable parameters that whole ranks allow (`matched`): LoRA 4% more than MixLoRA, the others within
10%, MixDoRA a fifth less. Alpha is twice the rank, as in the paper. Accuracy is of whole answers that match, on
questions of the test split, none of which was trained on. A task is used if the base, or LoRA trained on it alone,
beats the commonest answer by 5 points on the validation split.

All methods have one rate, as in the paper: the one of RATES with which LoRA on all four tasks has the highest accuracy
of the validation split (preset `rates`, at a seed of its own), a task that it cannot do alone counted as wrong. It is
the baseline that is tuned. It came out as 3e-3: 0.775, against 0.746 at 1e-3 (0.995 of three tasks; it does not learn
to add there, alone or together) and 0.573 at 1e-2 (0.764 of three). At that seed LoRA's drop was 0.159 and MixLoRA's
0.015; at 1e-3, of three tasks, -0.009 and -0.014. The choice decides what can be seen: cpu-long shows both methods at
1e-3 too; no claim speaks of them.

    lora            rank about 5 r in every map
    mixlora         8 experts of rank r, 2 active, balance loss at 1e-2 (the paper's text), shares of both choices as
                    in the released code (the text has the first alone), each layer for itself
    mixlora_no_aux  the same without it, on all tasks together alone

Sizes: LLaMA2-7B loses 4.4 points with LoRA (69.9 -> 65.5) and gains 0.6 with MixLoRA (74.7 -> 75.3); on all tasks
together MixLoRA is 9.8 points better. A third of the differences is claimed: 1.7 and 3.3 points. A third is a guess.
For the balance the sign is claimed alone.

`smollm2` in the names of cpu-long: SmolLM2-135M on three tasks of packages that have options, with LoRA and MixLoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments import recipes
from experiments.claims import Claim
from experiments.experiment import Experiment, Preset, Study

Method = Callable[..., Any]
DROP, BETTER = 0.017, 0.033  # shares of 1, see above
RATES = (1e-3, 3e-3, 1e-2)
RATE, OTHER_RATE = 3e-3, 1e-3
AUX = 1e-2
RANK, STEPS, BATCH = 2, 300, 64  # of MixLoRA; of each task; rows of a step
TASKS = ("question-types", "sentiment-film", "sarcasm", "quartz", "sms-spam")  # of the larger models


def claims(prefix: str = "", aux: bool = True) -> tuple[Claim, ...]:
    ours, lora = f"{prefix}mixlora", f"{prefix}lora"
    about_tasks = (
        Claim("all tasks at once cost MixLoRA less (share of right answers)", "multi_task_drop", ours, lora,
              "difference", "lower", DROP, "-0.6 against 4.4 points"),
        Claim("all tasks at once: MixLoRA is better", "multi_accuracy", ours, lora, "difference", "higher", BETTER,
              "75.3 against 65.5%"),
    )  # fmt: skip
    if not aux:
        return about_tasks
    balance = Claim(
        "without the balance loss experts are less balanced", "max_violation", f"{prefix}mixlora_no_aux", ours,
        "difference", "higher", 0.0, "accuracy 70.5 against 71.8%; balance not given",
    )  # fmt: skip
    return (*about_tasks, balance)


def with_rank(make: Method, rank: int, **more: Any) -> Any:
    """Alpha twice the rank, as in the paper."""
    return make(rank=rank, alpha=2.0 * rank, **more)


def arms(
    world: Any, rank: int, tuning: Any, methods: Mapping[str, tuple[Method, float]], dropout: float = 0.0, **trial: Any
) -> dict[str, Study]:
    """Each method at the size of MixLoRA of `rank`, with the weight of its balance loss."""
    from experiments.mixlora.study import Trial, matched, study
    from moe.lora import presets
    from moe.lora.adapters import parameter_count

    config, ours = world.config(), with_rank(presets.mixlora, rank)
    made = lambda make: matched(with_rank(make, rank, dropout=dropout), config, parameter_count(config, ours))  # noqa: E731
    trial = {"reference": made(presets.lora), "world": world, "tuning": tuning, "equal_to": ours, **trial}
    return {
        name: study(Trial(made(make), balance_weight=weight, alone="no_aux" not in name, **trial))
        for name, (make, weight) in methods.items()
    }


def main_methods() -> dict[str, tuple[Method, float]]:
    from moe.lora import presets

    return {
        "lora": (presets.lora, 0.0), "mixlora": (presets.mixlora, AUX), "mixlora_no_aux": (presets.mixlora, 0.0),
    }  # fmt: skip


def other_methods() -> dict[str, tuple[Method, float]]:
    """LoRAMoE and HydraLoRA mix all experts, so that nothing is to be balanced."""
    from moe.lora import presets

    return {
        "dora": (presets.dora, 0.0), "mixdora": (presets.mixdora, AUX), "loramoe": (presets.loramoe, 0.0),
        "mola": (presets.mola, AUX), "hydralora": (presets.hydralora, 0.0),
    }  # fmt: skip


def tuning(rate: float, steps: int, batch_size: int, **more: Any) -> Any:
    """AdamW at a constant rate, no decay."""
    from experiments.finetune import FinetuneConfig

    made = FinetuneConfig(steps=steps, batch_size=batch_size, **more)
    return replace(made, optimizer=replace(made.optimizer, learning_rate=rate))


def smoke() -> Preset:
    from experiments.mixlora.worlds import Symbolic

    world = Symbolic(digits=4, pretraining_steps=8, pretraining_batch=8, test_rows=16, tasks=("copy", "reverse"))
    world = replace(world, model=replace(world.model, hidden=32, num_layers=2, head_dim=8, ffn_dim=48))
    return Preset(arms(world, 1, tuning(RATE, 3, 8), main_methods(), margin=-1.0), 1, claims(), "shows that it runs")


def cpu() -> Preset:
    from experiments.mixlora.worlds import Symbolic

    return Preset(arms(Symbolic(), RANK, tuning(RATE, STEPS, BATCH), main_methods()), 2, claims())


def rates() -> Preset:
    """What RATE is chosen from, by LoRA on validation; MixLoRA is shown beside it."""
    from experiments.mixlora.worlds import Symbolic

    methods = {name: main_methods()[name] for name in ("lora", "mixlora")}
    at = lambda rate: arms(Symbolic(), RANK, tuning(rate, STEPS, BATCH), methods, first_seed=1000, split="validation")  # noqa: E731
    tried = {f"{name}@{rate:g}": arm for rate in RATES for name, arm in at(rate).items()}
    return Preset(tried, 1, ())


def cpu_long() -> Preset:
    """The other methods, and the other rate; SmolLM2, whose rate and budget were set beforehand and not tuned."""
    from experiments.mixlora.worlds import Packaged, Symbolic

    small = arms(Symbolic(), RANK, tuning(RATE, STEPS, BATCH), main_methods() | other_methods())
    two = {name: main_methods()[name] for name in ("lora", "mixlora")}
    faster = {f"{name}_{OTHER_RATE:g}": method for name, method in two.items()}
    small |= arms(Symbolic(), RANK, tuning(OTHER_RATE, STEPS, BATCH), faster)
    methods = {f"smollm2_{name}": method for name, method in two.items()}
    large = arms(Packaged(model=recipes.smollm2()), 4, tuning(5e-4, 24, 8), methods)
    note = "two seeds; the arms of SmolLM2 need `data fetch --models` and the packages of their tasks"
    return Preset(small | large, 2, (*claims(), *claims("smollm2_", aux=False)), note)


def published(world: Any, steps: int) -> dict[str, Study]:
    """The paper's: r = 16, alpha 32, dropout 0.05, batches of 16, rate 2e-4; LoRA and DoRA of r = 80 or about."""
    methods = {**main_methods(), "dora": other_methods()["dora"], "mixdora": other_methods()["mixdora"]}
    return arms(world, 16, tuning(2e-4, steps, 16, checkpoint_every=200), methods, dropout=0.05)


def gpu() -> Preset:
    """One H100, a model of 1B (`--set world.source=DIR`; counted in TinyLlama's shape): the packaged tasks."""
    from experiments.mixlora.worlds import Packaged

    shape = recipes.dense_shape(2048, 22, 32, 4, 5632, 32_000)
    world = Packaged(TASKS, "", "bfloat16", shape, longest_row=128, test_rows=512)
    return Preset(published(world, 250), 2, claims(), "one H100; --set world.source=DIR of Hugging Face's form")


def paper() -> Preset:
    """LLaMA2-7B's shape, `--set world.source=DIR`. The paper's five tasks are in no package: these are the packaged
    ones, two passes over the smallest of them [a budget of ours]."""
    from experiments.mixlora.worlds import Packaged

    shape = recipes.dense_shape(4096, 32, 32, 32, 11_008, 32_000)
    world = Packaged(TASKS, "", "bfloat16", shape, longest_row=512, test_rows=512)
    return Preset(published(world, 380), 3, claims(), "7 to 8B; --set world.source=DIR of Hugging Face's form")


def figure(content: dict[str, Any], path: Path) -> None:
    """One task at a time against all at once."""
    from experiments.mixlora.figure import draw

    draw(content, path)


EXPERIMENT = Experiment(
    name="mixlora",
    title="MixLoRA: LoRA experts and several tasks at once",
    paper="Li et al., 2024, arXiv 2404.15159",
    presets={"smoke": smoke, "rates": rates, "cpu": cpu, "cpu-long": cpu_long, "gpu": gpu, "paper": paper},
    figure=figure,
)
