"""Eight simulated CPU devices, a compile cache, quick compilation: set before jax is imported by any test."""

import os
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compilation takes most of the suite's time, and two thirds as long without LLVM's optimisations; XLA's own stay.
os.environ["XLA_FLAGS"] = " ".join((
    os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0",
))  # fmt: skip
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`slow_after(n)`: the first n cases of a function are fast, so that the fast suite has some of every family."""
    seen: Counter[tuple[Path, str]] = Counter()
    for item in items:
        mark = item.get_closest_marker("slow_after")
        if mark is not None and isinstance(item, pytest.Function):
            function = item.path, item.originalname
            seen[function] += 1
            if seen[function] > mark.args[0]:
                item.add_marker("slow")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file():
    """Compiled programs are let go after each file: every one holds some memory maps, of which a process may have only
    so many (65,530), and the next compilation beyond that is a segmentation fault."""
    yield
    jax.clear_caches()
