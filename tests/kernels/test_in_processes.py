"""Triton kernels without a GPU, each file in a process of its own: `interpreted/`, where kernels run in Triton's
interpreter, and `rig/`, where they are compiled and lowered; one process cannot do both.

`make test` puts Triton and jax-triton beside the environment, in `.venv/kernels`, where nothing else sees them. By
hand: PYTHONPATH=.venv/kernels python -m pytest tests/kernels/rig, and TRITON_INTERPRET=1 for the other.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import _triton

HERE = Path(__file__).parent
BESIDE = Path(sys.prefix) / "kernels"
FILES = [f"{path.parent.name}/{path.name}" for path in sorted(HERE.glob("*/test_*.py"))]


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("file", FILES)
def test_kernels(file):
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("Triton is for Linux on x86-64")
    assert BESIDE.is_dir() or _triton.available(), f"no Triton in {BESIDE.name} beside the environment: run `make test`"
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "TRITON_INTERPRET")}
    env |= {"PYTHONPATH": os.pathsep.join([str(BESIDE), os.environ.get("PYTHONPATH", "")])}
    if file.startswith("interpreted"):
        env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / file)]
    done = subprocess.run(command, cwd=HERE.parents[1], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout
    assert " skipped" not in done.stdout, done.stdout
