"""The restart that makes malloc keep memory: once, with the same arguments, and never over the user's own tuning."""

import os
import subprocess
import sys

import pytest

from experiments.memory import KEEP, TUNABLES

CODE = """
import os, sys
from experiments.memory import keep_memory
keep_memory()
import jax
print(os.getpid(), os.environ["GLIBC_TUNABLES"], sys.argv[1:], jax.config.read("jax_cpu_enable_async_dispatch"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
@pytest.mark.parametrize("tuned", [None, "glibc.malloc.check=0"])
def test_restarts_once_under_the_same_process_id(tuned):
    env = {name: value for name, value in os.environ.items() if name != TUNABLES} | ({TUNABLES: tuned} if tuned else {})
    child = subprocess.Popen([sys.executable, "-c", CODE, "a b"], env=env, stdout=subprocess.PIPE, text=True)
    assert child.communicate()[0] == f"{child.pid} {tuned or KEEP} ['a b'] False\n"
