"""Problems made by the generators of `reasoning-gym`: as many as wanted, always the same.

A generator is run out of the pinned, checked wheel. Its package is not installed: importing it as a whole brings in a
hundred generators and eleven other packages, one of which needs a C compiler; the few used here need none of them.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path

from experiments.data import DataError
from experiments.data.download import read_members
from experiments.data.packages import Archive
from experiments.tasks.example import Example

PACKAGE = "reasoning_gym"
SEED = 0
POOL = 5000  # problems made for each task, of which a tenth is the test split


def generated(archive: Archive, path: Path, module: str) -> list[Example]:
    """The first POOL problems of a generator.

    Args:
      path: the wheel.
      module: dotted, below the package; its last part is the generator's name.

    Raises:
      DataError: the wheel is not what was pinned, or the generator does not run.
    """
    for _ in read_members(archive, path, rf"{PACKAGE}/.*"):
        pass  # every member that may be imported is checked against its pin
    try:
        with _importable(path, module):
            importlib.import_module(f"{PACKAGE}.coaching")  # first: it and the factory import each other
            importlib.import_module(f"{PACKAGE}.{module}")
            factory = importlib.import_module(f"{PACKAGE}.factory")
            items = list(factory.create_dataset(module.rpartition(".")[2], size=POOL, seed=SEED))
    except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"package {archive.pin}, generator {module}: {error}") from error
    return [Example(f"Question: {item['question'].strip()}\nAnswer:", (), str(item["answer"]).strip())
            for item in items]


@contextlib.contextmanager
def _importable(wheel: Path, module: str) -> Iterator[None]:
    """The package and those that hold `module` stand for their folders in the wheel, their own imports left out.

    What was imported under these names before is there again afterwards.
    """
    before = _imported()
    for name in before:
        del sys.modules[name]
    parts = f"{PACKAGE}.{module}".split(".")
    try:
        for i in range(1, len(parts)):
            package = types.ModuleType(".".join(parts[:i]))
            package.__path__ = ["/".join((str(wheel), *parts[:i]))]
            sys.modules[package.__name__] = package
        yield
    finally:
        for name in _imported():
            del sys.modules[name]
        sys.modules.update(before)


def _imported() -> dict[str, types.ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == PACKAGE}
