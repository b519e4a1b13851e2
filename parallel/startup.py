"""Start-up on one process or many: who takes part, who is missing, and the few things processes agree on."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.clusters import ClusterEnv  # private: the guard test in tests/parallel/test_startup.py watches these two
from jax._src.distributed import global_state
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

ENV = ("SWITCHYARD_COORDINATOR", "SWITCHYARD_NUM_PROCESSES", "SWITCHYARD_PROCESS_ID")
_entries: Counter[str] = Counter()  # how often each barrier was entered: a barrier's key works once


@dataclass(frozen=True)
class ProcessReport:
    """One process as it described itself."""

    rank: int
    host: str
    pid: int
    devices: tuple[str, ...]


@dataclass(frozen=True)
class ClusterReport:
    """What `check_cluster` found.

    Attributes:
      processes: those that answered, by rank.
      missing: ranks that did not.
      coordinator: host:port, or None for a single process.
      all_reduce_bytes: size of the array summed over all devices.
      all_reduce_gbps: that size over the median time of one all-reduce, in GB/s; None if ranks are missing or there is
        one device.
    """

    processes: tuple[ProcessReport, ...]
    missing: tuple[int, ...]
    coordinator: str | None
    all_reduce_bytes: int
    all_reduce_gbps: float | None


def initialize(
    *, coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None,
    local_devices: Sequence[int] | None = None, timeout: float = 300.0,
) -> bool:
    """Joins this process to the others; call it before any JAX computation. True if there are others.

    The three first arguments come from the caller, else from SWITCHYARD_COORDINATOR, SWITCHYARD_NUM_PROCESSES and
    SWITCHYARD_PROCESS_ID, else from Slurm (srun), Open MPI or Kubernetes as JAX detects them. If none of these speaks
    of several processes, nothing happens. A second call does nothing.

    Args:
      coordinator: host:port of process 0; the port must be free there.
      local_devices: GPU ids this process uses; JAX's choice by default (one per process under Slurm and Open MPI).
      timeout: seconds to wait for all processes.

    Raises:
      ValueError: some of the three are missing, or out of range.
      RuntimeError: after `timeout`, naming the missing ranks; or two processes with one rank.
    """
    if jax.distributed.is_initialized():
        return global_state.num_processes > 1
    given: tuple[Any, ...] | None = _given(coordinator, num_processes, process_id)
    if given is None and not _scheduler_has_several():
        return False
    address, count, rank, devices = (*given, local_devices) if given else _detect(local_devices, timeout)
    host, port = _check(address, count, rank)
    if count > 1 and rank == 0:
        _call_roll(host, port, count, timeout)
    elif count > 1:
        _answer_roll(host, port, count, rank, timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # The preemption service would swallow SIGTERM, so that `timeout` and schedulers could not end the process.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(address, count, rank, devices, "deactivate", initialization_timeout=int(timeout))
    return count > 1


def is_primary() -> bool:
    """Whether this is process 0, the one that writes results."""
    return global_state.process_id == 0 if jax.distributed.is_initialized() else True


def barrier(name: str, timeout: float = 600.0) -> None:
    """Waits until every process is here. Every process must enter the barriers of one name equally often.

    Raises:
      RuntimeError: some did not come within `timeout` seconds.
    """
    if not jax.distributed.is_initialized():
        return
    _entries[name] += 1
    _meet(f"switchyard/{name}/{_entries[name]}", f"barrier {name!r}", timeout)


def any_process(flag: bool, step: int) -> bool:
    """Whether any process says True in this call: the same answer everywhere, without waiting for the devices.

    Every process must call it equally often and with the same `step`, or the call fails as `barrier` does.
    """
    if not jax.distributed.is_initialized():
        return flag
    _entries["any_process"] += 1
    key = f"switchyard/flag/{_entries['any_process']}-{step}"
    if flag:
        _client().key_value_set(f"{key}/{global_state.process_id}", "1")
    _meet(f"{key}/barrier", f"step {step}", timeout=600.0)
    return bool(_client().key_value_dir_get(key))


def simulate_devices(count: int) -> None:
    """Makes the CPU count as `count` devices (per process), whatever XLA_FLAGS say; call it before any computation.

    Raises:
      ValueError: count < 1.
      RuntimeError: JAX already runs with another number or kind of devices.
    """
    if count < 1:
        raise ValueError(f"devices = {count}: expected at least 1")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if jax.local_device_count() == count and jax.default_backend() == "cpu":
            return
        raise RuntimeError(f"devices = {count}: expected {jax.local_device_count()}, as JAX already runs on that many "
                           f"{jax.default_backend()} devices; simulate devices before any computation") from error
    jax.config.update("jax_platforms", "cpu")


def check_cluster(timeout: float = 60.0, size_bytes: int = 16 * 2**20) -> ClusterReport:
    """Asks every process to report and times one all-reduce. Never hangs on a silent process: it is listed as missing.

    Args:
      timeout: seconds to wait for all reports.
      size_bytes: bytes of the float32 array that every device contributes.
    """
    devices = tuple(f"{device.platform}:{device.id} {device.device_kind}" for device in jax.local_devices())
    me = ProcessReport(jax.process_index(), socket.gethostname(), os.getpid(), devices)
    found = {me.rank: me} if jax.process_count() == 1 else _exchange(me, timeout)
    missing = tuple(rank for rank in range(jax.process_count()) if rank not in found)
    speed = None if missing or jax.device_count() == 1 else size_bytes / _time_all_reduce(size_bytes) / 1e9
    return ClusterReport(
        tuple(found[rank] for rank in sorted(found)), missing, global_state.coordinator_address, size_bytes, speed)


def _client() -> Any:
    """The coordinator's client: barriers and a key-value store between hosts, no devices involved."""
    return global_state.client


