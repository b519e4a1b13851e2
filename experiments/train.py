"""The training loop: one model, from a config and an output directory to metrics, resumable at any moment."""

from __future__ import annotations

import functools
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.config import InitConfig, RunConfig
from experiments.data.corpus import Corpus, open_corpus
from experiments.data.pipeline import batches, check_fits, make_dataset
from experiments.data.shards import SPLITS
from experiments.dry_run import flops_per_token, parameter_counts
from experiments.evaluate import evaluate
from experiments.initial import Parent, Source, check_source, fingerprint, open_source, started
from experiments.logs import JsonLines, check_loggers, make_loggers
from experiments.output import write_json
from experiments.step import (
    Batch,
    TrainState,
    batch_sharding,
    compile_step,
    init_state,
    make_optimizer,
    state_shardings,
)
from moe.config import require
from moe.routing import make_router
from moe.transformer import abstract_params
from optim.sharding import opt_state_shardings
from parallel.checkpoint import Checkpoints
from parallel.mesh import make_mesh
from parallel.sharding import tree_shardings
from parallel.startup import any_process, is_primary


class NotFinite(ValueError):
    """A loss or a gradient is not a finite number."""


Progress = Callable[[int, int, dict[str, float]], None]
START = "start.json"


@dataclass(frozen=True)
class FitResult:
    """`metrics`: final numbers by name; `series`: small JSON-able arrays for figures."""

    metrics: dict[str, float]
    series: dict[str, Any]


def fit(
    config: RunConfig,
    out: Path,
    *,
    steps: int | None = None,
    progress: Progress | None = None,
    loggers: Sequence[str] = (),
    profile: tuple[int, int] | None = None,
    parent: Parent | None = None,
) -> FitResult:
    """Trains one model in `out`, resuming from the checkpoint found there, and evaluates it.

    Args:
      config: everything the run is a function of; a checkpoint of another config is refused.
      out: directory for `metrics.jsonl` and `checkpoints/`.
      steps: stop after this many optimiser steps in all; the schedule still spans `config.steps`.
      progress: called as progress(finished, total, metrics) after each step.
      loggers: any of `tensorboard`, `wandb`, `trackio`, beside the JSON lines.
      profile: (first, last) steps to trace with the JAX profiler into `out/profile`.
      parent: the finished run that `config.init.source = "parent:NAME"` means.

    Raises:
      ValueError: bad input, before anything is compiled or written.
      NotFinite: a loss or gradient that is not, after its line is written; the step is not saved.
      KeyboardInterrupt: after Ctrl-C, once the state is saved.
    """
    total = config.steps if steps is None else steps
    require(total >= 1, "steps", total, "at least 1")
    check_loggers(loggers)
    corpus = open_corpus(config.data)
    check(config, corpus, parent)
    source = open_source(config, parent)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.expert)
    tx = make_optimizer(config.optimizer, config.steps)
    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        saved = stack.enter_context(Checkpoints(out / "checkpoints", fingerprint=fingerprint(config, corpus, parent)))
        if source is not None and saved.latest() is None:
            state = start_from(source, config, tx, mesh, corpus, out / START)
        else:
            state = restore_or_init(config, tx, mesh, saved)
        start = int(state.step)
        lines = JsonLines.resume(out / "metrics.jsonl", start) if is_primary() else None
        sinks = [lines, *make_loggers(loggers, out, start)] if lines else []
        for sink in sinks:
            stack.callback(sink.close)
        step_fn = compile_step(config, tx, mesh)
        feed = stack.enter_context(feeding(config, corpus, mesh, start))
        with stop_on_interrupt() as stop:
            state, times = loop(config, state, step_fn, feed, saved, sinks, stop, total, progress, profile, out)
        # From here on Ctrl-C acts at once: the state is saved, the same call evaluates it.
        metrics, series = evaluate(config, state, corpus, mesh)
        parameters, active = parameter_counts(state.params, config.model)
        kept = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    if source is not None:
        metrics |= json.loads((out / START).read_text())
    metrics |= {"flops_per_token": float(flops_per_token(active)), "state_bytes_per_parameter": kept / parameters}
    rows = read_lines(out / "metrics.jsonl") if is_primary() else []
    step_ms = float(np.median([row["step_ms"] for row in rows])) if rows else float(np.median(times or [np.nan])) * 1e3
    tokens = config.batch_size * config.data.seq_len
    metrics |= {"step_ms": step_ms, "tokens_per_second": 1e3 * tokens / step_ms, "steps": float(total)}
    return FitResult(metrics, series | loss_curve(rows))


def check(config: RunConfig, corpus: Corpus, parent: Parent | None = None) -> None:
    """What only becomes visible with the corpus, the parameters, their optimiser and the devices at hand."""
    require(
        config.model.vocab_size >= corpus.vocab_size,
        "model.vocab_size",
        config.model.vocab_size,
        f"at least the corpus' vocabulary of {corpus.vocab_size}",
    )
    for split in SPLITS:
        check_fits(corpus, split, config.data.seq_len)
    if config.model.moe is not None:
        make_router(config.model.moe)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.expert)
    params = abstract_params(config.model)
    opt_state_shardings(make_optimizer(config.optimizer, config.steps), params, tree_shardings(params, mesh))
    source = open_source(config, parent)
    if source is not None:
        check_source(config, source)
    processes = jax.process_count()
    per_pass = config.batch_size // config.accumulation
    require(
        per_pass % processes == 0,
        "batch_size",
        config.batch_size,
        f"batch_size / accumulation = {per_pass} divisible by {processes} processes",
    )


