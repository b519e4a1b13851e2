"""The shared runner: arms x seeds of one preset, resumable, ending in a table, a verdict and a figure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.claims import Judged, compared, judge, mean_std, overall, stated
from experiments.config import PARENT, RunConfig
from experiments.data.corpus import open_corpus
from experiments.dry_run import dry_run
from experiments.experiment import Arm, Experiment, Preset, Study, load, planned, preset_of, studies
from experiments.initial import Parent
from experiments.logs import check_loggers
from experiments.output import contents, elapsed, probe, stopwatch, write_json
from experiments.overrides import flatten, with_overrides
from experiments.progress import Bar
from experiments.provenance import git_commit, provenance
from experiments.report import CLAIM_COLUMNS, arm_cells, claim_cells
from experiments.series import within_limit
from experiments.train import FitResult, NotFinite, check, fit
from experiments.tuning import candidates, described_tuning, tuned, tuning_rows
from moe.config import require
from parallel.startup import barrier, is_primary

MANIFEST = "manifest.json"
WALL = "wall.json"


def run(
    name: str,
    preset_name: str,
    out: Path,
    *,
    seeds: int | None = None,
    arms: Sequence[str] = (),
    settings: Sequence[str] = (),
    loggers: Sequence[str] = (),
    profile: tuple[int, int] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs (or goes on with) one preset of an experiment in `out` and returns what `out/result.json` holds.

    Seeds are the outer loop, so that pairs of arms finish together. A finished run is recorded in its folder and
    skipped when the command is repeated; a run that was cut short resumes from its checkpoint.

    Raises:
      ValueError: bad input, before anything is compiled or written.
      KeyboardInterrupt: after Ctrl-C, once the state is saved.
    """
    console = console or wide_console()
    commit = git_commit()  # of the code that was loaded, whatever happens to the tree while it runs
    experiment = load(name)
    preset = select(preset_of(experiment, preset_name), arms, settings, seeds)
    check_loggers(loggers)
    for config in [*planned(preset).values(), *candidates(preset).values()]:
        check(config, open_corpus(config.data), parent_of(preset, config, 0, out))
    for study in studies(preset).values():
        study.check()
    prepare(out, experiment, preset_name, preset)
    options = {"commit": commit, "console": console, "loggers": loggers, "profile": profile}
    with stopwatch(out / WALL) if is_primary() else nullcontext():
        tried = tune(experiment.name, preset, out, **options)
        preset = tuned(preset, tried)
        results = train_all(experiment.name, preset, everything(preset), range(preset.seeds), out, **options)
    barrier("run/trained")
    content = collect(experiment, preset_name, preset, results, tried, out)
    if is_primary():
        write_json(out / "result.json", content)
        experiment.figure(content, out / "figure.png")
        show(content, console, out / "figure.png")
    return content


def tune(title: str, preset: Preset, out: Path, **options: Any) -> dict[str, dict[str, float]]:
    """Metrics of every candidate of `preset.tuning`, their parents trained before them."""
    if preset.tuning is None:
        return {}
    parents = {PARENT + name: parent for name, parent in preset.parents.items()}
    seed, jobs = preset.tuning.seed, candidates(preset)
    results = train_all(f"{title}, tuning", preset, parents | jobs, [seed], out, run_one=run_candidate, **options)
    return {name: results[name, seed].metrics for name in jobs}


def train_all(
    title: str,
    preset: Preset,
    jobs: Mapping[str, Arm],
    seeds: Iterable[int],
    out: Path,
    *,
    commit: str,
    console: Console,
    loggers: Sequence[str],
    profile: tuple[int, int] | None,
    run_one: Callable[..., FitResult] | None = None,
) -> dict[tuple[str, int], FitResult]:
    """Every job at every seed that is not recorded yet, under one progress bar; by `run_arm` or `run_one`."""
    plan = [(arm, seed) for seed in seeds for arm in jobs]
    results = {run: result for run in plan if (result := read_result(out, *run)) is not None}
    total = sum(jobs[arm].steps for arm, _ in plan)
    done = sum(jobs[arm].steps for arm, _ in results)
    with Bar(title, total, done, console, shown=is_primary()) as bar:
        for arm, seed in [run for run in plan if run not in results]:
            note = noted(jobs[arm], bar, f"{arm} seed {seed}", done)
            options = {"progress": note, "loggers": loggers, "profile": profile}
            if (parent := parent_of(preset, jobs[arm], seed, out)) is not None:
                options |= {"parent": parent}
            result = (run_one or run_arm)(jobs[arm], seed, run_folder(out, arm, seed), **options)
            record(out, arm, seed, result, commit)
            results[arm, seed] = result
            done += jobs[arm].steps
            bar.update(done, f"{arm} seed {seed}")
    return results


