"""Another commit's source tree, for as long as a benchmark needs it."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe.config import require

ROOT = Path(__file__).resolve().parents[2]


def git(*args: str, root: Path = ROOT) -> str | None:
    """What a git command prints, without the last newline; None where it fails or there is no git."""
    try:
        done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def resolve_revision(revision: str, needed: str, root: Path = ROOT) -> str:
    """The commit a revision names; raises ValueError unless it exists and holds the file `needed`."""
    commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}", root=root)
    require(commit is not None, "against", revision, "a revision of the git checkout this runs from")
    assert commit is not None
    holds = git("cat-file", "-e", f"{commit}:{needed}", root=root) is not None
    require(holds, "against", revision, f"a revision that has {needed}")
    return commit


@contextmanager
def worktree(commit: str, root: Path = ROOT) -> Iterator[Path]:
    """A detached worktree of `commit` in a temporary directory; gone afterwards, also after Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        tree = Path(directory) / "tree"
        try:
            made = git("worktree", "add", "--quiet", "--detach", str(tree), commit, root=root) is not None
            require(made, "against", commit, "a commit of which git can make a worktree")
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree), root=root)
            git("worktree", "prune", root=root)
