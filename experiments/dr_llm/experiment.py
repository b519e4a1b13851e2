"""Dr.LLM: small routers choose for each question which blocks of a frozen model to skip, execute or repeat.

Paper:     Heakl et al., arXiv 2510.12773. Baselines: ShortGPT 2403.03853; early exit; Coulom's progressive widening for
           the search. The library is moe/depth/.
Claim:     routers taught by searched paths answer more questions than the whole model, with fewer block executions.
Command:   python -m experiments run dr-llm --preset cpu
Time:      cpu about 10 minutes on 2 quiet cores (the committed run shared them: 22); cpu-long about 60 (not run).
Result:    cpu, two seeds: paths that answer more do exist (the bound 0.930 at 0.61 of the executions, the tree search
           0.852 at 0.71, the whole model 0.608), but routers do not find them: 0.257 at 0.60 of the executions, 35
           points below the model (does not hold). They beat skipping at random and their own decisions at other layers
           (0.128, 0.098: hold), not early exit at the same depth (0.396) or one edit's teaching (0.366 at 0.80). The
           stream says no more than embeddings (inconclusive); unseen tasks lose 10 points (does not hold).

Protocol, fixed beforehand. A decoder of 8 layers learns chains of one to four numbers for 1200 steps (arithmetic.py)
and is frozen. Its 222 paths of at most two edits are enumerated for validation questions, which it was not trained on;
routers are trained on the shortest correct ones as in the paper (supervision.py, routers.py); all policies are compared
on questions of the test split. Policies of a seed share base, searches and routers.

Steps and modulus are of a trial at seed 1000, where the model answered 60% of the test and 71% of the validation
questions. Sizes were written before it and stayed, although its routers (256 taught questions) were far below the
model; `router_one_edit` and the numbers of questions came after it.

    full              every block once
    router            learned routers, 8 windows, on the residual stream entering each block
    router_embedding  the same on the embeddings
    router_one_edit   `router` taught by the 24 paths of at most one edit: two edits may leave out half of 8 blocks, and
                      skips are many more of the labels than the paper's 3.5%; no claim speaks of it
    upper_bound       enumeration on the test questions themselves, which needs their answers: a bound, not a method
    uct_bound         the same by the paper's tree search of 50 paths, any number of edits
    released_bound    the same by the chain that the released code runs
    shuffled          the routers' decisions of each question at random layers
    random            as many blocks left out as the routers leave out on average, at random
    shortgpt          the same, those of the least influence
    early_exit        the same, the last ones
    static            the majority label of each layer

Executions are told in the paper's way, blocks summed over generated tokens, and as a fraction of full depth. The
paper's "5 layers saved" are 0.4 to 2.2% of its executions.

Sizes: accuracy of routers above the model's (paper: +1 to +4 points); 1% saved (mean of the paper's six rows: 1.0%);
embeddings 2 points worse (paper: 3.6 and 8.6; a third of their mean); shuffled and random 2 points worse, a guess; the
bound 5 points above the model, a guess; on tasks routers have not seen -1 point (paper: -0.85). That the model knows
its task, 5 points above the commonest answer, is a condition; a task that routers have not seen and that the model does
not know by as much (validation split) is dropped and named.

`smollm2` in the names of cpu-long: SmolLM2-135M on packaged tasks with options, tree search of 50 paths with at most
three edits for supervision and bound; seeds share model and searches and differ in routers alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments import recipes
from experiments.claims import Claim
from experiments.experiment import Experiment, Preset, Study

CHANGE, SAVED, EMBEDDING, RANDOM, BOUND, OTHERS, KNOWN = 0.0, 0.01, 0.02, 0.02, 0.05, -0.01, 0.05  # see above
PACKAGED = ("upper_bound", "router", "router_embedding", "shuffled", "random", "static", "shortgpt", "early_exit")


def claims(prefix: str = "") -> tuple[Claim, ...]:
    arm = lambda name: prefix + name  # noqa: E731
    better = lambda text, ours, theirs, size, paper: Claim(  # noqa: E731
        text, "accuracy", arm(ours), arm(theirs), "difference", "higher", size, paper
    )
    return (
        Claim("condition: the model knows its task", "over_majority", arm("full"), None, "value", "higher", KNOWN, "-"),
        better("routers answer more than the whole model", "router", "full", CHANGE, "+1.0 to +4.0 points"),
        Claim("with fewer block executions", "fraction", arm("router"), arm("full"), "difference", "lower", SAVED,
              "-2.2, -1.7, -0.4, -0.5, -0.4, -0.7%"),
        better("the stream says more than embeddings", "router", "router_embedding", EMBEDDING, "+3.6, +8.6 points"),
        better("where blocks are skipped matters", "router", "shuffled", RANDOM, "not given"),
        better("random skipping is worse", "router", "random", RANDOM, "not given"),
        better("search finds paths where the whole model fails", "upper_bound", "full", BOUND, "not given"),
        Claim("tasks that routers have not seen", "other_tasks_change", arm("router"), None, "value", "higher", OTHERS,
              "-0.85 points"),
    )  # fmt: skip


def arms(policies: tuple[str, ...], prefix: str = "", **trial: Any) -> dict[str, Study]:
    from experiments.dr_llm.study import Trial, study

    return {prefix + policy: study(Trial(policy, **trial)) for policy in ("full", *policies)}  # type: ignore[arg-type]


def small(**trial: Any) -> dict[str, Study]:
    """Every policy on arithmetic."""
    from dataclasses import replace

    from experiments.dr_llm.study import POLICIES, Trial, study

    first = Trial("router", **trial)
    one_edit = replace(first, search=replace(first.search, max_edits=1))
    return arms(POLICIES[1:], **trial) | {"router_one_edit": study(one_edit)}


def smoke() -> Preset:
    from dataclasses import replace

    from experiments.dr_llm.arithmetic import Arithmetic
    from experiments.dr_llm.routers import RouterTraining
    from experiments.dr_llm.supervision import SearchConfig
    from moe.depth.router import DepthConfig

    world = Arithmetic(steps=20, batch=32, search_questions=64, test_questions=32, others=("right",), size=32)
    model = replace(world.model, hidden=32, num_layers=3, num_heads=2, num_kv_heads=2, ffn_dim=48)
    trial = {
        "world": replace(world, model=model), "search": SearchConfig(budget=4, chunk=32),
        "depth": DepthConfig(hidden=16), "training": RouterTraining(epochs=2), "knobs": (), "skips": (1,),
    }  # fmt: skip
    return Preset(small(**trial), 1, claims(), "shows that it runs")


def cpu() -> Preset:
    return Preset(small(), 2, claims())


def cpu_long() -> Preset:
    """SmolLM2; the budget was set beforehand by the time of a pass."""
    from experiments.dr_llm.packaged import Packaged
    from experiments.dr_llm.supervision import SearchConfig

    search = SearchConfig("uct", max_edits=3, budget=50, chunk=8)
    world = Packaged(model=recipes.smollm2())
    large = arms(PACKAGED, "smollm2_", world=world, search=search, knobs=(-0.25,), skips=(1, 3))
    return Preset(large, 2, claims("smollm2_"), "SmolLM2-135M: data fetch --models, and the packages of its tasks")


def published(model: Any, search_questions: int, test_questions: int) -> dict[str, Study]:
    """The paper's search and training (`RouterTraining` and `DepthConfig` are its own) on the packaged tasks; ARC and
    DART are in no package."""
    from experiments.dr_llm.packaged import Packaged
    from experiments.dr_llm.supervision import SearchConfig

    world = Packaged(
        ("quartz", "logiqa", "question-types"), ("sentiment-film", "sarcasm", "sms-spam"), "", "bfloat16", model,
        longest=512, search_questions=search_questions, test_questions=test_questions, validation_questions=512,
        size=64,
    )  # fmt: skip
    return arms(PACKAGED, world=world, search=SearchConfig("uct", max_edits=0, budget=50, chunk=64))


def gpu() -> Preset:
    """One H100 and a model of 0.5 to 1.5B (`--set world.source=DIR`; counted in Qwen2.5-0.5B's shape)."""
    made = published(recipes.dense_shape(896, 24, 14, 2, 4864, 151_936), 2048, 1024)
    return Preset(made, 2, claims(), "one H100; --set world.source=DIR of Hugging Face's form")


def paper() -> Preset:
    """LLaMA-3.2-3B's shape, `--set world.source=DIR`; as many questions visited as in the paper."""
    made = published(recipes.dense_shape(3072, 28, 24, 8, 8192, 128_256), 24_330, 2048)
    return Preset(made, 3, claims(), "3 to 8B; --set world.source=DIR of Hugging Face's form")


def figure(content: dict[str, Any], path: Path) -> None:
    """Accuracy against block executions."""
    from experiments.dr_llm.figure import draw

    draw(content, path)


EXPERIMENT = Experiment(
    name="dr-llm",
    title="Dr.LLM: which blocks a question needs",
    paper="Heakl et al., 2025, arXiv 2510.12773",
    presets={"smoke": smoke, "cpu": cpu, "cpu-long": cpu_long, "gpu": gpu, "paper": paper},
    figure=figure,
)
