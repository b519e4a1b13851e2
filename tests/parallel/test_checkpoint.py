"""Checkpoints: what is restored is what was saved, on any mesh; what cannot be says why; SIGKILL loses nothing."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.checkpoint import LEFTOVER, MARKER, CheckpointError, Checkpoints
from parallel.intact import _device_checksum, checksum
from parallel.leaves import describe

ROOT = Path(__file__).parents[2]


def sharding(devices: int, *spec: str | None) -> NamedSharding:
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    return NamedSharding(mesh, P(*spec))


def spread(tree, devices: int, concrete: bool = True):
    """The same leaves on `devices` devices: split where the first dimension allows, replicated elsewhere."""

    def place(x):
        if not isinstance(x, jax.Array):
            return x
        where = sharding(devices, "d") if x.ndim and x.shape[0] and x.shape[0] % devices == 0 else sharding(devices)
        return jax.device_put(x, where) if concrete else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(place, tree)


def raw(x) -> np.ndarray:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)


def assert_same(got, want) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert type(a) is type(b)
        assert describe(a) == describe(b)
        assert raw(a).tobytes() == raw(b).tobytes()


def every_kind() -> dict:
    rng = np.random.default_rng(0)
    floats = {str(np.dtype(t)): jnp.asarray(rng.normal(size=(8, 4)), t) for t in
              (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.complex64)}
    ints = {t: jnp.asarray(rng.integers(0, 100, (16,)), t) for t in ("int32", "uint8", "int8", "uint16", "bool")}
    params = {"w": jnp.arange(32.0).reshape(8, 4)}
    return {
        "floats": floats, "ints": ints, "nan": jnp.array([jnp.nan, -0.0, jnp.inf]), "scalar": jnp.int32(-3),
        "key": jax.random.key(3), "keys": jax.random.split(jax.random.key(4, impl="rbg"), 8),
        "optimizer": optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(params), "empty": {}, "none": None,
        "state": optax.EmptyState(), "tuple": (jnp.ones(2), [], (jnp.zeros((0, 3)),)),
        "int": 2**40, "float": 0.1, "true": True, "numpy": np.arange(5), "numpy_scalar": np.float64(0.3),
    }


def small(value: float = 1.0) -> dict:
    return {"w": jnp.full((8, 4), value, jnp.float32), "deep": {"b": jnp.arange(6, dtype=jnp.int32)}, "n": 3}


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    path.write_bytes({"cut": data[:middle], "empty": b"", "byte": flipped}[how])


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else b"/" for p in directory.rglob("*")}


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_every_kind_of_leaf_returns_from_8_devices_to(devices, tmp_path):
    tree = every_kind()
    with Checkpoints(tmp_path / "c") as saved:
        saved.save(7, spread(tree, 8))
        got = saved.restore(spread(tree, devices, concrete=False))
    assert_same(got, tree)
    for leaf, want in zip(jax.tree.leaves(got), jax.tree.leaves(spread(tree, devices, concrete=False))):
        if isinstance(leaf, jax.Array):
            assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)


def test_random_trees_return(tmp_path):
    """Random nesting, dtypes, shapes, meshes on both sides."""
    rng = np.random.default_rng(1)

    def leaf():
        shape = tuple(rng.choice([0, 1, 3, 8, 16], size=rng.integers(0, 4)).tolist())
        dtype = rng.choice(["float32", "bfloat16", "int32", "uint8", "bool"])
        return jnp.asarray(rng.integers(0, 2, shape) if dtype == "bool" else 10 * rng.normal(size=shape), dtype)

    def tree(depth):
        kind = rng.integers(0, 4 if depth else 1)
        children = [tree(depth - 1) for _ in range(rng.integers(0, 4))] if kind else []
        named = {f"k/{i}.": child for i, child in enumerate(children)}
        return leaf() if kind == 0 else [children, tuple(children), named][kind - 1]

    with Checkpoints(tmp_path / "c") as saved:
        for step in range(12):
            value = {"root": tree(3), "more": leaf()}
            before, after = rng.choice([1, 2, 4, 8], 2).tolist()
            saved.save(step, spread(value, before))
            assert_same(saved.restore(spread(value, after, concrete=False)), value)


def test_trees_without_elements_and_of_one_leaf_return(tmp_path):
    with Checkpoints(tmp_path / "c") as saved:
        for step, tree in enumerate([{"z": jnp.zeros((3, 0))}, jnp.arange(3), {"": {"": jnp.ones(2)}}]):
            saved.save(step, tree)
            assert_same(saved.restore(tree), tree)
        with pytest.raises(ValueError, match="at least one leaf"):
            saved.save(9, {})


def test_without_a_sharding_leaves_go_to_the_first_device(tmp_path):
    with Checkpoints(tmp_path / "c") as saved:
        saved.save(0, spread(small(), 8))
        got = saved.restore(jax.eval_shape(small) | {"n": 0})
    assert got["w"].devices() == {jax.devices()[0]}
    assert got["n"] == 3


def wrong_trees() -> dict:
    w, b = jax.ShapeDtypeStruct((8, 4), jnp.float32), jax.ShapeDtypeStruct((6,), jnp.int32)
    struct = jax.ShapeDtypeStruct
    return {
        "missing": ({"w": w, "deep": {"b": b}}, "'n': stored int64[], expected nothing"),
        "extra": ({"w": w, "deep": {"b": b, "c": b}, "n": 0}, "'deep/c': stored nothing, expected int32[6]"),
        "shape": ({"w": struct((4, 8), jnp.float32), "deep": {"b": b}, "n": 0},
                  "'w': stored float32[8, 4], expected float32[4, 8]"),
        "dtype": ({"w": struct((8, 4), jnp.bfloat16), "deep": {"b": b}, "n": 0},
                  "'w': stored float32[8, 4], expected bfloat16[8, 4]"),
        "kind": ({"w": w, "deep": {"b": b}, "n": 0.0}, "'n': stored int64[], expected float64[]"),
        "integer width": ({"w": w, "deep": {"b": b}, "n": struct((), jnp.int32)},
                          "'n': stored int64[], expected int32[]"),
        "rank": ({"w": w, "deep": {"b": struct((6, 1), jnp.int32)}, "n": 0},
                 "'deep/b': stored int32[6], expected int32[6, 1]"),
        "no key": ({"w": struct((8, 4), jax.random.key(0).dtype), "deep": {"b": b}, "n": 0}, "expected key<fry>[8, 4]"),
    }


@pytest.mark.parametrize("case", wrong_trees())
def test_restore_is_strict_about(case, tmp_path):
    tree, message = wrong_trees()[case]
    with Checkpoints(tmp_path / "c") as saved:
        saved.save(0, small())
        with pytest.raises(ValueError) as error:
            saved.restore(tree)
    assert message in str(error.value)
    assert str(tmp_path / "c" / "0") in str(error.value)


def test_key_implementations_are_told_apart(tmp_path):
    with Checkpoints(tmp_path / "c") as saved:
        saved.save(0, {"key": jax.random.key(0)})
        with pytest.raises(ValueError, match="stored key<fry>.*expected key<rbg>"):
            saved.restore({"key": jax.random.key(0, impl="rbg")})


def test_leaves_that_cannot_be_stored_are_named(tmp_path):
    with Checkpoints(tmp_path / "c") as saved:
        with pytest.raises(ValueError, match="leaf 'a/name' = str"):
            saved.save(0, {"a": {"name": "text"}})
        with pytest.raises(ValueError, match="'n' = 1180591620717411303424: expected numbers of at most 64 bits"):
            saved.save(0, {"n": 2**70})
        with pytest.raises(ValueError, match="'a/b': expected one leaf"):
            saved.save(0, {"a/b": 1, "a": {"b": 2}})
        assert saved.latest() is None


def test_values_are_those_before_a_donated_step(tmp_path):
    """`save` returns before the files are written; the next step may overwrite the buffers at once."""
    advance = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    with Checkpoints(tmp_path / "c", keep=3) as saved:
        for step in range(3):
            tree = spread({"a": jnp.zeros((1024, 256)), "b": jnp.zeros((64, 64), jnp.int32)}, 8)
            tree = jax.tree.map(lambda x, step=step: x + step, tree)
            host = {"host": np.full(1000, step)}
            saved.save(step, tree | host)
            host["host"][:] = -1
            for _ in range(5):
                tree = advance(tree)
        like = {"a": jnp.zeros((1024, 256)), "b": jnp.zeros((64, 64), jnp.int32), "host": np.zeros(1000, int)}
        for step in saved.steps():
            got = saved.restore(like, step)
            assert all((np.asarray(x) == step).all() for x in jax.tree.leaves(got))


def test_the_newest_steps_are_kept_and_steps_only_grow(tmp_path):
    with Checkpoints(tmp_path / "c", keep=2) as saved:
        assert saved.latest() is None
        for step in (1, 5, 30):
            saved.save(step, small(step))
        saved.wait()
        assert saved.steps() == [5, 30]
        assert saved.restore(small(), 5)["w"][0, 0] == 5
        for step in (30, 7, -1):
            with pytest.raises(ValueError, match=f"step = {step}: expected"):
                saved.save(step, small())
        with pytest.raises(ValueError, match=r"complete steps \[5, 30\]; expected step 6"):
            saved.restore(small(), 6)
    assert sorted(os.listdir(tmp_path / "c")) == [".switchyard.lock", "30", "5", MARKER]
    with pytest.raises(ValueError, match="keep = 0"):
        Checkpoints(tmp_path / "d", keep=0)
    assert not (tmp_path / "d").exists()


def test_an_empty_directory_has_nothing_to_restore(tmp_path):
    with Checkpoints(tmp_path) as saved, pytest.raises(CheckpointError, match=r"complete steps \[\]"):
        saved.restore(small())


def test_another_run_is_refused_and_the_fields_are_named(tmp_path):
    print_of = {"model.hidden": 64, "domains": ("a", "b"), "rate": 0.1}
    with Checkpoints(tmp_path / "c", fingerprint=print_of) as saved:
        saved.save(0, small())
    Checkpoints(tmp_path / "c", fingerprint=print_of).close()
    Checkpoints(tmp_path / "c").close()
    before = snapshot(tmp_path)
    with pytest.raises(ValueError) as error:
        Checkpoints(tmp_path / "c", fingerprint={"model.hidden": 128, "domains": ("a", "b"), "seed": 1})
    for part in ("model.hidden: 64 stored, 128 now", "rate: 0.1 stored, nothing now", "seed: nothing stored, 1 now"):
        assert part in str(error.value)
    assert "domains" not in str(error.value)
    assert snapshot(tmp_path) == before


def foreign(kind: str, at: Path) -> Path:
    if kind == "file":
        at.write_text("notes")
    elif kind == "below a file":
        at.write_text("notes")
        return at / "c"
    else:
        at.mkdir()
    if kind == "other files":
        (at / "thesis.tex").write_text("x")
        (at / "12").mkdir()
    if kind in ("broken marker", "strange marker", "newer format"):
        newer = '{"format": 99, "fingerprint": null}'
        text = {"broken marker": '{"format": ', "strange marker": "[1]", "newer format": newer}
        (at / MARKER).write_text(text[kind])
        (at / "12.orbax-checkpoint-tmp").mkdir()
    if kind == "file as step":
        (at / MARKER).write_text('{"format": 1, "fingerprint": null}')
        (at / "12").write_text("not a directory")
    return at


@pytest.mark.parametrize(("kind", "message"), [
    ("file", "found a file; expected a directory"),
    ("below a file", "Not a directory"),
    ("other files", "found 12, thesis.tex and no switchyard.json; expected an empty directory"),
    ("broken marker", "an unreadable switchyard.json"),
    ("strange marker", "an unreadable switchyard.json"),
    ("newer format", "found checkpoint format 99; expected format 1"),
    ("file as step", "found a file named '12'; expected a directory"),
])
def test_a_directory_that_is_not_ours_is_left_alone(kind, message, tmp_path):
    path = foreign(kind, tmp_path / "c")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError) as error:
        Checkpoints(path)
    assert message in str(error.value)
    assert repr(str(path)) in str(error.value)
    assert snapshot(tmp_path) == before


def test_only_our_own_leftovers_are_removed(tmp_path):
    with Checkpoints(tmp_path / "c") as saved:
        saved.save(3, small())
    ours = ["4.orbax-checkpoint-tmp", "5.orbax-checkpoint-tmp-123", ".deleting-1"]
    theirs = ["notes", "x.orbax-checkpoint-tmp", "003.bak", "deleting-1"]
    for name in ours + theirs:
        (tmp_path / "c" / name).mkdir()
        (tmp_path / "c" / name / "file").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "c" / "6.orbax-checkpoint-tmp").symlink_to(tmp_path / "elsewhere")
    Checkpoints(tmp_path / "c", read_only=True)
    assert set(ours) < set(os.listdir(tmp_path / "c"))
    with Checkpoints(tmp_path / "c") as saved:
        assert saved.latest() == 3
    left = set(os.listdir(tmp_path / "c"))
    assert left == {*theirs, "3", MARKER, ".switchyard.lock", "6.orbax-checkpoint-tmp"}
    assert (tmp_path / "elsewhere").is_dir()


def test_a_start_killed_before_the_marker_is_repeated(tmp_path):
    for name in (MARKER + ".tmp", ".switchyard.lock"):
        (tmp_path / name).write_text("{")
    with Checkpoints(tmp_path) as saved:
        saved.save(0, small())
    assert Checkpoints(tmp_path, read_only=True).latest() == 0


@pytest.mark.parametrize("how", ["cut", "empty", "byte", "gone"])
def test_every_damaged_file_of_a_step_is_noticed(how, tmp_path, capfd):
    """One error, no traceback beside it, the older step named, nothing touched."""
    rng = np.random.default_rng(2)
    tree = {"w": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32), "n": 3}
    with Checkpoints(tmp_path / "c") as saved:
        saved.save(1, tree)
        saved.save(2, tree)
    files = [p for p in sorted((tmp_path / "c" / "2").rglob("*")) if p.is_file() and p.stat().st_size]
    assert len(files) > 5
    capfd.readouterr()
    for path in files:
        data = path.read_bytes()
        if path.name == "switchyard-files.json" and how == "gone":
            continue  # the next test
        path.unlink() if how == "gone" else damage(path, how)
        before = snapshot(tmp_path)
        saved = Checkpoints(tmp_path / "c")
        if path.name == "switchyard-files.json" and how == "byte":
            path.write_bytes(data)
            continue
        with pytest.raises(CheckpointError) as error:
            saved.restore(tree)
        assert "step 2 damaged" in str(error.value), path
        assert "step 1 is complete" in str(error.value)
        assert str(tmp_path / "c") in str(error.value)
        assert snapshot(tmp_path) == before
        assert_same(saved.restore(tree, 1), tree)
        path.write_bytes(data)
    assert "Traceback" not in capfd.readouterr().err
    assert_same(Checkpoints(tmp_path / "c").restore(tree), tree)


def test_wrong_values_are_noticed_without_the_list_of_files(tmp_path):
    """TensorStore reads a changed data byte without a word; the leaf's checksum sees it."""
    tree = {"w": jnp.asarray(np.random.default_rng(2).normal(size=(300, 300)), jnp.float32)}
    with Checkpoints(tmp_path / "c") as saved:
        saved.save(2, tree)
    (tmp_path / "c" / "2" / "switchyard-files.json").unlink()
    assert_same(Checkpoints(tmp_path / "c").restore(tree), tree)
    data = max((tmp_path / "c" / "2").rglob("*"), key=lambda p: p.stat().st_size)
    damage(data, "byte")
    with pytest.raises(CheckpointError, match="step 2 damaged: leaf 'w' has checksum .*no older one"):
        Checkpoints(tmp_path / "c").restore(tree)