def _meet(key: str, what: str, timeout: float) -> None:
    try:
        _client().wait_at_barrier(key, int(1000 * timeout))
    except Exception as error:
        names = str(error).partition("timed out task names:")[2].partition("\n\n")[0]
        late = sorted({int(rank) for rank in re.findall(r"(\d+)\s*$", names, re.MULTILINE)})
        reason = f"ranks {late} are missing" if late else str(error)
        raise RuntimeError(f"{what}: expected every process within {timeout:g} s; {reason}") from error


def _given(coordinator: str | None, num_processes: int | None, process_id: int | None) -> tuple[str, int, int] | None:
    """The three values from arguments or the environment; None if there is none of them."""
    values = [coordinator, num_processes, process_id]
    values = [os.environ.get(name) if value is None else value for name, value in zip(ENV, values)]
    if all(value is None for value in values):
        return None
    absent = [name for name, value in zip(ENV, values) if value is None]
    if absent:
        raise ValueError(f"{', '.join(absent)} = None: expected all of {', '.join(ENV)} (or none of them)")
    for name, value in zip(ENV[1:], values[1:]):
        if not re.fullmatch(r"-?\d+", str(value)):
            raise ValueError(f"{name} = {value!r}: expected an integer")
    return str(values[0]), int(str(values[1])), int(str(values[2]))


def _scheduler_has_several() -> bool:
    """Whether srun, mpirun or an indexed Kubernetes job started this process as one of several."""
    counts = (os.environ.get("SLURM_STEP_NUM_TASKS", "1"), os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    in_indexed_job = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    return in_indexed_job or any(count.isdecimal() and int(count) > 1 for count in counts)


def _detect(local_devices: Sequence[int] | None, timeout: float) -> tuple[Any, ...]:
    """Coordinator, count, rank and local devices as the scheduler tells them."""
    return ClusterEnv.auto_detect_unset_distributed_params(None, None, None, local_devices, None, int(timeout))


def _check(address: str | None, count: int | None, rank: int | None) -> tuple[str, int]:
    if address is None or count is None or rank is None:
        raise ValueError(f"coordinator = {address}, num_processes = {count}, process_id = {rank}: expected all three "
                         f"from the scheduler; set {', '.join(ENV)}")
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"coordinator = {address!r}: expected host:port")
    if count < 1:
        raise ValueError(f"num_processes = {count}: expected at least 1")
    if not 0 <= rank < count:
        raise ValueError(f"process_id = {rank}: expected 0 to {count - 1}, as num_processes = {count}")
    return host.strip("[]"), int(port)


