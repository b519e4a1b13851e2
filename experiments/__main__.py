"""`python -m experiments`: see experiments/cli.py."""

import sys

from experiments.memory import keep_memory

if __name__ == "__main__":
    keep_memory()
    from experiments.cli import main

    sys.exit(main())
