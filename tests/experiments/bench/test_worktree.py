import subprocess
from pathlib import Path

import pytest

from experiments.bench.worktree import git, resolve_revision, worktree


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    root.mkdir()
    for command in (
        ["init", "--quiet"], ["config", "user.email", "a@example.org"], ["config", "user.name", "A"],
    ):  # fmt: skip
        subprocess.run(["git", *command], cwd=root, check=True)
    for text in ("first", "second"):
        (root / "worker.py").write_text(text)
        subprocess.run(["git", "add", "."], cwd=root, check=True)
        subprocess.run(["git", "commit", "--quiet", "-m", text], cwd=root, check=True)
    return root


def test_holds_the_revision_and_is_gone_afterwards(repository: Path) -> None:
    commit = resolve_revision("HEAD~1", "worker.py", repository)
    with worktree(commit, repository) as tree:
        assert (tree / "worker.py").read_text() == "first"
        assert (repository / "worker.py").read_text() == "second"
    assert not tree.parent.exists()
    assert len((git("worktree", "list", root=repository) or "").splitlines()) == 1


def test_is_gone_after_ctrl_c(repository: Path) -> None:
    commit = resolve_revision("HEAD", "worker.py", repository)

    def interrupted(tree: Path) -> None:
        (tree / "untracked").write_text("left behind")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), worktree(commit, repository) as tree:
        interrupted(tree)
    assert not tree.exists()
    assert len((git("worktree", "list", root=repository) or "").splitlines()) == 1


@pytest.mark.parametrize("revision", ["no-such-branch", "--help", "HEAD~9"])
def test_unknown_revision(repository: Path, revision: str) -> None:
    with pytest.raises(ValueError, match=f"against = '{revision}': expected a revision of the git checkout"):
        resolve_revision(revision, "worker.py", repository)


def test_revision_without_the_worker(repository: Path) -> None:
    with pytest.raises(ValueError, match=r"against = 'HEAD': expected a revision that has train\.py"):
        resolve_revision("HEAD", "train.py", repository)


def test_outside_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="against = 'HEAD'"):
        resolve_revision("HEAD", "worker.py", tmp_path)
