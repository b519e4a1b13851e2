"""The commands convert and logits: what they write, print and refuse."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import models
from experiments.models import convert_model, write_logits
from moe.pretrained.model import load
from moe.pretrained.safetensors import open_safetensors

GOLDENS = Path(__file__).parents[1] / "goldens"
CASE = "llama_tied_gqa"


@pytest.fixture(scope="module")
def golden():
    spec = importlib.util.spec_from_file_location("golden_language_models", GOLDENS / "language_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(golden, tmp_path):
    golden.write_checkpoint(CASE, tmp_path / "model", shards=2)
    return tmp_path / "model"


def save(path, array):
    np.save(path, array)
    return path


def files(path):
    return {each.name for each in path.iterdir()}


@pytest.mark.parametrize("batch_size", [2, 64])
def test_logits_of_a_folder_are_those_of_the_released_model(golden, folder, tmp_path, monkeypatch, batch_size):
    """Three rows in passes of two; over all devices, and on one."""
    if batch_size == 2:
        monkeypatch.setattr(models.jax, "device_count", lambda: 1)
    wanted, rows = golden.logits(CASE), golden.tokens(CASE).astype(np.uint16)
    tokens = save(tmp_path / "tokens.npy", np.concatenate([rows, rows[:1]]))
    out = tmp_path / "new" / "logits.npy"
    write_logits(str(folder), tokens, out, batch_size=batch_size)
    got = np.load(out)
    assert got.dtype == np.float32
    assert files(out.parent) == {"logits.npy"}
    assert got.shape == (3, *wanted.shape[1:])
    assert out.stat().st_size == save(tmp_path / "again.npy", got).stat().st_size
    assert np.abs(got - np.concatenate([wanted, wanted[:1]])).max() <= 1e-4 * wanted.std()


def test_one_sequence_replaces_what_was_there(golden, folder, tmp_path):
    tokens, out = save(tmp_path / "tokens.npy", golden.tokens(CASE)[1]), save(tmp_path / "out.npy", np.zeros(3))
    write_logits(folder, tokens, out)
    wanted = golden.logits(CASE)[1:]
    assert np.load(out).shape == wanted.shape
    assert np.abs(np.load(out) - wanted).max() <= 1e-4 * wanted.std()


BAD = {
    "a float": (np.ones((2, 3)), "tokens dtype = 'float64': expected whole numbers"),
    "a flag": (np.ones((2, 3), bool), "tokens dtype = 'bool': expected whole numbers"),
    "three axes": (np.ones((2, 3, 1), int), r"tokens shape = \(2, 3, 1\): expected \[B, S\] or \[S\]"),
    "a number": (np.array(3), r"tokens shape = \(\)"),
    "none": (np.ones((0, 3), int), r"tokens shape = \(0, 3\)"),
    "above the vocabulary": (np.array([[1, 40]]), "tokens = 40: expected ids from 0 to 39"),
    "below zero": (np.array([[-1, 4]]), "tokens = -1: expected ids from 0 to 39"),
    "beyond any integer": (np.array([[2**63]], np.uint64), "tokens = 9223372036854775808: expected ids from 0 to 39"),
    "beyond the context": (np.ones((1, 65), int), "tokens length = 65: expected at most the model's context of 64"),
    "an object": (np.array([{}], object), "expected a whole .npy file of numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tokens_are_named_before_anything_is_read_or_written(folder, tmp_path, monkeypatch, name):
    array, message = BAD[name]
    monkeypatch.setattr(models, "load", lambda *args, **options: pytest.fail("weights were read"))
    tokens = save(tmp_path / "tokens.npy", array)
    with pytest.raises(ValueError, match=message):
        write_logits(folder, tokens, tmp_path / "new" / "out.npy")
    assert files(tmp_path) == {"model", "tokens.npy"}


def test_bad_paths_are_named(folder, tmp_path):
    tokens = save(tmp_path / "tokens.npy", np.ones((1, 2), int))
    np.savez(tmp_path / "archive.npz", tokens=np.ones(2, int))
    (tmp_path / "short.npy").write_bytes(tokens.read_bytes()[:-3])
    (tmp_path / "folder.npy").mkdir()
    out = tmp_path / "out.npy"
    for arguments, message in (
        ((tmp_path / "nothing", tokens, out), "model = .*nothing.*: expected smollm2, or a folder"),
        ((folder, tmp_path / "none.npy", out), "tokens = .*none.npy.*: expected an existing .npy file"),
        ((folder, tmp_path / "short.npy", out), "tokens = .*short.npy.*: expected a whole .npy file"),
        ((folder, tmp_path / "archive.npz", out), "tokens = .*archive.npz.*: expected an .npy file, not an archive"),
        ((folder, tokens, tmp_path / "out.txt"), "out = .*out.txt.*: expected a name that ends in .npy"),
        ((folder, tokens, tmp_path / "folder.npy"), "out = .*folder.npy.*: expected a file, not a folder"),
        ((folder, tokens, tokens / "new" / "out.npy"), "out = .*expected a file in a folder; .*tokens.npy is none"),
        ((folder, tokens, out, 0), "batch_size = 0: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            write_logits(*arguments)
    assert not out.exists()


def test_an_error_midway_leaves_the_old_file_alone(folder, tmp_path, monkeypatch):
    def broken(*args):
        yield np.zeros((1, 2, 40), np.float32)
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "logits_of", broken)
    tokens, out = save(tmp_path / "tokens.npy", np.ones((2, 2), int)), save(tmp_path / "out.npy", np.arange(3))
    before = files(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write_logits(folder, tokens, out)
    assert files(tmp_path) == before
    np.testing.assert_array_equal(np.load(out), np.arange(3))


def test_convert_says_what_it_wrote_and_what_it_left_out(golden, tmp_path, capsys):
    golden.write_checkpoint("deepseek_v3", tmp_path / "model")
    source = open_safetensors(tmp_path / "model")
    arrays = {name: source.read(name) for name in source.tensors}
    from safetensors.numpy import save_file

    save_file(arrays | {"model.layers.3.norm.weight": np.ones(3, np.float32)}, tmp_path / "model" / "model.safetensors")
    notes = convert_model(tmp_path / "model", tmp_path / "ours")
    printed = capsys.readouterr().out
    assert notes == ("tensors that are not used (the layers for multi-token prediction are left out): 1",)
    assert f"{tmp_path / 'ours'}: 0.1 MB in " in printed
    assert f"note: {notes[0]}" in printed
    assert "convert: 100%" in printed
    convert_model(tmp_path / "ours", tmp_path / "back", "deepseek_v3")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == golden.config("deepseek_v3")
    assert load(tmp_path / "back").config == load(tmp_path / "ours").config
