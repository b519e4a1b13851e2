"""A model along a path is its blocks applied one by one, with and without a cache, and does less work."""

from itertools import product

import jax
import numpy as np
import pytest

from moe.depth.execute import (
    PathGenerator,
    _full_forward,
    along,
    cached_forward_along,
    empty_path_cache,
    forward_along,
    generate_along,
    padded_prompts,
)
from moe.depth.paths import path_of
from moe.generate import Generator, unstacked
from moe.transformer import Transformer

PATHS = [(0, 1, 2), (), (1,), (0, 0, 2), (2, 2), (0, 0, 1, 1, 2, 2)]


def weights_of(model):
    return unstacked(model.config, model.params, model.router_state)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.slow_after(4)
def test_forward_is_the_blocks_applied_one_by_one(any_model, tokens, path):
    weights = weights_of(any_model)
    hidden = forward_along(any_model.config, weights, path, tokens, np.full(4, 12))
    np.testing.assert_allclose(hidden @ weights.head, any_model.logits(tokens, path), atol=2e-5)


def test_executing_every_block_is_the_model_to_the_bit(any_model, tokens):
    weights, lengths = weights_of(any_model), np.array([12, 5, 9, 1])
    positions = np.broadcast_to(np.arange(12), tokens.shape)
    segment_ids = (positions < lengths[:, None]).astype(np.int32)
    forward = jax.jit(Transformer(any_model.config).apply)
    want = forward({"params": any_model.params}, tokens, segment_ids, positions, any_model.router_state, None).hidden
    got = forward_along(any_model.config, weights, (0, 1, 2), tokens, lengths)
    real = segment_ids > 0
    np.testing.assert_array_equal(np.asarray(got)[real], np.asarray(want)[real])


def test_executing_nothing_is_the_norm_of_the_embedding(any_model, tokens):
    x = np.asarray(any_model.params["embedding"], np.float64)[tokens]
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(any_model.params["final_norm"]["scale"])
    got = forward_along(any_model.config, weights_of(any_model), (), tokens, np.full(4, 12))
    np.testing.assert_allclose(got, normed, atol=1e-5)


def check_decoding(model, tokens, path):
    """Prompts of 5 and 3, the shorter one padded; then four tokens, one at a time, along the same path."""
    config, weights, tokens = model.config, weights_of(model), tokens[:2, :9]
    want = model.logits(tokens, path)
    lengths = np.array([5, 3])
    positions = np.broadcast_to(np.arange(5), (2, 5))
    real = positions < lengths[:, None]
    cache = empty_path_cache(config, path, 2, 16)
    prompt = np.where(real, tokens[:, :5], 0), real.astype(np.int32), positions
    hidden, cache = cached_forward_along(config, weights, path, *prompt, cache)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose((hidden @ weights.head)[row, :length], want[row, :length], atol=3e-5)
    for i in range(4):
        at = (lengths + i)[:, None]
        new = np.take_along_axis(tokens, at, axis=1), np.ones((2, 1), np.int32), at
        hidden, cache = cached_forward_along(config, weights, path, *new, cache)
        got = (hidden @ weights.head)[:, 0]
        np.testing.assert_allclose(got, want[np.arange(2), at[:, 0]], atol=3e-5, err_msg=f"token {i}")


@pytest.mark.parametrize("labels", list(product((0, 1, 2), repeat=3)), ids=str)
@pytest.mark.slow_after(8)
def test_decoding_with_a_cache_is_the_full_recomputation(model, tokens, labels):
    """All 27 paths that labels of a model of 3 layers name."""
    check_decoding(model, tokens, path_of(labels))


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.slow_after(4)
def test_so_it_is_for_layers_of_different_kinds_and_windows(any_model, tokens, path):
    check_decoding(any_model, tokens, path)


def test_a_cache_of_another_path_is_refused(model, tokens):
    config, weights = model.config, weights_of(model)
    where = tokens[:, :1], np.ones((4, 1), np.int32), np.zeros((4, 1), np.int32)
    cache = empty_path_cache(config, (0, 2), 4, 8)
    with pytest.raises(ValueError, match=r"cache.path = \(0, 2\): expected \(1, 2\)"):
        cached_forward_along(config, weights, (1, 2), *where, cache)


