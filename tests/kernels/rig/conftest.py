"""Tests that need Triton's compiler, in a process of their own: `tests/kernels/test_in_processes.py` runs them."""

from kernels import _triton

collect_ignore_glob = [] if _triton.available() and not _triton.interpreting() else ["test_*.py"]
