"""Keeps the memory of CPU steps from one step to the next: fresh pages cost more than some of the arithmetic.

XLA:CPU asks malloc for all temporaries of a step at once and gives them back after it. By default glibc passes such a
block to the operating system and back, so every step pays for hundreds of megabytes of zeroed pages; on a virtual
machine that was measured at 10 % of a step in the best case and half of it in the worst.
"""

from __future__ import annotations

import os
import sys

TUNABLES = "GLIBC_TUNABLES"
# Huge pages; no block of its own for large requests, and nothing handed back: what a step frees, the next one finds.
KEEP = f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**40}"


def keep_memory() -> None:
    """Starts this very command again with malloc keeping its memory, unless the user tuned malloc already.

    glibc reads the setting once, before Python runs; other C libraries ignore it. The process id stays the same. Steps
    on CPU then run in the calling thread, because only the main thread's heap grows without bound. Accelerators do not
    notice either.
    """
    if sys.platform == "linux" and TUNABLES not in os.environ:
        os.environ[TUNABLES] = KEEP
        os.execv(sys.executable, sys.orig_argv)
    import jax  # after the restart, which would otherwise pay for it twice

    jax.config.update("jax_cpu_enable_async_dispatch", False)
