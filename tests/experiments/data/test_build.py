"""A user's text to shards and back, and one clear error for each kind of bad input, with nothing left behind."""

import io
import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from experiments.config import DataConfig
from experiments.data import DataError, build, commands
from experiments.data import tokenizer as tok
from experiments.data.corpus import load_directory, open_corpus
from experiments.data.shards import assign_splits, slug

QUIET = Console(file=io.StringIO())
ROWS = [{"domain": kind, "text": f"{kind} document {i}: Zürich 东京 {i * i}"} for kind in ("new", "old")
        for i in range(40)]


def texts(corpus, split=None):
    """{domain: documents}, decoded."""
    words = tok.ByteTokenizer()
    if corpus.tokenizer == "bpe":
        words = tok.BpeTokenizer.load(corpus.folder / "tokenizer.json")
    out = {}
    for name in corpus.domains:
        for part in (split,) if split else ("train", "validation", "test"):
            tokens, offsets = corpus.stream(name, part)
            out.setdefault(name, []).extend(words.decode(tokens[a:b]) for a, b in pairwise(offsets))
    return out


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_rows_round_trip(tmp_path, write):
    source = write(tmp_path / f"mine.{write.__name__[6:]}", [*ROWS, ROWS[3]])  # one copy
    corpus = commands.build(source=source, out=tmp_path / "out", console=QUIET)
    got = texts(corpus)
    assert corpus.domains == ("new", "old")
    assert {d: sorted(t) for d, t in got.items()} == {
        d: sorted(r["text"] for r in ROWS if r["domain"] == d) for d in got}
    reopened = open_corpus(DataConfig(corpus=str(tmp_path / "out"), allow_unclear_rights=False))
    assert reopened.content_hash == corpus.content_hash
    assert load_directory(tmp_path / "out", verify=True).describe() == corpus.describe()
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_splits_are_disjoint_and_independent_of_order(tmp_path):
    rows = [{"text": f"document {i}"} for i in range(300)]
    one = build.build_corpus(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "one", console=QUIET)
    two = build.build_corpus(write_jsonl(tmp_path / "b.jsonl", rows[::-1]), tmp_path / "two", console=QUIET)
    for split in ("train", "validation", "test"):
        assert set(texts(one, split)["a"]) == set(texts(two, split)["b"])
    sizes = [len(texts(one, s)["a"]) for s in ("train", "validation", "test")]
    assert sum(sizes) == 300
    assert sizes[0] > 240
    assert min(sizes) >= 3


def test_txt_documents_are_blocks_between_blank_lines(tmp_path):
    source = tmp_path / "notes.txt"
    source.write_bytes("\ufeffone\r\nmore\r\n\r\n\r\ntwo\0\n \nthree ü\n".encode())
    corpus = build.build_corpus(source, tmp_path / "out", console=QUIET)
    assert corpus.domains == ("notes",)
    assert sorted(texts(corpus)["notes"]) == ["one\nmore", "three ü", "two"]
    assert [i.documents for i in corpus.info] == [{"train": 1, "validation": 1, "test": 1}]


def test_txt_without_blank_lines_is_cut_at_line_ends(tmp_path):
    source = tmp_path / "book.txt"
    lines = [f"line {i} of a book without paragraphs" for i in range(2000)]
    source.write_text("\n".join(lines))
    corpus = build.build_corpus(source, tmp_path / "out", console=QUIET)
    documents = texts(corpus)["book"]
    assert 20 <= len(documents) <= 110
    assert sorted(line for d in documents for line in d.split("\n")) == sorted(lines)


def test_bpe_round_trips_and_token_zero_only_ends_documents(tmp_path):
    rows = [*ROWS, {"domain": "new", "text": f"the marker {tok.END} written out"}]
    corpus = build.build_corpus(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out", tokenizer="bpe",
                                vocab_size=300, console=QUIET)
    assert corpus.vocab_size <= 300
    assert corpus.stream("new", "train").tokens.dtype == np.uint16
    got = texts(corpus)
    assert sorted(got["old"]) == sorted(r["text"] for r in ROWS if r["domain"] == "old")
    assert "the marker  written out" in got["new"]
    tokens, offsets = corpus.stream("new", "train")
    np.testing.assert_array_equal(np.flatnonzero(tokens == 0), offsets[1:] - 1)
    assert "Zürich" in corpus.text(tokens).decode(errors="replace")



