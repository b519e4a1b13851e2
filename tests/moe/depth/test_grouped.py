"""Groups of rows run a block together and give what each row alone gives, with a cache and without."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe.depth import grouped
from moe.depth.execute import cached_forward_along
from moe.depth.grouped import decided_labels, empty_grouped_cache, given, grouped_forward, padded_rows, routed
from moe.depth.paths import path_of
from moe.depth.policy import DepthPolicy
from moe.depth.scanned import decide
from moe.generate import Generator, unstacked

LABELS = np.array([[1, 1, 1], [0, 2, 1], [2, 0, 0], [0, 2, 2]])
LENGTHS = np.array([5, 3, 5, 2])


def weights_of(model):
    return unstacked(model.config, model.params, model.router_state)


def where(tokens, lengths, start=0):
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) + start
    return tuple(map(jnp.asarray, (tokens, (positions - start < lengths[:, None]).astype(np.int32), positions)))


def test_a_batch_is_its_rows_alone(any_model, tokens):
    weights = weights_of(any_model)
    hidden, labels, _ = grouped_forward(any_model.config, weights, given(LABELS), *where(tokens, np.full(4, 12)))
    np.testing.assert_array_equal(labels, LABELS)
    for row, of_row in enumerate(LABELS):
        want = any_model.logits(tokens[row : row + 1], path_of(of_row))[0]
        np.testing.assert_allclose(hidden[row] @ weights.head, want, atol=2e-5, err_msg=str(of_row))


@pytest.mark.slow_after(1)
def test_routers_decide_once_and_their_cache_decodes(any_model, routers, depth, tokens):
    """Prompts decide while their cache is written; decoding follows, as a batch, and as a row along its path."""
    config, weights = any_model.config, weights_of(any_model)
    arguments = config, depth, any_model.params, any_model.router_state, routers, DepthPolicy()
    prompt = tokens[:, :5]
    want_labels = decide(*arguments, prompt, LENGTHS).labels
    cache = empty_grouped_cache(config, 4, 16)
    decided = routed(depth, routers, DepthPolicy(), LENGTHS)
    _, labels, cache = grouped_forward(config, weights, decided, *where(prompt, LENGTHS), cache)
    np.testing.assert_array_equal(labels, want_labels)
    assert len({tuple(row) for row in labels}) > 1
    want = [any_model.logits(tokens[row : row + 1], path_of(labels[row]))[0] for row in range(4)]
    for i in range(3):
        at = (LENGTHS + i)[:, None]
        new = jnp.asarray(np.take_along_axis(tokens, at, axis=1)), jnp.ones((4, 1), jnp.int32), jnp.asarray(at)
        alone = cached_forward_along(
            config, weights, path_of(labels[1]), *(a[1:2] for a in new), cache.of_row(1)
        )[0]
        hidden, _, cache = grouped_forward(config, weights, given(cache.labels), *new, cache)
        for row in range(4):
            np.testing.assert_allclose(hidden[row, 0] @ weights.head, want[row][at[row, 0]], atol=3e-5)
        np.testing.assert_allclose(alone[0], hidden[1], atol=2e-5)


def test_each_pass_runs_its_rows_alone(model, tokens, monkeypatch):
    """Layer 1 of LABELS: rows 0, 1, 3 together, then 1 and 3 again; what nobody runs is no program."""
    groups = []
    run = grouped._run_rows

    def spy(config, kind, window, weights, layer, shared, rows, x, cache):
        groups.append(None if rows is None else [row for row in rows.tolist() if row < 4])
        return run(config, kind, window, weights, layer, shared, rows, x, cache)

    monkeypatch.setattr(grouped, "_run_rows", spy)
    grouped_forward(model.config, weights_of(model), given(LABELS), *where(tokens, np.full(4, 12)))
    assert groups == [[0, 2], [2], [0, 1, 3], [1, 3], [0, 1, 3], [3]]
    groups.clear()
    agreed = np.array([[1, 0, 2]] * 4)
    grouped_forward(model.config, weights_of(model), given(agreed), *where(tokens, np.full(4, 12)))
    assert groups == [None] * 3


def test_groups_are_padded_to_powers_of_two():
    assert padded_rows(np.arange(6), 6) is None
    np.testing.assert_array_equal(padded_rows(np.array([1, 3, 4]), 6), [1, 3, 4, 6])
    np.testing.assert_array_equal(padded_rows(np.array([2]), 6), [2])
    np.testing.assert_array_equal(padded_rows(np.arange(5), 6), [0, 1, 2, 3, 4, 6])


def test_labels_of_prompts_are_those_of_the_compiled_decision(model, routers, depth, tokens):
    prompts = [row[:length].tolist() for row, length in zip(tokens, LENGTHS)]
    got = decided_labels(Generator(model), depth, routers, DepthPolicy(), prompts)
    want = decide(model.config, depth, model.params, {}, routers, DepthPolicy(), tokens, LENGTHS).labels
    np.testing.assert_array_equal(got, want)


def test_other_decisions_than_the_caches_are_refused(model, tokens):
    config, weights = model.config, weights_of(model)
    cache = empty_grouped_cache(config, 4, 16)
    with pytest.raises(ValueError, match="a cache that was written"):
        cache.of_row(0)
    cache = grouped_forward(config, weights, given(LABELS), *where(tokens[:, :5], LENGTHS), cache)[2]
    other = LABELS.copy()
    other[2, 1] = 1
    new = tuple(map(jnp.asarray, (tokens[:, 5:6], np.ones((4, 1), np.int32), LENGTHS[:, None])))
    with pytest.raises(ValueError, match=r"decisions of layer 1 = .*: expected those the cache was written under"):
        grouped_forward(config, weights, given(other), *new, cache)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full((4, 3), 3), "labels = "),
        (np.ones((3, 3), int), r"decisions of layer 0, shape = \(3,\): expected \[B = 4\]"),
    ],
)
def test_bad_decisions(model, tokens, labels, message):
    with pytest.raises(ValueError, match=message):
        grouped_forward(model.config, weights_of(model), given(labels), *where(tokens, np.full(4, 12)))


def test_empty_prompts_are_refused(model, routers, depth):
    with pytest.raises(ValueError, match=r"prompts\[1\]"):
        decided_labels(Generator(model), depth, routers, DepthPolicy(), [[1], []])