def restore_or_init(config: RunConfig, tx: Any, mesh: Mesh, saved: Checkpoints) -> TrainState:
    """The newest complete checkpoint on this mesh, or a fresh state."""
    init = functools.partial(init_state, config, tx)
    abstract = jax.eval_shape(init)
    shardings = state_shardings(abstract, tx, mesh)
    if saved.latest() is None:
        return jax.jit(init, out_shardings=shardings)()
    placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
    return saved.restore(placed)


def start_from(source: Source, config: RunConfig, tx: Any, mesh: Mesh, corpus: Corpus, path: Path) -> TrainState:
    """A state with the source's parameters. What it scores before its first step goes to `path`: `start_val_ce`,
    `start_test_ce`, and if upcycled `start_gap`, the distance of the latter from the source's own."""
    params, router_state = source.read(mesh)
    state = started(config, tx, source, mesh, params, router_state)
    found, _ = evaluate(config, state, corpus, mesh)
    scores = {f"start_{name}": found[name] for name in ("val_ce", "test_ce")}
    if config.init.upcycle:
        dense = replace(config, model=source.model, init=InitConfig())
        before, _ = evaluate(dense, replace(state, params=params, router_state=router_state), corpus, mesh)
        scores["start_gap"] = abs(found["test_ce"] - before["test_ce"])
    if is_primary():
        write_json(path, scores)
    return state


@contextmanager
def feeding(config: RunConfig, corpus: Corpus, mesh: Mesh, start_step: int) -> Iterator[Iterator[Batch]]:
    """Batches [A, B, S + 1] on the mesh from the data position of `start_step`; process p reads its slice only."""
    dataset = make_dataset(corpus, "train", config.data.seq_len, config.seed, config.data.weights)
    passes = config.accumulation
    source = batches(
        dataset,
        start_step * config.batch_size,
        config.batch_size // passes,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    sharding = batch_sharding(mesh)

    def on_mesh() -> Iterator[Batch]:
        while True:
            parts = [next(source) for _ in range(passes)]
            yield {
                name: jax.make_array_from_process_local_data(sharding, np.stack([p[name] for p in parts]))
                for name in ("tokens", "segment_ids", "positions")
            }

    try:
        yield on_mesh()
    finally:
        source.close()


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C (or SIGTERM) into a flag read between steps; a second Ctrl-C interrupts at once."""
    asked = False

    def ask(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    try:
        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals stay with whoever owns them
        before = {}
    try:
        yield lambda: asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def loop(
    config: RunConfig,
    state: TrainState,
    step_fn: Any,
    feed: Iterator[Batch],
    saved: Checkpoints,
    sinks: list[Any],
    stop: Callable[[], bool],
    total: int,
    progress: Progress | None,
    profile: tuple[int, int] | None,
    out: Path,
) -> tuple[TrainState, list[float]]:
    """Runs steps up to `total` or until asked to stop. Metrics of step n are fetched after step n + 1 is dispatched, so
    the device never waits; before a save they are written first, so no line of a saved step can be missing.
    Raises KeyboardInterrupt once the state is saved if any process was asked to stop; NotFinite, without saving the
    step, if its loss or gradient is not."""
    pending: tuple[int, dict[str, Any]] | None = None
    times: list[float] = []
    mark, tracing = time.perf_counter(), False

    def write() -> None:
        nonlocal pending, mark
        if pending is None:
            return
        step, values = pending[0], {k: float(v) for k, v in jax.device_get(pending[1]).items()}
        now = time.perf_counter()
        seconds, mark, pending = now - mark, now, None
        times.append(seconds)
        values |= {"step_ms": 1e3 * seconds, "tokens_per_second": values["tokens"] / seconds}
        for sink in sinks:
            sink.log(step, values)
        if progress:
            progress(step, total, values)
        for name in ("loss", "grad_norm"):  # top_k hides a NaN score, these do not
            if not math.isfinite(values[name]):
                found = f"{name} = {values[name]} at step {step}"
                raise NotFinite(f"{found}: expected a finite number; the last checkpoint is kept")

    step, stopping = int(state.step), False
    while step < total:
        if profile and not tracing and profile[0] <= step + 1 <= profile[1]:
            jax.profiler.start_trace(str(out / "profile"))
            tracing = True
        state, metrics = step_fn(state, next(feed))
        write()
        step, pending = step + 1, (step + 1, metrics)
        stopping = any_process(stop(), step)
        if profile and tracing and (stopping or step in (profile[1], total)):
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            tracing = False
        if stopping or step == total or (config.checkpoint_every and step % config.checkpoint_every == 0):
            write()
            saved.save(step, state)
            mark = time.perf_counter()
        if stopping:
            break
    saved.wait()
    if stopping:  # not stop(): all processes must leave here together
        raise KeyboardInterrupt(f"stopped after step {step}; the state is saved")
    return state, times[2:]  # the first holds the compilation, the second its tail


def read_lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def loss_curve(rows: list[dict[str, float]], points: int = 200) -> dict[str, list[float]]:
    """Loss and balance over steps from the JSON lines, thinned to `points` by averaging."""
    chunks = np.array_split(np.arange(len(rows)), max(1, min(points, len(rows)))) if rows else []
    mean = lambda key: [round(float(np.mean([rows[i][key] for i in c])), 5) for c in chunks]  # noqa: E731
    names = [n for n in ("loss", "balance_loss", "max_violation", "max_violation_sequence") if rows and n in rows[0]]
    return {"loss_steps": [float(rows[c[-1]]["step"]) for c in chunks], **{name: mean(name) for name in names}}
