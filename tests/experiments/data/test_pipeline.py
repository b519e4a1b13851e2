"""The input pipeline is a function of (seed, index): any process count, any start, one domain per sequence."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from experiments import recipes
from experiments.config import DataConfig
from experiments.data.corpus import Corpus, DomainInfo, Stream, open_corpus
from experiments.data.pipeline import (
    Weighted,
    batch_at,
    batches,
    eval_sequences,
    make_dataset,
    num_windows,
    proportions,
    shuffle_window,
    window,
)
from experiments.data.synthetic import synthetic_corpus
from experiments.overrides import with_overrides
from experiments.train import feeding, fit
from parallel.mesh import make_mesh

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


def test_the_order_without_weights_is_pinned():
    """Committed results were trained on it: a new one makes them another experiment."""
    batch = batch_at(make_dataset(synthetic_corpus(), "train", SEQ, seed=0), 5000, 256)
    content = b"".join(batch[name].astype("<i4").tobytes() for name in sorted(NAMES))
    assert hashlib.sha256(content).hexdigest()[:16] == "87517c686d2aa035"


@pytest.mark.parametrize("count", [1, 3, 8])
def test_equal_weights_are_no_weights(count):
    corpus = synthetic_corpus(num_domains=count)
    plain, weighted = make_dataset(corpus, "train", SEQ, 4), make_dataset(corpus, "train", SEQ, 4, (0.3,) * count)
    for start in (0, 64 * shuffle_window(count) - 32, 10**7):
        one, other = batch_at(plain, start, 64), batch_at(weighted, start, 64)
        for name in NAMES:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("weights", [(5.0, 3.0, 1.5, 0.5), (0.35, 0.65, 0.0, 0.0), (1e-3, 0.0, 0.3, 0.7), (0, 0, 0, 2)])
def test_domains_come_in_proportion_to_their_weights(weights):
    p = np.array(weights) / np.sum(weights)
    corpus = synthetic_corpus(num_domains=4)
    dataset = make_dataset(corpus, "train", SEQ, 0, weights)
    run = shuffle_window(4)
    domains = np.array([int(dataset[i]["domain"]) for i in range(4 * run)])
    for part in domains.reshape(4, run):  # of every run, not only of all
        assert np.abs(np.bincount(part, minlength=4) - run * p).max() <= 2
    assert np.abs(np.bincount(domains, minlength=4) - 4 * run * p).max() <= 2
    assert len(set(domains[:32].tolist())) >= min(2, np.sum(p > 0.1))  # shuffled, no blocks
    late = batch_at(make_dataset(corpus, "train", SEQ, 0, weights), 3 * run + 5, 8)
    assert late["domain"].tolist() == domains[3 * run + 5 : 3 * run + 13].tolist()


def test_long_runs_keep_the_weights():
    """Where shares are rounded once a cycle and nowhere else."""
    p = proportions((0.35, 0.2, 0.45), 3)
    chosen = Weighted(p, 64 * 1026)
    first = np.array([chosen[i] for i in range(200_000)])
    assert np.abs(np.bincount(first[:, 0]) - 200_000 * p).max() <= 4
    for d in range(3):  # every window of a domain in turn, over the seams of cycles too
        np.testing.assert_array_equal(first[first[:, 0] == d, 1], np.arange(np.sum(first[:, 0] == d)))


def test_a_weighted_domain_goes_through_all_its_windows():
    corpus = tiny_corpus(sizes=(641, 641))
    seen = batch_at(make_dataset(corpus, "train", SEQ, 1, (3, 1)), 0, shuffle_window(2))
    for d, count in ((0, 768), (1, 256)):
        rows = seen["tokens"][seen["domain"] == d]
        assert len(rows) == count
        times = np.unique(rows, axis=0, return_counts=True)[1]
        assert len(times) == 40
        assert np.ptp(times) <= 1


@pytest.mark.parametrize("weights", [(-1.0, 2.0), (float("nan"), 1.0), (float("inf"), 1.0), (0.0, 0.0)])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match=r"data.weights = .*: expected finite numbers, 0 or more and not all 0"):
        DataConfig(weights=weights)
    with pytest.raises(ValueError, match=r"data.weights = .*: expected finite numbers, 0 or more and not all 0"):
        make_dataset(tiny_corpus(), "train", SEQ, 0, weights)


def test_weights_are_for_the_corpus_domains_in_its_order(tmp_path):
    config = DataConfig(corpus="synthetic", seq_len=32, weights=(1.0,) * 8)
    assert open_corpus(config).domains == open_corpus(replace(config, weights=())).domains
    with pytest.raises(ValueError, match=r"data.weights = \(1.0, 2.0\): expected 8 numbers, for chain-0, chain-1"):
        open_corpus(replace(config, weights=(1.0, 2.0)))
    with pytest.raises(ValueError, match=r"data.weights = \[1.0, 2.0\]: expected 8 numbers"):
        make_dataset(open_corpus(replace(config, weights=())), "train", SEQ, 0, (1.0, 2.0))
    two = replace(config, domains=("chain-1", "chain-5"), weights=(1.0, 2.0))
    assert open_corpus(two).domains == two.domains
    with pytest.raises(ValueError, match=r"data.domains = \('chain-5', 'chain-1'\): expected the order of"):
        open_corpus(replace(two, domains=two.domains[::-1]))
    smoke = recipes.smoke()
    assert with_overrides(smoke, ["data.weights=0,0,0,1,0,0,0,3"]).data.weights == (0, 0, 0, 1, 0, 0, 0, 3)
    with pytest.raises(ValueError, match="data.weights"):
        fit(replace(smoke, data=replace(smoke.data, weights=(1.0,))), tmp_path / "out")
    assert not (tmp_path / "out").exists()  # before anything is written or compiled


def test_training_reads_the_weighted_domains():
    smoke = recipes.smoke()
    config = replace(smoke, data=replace(smoke.data, weights=(0, 0, 0, 0, 0, 1, 0, 0)))
    corpus = open_corpus(config.data)
    with feeding(config, corpus, make_mesh(1, 1, 1), 0) as feed:
        tokens = np.asarray(next(feed)["tokens"])
    stream = np.asarray(corpus.stream("chain-5", "train").tokens).tobytes()
    rows = tokens.reshape(-1, tokens.shape[-1])
    assert len(rows) == config.batch_size
    assert all(row.astype(np.uint8).tobytes() in stream for row in rows)


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
