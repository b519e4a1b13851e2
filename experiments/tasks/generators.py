"""Problems made by the generators of the optional package `reasoning-gym`: as many as wanted, always the same."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from experiments.data import DataError
from experiments.tasks.example import Example

VERSION = "0.1.25"
INSTALL_COMMAND = f"pip install reasoning-gym=={VERSION}"
SEED = 0
POOL = 5000  # problems made for each task, of which a tenth is the test split


def library() -> Any:
    """The package, imported.

    Raises:
      DataError: it is not installed, or in another version, whose problems may differ; says what to type.
    """
    try:
        found = version("reasoning-gym")
        if found != VERSION:
            raise DataError(f"reasoning-gym {found} is installed: expected {VERSION}, so that the problems are the "
                            f"same everywhere: `{INSTALL_COMMAND}`")
        import reasoning_gym  # pyright: ignore[reportMissingImports]
    except (PackageNotFoundError, ImportError) as error:
        raise DataError(f"generated tasks need the optional package reasoning-gym ({error}): "
                        f"`{INSTALL_COMMAND}`") from error
    return reasoning_gym


def generated(name: str) -> Iterator[Example]:
    """The first POOL problems of a generator."""
    for item in library().create_dataset(name, size=POOL, seed=SEED):
        yield Example(f"Question: {item['question'].strip()}\nAnswer:", (), str(item["answer"]).strip())
