"""Steps of anything that has a state: kept, resumed, written down, stopped by Ctrl-C. The training loop of
`experiments.train` has more to do; what is trained beside it, adapters and searches, goes step by step here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments.logs import JsonLines
from experiments.train import NotFinite, stop_on_interrupt
from parallel.checkpoint import Checkpoints
from parallel.startup import any_process, is_primary

Progress = Callable[[int, dict[str, float]], None]  # (finished steps, metrics of the last)


def stepped(
    state: Any,
    run: Callable[[Any, int], tuple[Any, dict[str, Any]]],
    steps: int,
    saved: Checkpoints,
    out: Path,
    *,
    checkpoint_every: int = 0,
    progress: Progress | None = None,
) -> Any:
    """`state.step` counts what is done; `run(state, step) -> (state, metrics)` up to `steps`, or Ctrl-C.

    Metrics, numbers by name, go to `out/metrics.jsonl`; those of a step are read once the next is on its way. The state
    is saved at the end, when stopped, and every `checkpoint_every` steps.

    Raises:
      NotFinite: a metric that is not, after its line is written; the step is not saved.
      KeyboardInterrupt: after Ctrl-C, once the state is saved.
    """
    step, pending, stopping = int(state.step), None, False
    with stop_on_interrupt() as stop:
        lines = JsonLines.resume(out / "metrics.jsonl", step) if is_primary() else None
        mark = time.perf_counter()
        while step < steps and not stopping:
            state, metrics = run(state, step)
            step, before, pending = step + 1, pending, (step + 1, metrics)
            mark = _told(before, lines, progress, mark)
            stopping = any_process(stop(), step)
            if stopping or step == steps or (checkpoint_every and step % checkpoint_every == 0):
                mark, pending = _told(pending, lines, progress, mark), None
                saved.save(step, state)
                mark = time.perf_counter()
        if lines is not None:
            lines.close()
        saved.wait()
    if stopping:
        raise KeyboardInterrupt(f"stopped after step {step}; the state is saved")
    return state


def _told(pending: Any, lines: JsonLines | None, progress: Progress | None, mark: float) -> float:
    """Writes the metrics of a step; the time at which they were there."""
    if pending is None:
        return mark
    step, values = pending[0], {name: float(value) for name, value in jax.device_get(pending[1]).items()}
    now = time.perf_counter()
    if lines is not None:
        lines.log(step, values | {"step_ms": 1e3 * (now - mark)})
    if progress is not None:
        progress(step, values)
    for name, value in values.items():
        if not math.isfinite(value):
            raise NotFinite(f"{name} = {value} at step {step}: expected a finite number")
    return now
