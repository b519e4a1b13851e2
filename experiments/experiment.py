"""The contract of an experiment: a folder per paper whose `experiment.py` offers `EXPERIMENT`.

An arm is a whole `RunConfig`, made with `dataclasses.replace` from a recipe, or a `Study`, which is anything else; a
preset is a set of arms of one kind and a number of seeds. The shared runner (`experiments.run`) does the rest.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from experiments.claims import Claim
from experiments.config import PARENT, RunConfig
from experiments.overrides import flatten, with_overrides
from moe.config import require

FOLDER = Path(__file__).parent


StudyProgress = Callable[[int, str], None]  # (how many of the study's steps are done, what is going on)


def nothing() -> None:
    """A study that needs nothing."""


@dataclass(frozen=True)
class Study:
    """An arm that is not one training run.

    Attributes:
      run: `run(seed, out, progress) -> (metrics, series for figures)`. The folder `out` is its own: a long study keeps
        what it has finished there, raises KeyboardInterrupt after Ctrl-C, and goes on when it is called again.
      settings: what it depends on; JSON-able.
      steps: its length, in the unit of `progress`.
      check: ValueError for what is missing or wrong, before anything is compiled or written.
      count: for `--dry-run`, numbers by name.
      override: the study with `--set` settings; None where there is nothing to set.
    """

    run: Callable[[int, Path, StudyProgress], tuple[dict[str, float], dict[str, Any]]]
    settings: Mapping[str, Any]
    steps: int = 1
    check: Callable[[], None] = nothing
    count: Callable[[], dict[str, float | int]] | None = None
    override: Callable[[Sequence[str]], Study] | None = None


Trial = TypeVar("Trial")


def study_of(
    trial: Trial,
    run: Callable[[Trial, int, Path, StudyProgress], tuple[dict[str, float], dict[str, Any]]],
    steps: Callable[[Trial], int],
    check: Callable[[Trial], None],
    count: Callable[[Trial], dict[str, float | int]],
    override: Callable[[Trial, Sequence[str]], Trial] = with_overrides,
) -> Study:
    """The study a dataclass describes: its fields are the settings; the functions are `Study`'s, and take it first."""
    again = lambda settings: study_of(override(trial, settings), run, steps, check, count, override)  # noqa: E731
    of = lambda function: functools.partial(function, trial)  # noqa: E731
    return Study(of(run), flatten(trial), steps(trial), of(check), of(count), again)


Arm = RunConfig | Study


@dataclass(frozen=True)
class Tuning:
    """A field of the arms that is chosen for each of them beforehand, at a seed that no claim sees: the value with the
    lowest `metric`, which is of the validation split. A run whose loss is not finite has lost.

    Attributes:
      field: dotted, `optimizer.learning_rate`.
      values: what is tried, by arm; arms that are not here stay as they are.
    """

    field: str
    values: Mapping[str, tuple[float, ...]]
    metric: str = "val_ce"
    seed: int = 1000


@dataclass(frozen=True)
class Preset:
    """Arms by name, paired by seed; `claims` are those that can be judged from these arms.

    `parents` are trained first, at each seed, for the arms that start from them (`init.source = "parent:NAME"`). They
    are no arms: no claim speaks of them. ValueError for an arm whose parent is not there, or a parent with a parent.
    With `tuning`, a field of the arms is chosen first.
    """

    arms: Mapping[str, Arm]
    seeds: int
    claims: tuple[Claim, ...]
    note: str = ""
    parents: Mapping[str, RunConfig] = field(default_factory=dict)
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        known = ", ".join(self.parents) or "none"
        for name, arm in trained(self).items():
            there = not arm.init.parent or arm.init.parent in self.parents
            require(there, f"{name}: init.source", arm.init.source, f"a parent out of: {known}")
        for name, parent in self.parents.items():
            source = parent.init.source
            require(not parent.init.parent, f"parent {name}: init.source", source, "no parent of its own")


@dataclass(frozen=True)
class Experiment:
    """One paper.

    Attributes:
      name: as typed, `global-batch-lbl`; its folder has underscores.
      title, paper: what the list shows; authors, year and identifier.
      presets: functions, so that nothing is built before it is asked for: `smoke` (seconds), `cpu`, `cpu-long`, `gpu`,
        `paper`.
      figure: draws `result.json`'s content into a PNG at the given path.
    """

    name: str
    title: str
    paper: str
    presets: Mapping[str, Callable[[], Preset]]
    figure: Callable[[dict[str, Any], Path], None]


def names() -> list[str]:
    """Experiments of this tree: folders with an `experiment.py` (the template is to copy, not to list)."""
    found = (path.parent.name.replace("_", "-") for path in FOLDER.glob("*/experiment.py"))
    return sorted(name for name in found if name != "template")


def load(name: str) -> Experiment:
    """The experiment of that name, or of that import path `package.module` for a file outside the tree.

    Raises:
      ValueError: if there is none; it lists those there are.
    """
    module = name if "." in name else f"experiments.{name.replace('-', '_')}.experiment"
    known = "." in name or name in [*names(), "template"]
    require(known, "experiment", name, f"one of {', '.join(names())}, or an import path package.module")
    try:
        return importlib.import_module(module).EXPERIMENT
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name != module and not module.startswith(f"{error.name}."):
            raise  # the experiment is there, something it imports is not
        raise ValueError(f"experiment = {name!r}: expected a module with EXPERIMENT ({error})") from error


def trained(preset: Preset) -> dict[str, RunConfig]:
    """The arms that train a model."""
    return {name: arm for name, arm in preset.arms.items() if isinstance(arm, RunConfig)}


def studies(preset: Preset) -> dict[str, Study]:
    """The other arms."""
    return {name: arm for name, arm in preset.arms.items() if isinstance(arm, Study)}


def planned(preset: Preset) -> dict[str, RunConfig]:
    """Everything that trains, in order: the parents, as `parent:NAME`, then the arms."""
    return {PARENT + name: parent for name, parent in preset.parents.items()} | trained(preset)


def preset_of(experiment: Experiment, name: str) -> Preset:
    require(name in experiment.presets, "preset", name, f"one of {', '.join(experiment.presets)}")
    return experiment.presets[name]()
