"""Sources made of one domain: what is replaced, by what, how often, and what stays clean."""

import io
from functools import partial

import numpy as np
import pytest
from rich.console import Console

from experiments.config import DataConfig
from experiments.data import DataError, commands
from experiments.data.corpus import open_corpus
from experiments.data.noise import noised, redundant
from experiments.data.pipeline import make_dataset
from experiments.data.shards import SPLITS, array_sha256
from experiments.data.synthetic import synthetic_corpus

NOISED = "noised(base='synthetic')"
LEVELS = (0.0, 0.3, 0.6, 0.9)


def opened(spec, **options):
    return open_corpus(DataConfig(corpus=spec, **options))


def documents(stream):
    return [d.tobytes() for d in np.split(np.asarray(stream.tokens), stream.offsets[1:-1])]


def test_sources_share_out_the_documents():
    corpus = opened(NOISED)
    assert corpus.domains == ("clean", "noise-30", "noise-60", "noise-90")
    whole = synthetic_corpus()
    for split in SPLITS:
        streams = [corpus.stream(name, split) for name in corpus.domains]
        assert sum(len(s.offsets) - 1 for s in streams) == len(whole.stream("chain-0", split).offsets) - 1
        assert np.ptp([len(s.tokens) for s in streams]) <= 192  # one document
        for s, info in zip(streams, corpus.info):
            assert np.all(s.tokens[s.offsets[1:] - 1] == 0)
            assert np.sum(s.tokens == 0) == len(s.offsets) - 1 == info.documents[split]
            assert info.hashes[split] == (array_sha256(s.tokens), array_sha256(s.offsets))
    for split in ("validation", "test"):  # clean, each document once
        parts = [d for name in corpus.domains for d in documents(corpus.stream(name, split))]
        assert sorted(parts) == sorted(documents(whole.stream("chain-0", split)))
    kept = documents(corpus.stream("clean", "train"))
    assert set(kept) < set(documents(whole.stream("chain-0", "train")))


@pytest.mark.parametrize("noise", ["unigram", "uniform"])
def test_levels_are_shares_of_the_text_replaced_by_the_distribution_asked_for(noise):
    levels = (0.0, 0.5, 1.0)
    clean = opened("noised(base='synthetic', levels=(0.0, 1e-9, 2e-9))")  # the same shares, no noise
    corpus = opened(f"noised(base='synthetic', levels={levels}, noise='{noise}')")
    for level, name, as_it_was in zip(levels, corpus.domains, clean.domains):
        before, after = clean.stream(as_it_was, "train"), corpus.stream(name, "train")
        np.testing.assert_array_equal(before.offsets, after.offsets)
        text = before.tokens != 0
        np.testing.assert_array_equal(after.tokens != 0, text)
        unigram = np.bincount(before.tokens[text], minlength=64) / text.sum()
        target = unigram if noise == "unigram" else np.array([0, *[1 / 63] * 63])
        # A replaced token is the same one again with the chance its distribution gives it.
        changed = np.mean(before.tokens[text] != after.tokens[text])
        assert changed == pytest.approx(level * (1 - unigram @ target), abs=0.015)
        found = np.bincount(after.tokens[text], minlength=64) / text.sum()
        assert np.abs(found - ((1 - level) * unigram + level * target)).sum() < 0.06
    if noise == "uniform":
        assert corpus.stream("noise-100", "train").tokens.max() == 63


def test_noise_is_independent_from_token_to_token():
    clean = opened("noised(base='synthetic', levels=(0.0, 1e-9))").stream("noise-1e-07", "train").tokens
    hit = opened("noised(base='synthetic', levels=(0.0, 0.5), noise='uniform')").stream("noise-50", "train").tokens
    changed = (clean != hit)[(clean != 0)].astype(float)
    assert abs(np.corrcoef(changed[1:], changed[:-1])[0, 1]) < 0.03


def test_a_function_of_the_spec_alone():
    again = opened(NOISED)
    assert opened(NOISED).streams is again.streams  # kept: opening twice is cheap
    for options in ("seed=1", "noise='uniform'", "domain='chain-1'", "levels=(0.0, 0.3, 0.6, 0.8)"):
        other = opened(f"noised(base='synthetic', {options})")
        assert other.content_hash != again.content_hash
        assert other.describe()["content_hash"] == other.content_hash
    from experiments.data import noise

    noise._noised.cache_clear()
    fresh = opened(NOISED)
    assert fresh.streams is not again.streams
    assert fresh.content_hash == again.content_hash
    hashes = fresh.content_hash, opened(NOISED, domains=("clean",)).content_hash
    assert hashes[0] != hashes[1]


