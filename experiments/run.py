"""The shared runner: arms x seeds of one preset, resumable, ending in a table, a verdict and a figure."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.claims import Judged, judge, mean_std, overall, stated
from experiments.config import RunConfig
from experiments.data.corpus import open_corpus
from experiments.dry_run import dry_run
from experiments.experiment import Experiment, Preset, load, preset_of
from experiments.logs import check_loggers
from experiments.overrides import flatten, with_overrides
from experiments.progress import Bar
from experiments.provenance import provenance
from experiments.train import FitResult, check, fit
from moe.config import require
from parallel.startup import barrier, is_primary

SERIES_BYTES = 200_000
MANIFEST = "manifest.json"


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
    experiment = load(name)
    preset = select(preset_of(experiment, preset_name), arms, settings, seeds)
    check_loggers(loggers)
    for config in preset.arms.values():
        check(config, open_corpus(config.data))
    prepare(out, experiment, preset_name, preset)
    began = time.time()
    plan = [(arm, seed) for seed in range(preset.seeds) for arm in preset.arms]
    results: dict[tuple[str, int], FitResult] = {}
    total = sum(preset.arms[arm].steps for arm, _ in plan)
    done = sum(preset.arms[arm].steps for arm, seed in plan if read_result(out, arm, seed) is not None)
    with Bar(experiment.name, total, done, console, shown=is_primary()) as bar:
        finished = 0
        for arm, seed in plan:
            config = replace(preset.arms[arm], seed=seed)
            result = read_result(out, arm, seed)
            if result is None:
                note = lambda step, _, m, arm=arm, seed=seed, before=finished: bar.update(  # noqa: E731
                    before + step, f"{arm} seed {seed} step {step} loss {m['loss']:.3f}"
                )
                result = fit(config, run_folder(out, arm, seed), progress=note, loggers=loggers, profile=profile)
                record(out, arm, seed, result)
            results[arm, seed] = result
            finished += config.steps
            bar.update(finished, f"{arm} seed {seed}")
    content = collect(experiment, preset_name, preset, results, time.time() - began)
    if is_primary():
        write_json(out / "result.json", content)
        experiment.figure(content, out / "figure.png")
        show(content, judged(preset, content["arms"]), console, out / "figure.png")
    return content


def select(preset: Preset, arms: Sequence[str], settings: Sequence[str], seeds: int | None) -> Preset:
    """The preset with the asked arms, overrides on every arm, and seeds. Claims whose arms are left out drop out."""
    for arm in arms:
        require(arm in preset.arms, "arm", arm, f"one of {', '.join(preset.arms)}")
    require(seeds is None or seeds >= 1, "seeds", seeds, "at least 1")
    kept = {arm: with_overrides(config, settings) for arm, config in preset.arms.items() if not arms or arm in arms}
    claims = tuple(c for c in preset.claims if c.arm in kept and c.baseline in kept)
    return replace(preset, arms=kept, claims=claims, seeds=seeds or preset.seeds)


def manifest(experiment: Experiment, preset_name: str, preset: Preset) -> dict[str, Any]:
    """What must be equal for `out` to be continued; more seeds may be asked for later, and another mesh."""
    flat = {f"{arm}.{key}": value for arm, config in preset.arms.items() for key, value in flatten(config).items()}
    free = (".seed", ".checkpoint_every", ".mesh.data", ".mesh.fsdp", ".mesh.expert")
    kept = {key: value for key, value in flat.items() if not key.endswith(free)}
    return {"experiment": experiment.name, "preset": preset_name, **kept}


def prepare(out: Path, experiment: Experiment, preset_name: str, preset: Preset) -> None:
    """Makes `out` or recognises it as this very experiment's, and tries that it can be written to."""
    wanted = json.loads(json.dumps(manifest(experiment, preset_name, preset)))
    require(not out.exists() or out.is_dir(), "--out", str(out), "a directory, or a path where one can be made")
    path = out / MANIFEST
    if path.exists():
        try:
            held = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"--out = {str(out)!r}: expected a readable {MANIFEST} in it ({error})") from error
        keys = [key for key in {**wanted, **held} if held.get(key) != wanted.get(key)]
        differs = "; ".join(f"{key}: {held.get(key)!r} there, {wanted.get(key)!r} asked for" for key in keys[:5])
        require(not keys, "--out", str(out), f"the same settings as before or another directory; differing: {differs}")
    elif out.exists():
        foreign = sorted(p.name for p in out.iterdir())[:5]
        require(not foreign, "--out", str(out), f"an empty directory or one of this experiment; it holds {foreign}")
    barrier("run/inspected")
    if is_primary():
        probe(out)
        write_json(path, wanted)
    barrier("run/prepared")


def probe(out: Path) -> None:
    """Raises ValueError if a directory cannot be made or a megabyte not written there; leaves nothing behind."""
    made = [path for path in (out, *out.parents) if not path.exists()]
    trial = out / ".probe"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with trial.open("wb") as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        trial.unlink(missing_ok=True) if out.is_dir() else None
        for path in filter(Path.is_dir, made):
            path.rmdir()
        reason = error.strerror or str(error)
        raise ValueError(f"--out = {str(out)!r}: expected a writable directory with free space ({reason})") from error
    trial.unlink()


def run_folder(out: Path, arm: str, seed: int) -> Path:
    return out / "runs" / f"{arm}-seed{seed}"


def record(out: Path, arm: str, seed: int, result: FitResult) -> None:
    if is_primary():
        write_json(run_folder(out, arm, seed) / "result.json", asdict(result))
    barrier("run/recorded")