def test_skipping_removes_work_and_repeating_adds_it(model, tokens):
    def flops(path):
        compiled = _full_forward.lower(*along(model.config, weights_of(model), path), tokens, np.full(4, 12)).compile()
        return compiled.cost_analysis()["flops"]

    none, skipped, full, repeated = map(flops, ((), (0, 2), (0, 1, 2), (0, 1, 1, 2)))
    block = (full - none) / 3
    np.testing.assert_allclose([full - skipped, repeated - full], block, rtol=0.02)
    assert none < 0.1 * block


def test_paths_of_one_length_share_a_program(model, tokens):
    before = _full_forward._cache_size()
    for path in ((0, 1), (0, 2), (1, 2), (1, 1)):
        forward_along(model.config, weights_of(model), path, tokens[:3], np.full(3, 12))
    assert _full_forward._cache_size() == before + 1


@pytest.mark.slow_after(1)
def test_generation_along_paths_is_the_argmax_of_recomputation(any_model):
    prompts = [[1, 2, 3, 4], [5, 6, 7], [7, 8, 9], [3, 1, 2]]
    labels = np.array([[1, 0, 2], [1, 1, 1], [1, 0, 2], [0, 0, 0]])
    base = Generator(any_model)
    made = np.stack(list(generate_along(base, prompts, labels, max_new_tokens=4)), axis=1)
    for prompt, of_row, new in zip(prompts, labels, made):
        logits = any_model.logits([[*prompt, *new]], path_of(of_row))[0]
        np.testing.assert_array_equal(new, logits[len(prompt) - 1 : -1].argmax(-1))
    alone = np.stack(list(PathGenerator(base, (0, 2, 2))([prompts[0]], max_new_tokens=4)), axis=1)
    np.testing.assert_array_equal(alone[0], made[0])


def test_sequences_of_different_paths_end_on_their_own(model):
    prompts, labels = [[1, 2], [3, 4]], np.array([[1, 1, 1], [1, 1, 0]])
    base = Generator(model)
    made = np.stack(list(generate_along(base, prompts, labels, max_new_tokens=5)), axis=1)
    stop = int(made[0, 1])
    stopped = np.stack(list(generate_along(base, prompts, labels, max_new_tokens=5, stop=[stop])), axis=1)
    for row in range(2):
        end = list(made[row]).index(stop) + 1 if stop in made[row] else 5
        np.testing.assert_array_equal(stopped[row, :end], made[row, :end])
        assert (stopped[row, end:] == -1).all()


def test_prompts_are_padded_on_the_right(model):
    tokens, lengths = padded_prompts(model.config, [[4, 5, 6], [7]])
    np.testing.assert_array_equal(lengths, [3, 1])
    np.testing.assert_array_equal(tokens[:, :4], [[4, 5, 6, 0], [7, 0, 0, 0]])
    assert not tokens[:, 4:].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: along(m.config, weights_of(m), (1, 0)), "path = "),
        (lambda m: along(m.config, weights_of(m), (0, 3)), "path = "),
        (lambda m: along(m.config, weights_of(m), (0,) * 7), "2L = 6"),
        (lambda m: empty_path_cache(m.config, (2, 1), 1, 8), "path = "),
        (lambda m: generate_along(Generator(m), [[1]], [[1, 1]], max_new_tokens=1), "labels shape"),
        (lambda m: generate_along(Generator(m), [[1]], [[1, 1, 3]], max_new_tokens=1), r"labels = \[3\]"),
        (lambda m: generate_along(Generator(m), [[1], [2]], [[1, 1, 1]], max_new_tokens=1), "labels shape"),
        (lambda m: generate_along(Generator(m), [[]], [[1, 1, 1]], max_new_tokens=1), r"prompts\[0\]"),
        (lambda m: padded_prompts(m.config, [[1], []]), r"prompts\[1\]"),
    ],
)
def test_bad_input(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)