def test_shares_depend_on_neither_levels_nor_noise():
    corpora = [noised("synthetic", levels=LEVELS), noised("synthetic", levels=(0.0, 0.1, 0.2, 1.0), noise="uniform")]
    one, other = ([np.asarray(c.stream(name, s).tokens) for name in c.domains for s in ("validation", "test")]
                  for c in corpora)
    for a, b in zip(one, other):
        np.testing.assert_array_equal(a, b)


def test_the_pipeline_takes_it():
    corpus = opened(NOISED, weights=(0.0, 0.0, 0.0, 1.0))
    sample = make_dataset(corpus, "train", 16, 0, (0.0, 0.0, 0.0, 1.0))[0]
    stream = np.asarray(corpus.stream("noise-90", "train").tokens).tobytes()
    assert int(sample["domain"]) == 3
    assert sample["tokens"].astype(np.uint8).tobytes() in stream


@pytest.mark.parametrize("show", [commands.list_corpus, partial(commands.stats, distinct=False)])
def test_the_command_line_shows_it(show):
    out = io.StringIO()
    show(corpus=NOISED, console=Console(file=out, width=200))
    for name in opened(NOISED).domains:
        assert name in out.getvalue()


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_redundant_source_is_a_few_documents_again_and_again(share):
    corpus = opened(f"redundant(base='synthetic', share={share}, documents=5)")
    assert corpus.domains == ("rare", "common")
    rare, common = (documents(corpus.stream(name, "train")) for name in corpus.domains)
    whole = documents(synthetic_corpus().stream("chain-0", "train"))
    assert sorted([*rare, *set(common)]) == sorted(whole)
    counts = [common.count(document) for document in set(common)]
    assert len(counts) == 5
    assert max(counts) - min(counts) <= 1
    tokens = [len(corpus.stream(name, "train").tokens) for name in corpus.domains]
    assert tokens[1] / sum(tokens) == pytest.approx(share, abs=192 / sum(tokens))
    for split in ("validation", "test"):
        parts = [d for name in corpus.domains for d in documents(corpus.stream(name, split))]
        assert sorted(parts) == sorted(documents(synthetic_corpus().stream("chain-0", split)))
    assert redundant("synthetic", share=share, documents=5, seed=1).content_hash != corpus.content_hash


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("noised(base='synthetic', levels=(0.0, 1.5))", r"data.corpus: levels = \(0.0, 1.5\): expected shares, 0 to 1"),
        ("noised(base='synthetic', levels=(0.0, -0.1))", "data.corpus: levels"),
        ("noised(base='synthetic', levels=(0.0, 'a'))", "data.corpus: levels"),
        ("noised(base='synthetic', levels=(0.0, 1e999 - 1e999))", "data.corpus"),
        ("noised(base='synthetic', levels=(0.0,))", "data.corpus: levels = .*two numbers or more"),
        ("noised(base='synthetic', levels=0.3)", "data.corpus: levels = 0.3: expected two numbers"),
        ("noised(base='synthetic', levels=(0.3, 0.3))", "data.corpus: levels = .* different"),
        ("noised(base='synthetic', noise='gauss')", "data.corpus: noise = 'gauss': expected one of unigram, uniform"),
        ("noised(base='synthetic', domain='legal')", "data.corpus: domain = 'legal': expected one of chain-0, chain-1"),
        ("noised(base='synthetic', seed=-1)", "data.corpus: seed = -1"),
        ("noised(base='nowhere')", "data.corpus = 'nowhere'"),
        ("noised(base=3)", "data.corpus: base = 3"),
        ("noised(base='synthetic', level=3)", "data.corpus = .*: expected options that noised takes"),
        (f"noised(base='synthetic', levels={tuple(i / 100 for i in range(89))})",
         "data.corpus: domain = 'chain-0': expected one with 89 documents in each split, .* validation split has 88"),
        ("redundant(base='synthetic', share=1.0)", "data.corpus: share = 1.0: expected above 0, at most 0.99"),
        ("redundant(base='synthetic', documents=341)", "data.corpus: documents = 341: expected 1 to 340"),
        ("redundant(base='synthetic', share=0.01)", "data.corpus: share = 0.01: expected more, or fewer documents: 8 "),
    ],
)
def test_bad_specs_say_what_is_wrong(spec, message):
    with pytest.raises(ValueError, match=message):
        opened(spec)


def test_a_missing_base_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("SWITCHYARD_DATA", str(tmp_path))
    with pytest.raises(DataError, match="data fetch"):
        opened("noised()")
