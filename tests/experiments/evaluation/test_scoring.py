"""Scores against a loop over tokens with full logits, on a tiny random model; one by one equals batched."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.evaluation.scoring import Scorer, bucket, option_requests
from experiments.evaluation.statistics import majority, wilson
from experiments.evaluation.text import ByteWords, windows
from moe.config import ModelConfig, MoEConfig
from moe.transformer import Transformer

CONFIG = ModelConfig(vocab_size=256, hidden=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=32,
                     moe=MoEConfig(num_experts=4, top_k=2, expert_dim=16), first_dense=1, init_std=0.4)
LONGEST = 96


@pytest.fixture(scope="module")
def model(drawn):
    return drawn(CONFIG)


@pytest.fixture(scope="module")
def oracle(model):
    """nats of each token of a sequence after those before it, from the logits of the whole sequence by hand."""
    params, state = model

    @jax.jit
    def logits(tokens):
        positions = jnp.arange(LONGEST, dtype=jnp.int32)[None]
        out: Any = Transformer(CONFIG).apply({"params": params}, tokens, jnp.ones_like(tokens), positions, state, None)
        return out.hidden[0] @ out.head.T

    def nats(inputs, targets):
        tokens = np.zeros((1, LONGEST), np.int32)  # causal: what follows the inputs changes nothing before
        tokens[0, : len(inputs)] = inputs
        rows = np.asarray(logits(tokens), np.float64)
        return [float(np.log(np.exp(row - row.max()).sum()) - (row[t] - row.max())) for row, t in zip(rows, targets)]

    return nats


@pytest.mark.slow
def test_windows_equal_a_loop_over_documents_and_tokens(model, oracle):
    params, state = model
    words, texts, length = ByteWords(), ["hello there", "a", "some more text here"], 8
    text = windows(words, texts, length)
    expected, column = 0.0, 0
    for one in texts:  # a document's inputs, cut where a window of the packed stream ends
        inputs, targets = [0, *one.encode()[:-1]], list(one.encode())
        while targets:
            room = length - column
            expected += sum(oracle(inputs[:room], targets[:room]))
            column = (column + len(targets[:room])) % length
            inputs, targets = inputs[room:], targets[room:]
    for batch_size in (1, 3):
        total = Scorer(CONFIG, params, state, batch_size).total_nll(text)
        assert total == pytest.approx(expected, rel=1e-5)


QUESTIONS = [("What is it?", ("cat", "dog", "a bird")), ("Q", ("no", "yes")), ("A longer question " * 3, ("x", "y"))]


def requests():
    words, found = ByteWords(), []
    for i, (prompt, options) in enumerate(QUESTIONS):
        wholes = [words.encode(f"{prompt} {option}") for option in options]
        found += option_requests(words.encode(prompt), wholes, i)
    return found


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.slow_after(1)
def test_options_equal_a_loop_over_tokens(model, oracle, batch_size):
    params, state = model
    read = []
    nats = Scorer(CONFIG, params, state, batch_size).run(requests(), read.append)
    for i, (prompt, options) in enumerate(QUESTIONS):
        for j, option in enumerate(options):
            whole = [0, *f"{prompt} {option}".encode()]
            expected = sum(oracle(whole[:-1], whole[1:])[len(prompt.encode()) :])
            assert nats[i, j] == pytest.approx(expected, rel=1e-5)
    assert len(nats) == sum(len(options) for _, options in QUESTIONS)
    assert sum(read) == sum(map(len, {r.inputs for r in requests()}))


def test_options_of_one_token_share_a_row():
    found = option_requests([1, 2, 3], [[1, 2, 3, 4], [1, 2, 3, 5]], "q")
    assert [(r.inputs, r.where, r.targets, r.tag) for r in found] == [
        ((1, 2, 3), (2,), (4,), ("q", 0)), ((1, 2, 3), (2,), (5,), ("q", 1))]


def test_a_prompt_whose_end_merges_with_an_option_is_cut_back_for_all():
    found = option_requests([1, 2, 3], [[1, 2, 9, 4], [1, 2, 3, 5]], 0)
    assert [(r.where, r.targets) for r in found] == [((1, 2), (9, 4)), ((1, 2), (3, 5))]
    with pytest.raises(ValueError, match="option 1 .* expected tokens beyond"):
        option_requests([1, 2], [[1, 2, 3], [1, 2]], 0)
    with pytest.raises(ValueError, match="prompt"):
        option_requests([], [[1], [2]], 0)


def test_few_lengths():
    assert [bucket(n) for n in (1, 32, 33, 128, 129, 1024, 1025, 5000)] == [32, 32, 64, 128, 256, 1024, 2048, 8192]
    assert len({bucket(n) for n in range(1, 8193)}) == 14


def test_wilson_against_its_definition_and_the_majority():
    for hits, count in ((0, 20), (7, 20), (20, 20), (1432, 2832)):
        for bound in wilson(hits, count):
            if 0 < bound < 1:  # the ends are where the score test is exactly at z
                z = (hits / count - bound) / (bound * (1 - bound) / count) ** 0.5
                assert abs(z) == pytest.approx(1.959964, rel=1e-5)
    assert wilson(0, 20)[0] == 0.0
    assert wilson(20, 20)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)
    assert majority([0, 1, 1, 2]) == 2
    assert majority([]) == 0


def test_batch_size():
    with pytest.raises(ValueError, match="batch_size = 0"):
        Scorer(CONFIG, {"embedding": None, "head": None}, {}, 0)
