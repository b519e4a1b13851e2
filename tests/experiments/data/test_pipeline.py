"""The input pipeline is a function of (seed, index): any process count, any start, one domain per sequence."""

import numpy as np
import pytest

from experiments.config import DataConfig
from experiments.data.corpus import Corpus, DomainInfo, Stream, open_corpus
from experiments.data.pipeline import (
    batch_at,
    batches,
    eval_sequences,
    make_dataset,
    num_windows,
    shuffle_window,
    window,
)
from experiments.data.synthetic import synthetic_corpus

SEQ = 16
NAMES = {"tokens", "segment_ids", "positions", "domain"}


def tiny_corpus(sizes=(1009, 1601), split_sizes=None):
    """Domain d counts 1, 2, ... in documents of 7 + d tokens: a window tells where it is from."""
    info, streams = [], {}
    for d, size in enumerate(sizes):
        name = f"d{d}"
        for split in ("train", "validation", "test"):
            n = (split_sizes or {}).get(split, size)
            offsets = np.append(np.arange(0, n, 7 + d), n).astype(np.int64)
            streams[name, split] = Stream((np.arange(n) + 1).astype(np.uint16), offsets)
        counts = {s: len(streams[name, s].tokens) for s in ("train", "validation", "test")}
        info.append(DomainInfo(name, "", "clear", "", counts, counts, {}))
    return Corpus("tiny", "none", 4096, tuple(info), streams)


def test_windows_follow_documents():
    stream = Stream(np.array([5, 6, 0, 7, 0, 8, 9, 9, 9, 0], np.uint8), np.array([0, 3, 5, 10]))
    first, second = window(stream, 0, 4), window(stream, 1, 4)
    assert first["tokens"].tolist() == [5, 6, 0, 7, 0]
    assert first["segment_ids"].tolist() == [1, 1, 1, 2, 2]
    assert first["positions"].tolist() == [0, 1, 2, 0, 1]
    assert second["tokens"].tolist() == [0, 8, 9, 9, 9]  # shares one token: 0 is target there, input here
    assert second["segment_ids"].tolist() == [1, 2, 2, 2, 2]
    assert second["positions"].tolist() == [0, 0, 1, 2, 3]
    assert num_windows(stream, 4) == 2
    assert num_windows(stream, 9) == 1


def test_every_token_is_predicted_once_per_epoch():
    stream = tiny_corpus().stream("d0", "train")
    n = num_windows(stream, SEQ)
    targets = np.concatenate([window(stream, i, SEQ)["tokens"][1:] for i in range(n)])
    np.testing.assert_array_equal(targets, stream.tokens[1 : n * SEQ + 1])


def test_samples_have_one_domain_and_int32():
    dataset = make_dataset(synthetic_corpus(), "train", SEQ, seed=0)
    batch = batch_at(dataset, 0, 64)
    assert set(batch) == NAMES
    assert batch["domain"].shape == (64,)
    assert all(batch[name].shape == (64, SEQ + 1) for name in NAMES - {"domain"})
    assert all(v.dtype == np.int32 for v in batch.values())
    corpus = synthetic_corpus()
    for tokens, d in zip(batch["tokens"], batch["domain"]):
        stream = np.asarray(corpus.stream(corpus.domains[d], "train").tokens).tobytes()
        assert tokens.astype(np.uint8).tobytes() in stream