@pytest.mark.parametrize(("name", "content", "arguments", "message"), [
    ("a.csv", "x", {}, r"from = '.*a.csv': expected a file ending in one of .txt, .jsonl, .parquet"),
    ("a.txt", "", {}, r"0 bytes"),
    ("a.txt", " \n \n", {}, r"no text: expected at least one document"),
    ("a.txt", "one\n\ntwo", {}, r"domain 'a' has 2 distinct document\(s\): expected at least 3"),
    ("a.txt", b"good\n\nb\xffd\n", {}, r"not UTF-8 at byte 7 \(line 3, 0xff\)"),
    ("a.jsonl", '{"text": "a"}\n{"text": \n', {}, r"a.jsonl, line 2: invalid JSON"),
    ("a.jsonl", '{"text": "a"}\n[1]\n', {}, r"line 2: list: expected a JSON object"),
    ("a.jsonl", '{"text": "a"}\n{"body": "b"}\n', {}, r"line 2: no key 'text': this row has 'body'"),
    ("a.jsonl", '{"text": 3}\n', {}, r"line 1: text = 3: expected a string"),
    ("a.jsonl", '{"text": "a", "domain": "d"}\n{"text": "b"}\n', {}, r"line 2: no key 'domain': expected it in all"),
    ("a.jsonl", '{"text": "a"}\n', {"domain_key": "topic"}, r"line 1: no key 'topic'"),
    ("a.jsonl", '{"text": "a"}\n', {"tokenizer": "words"}, r"tokenizer = 'words': expected byte, bpe or smollm2"),
    ("a.jsonl", '{"text": "a"}\n', {"tokenizer": "bpe", "vocab_size": 256}, r"vocab_size = 256: expected at least 257"),
    ("a.parquet", "PAR1 no", {}, r"cannot be read as parquet"),
])
def test_bad_input_is_one_clear_error(tmp_path, name, content, arguments, message):
    source = tmp_path / name
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        build.build_corpus(source, tmp_path / "out", console=QUIET, **arguments)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_parquet_errors_name_column_and_row(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", [{"text": "a"}, {"text": None}])
    with pytest.raises(DataError, match=r"a.parquet, row 2: text = None: expected a string"):
        build.build_corpus(source, tmp_path / "out", console=QUIET)
    with pytest.raises(DataError, match=r"no column 'body': expected one of 'text'"):
        build.build_corpus(source, tmp_path / "out", text_key="body", console=QUIET)


def test_out_must_be_new_or_empty(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ROWS)
    out = tmp_path / "out"
    out.mkdir()
    build.build_corpus(source, out, console=QUIET)
    with pytest.raises(ValueError, match=r"out = '.*out': expected a directory that is new or empty"):
        build.build_corpus(source, out, console=QUIET)
    with pytest.raises(ValueError, match=r"a.jsonl': expected a directory that is new"):
        build.build_corpus(source, source, console=QUIET)
    with pytest.raises(DataError, match="cannot be written"):
        build.build_corpus(source, source / "below", console=QUIET)


def test_a_row_key_for_every_row_is_no_domain(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": f"t{i}", "domain": str(i)} for i in range(300)])
    with pytest.raises(DataError, match="more than 256 domains"):
        build.build_corpus(source, tmp_path / "out", console=QUIET)
    assert not (tmp_path / "out").exists()


def test_foreign_and_damaged_directories_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"data.corpus = 'nowhere': expected `packaged`, `synthetic`, or a directory"):
        open_corpus(DataConfig(corpus="nowhere"))
    out = tmp_path / "out"
    build.build_corpus(write_jsonl(tmp_path / "a.jsonl", ROWS), out, console=QUIET)
    config = DataConfig(corpus=str(out))
    tokens = out / "new.train.tokens.npy"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-5])
    with pytest.raises(DataError, match=r"new.train.tokens.npy: cannot be read"):
        open_corpus(config)
    np.save(tokens, np.zeros(3, np.uint16))
    with pytest.raises(DataError, match=r"new.train.tokens.npy: expected uint8 \[\d+\], found uint16 \[3\]"):
        open_corpus(config)
    tokens.unlink()
    with pytest.raises(DataError, match=r"new.train.tokens.npy: cannot be read"):
        open_corpus(config)
    for content, message in (("{", "cannot be read as JSON"), ("{}", "format = None: expected 1"),
                             ('{"format": 1}', "'domains' is missing")):
        (out / "corpus.json").write_text(content)
        with pytest.raises(DataError, match=message):
            open_corpus(config)


def test_bpe_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"install the extra with `pip install -e '.\[hf\]'`"):
        tok.train_bpe(["a"], 300)


def test_names_become_safe_and_distinct_file_names():
    assert slug("plain-name_1") == "plain-name_1"
    assert len({slug(n) for n in ("a/b", "a b", "a-b", "../a", "中", "文")}) == 6
    assert all("/" not in slug(n) and "." not in slug(n) for n in ("../a", "a.b", ".."))


def test_few_documents_still_fill_every_split():
    for n in (3, 5, 20):
        for seed in range(20):
            splits = assign_splits(np.random.default_rng(seed).random(n))
            assert set(splits.tolist()) == {0, 1, 2}
