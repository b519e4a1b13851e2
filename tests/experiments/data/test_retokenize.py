"""The packaged corpus in other tokens: the same documents in the same splits, decodable, capped."""

import io
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from rich.console import Console
from tokenizers import decoders, models, pre_tokenizers

from experiments.data import DataError, commands
from experiments.data import tokenizer as tok
from experiments.data.corpus import load_directory
from experiments.data.retokenize import documents, retokenize
from experiments.data.shards import SPLITS, DomainWriter, atomic_directory, write_index
from moe.pretrained import smollm2
from moe.pretrained.tokenizer import TextTokenizer

QUIET = Console(file=io.StringIO())
MARK = "<|endoftext|>"


@pytest.fixture
def small():
    """As SmolLM2's, with no merges: token 0 ends a document, bytes follow."""
    tokens = [MARK, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([MARK])
    return inner


def write_bytes_corpus(folder, domains):
    """domains: {name: {split: documents}}. The splits are the caller's, not the hashes'."""
    with atomic_directory(folder) as scratch:
        entries = []
        for name, parts in domains.items():
            writer, splits = DomainWriter(scratch, name, np.dtype(np.uint8)), []
            for index, split in enumerate(SPLITS):
                for text in parts[split]:
                    writer.add(np.frombuffer(text.encode(), np.uint8), b"\0" * 32)
                    splits.append(index)
            entries.append({"name": name, "licence": f"licence of {name}", "rights": "unclear", "source": f"{name}==1",
                            "splits": writer.finish(np.array(splits))})
        write_index(scratch, name="packaged", tokenizer="byte", vocab_size=256, domains=entries)
    return load_directory(folder)


@pytest.fixture
def corpus(tmp_path):
    parts = {"train": [f"Zürich 东京 {i} {MARK} {i * i}" for i in range(20)], "validation": ["val one", "val two"],
             "test": ["test only"]}
    other = {split: [f"b {text}" for text in parts[split]] for split in SPLITS}
    return write_bytes_corpus(tmp_path / "packaged", {"a": parts, "b": other})


def texts(corpus, domain, split):
    tokens, offsets = corpus.stream(domain, split)
    words = tok.BpeTokenizer.load(corpus.folder / "tokenizer.json")
    return [words.decode(tokens[a:b]) for a, b in pairwise(offsets)]


def test_documents_keep_their_split_and_come_back(tmp_path, corpus, small):
    out = retokenize(corpus, tmp_path / "out", tok.SmolLM2Tokenizer(small), console=QUIET)
    assert (out.tokenizer, out.vocab_size, out.name, out.domains) == ("smollm2", 257, "packaged-smollm2", ("a", "b"))
    for name in out.domains:
        for split in SPLITS:
            assert texts(out, name, split) == [d.decode() for d in documents(corpus, name, split)]
            tokens, offsets = out.stream(name, split)
            np.testing.assert_array_equal(np.flatnonzero(tokens == 0), offsets[1:] - 1)  # the mark in a text is text
            assert out.text(tokens) == corpus.text(corpus.stream(name, split).tokens)
    assert [(i.licence, i.rights, i.source) for i in out.info] == [(i.licence, i.rights, i.source) for i in corpus.info]
    assert load_directory(tmp_path / "out", verify=True).content_hash == out.content_hash


def test_a_cut_run_of_tokens_has_text_too(tmp_path, corpus, small):
    out = retokenize(corpus, tmp_path / "out", tok.SmolLM2Tokenizer(small), console=QUIET)
    tokens = out.stream("a", "validation").tokens
    assert out.text(tokens[4:]) == b"one\n\nval two\n\n"
    assert out.text(tokens[:7]) == b"val one"
    assert out.text(tokens[:0]) == b""


def test_a_cap_is_shared_among_the_splits_and_none_is_empty(tmp_path, corpus, small):
    whole = sum(corpus.info[0].tokens.values())
    out = retokenize(corpus, tmp_path / "out", tok.SmolLM2Tokenizer(small), whole // 2, console=QUIET)
    for name in out.domains:
        kept = {split: texts(out, name, split) for split in SPLITS}
        everything = {split: [d.decode() for d in documents(corpus, name, split)] for split in SPLITS}
        assert all(kept[split] == everything[split][: len(kept[split])] for split in SPLITS)
        assert 7 <= len(kept["train"]) <= 10
        assert (len(kept["validation"]), len(kept["test"])) == (1, 1)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"max_bytes": -1}, r"max_bytes = -1: expected 0 \(all\) or a number of bytes"),
    ({"corpus": "none"}, r"corpus.tokenizer = 'none': expected byte"),
    ({"out": "packaged"}, r"out = '.*packaged': expected a directory that is new or empty"),
])
def test_bad_arguments_leave_nothing(tmp_path, corpus, small, arguments, message):
    if "corpus" in arguments:
        corpus = replace(corpus, tokenizer="none")
    with pytest.raises(ValueError, match=message):
        retokenize(corpus, tmp_path / arguments.get("out", "out"), tok.SmolLM2Tokenizer(small),
                   arguments.get("max_bytes", 0), QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["packaged"]


def test_a_failure_half_way_leaves_nothing(tmp_path, corpus, small):
    class Failing(tok.SmolLM2Tokenizer):
        def encode(self, text):
            if text.startswith("b"):
                raise DataError("no")
            return super().encode(text)

    with pytest.raises(DataError, match="no"):
        retokenize(corpus, tmp_path / "out", Failing(small), console=QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["packaged"]


@pytest.mark.parametrize(("tokenizer", "vocab_size"), [("smollm2", 257), ("bpe", 300), ("byte", 256)])
def test_the_command_takes_the_packaged_corpus(tmp_path, corpus, small, monkeypatch, tokenizer, vocab_size):
    monkeypatch.setenv("SWITCHYARD_DATA", str(tmp_path))
    monkeypatch.setattr(smollm2, "smollm2_tokenizer", lambda: TextTokenizer(small))
    out = commands.build(source=Path("packaged"), out=tmp_path / "out", tokenizer=tokenizer, vocab_size=300,
                         domains=("b",), console=QUIET)
    assert out.domains == ("b",)
    assert 256 <= out.vocab_size <= vocab_size
    tokens = corpus.stream("b", "test").tokens
    assert out.text(out.stream("b", "test").tokens) == corpus.text(tokens)


def test_the_command_refuses_what_does_not_fit(tmp_path, corpus, monkeypatch):
    monkeypatch.setenv("SWITCHYARD_DATA", str(tmp_path))
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree\n")
    build = lambda **changed: commands.build(**({"source": tmp_path / "a.txt", "out": tmp_path / "out",  # noqa: E731
                                                 "console": QUIET} | changed))
    with pytest.raises(ValueError, match=r"domains = \('a',\): expected none"):
        build(domains=("a",))
    with pytest.raises(ValueError, match=r"max_bytes = 5: expected 0"):
        build(max_bytes=5)
    with pytest.raises(ValueError, match=r"tokenizer = 'words': expected byte, bpe or smollm2"):
        build(source=Path("packaged"), tokenizer="words")
    with pytest.raises(ValueError, match=r"data.domains = 'c': expected names out of a, b"):
        build(source=Path("packaged"), domains=("c",))
    with pytest.raises(ValueError, match=r"the model smollm2 is missing"):
        build(source=Path("packaged"), tokenizer="smollm2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "packaged"]


def test_own_text_in_smollm2s_tokens(tmp_path, small, monkeypatch):
    monkeypatch.setattr(smollm2, "smollm2_tokenizer", lambda: TextTokenizer(small))
    (tmp_path / "a.txt").write_text("one é\n\ntwo\n\nthree\n")
    out = commands.build(source=tmp_path / "a.txt", out=tmp_path / "out", tokenizer="smollm2", console=QUIET)
    assert (out.tokenizer, out.vocab_size) == ("smollm2", 257)
    assert sorted(t for split in SPLITS for t in texts(out, "a", split)) == ["one é", "three", "two"]