def run_arm(arm: Arm, seed: int, out: Path, **options: Any) -> FitResult:
    """One arm at one seed: a training run in `out`, or a study."""
    if isinstance(arm, RunConfig):
        return fit(replace(arm, seed=seed), out, **options)
    out.mkdir(parents=True, exist_ok=True)
    return FitResult(*arm.run(seed, out, options["progress"]))


def noted(arm: Arm, bar: Bar, what: str, before: int) -> Callable[..., None]:
    """The `progress` of a training run, or of a study: moves the bar on from `before`."""
    if isinstance(arm, Study):
        return lambda step, note: bar.update(before + step, f"{what} {note}")
    return lambda step, _, m: bar.update(before + step, f"{what} step {step} loss {m['loss']:.3f}")


def run_candidate(arm: Arm, seed: int, out: Path, **options: Any) -> FitResult:
    """`run_arm` for tuning: a run that is not finite has no metrics."""
    try:
        return run_arm(arm, seed, out, **options)
    except NotFinite:
        return FitResult({}, {})


def everything(preset: Preset) -> dict[str, Arm]:
    """What is run at each seed, in order: parents, as `parent:NAME`, then arms."""
    return planned(preset) | dict(preset.arms)


def parent_of(preset: Preset, arm: Arm, seed: int, out: Path) -> Parent | None:
    """The run that an arm starts from, None if it starts otherwise."""
    name = arm.init.parent if isinstance(arm, RunConfig) else ""
    return Parent(replace(preset.parents[name], seed=seed), run_folder(out, PARENT + name, seed)) if name else None


def select(preset: Preset, arms: Sequence[str], settings: Sequence[str], seeds: int | None) -> Preset:
    """The preset with the asked arms, overrides on every arm, and seeds. Claims whose arms are left out drop out, and
    parents that no arm starts from; the others take those overrides that their children cannot have alone: of the
    model around the experts and of the mesh. ValueError for an override of what is tuned."""
    for arm in arms:
        require(arm in preset.arms, "arm", arm, f"one of {', '.join(preset.arms)}")
    require(seeds is None or seeds >= 1, "seeds", seeds, "at least 1")
    if preset.tuning is not None:
        free = all(setting.partition("=")[0] != preset.tuning.field for setting in settings)
        require(free, "--set", preset.tuning.field, f"another field: {preset.tuning.field} is tuned")
    asked = {name: arm for name, arm in preset.arms.items() if not arms or name in arms}
    fixed = [name for name, arm in asked.items() if isinstance(arm, Study) and arm.override is None]
    require(not settings or not fixed, "--set", list(settings), f"arms with something to set, not {', '.join(fixed)}")
    kept = {name: overridden(arm, settings) for name, arm in asked.items()}
    claims = tuple(c for c in preset.claims if set(c.arms) <= kept.keys())
    common = [s for s in settings if s.startswith(("model.", "mesh.")) and not s.startswith("model.moe.")]
    needed = {arm.init.parent for arm in kept.values() if isinstance(arm, RunConfig)}
    parents = {name: with_overrides(one, common) for name, one in preset.parents.items() if name in needed}
    return replace(preset, arms=kept, claims=claims, parents=parents, seeds=seeds or preset.seeds)


def overridden(arm: Arm, settings: Sequence[str]) -> Arm:
    if isinstance(arm, RunConfig):
        return with_overrides(arm, settings)
    return arm.override(settings) if settings and arm.override is not None else arm


