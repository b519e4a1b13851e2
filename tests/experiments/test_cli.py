"""The command line: bad input is one line and exit code 2, looking around needs no JAX."""

import errno
import subprocess
import sys

import jax
import pytest

from experiments import start
from experiments.cli import COMMANDS, main

RUN = ["run", "global-batch-lbl", "--preset", "smoke"]
TRAIN = ["train", "--preset", "smoke"]


@pytest.mark.parametrize(
    ("words", "named", "expected"),
    [
        (["run", "global-batch-lbl", "--preset", "tiny"], "preset = 'tiny'", "smoke, cpu"),
        (["run", "no-such-paper"], "experiment = 'no-such-paper'", "global-batch-lbl"),
        (["run", "no.such.module"], "experiment = 'no.such.module'", "EXPERIMENT"),
        ([*RUN, "--arms", "global,best"], "arm = 'best'", "micro, shuffle_micro, global"),
        ([*RUN, "--seeds", "0"], "seeds = 0", "at least 1"),
        ([*RUN, "--set", "model.moe.top_k=99"], "moe.top_k = 99", "num_experts = 8"),
        ([*RUN, "--set", "mesh.data=3"], "batch_size = 8", "3 devices"),
        ([*RUN, "--set", "batch_size=8", "--set", "accumulation=3"], "batch_size = 8", "accumulation = 3"),
        ([*RUN, "--set", "steps"], "--set = 'steps'", "name=value"),
        ([*RUN, "--set", "model.hiden=8"], "'model.hiden'", "model.hidden"),
        ([*RUN, "--set", "steps=many"], "steps = 'many'", "int"),
        ([*RUN, "--profile", "5"], "--profile = '5'", "A:B"),
        ([*RUN, "--profile", "5:2"], "--profile = '5:2'", "A <= B"),
        ([*RUN, "--profile", "0:2"], "--profile = '0:2'", "1 <= A"),
        ([*RUN, "--router", "no_such_module:make"], "moe.router = 'no_such_module:make'", "package.module:name"),
        ([*RUN, "--optimizer", "no_such_module:make"], "optimizer.name = 'no_such_module:make'", "package.module:name"),
        ([*RUN, "--dry-run", "--set", "model.moe.top_k=99"], "moe.top_k = 99", "num_experts = 8"),
        ([*TRAIN, "--set", "data.corpus=nowhere"], "'nowhere'", "data build"),
        ([*TRAIN, "--steps", "0"], "steps = 0", "at least 1"),
        (["train", "--preset", "tiny"], "preset = 'tiny'", "smoke, cpu"),
        (["data", "list", "--corpus", "nowhere"], "nowhere", ""),
    ],
)
def test_bad_input_is_one_line_and_two(words, named, expected, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*words, *(["--out", str(out)] if words[0] in ("run", "train") else [])]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert named in line
    assert expected in line
    assert not out.exists()


def test_out_of_something_else_is_refused_and_kept(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    for words in (RUN, TRAIN):
        assert main([*words, "--out", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --out = ")
        assert "thesis.tex" in line
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_debugging_shows_where_it_came_from(monkeypatch):
    monkeypatch.setenv("SWITCHYARD_DEBUG", "1")
    with pytest.raises(ValueError, match="no-such-paper"):
        main(["run", "no-such-paper"])


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def stopped():
        raise KeyboardInterrupt("stopped after step 7; the state is saved")

    monkeypatch.setitem(COMMANDS, "list", stopped)
    assert main(["list"]) == 130
    assert "stopped after step 7; the state is saved; the same command resumes" in capsys.readouterr().err


@pytest.mark.slow
def test_a_disk_that_fills_up_while_running_is_one_line(monkeypatch, capsys, tmp_path):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr("experiments.train.JsonLines.log", full)
    assert main([*TRAIN, "--out", str(tmp_path / "out"), "--steps", "2"]) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'metrics.jsonl'\n"


def test_commands_of_two_words(monkeypatch, capsys):
    assert main(["data", "list", "--corpus", "synthetic"]) == 0
    assert "chain-0" in capsys.readouterr().out
    asked = []
    monkeypatch.setitem(COMMANDS, "data fetch", lambda: asked.append("fetch"))
    assert main(["data", "fetch"]) == 0
    assert asked == ["fetch"]
    with pytest.raises(SystemExit) as stopped:
        main(["data", "burn"])
    assert stopped.value.code == 2


def test_what_is_typed_reaches_the_runner(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("experiments.run.run", lambda *args, **kwargs: seen.append((args, kwargs)))
    words = ["--seeds", "3", "--arms", "micro,global", "--profile", "2:4", "--log", "tensorboard", "--log", "wandb"]
    settings = ["--set", "steps=5", "--set", "balance.weight=0.5", "--router", "a.b:c", "--optimizer", "d:e"]
    assert main([*RUN, *words, *settings, "--out", str(tmp_path)]) == 0
    assert main(["run", "my_package.study"]) == 0
    (args, kwargs), (second, defaults) = seen
    assert args == ("global-batch-lbl", "smoke", tmp_path)
    assert kwargs == {
        "seeds": 3,
        "arms": ("micro", "global"),
        "settings": ["steps=5", "balance.weight=0.5", "model.moe.router=a.b:c", "optimizer.name=d:e"],
        "loggers": ("tensorboard", "wandb"),
        "profile": (2, 4),
    }
    assert (second[1], second[2].as_posix()) == ("cpu", "runs/study-cpu")
    assert defaults == {"seeds": None, "arms": (), "settings": [], "loggers": (), "profile": None}


def test_dry_run_prints_every_arm_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*RUN, "--arms", "micro", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for word in ("micro", "parameters", "flops per step"):
        assert word in printed
    assert list(tmp_path.iterdir()) == []


LOOKING = """
import sys
from experiments.cli import main
try:
    code = main({words!r})
except SystemExit as stopped:
    code = stopped.code
heavy = [name for name in ("jax", "flax", "numpy", "matplotlib") if name in sys.modules]
assert not heavy, heavy
sys.exit(code)
"""


@pytest.mark.parametrize("words", [["list"], ["--help"], ["run", "--help"]])
def test_looking_around_imports_no_jax(words):
    command = [sys.executable, "-c", LOOKING.format(words=words)]
    done = subprocess.run(command, cwd=start.ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert ("global-batch-lbl" if words == ["list"] else "preset" if "run" in words else "check-cluster") in done.stdout


def test_compiled_programs_are_kept_for_the_next_command(monkeypatch, tmp_path):
    """In the tree, and only where the user has named no place: JAX reads the environment before any command runs."""
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(start, "ROOT", tmp_path)
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        start.start(None)
        assert jax.config.jax_compilation_cache_dir == before["jax_compilation_cache_dir"]
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        start.start(None)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache" / "jax")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