def test_domains_come_equally_and_shuffled():
    dataset = make_dataset(synthetic_corpus(), "train", SEQ, seed=3)
    domains = batch_at(dataset, 0, shuffle_window(8))["domain"]
    assert np.bincount(domains).tolist() == [shuffle_window(8) // 8] * 8
    assert np.any(domains[8:] != domains[:-8])  # no round robin
    assert len({d for d in domains[:16].tolist()}) > 4


def test_an_epoch_sees_every_window_once():
    corpus = tiny_corpus(sizes=(641,))
    n = num_windows(corpus.stream("d0", "train"), SEQ)  # 40
    run = shuffle_window(1)
    seen = batch_at(make_dataset(corpus, "train", SEQ, seed=1), 0, run)
    windows = [window(corpus.stream("d0", "train"), i, SEQ)["tokens"].tobytes() for i in range(n)]
    counts = [sum(tokens.tobytes() == w for tokens in seen["tokens"]) for w in windows]
    assert sum(counts) == run
    assert max(counts) - min(counts) <= 1


def test_windows_come_from_all_over_a_domain():
    corpus = tiny_corpus(sizes=(40_000,))
    first = batch_at(make_dataset(corpus, "train", SEQ, seed=0), 0, 64)["tokens"][:, 0]
    assert first.max() - first.min() > 30_000


def test_batches_depend_on_seed_and_index_only():
    corpus = synthetic_corpus()
    whole = batch_at(make_dataset(corpus, "train", SEQ, seed=5), 0, 48)
    again = make_dataset(corpus, "train", SEQ, seed=5)
    for start in (0, 16, 40):
        part = batch_at(again, start, 8)
        for name in NAMES:
            np.testing.assert_array_equal(part[name], whole[name][start : start + 8])
    other = batch_at(make_dataset(corpus, "train", SEQ, seed=6), 0, 48)
    assert np.any(other["tokens"] != whole["tokens"])


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_union_over_processes_is_the_same(processes):
    dataset = make_dataset(synthetic_corpus(), "train", SEQ, seed=0)
    whole = [batch_at(dataset, 100 + 8 * step, 8) for step in range(2)]
    parts = [batches(dataset, 100, 8, p, processes) for p in range(processes)]
    for step in range(2):
        got = [next(part) for part in parts]
        for name in NAMES:
            np.testing.assert_array_equal(np.concatenate([g[name] for g in got]), whole[step][name])
    for part in parts:
        part.close()


def test_batches_restart_anywhere():
    dataset = make_dataset(synthetic_corpus(), "train", SEQ, seed=0)
    stream = batches(dataset, 0, 4)
    first = [next(stream) for _ in range(4)]
    stream.close()
    late = batches(dataset, 12, 4)
    np.testing.assert_array_equal(next(late)["tokens"], first[3]["tokens"])
    late.close()


def test_eval_takes_equal_spread_windows():
    corpus = tiny_corpus()
    data = eval_sequences(corpus, "test", SEQ, 10 * SEQ + 3)
    assert data["tokens"].shape == (20, SEQ + 1)
    assert data["domain"].tolist() == [0] * 10 + [1] * 10
    starts = [int(w[0]) for w in data["tokens"][:10]]
    assert len(set(starts)) == 10  # whole windows, none twice
    assert np.all(np.diff(starts) >= 5 * SEQ)  # over the whole split, not its first documents
    short = eval_sequences(corpus, "test", SEQ, 10**6)
    assert np.bincount(short["domain"]).tolist() == [63, 63]  # what the shorter domain has, for both


def test_too_long_windows_give_the_numbers():
    corpus = tiny_corpus(split_sizes={"validation": 20})
    with pytest.raises(ValueError, match=r"data.seq_len = 20: expected at most 19: a window takes .* 21 tokens, and "
                                         r"split 'validation' of domain 'd0' has 20"):
        eval_sequences(corpus, "validation", 20, 100)
    assert len(eval_sequences(corpus, "validation", 19, 19)["tokens"]) == 2
    with pytest.raises(ValueError, match=r"eval_tokens_per_domain = 5: expected at least seq_len = 16"):
        eval_sequences(corpus, "test", SEQ, 5)
    with pytest.raises(ValueError, match=r"data.seq_len = 5000"):
        make_dataset(corpus, "train", 5000, 0)
    with pytest.raises(ValueError, match=r"batch_size = 6: expected divisible by the 4 processes"):
        batch_at(make_dataset(corpus, "train", SEQ, 0), 0, 6, 0, 4)


def test_synthetic_domains_differ_and_repeat():
    corpus = open_corpus(DataConfig(corpus="synthetic"))
    assert len(corpus.domains) == 8
    assert corpus.vocab_size == 64
    synthetic_corpus.cache_clear()
    assert synthetic_corpus().content_hash == corpus.content_hash != synthetic_corpus(seed=1).content_hash
    tables = []
    for name in corpus.domains:
        tokens, offsets = corpus.stream(name, "train")
        assert tokens.max() == 63
        assert np.all(tokens[offsets[1:] - 1] == 0)
        assert np.sum(tokens == 0) == len(offsets) - 1
        table = np.zeros((64, 64))
        np.add.at(table, (tokens[:-1], tokens[1:]), 1)
        tables.append(table / table.sum())
    overlap = [np.minimum(tables[0], other).sum() for other in tables[1:]]
    assert max(overlap) < 0.2  # bigrams of two chains hardly meet