def test_a_step_emptied_or_made_by_someone_else_is_damaged(tmp_path):
    with Checkpoints(tmp_path / "c") as saved:
        saved.save(1, small())
        saved.save(2, small())
    shutil.rmtree(tmp_path / "c" / "2")
    (tmp_path / "c" / "2").mkdir()
    with pytest.raises(CheckpointError, match="step 2 damaged: no manifest.*step 1 is complete"):
        Checkpoints(tmp_path / "c").restore(small())


def test_checksums_are_equal_on_host_and_devices_and_on_every_mesh():
    for name, leaf in (every_kind()["floats"] | every_kind()["ints"] | {"key": every_kind()["keys"]}).items():
        on_host = checksum({"x": leaf})[0]
        assert on_host == checksum({"x": raw(leaf)})[0], name
        for devices in (1, 8):
            assert on_host == int(_device_checksum(spread({"x": leaf}, devices)["x"])), (name, devices)
    long = np.arange(3_000_001, dtype=np.int32)  # several chunks
    assert checksum({"x": long})[0] == int(_device_checksum(jnp.asarray(long)))
    swapped = long.copy()
    swapped[[5, 2_000_000]] = swapped[[2_000_000, 5]]
    assert checksum({"x": swapped}) != checksum({"x": long})


def test_reading_only(tmp_path):
    with pytest.raises(CheckpointError, match="found nothing there"):
        Checkpoints(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()
    with Checkpoints(tmp_path / "c") as saved:
        saved.save(0, small())
        saved.wait()
        reader = Checkpoints(tmp_path / "c", read_only=True)
        assert_same(reader.restore(small()), small())
        with pytest.raises(CheckpointError, match="opened read-only"):
            reader.save(1, small())


def child(code: str, *arguments: object, **kwargs) -> subprocess.Popen:
    """A Python process that runs `code` with Checkpoints, jax, jnp and np at hand, on one CPU device."""
    head = "import sys, time\nimport jax, jax.numpy as jnp, numpy as np\nfrom parallel.checkpoint import Checkpoints\n"
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", head + textwrap.dedent(code), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, cwd=ROOT, **pipes, **kwargs)


def test_two_processes_do_not_write_one_directory(tmp_path):
    code = "c = Checkpoints(sys.argv[1]); print('open'); sys.stdin.read()"
    holder = child(code, tmp_path / "c", stdin=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(CheckpointError, match="found another running process"):
            Checkpoints(tmp_path / "c")
        assert Checkpoints(tmp_path / "c", read_only=True).latest() is None
    finally:
        holder.kill()
        holder.communicate()
    Checkpoints(tmp_path / "c").close()


def test_a_full_disk_is_reported_and_the_older_step_stays(tmp_path):
    """The file size limit makes the write fail in the background: the next call raises it, once, without tracebacks."""
    out, err = child("""
        saved = Checkpoints(sys.argv[1])
        saved.save(1, {"w": jnp.zeros(8)})
        saved.wait()
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        big = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(300, 1000)).astype("f"))}
        for call in (saved.wait, lambda: saved.save(3, big), saved.close):
            saved.save(2, big)
            try:
                call()
            except ValueError as error:
                print(error)
            assert saved._pending is None and saved.latest() == 1
        saved.close()
        try:
            with Checkpoints(sys.argv[1]) as saved:
                saved.save(2, big)
                raise KeyboardInterrupt("first")
        except KeyboardInterrupt as error:
            print(error, *error.__notes__)
        print(saved.latest(), saved.restore({"w": jnp.zeros(8)}))
    """, tmp_path / "c").communicate()
    lines = out.splitlines()
    assert len(lines) == 5, out + err
    for line in lines[:4]:
        assert "saving step 2 failed" in line
        assert "newest complete step 1; expected a writable directory with room" in line
        assert str(tmp_path / "c") in line
    assert lines[3].startswith("first and while that was raised")
    assert lines[4].startswith("1 {'w'")
    assert "Traceback" not in err


WRITER = """
    saved = Checkpoints(sys.argv[1], keep=2)
    shape = jnp.zeros((128, 256))
    start = saved.latest()
    if start is not None:
        got = saved.restore({"w": shape, "step": 0})
        assert got["step"] == start and bool((got["w"] == start).all())
    step = 0 if start is None else start + 1
    print("ready", step)
    while True:
        saved.save(step, {"w": shape + step, "step": step})
        step += 1
"""


def kill_while_saving(directory: Path, kills: int, seed: int) -> int:
    """Runs the writer again and again and kills it; returns how many kills hit while a save was under way."""
    rng = np.random.default_rng(seed)
    during_save = 0
    latest = -1
    for _ in range(kills):
        writer = child(WRITER, directory)
        try:
            line = writer.stdout.readline()
            assert line.startswith("ready"), writer.communicate()[1]
            time.sleep(rng.uniform(0.05, 0.4))
            until = time.monotonic() + 1.0
            while time.monotonic() < until and not any(map(LEFTOVER.fullmatch, os.listdir(directory))):
                pass
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
        during_save += any(map(LEFTOVER.fullmatch, os.listdir(directory)))
        reader = Checkpoints(directory, read_only=True)
        for step in reader.steps()[-2:]:
            got = reader.restore({"w": jnp.zeros((128, 256)), "step": 0}, step)
            assert got["step"] == step
            assert bool((got["w"] == step).all())
        assert reader.latest() >= latest
        latest = reader.latest()
    return during_save


def test_sigkill_leaves_a_complete_newest_step(tmp_path):
    (tmp_path / "c").mkdir()
    assert kill_while_saving(tmp_path / "c", kills=3, seed=0) >= 1
    with Checkpoints(tmp_path / "c"):
        assert not any(map(LEFTOVER.fullmatch, os.listdir(tmp_path / "c")))


@pytest.mark.slow
def test_twenty_sigkills(tmp_path):
    (tmp_path / "c").mkdir()
    assert kill_while_saving(tmp_path / "c", kills=20, seed=1) >= 5


@pytest.mark.slow
def test_a_full_file_system(tmp_path):
    """A real one, of 1 MB, where this machine lets us mount it."""
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path / "disk"], capture_output=True)
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        saved = Checkpoints(tmp_path / "disk" / "c")
        saved.save(1, small())
        saved.save(2, {"w": jnp.asarray(np.random.default_rng(0).normal(size=(1000, 1000)), jnp.float32)})
        with pytest.raises(CheckpointError, match="saving step 2 failed.*newest complete step 1"):
            saved.close()
        with Checkpoints(tmp_path / "disk" / "c") as saved:
            assert_same(saved.restore(small()), small())
            saved.save(2, small(2.0))
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