def _call_roll(host: str, port: int, count: int, timeout: float) -> None:
    """Process 0 waits for everybody on the coordinator's port and tells all who is missing.

    JAX itself aborts the process when some rank stays away, without saying which. The port is free again for it after.
    """
    deadline = time.monotonic() + timeout
    dual = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=count)
    except OSError as error:
        raise RuntimeError(f"coordinator = {host}:{port}: expected a free port on its host ({error})") from error
    calls: dict[int, socket.socket] = {}
    problem = ""
    with server:
        while len(calls) < count - 1 and not problem and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                call = server.accept()[0]
            except TimeoutError:
                break
            problem = _register(call, calls, count)
        missing = [r for r in range(1, count) if r not in calls]
        if missing and not problem:
            problem = f"ranks {missing} of {count} processes are missing after {timeout:g} s"
        for call in calls.values():
            with call:
                call.sendall((problem or "ok").encode())
    if problem:
        raise RuntimeError(f"start-up at {host}:{port}: {problem}")


def _register(call: socket.socket, calls: dict[int, socket.socket], count: int) -> str:
    """Reads `switchyard RANK COUNT` from a caller; strangers are hung up on. Returns what is wrong, or nothing."""
    call.settimeout(5.0)
    try:
        words = call.recv(64).decode(errors="replace").split()
    except OSError:
        words = []
    if len(words) != 3 or words[0] != "switchyard" or not (words[1] + words[2]).isdecimal():
        call.close()
        return ""
    rank, theirs = int(words[1]), int(words[2])
    if theirs != count:
        problem = f"process {rank} expects {theirs} processes, process 0 expects {count}"
    elif rank in calls or rank == 0:
        problem = f"two processes claim rank {rank}"
    else:
        calls[rank] = call
        return ""
    with call:
        call.sendall(problem.encode())
    return problem


def _answer_roll(host: str, port: int, count: int, rank: int, timeout: float) -> None:
    """Reports to process 0, trying until `timeout`, and waits for its verdict."""
    deadline = time.monotonic() + timeout
    answer = ""
    while not answer and time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=5.0) as call:
                call.sendall(f"switchyard {rank} {count}".encode())
                # Process 0 may have started `timeout` after us at most.
                call.settimeout(timeout + 5.0)
                answer = call.recv(4096).decode()
        except OSError:
            time.sleep(0.2)
    if not answer:
        raise RuntimeError(f"start-up: rank 0 is missing: no answer at {host}:{port} within {timeout:g} s")
    if answer != "ok":
        raise RuntimeError(f"start-up at {host}:{port}: {answer}")


def _exchange(me: ProcessReport, timeout: float) -> dict[int, ProcessReport]:
    """Every process posts its report in the coordinator's key-value store and collects the others' until `timeout`."""
    _entries["check"] += 1
    folder = f"switchyard/check/{_entries['check']}"
    _client().key_value_set(f"{folder}/{me.rank}", json.dumps([me.host, me.pid, me.devices]))
    deadline = time.monotonic() + timeout
    found: dict[int, ProcessReport] = {}
    for rank in range(jax.process_count()):
        wait_ms = max(1, int(1000 * (deadline - time.monotonic())))
        try:
            host, pid, devices = json.loads(_client().blocking_key_value_get(f"{folder}/{rank}", wait_ms))
        except Exception:
            continue  # not there in time: the caller names it
        found[rank] = ProcessReport(rank, host, pid, tuple(devices))
    return found


def _time_all_reduce(size_bytes: int, repeats: int = 5) -> float:
    """Median seconds of one psum of `size_bytes` per device over all devices, after one warm-up."""
    mesh = Mesh(np.array(jax.devices()), ("all",))
    shape = (jax.device_count(), max(1, size_bytes // 4))
    ones = jax.jit(lambda: jnp.ones(shape, jnp.float32), out_shardings=NamedSharding(mesh, P("all")))()
    total = jax.jit(jax.shard_map(lambda x: lax.psum(x, "all"), mesh=mesh, in_specs=P("all"), out_specs=P()))
    seconds = []
    for _ in itertools.repeat(None, repeats + 1):
        start = time.perf_counter()
        total(ones).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