def manifest(experiment: Experiment, preset_name: str, preset: Preset) -> dict[str, Any]:
    """What must be equal for `out` to be continued; more seeds and arms may be asked for later, and another mesh."""
    configs = {name: settings_of(arm) | corpus_of(arm) for name, arm in everything(preset).items()}
    flat = {f"{arm}.{key}": value for arm, config in configs.items() for key, value in config.items()}
    free = (".seed", ".checkpoint_every", ".mesh.data", ".mesh.fsdp", ".mesh.expert")
    kept = {key: value for key, value in flat.items() if not key.endswith(free)}
    tuning = preset.tuning
    grid = {f"tuning.{arm}": [tuning.field, *tuning.values.get(arm, ())] for arm in preset.arms} if tuning else {}
    return {"experiment": experiment.name, "preset": preset_name, **kept, **grid}


def settings_of(arm: Arm) -> dict[str, Any]:
    return dict(arm.settings) if isinstance(arm, Study) else flatten(arm)


def corpus_of(arm: Arm) -> dict[str, str]:
    """The corpus by content; nothing for a study."""
    return {} if isinstance(arm, Study) else {"corpus_hash": open_corpus(arm.data).content_hash}


def prepare(out: Path, experiment: Experiment, preset_name: str, preset: Preset) -> None:
    """Makes `out` or recognises it as this very experiment's, and tries that it can be written to."""
    wanted = json.loads(json.dumps(manifest(experiment, preset_name, preset)))
    path, names = out / MANIFEST, contents(out) or []
    held: dict[str, Any] = {}
    if MANIFEST in names:
        try:
            held = json.loads(path.read_text())
        except (ValueError, OSError) as error:
            raise ValueError(f"--out = {str(out)!r}: expected a readable {MANIFEST} in it ({error})") from error
        keys = [key for key, value in wanted.items() if key in held and held[key] != value]
        differs = "; ".join(f"{key}: {held.get(key)!r} there, {wanted.get(key)!r} asked for" for key in keys[:5])
        require(not keys, "--out", str(out), f"the same settings as before or another directory; differing: {differs}")
    else:
        require(not names, "--out", str(out), f"an empty directory or one of this experiment; it holds {names[:5]}")
    barrier("run/inspected")
    if is_primary():
        probe(out)
        write_json(path, held | wanted)
    barrier("run/prepared")


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """`runs/ARM-seedS`, or `parents/NAME-seedS` for `parent:NAME`."""
    name = arm.removeprefix(PARENT)
    return out / ("runs" if name == arm else "parents") / f"{name}-seed{seed}"


def record(out: Path, arm: str, seed: int, result: FitResult, commit: str) -> None:
    """Marks a run as finished, with the commit whose code trained it."""
    if is_primary():
        write_json(run_folder(out, arm, seed) / "result.json", asdict(result) | {"commit": commit})
    barrier("run/recorded")


def read_result(out: Path, arm: str, seed: int) -> FitResult | None:
    path = run_folder(out, arm, seed) / "result.json"
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    return FitResult(stored["metrics"], stored["series"])


def commits(out: Path, preset: Preset) -> str:
    """The commit that trained the runs; several, in order, if the code changed between them."""
    runs = [(arm, seed) for seed in range(preset.seeds) for arm in everything(preset)]
    if preset.tuning is not None:
        runs = [(name, preset.tuning.seed) for name in candidates(preset)] + runs
    paths = [run_folder(out, arm, seed) / "result.json" for arm, seed in runs]
    return " ".join(dict.fromkeys(json.loads(path.read_text())["commit"] for path in paths))


