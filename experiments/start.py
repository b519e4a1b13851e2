"""What every command that computes does first."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(devices: int | None) -> None:
    """The compile cache, simulated devices if asked for, and the other processes if there are any."""
    import jax

    # Told, not put into the environment, which JAX has read by now.
    if (ROOT / "pyproject.toml").exists() and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    from parallel.startup import initialize, simulate_devices

    try:
        if devices is not None:
            simulate_devices(devices)
        initialize()
    except RuntimeError as error:  # a process that is missing or twice there: as plain as bad input
        raise ValueError(str(error)) from error
