"""Real processes: SIGKILL at any moment and the same command again equals the uninterrupted run bit for bit; the state
moves between meshes; two `jax.distributed` processes equal one."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 60
TIMES = {"step_ms", "tokens_per_second"}
# Wider than `smoke` so that a save takes long enough to be caught, and saved every third step.
SETTINGS = ["--set", "checkpoint_every=3", "--set", "steps=60", "--set", "model.moe.expert_dim=256"]


def command(out: Path, *more: str, steps: int = STEPS) -> list[str]:
    base = [sys.executable, "-m", "experiments", "train", "--preset", "smoke", "--out", str(out), "--steps", str(steps)]
    return [*base, *SETTINGS, *more]


def environment(cache: Path, **more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    return clean | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)} | more


def run(out: Path, cache: Path, *more: str, steps: int = STEPS, **env: str) -> None:
    done = subprocess.run(
        command(out, *more, steps=steps), cwd=ROOT, env=environment(cache, **env), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def lines(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def kept(out: Path) -> bytes:
    """The lines that the newest complete checkpoint vouches for. They hold times, so training them again would show."""
    names = [path.name for path in (out / "checkpoints").glob("*")]
    newest = max((int(name) for name in names if name.isdecimal()), default=0)
    return b"".join((out / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:newest]) if newest else b""


def saving(out: Path) -> bool:
    """A save is in flight: a temporary directory of an unfinished step is there."""
    return any("tmp" in path.name for path in (out / "checkpoints").glob("*"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> list[dict]:
    out = tmp_path_factory.mktemp("whole")
    run(out, cache)
    rows = lines(out)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return rows


def kill_once(out: Path, cache: Path, when: str, rng: random.Random) -> tuple[str, bool]:
    """Starts the command and kills it with SIGKILL at the named kind of moment.

    Returns what was seen at that moment, and whether the process had gone on from a checkpoint.
    """
    held = kept(out)
    fresh = cache / "compiling" if when == "compile" else cache
    process = subprocess.Popen(
        command(out), cwd=ROOT, env=environment(fresh), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics = out / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    grown = lambda: metrics.exists() and metrics.stat().st_size > before  # noqa: E731
    try:
        wait_for(process, lambda: (out / "checkpoints").exists() if when == "compile" else grown())
        if when == "save":
            wait_for(process, lambda: saving(out))
        else:
            time.sleep(rng.uniform(0.3, 1.0) if when == "compile" else rng.uniform(0.0, 0.4))
        seen = "compile" if when == "compile" and not grown() else "save" if saving(out) else "step"
    finally:
        finished = process.poll() is not None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not held or metrics.read_bytes().startswith(held), "steps before the checkpoint were trained again"
    return "finished" if finished else seen, bool(held)


def wait_for(process: subprocess.Popen, condition, timeout: float = 120.0) -> None:
    deadline = time.monotonic() + timeout
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline, "the process made no progress"
        time.sleep(0.0005)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_change_no_metric(tmp_path: Path, cache: Path, uninterrupted: list[dict]) -> None:
    rng = random.Random(0)
    plan = ["compile"] + ["save", "any"] * 10
    seen: list[str] = []
    resumed = 0
    while sum(s != "finished" for s in seen) < 20 and len(seen) < 60:
        if seen and seen[-1] == "finished":  # the run reached its end: begin a new one, kills go on
            assert lines(tmp_path / f"run{seen.count('finished') - 1}") == uninterrupted
        out = tmp_path / f"run{seen.count('finished')}"
        moment, from_checkpoint = kill_once(out, cache, plan[len(seen) % len(plan)], rng)
        seen.append(moment)
        resumed += from_checkpoint
    kills = [s for s in seen if s != "finished"]
    assert len(kills) >= 20, seen
    assert kills.count("save") >= 5, seen
    assert "compile" in kills, seen
    assert resumed >= 10, resumed
    print(f"\nkills: {len(kills)} ({', '.join(f'{kills.count(s)} {s}' for s in sorted(set(kills)))}), ", end="")
    print(f"of {len(seen)} starts {resumed} went on from a checkpoint, {seen.count('finished')} reached the end")
    run(out, cache)
    assert lines(out) == uninterrupted


@pytest.mark.slow
def test_saved_on_eight_devices_restored_on_one_two_and_four(tmp_path: Path, cache: Path) -> None:
    """Ten steps on 8 devices, then ten more on another mesh: within 1e-5 of the same twenty steps on one device."""
    one = tmp_path / "one"
    run(one, cache, steps=20)
    for devices, mesh in ((1, (1, 1, 1)), (2, (1, 2, 1)), (4, (1, 2, 2))):
        out = tmp_path / f"to{devices}"
        run(out, cache, "--devices", "8", *axes(2, 2, 2), steps=10)
        held = kept(out)
        assert held.count(b"\n") == 10
        run(out, cache, "--devices", str(devices), *axes(*mesh), steps=20)
        assert (out / "metrics.jsonl").read_bytes().startswith(held), "the first ten steps were trained again"
        assert_close(lines(out), lines(one))


def axes(*sizes: int) -> list[str]:
    return [part for name, n in zip(("data", "fsdp", "expert"), sizes) for part in ("--set", f"mesh.{name}={n}")]


def assert_close(got: list[dict], expected: list[dict], tol: float = 1e-5) -> None:
    assert [row["step"] for row in got] == [row["step"] for row in expected]
    for a, b in zip(got, expected):
        for name in ("loss", "balance_loss", "z_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=tol), (a["step"], name)


@pytest.mark.slow
def test_two_processes_over_loopback_equal_one(tmp_path: Path, cache: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run(one, cache, steps=8)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            command(two, "--set", "mesh.data=2", steps=8),
            cwd=ROOT,
            env=environment(
                cache,
                SWITCHYARD_COORDINATOR=f"127.0.0.1:{port}",
                SWITCHYARD_NUM_PROCESSES="2",
                SWITCHYARD_PROCESS_ID=str(rank),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], printed[0][-3000:] + printed[1][-3000:]
    assert_close(lines(two), lines(one))