def collect(
    experiment: Experiment,
    preset_name: str,
    preset: Preset,
    results: Mapping[tuple[str, int], FitResult],
    tried: Mapping[str, Mapping[str, float]],
    out: Path,
) -> dict[str, Any]:
    """The content of `result.json`, of the tuned preset."""
    arms = {arm: summary([results[arm, seed] for seed in range(preset.seeds)]) for arm in preset.arms}
    parents = {
        name: summary([results[PARENT + name, seed] for seed in range(preset.seeds)]) for name in preset.parents
    }
    verdicts = judged(preset, arms)
    series = {arm: [results[arm, seed].series for seed in range(preset.seeds)] for arm in preset.arms}
    configs = {name: without_places(settings_of(arm)) for name, arm in everything(preset).items()}
    return {
        "experiment": experiment.name,
        "preset": preset_name,
        "claim": [described(j) for j in verdicts],
        "arms": arms,
        **({"parents": parents} if parents else {}),
        **({"tuning": described_tuning(preset, tried)} if preset.tuning else {}),
        "verdict": overall(verdicts) if verdicts else "no claim judged",
        "provenance": provenance()
        | corpus_of(next(iter(preset.arms.values())))
        | {
            "commit": commits(out, preset),
            "seeds": preset.seeds,
            "wall_seconds": round(elapsed(out / WALL), 1),
            "config": configs,
        },
        "series": within_limit(series),
    }


def without_places(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose paths are names alone: where a corpus, a model or adapters lie says nothing to others."""
    name = lambda path: Path(path).resolve().name if path else path  # noqa: E731
    named = lambda value: list(map(name, value)) if isinstance(value, list) else name(value)  # noqa: E731
    places = ("corpus", "source", "folders")
    return {key: named(value) if key.rpartition(".")[2] in places else value for key, value in flat.items()}


def summary(runs: Sequence[FitResult]) -> dict[str, Any]:
    """Mean, deviation and values, in seed order, of every metric."""
    found = {key: [run.metrics[key] for run in runs] for key in runs[0].metrics}
    return {key: dict(zip(("mean", "std"), mean_std(values))) | {"values": values} for key, values in found.items()}


def judged(preset: Preset, arms: Mapping[str, Mapping[str, Any]]) -> list[Judged]:
    values = {arm: {key: value["values"] for key, value in metrics.items()} for arm, metrics in arms.items()}
    return [judge(claim, values) for claim in preset.claims]


def described(j: Judged) -> dict[str, Any]:
    return {
        "text": j.claim.text,
        "metric": j.claim.metric,
        "compared": compared(j.claim),
        "claimed": stated(j.claim),
        "paper": j.claim.paper,
        "measured": {"mean": j.mean, "std": j.std, "values": list(j.values)},
        "verdict": j.verdict,
    }


def show(content: dict[str, Any], console: Console, figure: Path) -> None:
    """The two tables, the verdict and the figure's path."""
    table = Table(title=f"{content['experiment']} ({content['preset']}): claimed beside measured")
    for column in CLAIM_COLUMNS:
        table.add_column(column, overflow="fold")
    for row in content["claim"]:
        table.add_row(*claim_cells(row))
    console.print(table)
    console.print(arms_table(content["arms"]))
    if "tuning" in content:
        console.print(cells_table("tuning: at a seed of its own, lowest is chosen", *tuning_rows(content["tuning"])))
    console.print(f"verdict: [bold]{content['verdict']}[/bold]")
    console.print(f"figure: {figure}", soft_wrap=True)


def wide_console() -> Console:
    """The terminal; where output goes to a file or a pipe, wide enough that tables do not fold."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def arms_table(arms: Mapping[str, Mapping[str, Any]]) -> Table:
    return cells_table("arms: mean ± sd over seeds", *arm_cells(arms))


def cells_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for i, key in enumerate(columns):
        table.add_column(key, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def counted(arm: Arm) -> dict[str, float | int]:
    """What an arm would cost; empty for a study that counts nothing."""
    if isinstance(arm, RunConfig):
        return dry_run(arm)
    return {} if arm.count is None else arm.count()


def plan_table(arms: Mapping[str, Arm]) -> Table:
    """`--dry-run`: every arm's step lowered on a simulated mesh, and counted; studies as they count themselves."""
    counts = {name: row for name, arm in arms.items() if (row := counted(arm))}
    require(bool(counts), "--dry-run", "no arm that trains", "a preset that trains models")
    keys = dict.fromkeys(key for row in counts.values() for key in row)
    table = Table(title="dry run: nothing is trained")
    table.add_column("")
    for arm in counts:
        table.add_column(arm, justify="right")
    for key in keys:
        table.add_row(key.replace("_", " "), *(f"{row[key]:,}" if key in row else "-" for row in counts.values()))
    return table
