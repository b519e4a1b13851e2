"""`python -m experiments`: see experiments/cli.py."""

import os
import sys

from experiments.cli import main

TUNABLE = "GLIBC_TUNABLES"


def with_huge_pages() -> None:
    """Starts this very command again with malloc on transparent huge pages, unless the user tuned malloc already.

    XLA's CPU temporaries are fresh memory in every step: with 4 kB pages the page faults cost 10 to 20 % of it. glibc
    reads the setting once, before Python runs; other C libraries ignore it. The process id stays the same.
    """
    if sys.platform == "linux" and TUNABLE not in os.environ:
        os.environ[TUNABLE] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)


if __name__ == "__main__":
    with_huge_pages()
    sys.exit(main())