TWO = """
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from parallel import startup
    directory, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
    startup.simulate_devices(2)
    assert startup.initialize(coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=rank, timeout=60)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    rows, same = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
    make = jax.jit(lambda n: {"w": jnp.arange(32.0).reshape(8, 4) + n, "key": jax.random.key(7), "step": n},
                   out_shardings={"w": rows, "key": same, "step": same})
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                        jax.eval_shape(make, jnp.int32(0)), {"w": rows, "key": same, "step": same})
    with Checkpoints(directory, keep=1, fingerprint={"a": 1}) as saved:
        start = saved.latest()
        if start is not None:
            got = saved.restore(like)
            for x, y in zip(got["w"].addressable_shards, make(jnp.int32(start))["w"].addressable_shards):
                np.testing.assert_array_equal(x.data, y.data)
        for step in (20, 30, 40):
            if start is None or step > start:
                saved.save(step, make(jnp.int32(step)))
        saved.wait()
        flags = [startup.any_process(rank == 1, 1), startup.any_process(False, 2)]
        print("\\nresult", saved.steps(), startup.is_primary(), *flags)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_two(directory: Path) -> list[str]:
    port = free_port()
    both = [child(TWO, directory, port, rank) for rank in range(2)]
    try:
        results = [p.communicate(timeout=120) for p in both]
    finally:
        for p in both:
            p.kill()
    assert [p.returncode for p in both] == [0, 0], results
    return [re.findall("result (.*)", out)[-1] for out, _ in results]


@pytest.mark.slow
def test_two_processes_save_and_one_restores_and_the_other_way_round(tmp_path):
    assert run_two(tmp_path / "c") == ["[40] True True False", "[40] False True False"]
    template = {"w": jnp.zeros((8, 4)), "key": jax.random.key(0), "step": jnp.int32(0)}
    with Checkpoints(tmp_path / "c", fingerprint={"a": 1}, keep=1) as saved:
        got = saved.restore(spread(template, 8, concrete=False))
        assert_same(got, {"w": jnp.arange(32.0).reshape(8, 4) + 40, "key": jax.random.key(7), "step": jnp.int32(40)})
        saved.save(100, {**got, "w": got["w"] + 60, "step": jnp.int32(100)})
    assert run_two(tmp_path / "c") == ["[100] True True False", "[100] False True False"]


def test_the_names_and_files_of_orbax_that_are_relied_on(tmp_path):
    """Fails after an upgrade of orbax-checkpoint that moves them: then read parallel/checkpoint.py again."""
    from orbax.checkpoint import v1 as ocp

    for name in ("save_async", "load", "Context", "options"):
        assert hasattr(ocp, name), name
    context = ocp.Context()
    assert hasattr(context.asynchronous, "create_directories_asynchronously")
    assert hasattr(context.array.saving, "use_ocdbt")
    assert ocp.options.AtomicityMode.ATOMIC_RENAME
    context.atomicity.mode = ocp.options.AtomicityMode.ATOMIC_RENAME
    with context:
        response = ocp.save_async(str(tmp_path / "5"), {"x/y": jnp.ones(3)}, custom_metadata={"leaves": 1})
        response.on_complete(lambda _: None)
        response.result()
    assert json.loads((tmp_path / "5" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"] == {"leaves": 1}
    assert LEFTOVER.fullmatch("5.orbax-checkpoint-tmp")