def read_result(out: Path, arm: str, seed: int) -> FitResult | None:
    path = run_folder(out, arm, seed) / "result.json"
    return FitResult(**json.loads(path.read_text())) if path.exists() else None


def write_json(path: Path, value: Any) -> None:
    """Atomically, so that a reader or a killed process never meets half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def collect(
    experiment: Experiment, preset_name: str, preset: Preset, results: Mapping[tuple[str, int], FitResult], wall: float
) -> dict[str, Any]:
    """The content of `result.json`."""
    arms: dict[str, dict[str, Any]] = {}
    for arm in preset.arms:
        runs = [results[arm, seed].metrics for seed in range(preset.seeds)]
        summary = {key: [run[key] for run in runs] for key in runs[0]}
        arms[arm] = {
            key: dict(zip(("mean", "std"), mean_std(values))) | {"values": values} for key, values in summary.items()
        }
    verdicts = judged(preset, arms)
    series = {arm: [results[arm, seed].series for seed in range(preset.seeds)] for arm in preset.arms}
    any_config = next(iter(preset.arms.values()))
    return {
        "experiment": experiment.name,
        "preset": preset_name,
        "claim": [described(j) for j in verdicts],
        "arms": arms,
        "verdict": overall(verdicts) if verdicts else "no claim judged",
        "provenance": provenance()
        | {
            "corpus_hash": open_corpus(any_config.data).content_hash,
            "seeds": preset.seeds,
            "wall_seconds": round(wall, 1),
            "config": {arm: published(config) for arm, config in preset.arms.items()},
        },
        "series": within_limit(series),
    }


def published(config: RunConfig) -> dict[str, Any]:
    """The config without the place of one's own corpus on this machine; `corpus_hash` says which one it is."""
    return flatten(config) | {"data.corpus": Path(config.data.corpus).name}


def judged(preset: Preset, arms: Mapping[str, Mapping[str, Any]]) -> list[Judged]:
    values = {arm: {key: value["values"] for key, value in metrics.items()} for arm, metrics in arms.items()}
    return [judge(claim, values) for claim in preset.claims]


def described(j: Judged) -> dict[str, Any]:
    return {
        "text": j.claim.text,
        "metric": j.claim.metric,
        "compared": f"{j.claim.arm} {'/' if j.claim.kind == 'ratio' else '-'} {j.claim.baseline}",
        "claimed": stated(j.claim),
        "paper": j.claim.paper,
        "measured": {"mean": j.mean, "std": j.std, "values": list(j.values)},
        "verdict": j.verdict,
    }


def within_limit(series: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Every second point of the curves is left out until the whole is within 200 kB."""
    while (size := len(json.dumps(series))) > SERIES_BYTES:
        longest = max(len(run.get("loss_steps", ())) for runs in series.values() for run in runs)
        require(longest > 8, "series", size, f"at most {SERIES_BYTES} bytes once curves are thinned")
        series = {arm: [thinned(run) for run in runs] for arm, runs in series.items()}
    return series


def thinned(run: dict[str, Any]) -> dict[str, Any]:
    """Every second point of what is as long as `loss_steps`."""
    points = len(run["loss_steps"])
    return {
        key: value[1::2] if isinstance(value, list) and len(value) == points else value for key, value in run.items()
    }


def show(content: dict[str, Any], verdicts: Sequence[Judged], console: Console, figure: Path) -> None:
    """The two tables, the verdict and the figure's path."""
    table = Table(title=f"{content['experiment']} ({content['preset']}): claimed beside measured")
    for column in ("claim", "claimed", "paper", "measured mean ± sd", "per seed", "verdict"):
        table.add_column(column, overflow="fold")
    for row in content["claim"]:
        measured = row["measured"]
        each = " ".join(f"{v:.4g}" for v in measured["values"])
        size = f"{measured['mean']:.4g} ± {measured['std']:.2g}"
        table.add_row(f"{row['text']} ({row['compared']})", row["claimed"], row["paper"], size, each, row["verdict"])
    console.print(table)
    console.print(arms_table(content["arms"]))
    console.print(f"verdict: [bold]{content['verdict']}[/bold]")
    console.print(f"figure: {figure}", soft_wrap=True)


def wide_console() -> Console:
    """The terminal; where output goes to a file or a pipe, wide enough that tables do not fold."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def arms_table(arms: Mapping[str, Mapping[str, Any]]) -> Table:
    shown = ("val_ce", "test_ce", "domain_expert_mi", "max_violation", "max_violation_sequence", "top_score", "step_ms")
    columns = [key for key in shown if all(key in metrics for metrics in arms.values())]
    table = Table(title="arms: mean ± sd over seeds")
    table.add_column("arm")
    for key in columns:
        table.add_column(key, justify="right")
    for arm, metrics in arms.items():
        table.add_row(arm, *(f"{metrics[key]['mean']:.4g} ± {metrics[key]['std']:.2g}" for key in columns))
    return table


def plan_table(preset: Preset) -> Table:
    """`--dry-run`: every arm's step lowered on a simulated mesh, and counted."""
    counts = {arm: dry_run(config) for arm, config in preset.arms.items()}
    keys = list(next(iter(counts.values())))
    table = Table(title="dry run: nothing is trained")
    table.add_column("")
    for arm in counts:
        table.add_column(arm, justify="right")
    for key in keys:
        table.add_row(key.replace("_", " "), *(f"{row[key]:,}" for row in counts.values()))
    return table
