"""Decisions as data: one program for all labels, equal to blocks applied one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.depth import scanned
from moe.depth.paths import path_of
from moe.depth.policy import DepthPolicy
from moe.depth.router import DepthConfig, route, stacked_logits
from moe.depth.scanned import agreed_forward, decide, forced_windows, masked_forward, teacher_forced_logits
from moe.transformer import Transformer

LABELS = np.array([[1, 1, 1], [0, 2, 1], [2, 0, 0], [0, 0, 0]])
FULL = np.full(4, 12)


def logits(output):
    return np.asarray(output.hidden @ output.head.T)


def of_model(model):
    return model.config, model.params, model.router_state


def test_masked_rows_follow_their_own_labels(any_model, tokens):
    got = logits(masked_forward(*of_model(any_model), tokens, FULL, LABELS))
    for row, labels in enumerate(LABELS):
        want = any_model.logits(tokens[row : row + 1], path_of(labels))[0]
        np.testing.assert_allclose(got[row], want, atol=2e-5, err_msg=str(labels))


@pytest.mark.parametrize("labels", LABELS, ids=str)
def test_an_agreed_batch_follows_its_labels(any_model, tokens, labels):
    got = logits(agreed_forward(*of_model(any_model), tokens, FULL, labels))
    np.testing.assert_allclose(got, any_model.logits(tokens, path_of(labels)), atol=2e-5)


def test_executing_every_block_is_the_model_to_the_bit(any_model, tokens):
    ones = np.ones((4, 12), np.int32)
    forward = jax.jit(Transformer(any_model.config).apply)
    positions = np.broadcast_to(np.arange(12), (4, 12))
    want = forward({"params": any_model.params}, tokens, ones, positions, any_model.router_state, None).hidden
    for run in (masked_forward, agreed_forward):
        got = run(*of_model(any_model), tokens, FULL, np.ones((4, 3), int)).hidden
        np.testing.assert_array_equal(got, want)


def test_labels_are_data(model, tokens):
    before = scanned._masked_forward._cache_size(), scanned._agreed_forward._cache_size()
    for labels in LABELS:
        masked_forward(*of_model(model), tokens[:3], FULL[:3], np.stack([labels] * 3))
        agreed_forward(*of_model(model), tokens[:3], FULL[:3], labels)
    after = scanned._masked_forward._cache_size(), scanned._agreed_forward._cache_size()
    assert after == (before[0] + 1, before[1] + 1)


def test_a_skipped_block_is_not_run(model, tokens):
    """A block that would call back does so as often as the labels say."""
    calls = []

    def block(x):
        jax.debug.callback(lambda: calls.append(1))
        return x + 1

    run = jax.jit(lambda x, label: scanned._branched(block, x, label))
    for label in (0, 1, 2):
        calls.clear()
        out = run(jnp.zeros(2), label)
        jax.effects_barrier()
        assert len(calls) == label
        np.testing.assert_array_equal(out, label)


@pytest.mark.parametrize("reads", ["residual", "embedding"])
@pytest.mark.slow_after(1)
def test_teacher_forcing_reads_what_enters_each_block(any_model, routers, depth, tokens, reads):
    depth = DepthConfig(depth.hidden, depth.num_windows, reads)
    lengths = np.array([12, 3, 7, 1])
    got = teacher_forced_logits(
        any_model.config, depth, any_model.params, any_model.router_state, routers, tokens, lengths, LABELS
    )
    assert got.shape == (4, 3, 3)
    for row, (labels, length) in enumerate(zip(LABELS, lengths)):
        prompt = tokens[row : row + 1, :length]
        stream = any_model.stream(prompt, path_of(labels))
        for layer in range(3):
            before = 0 if reads == "embedding" else labels[:layer].sum()
            router = jax.tree.map(lambda leaf: leaf[layer], routers)  # noqa: B023
            want = route(depth, router, stream[before], jnp.ones((1, length), bool))[0]
            np.testing.assert_allclose(got[row, layer], want, atol=3e-4, rtol=1e-4, err_msg=f"{labels} {layer}")


def test_what_follows_the_prompt_and_pads_it_does_not_matter(model, routers, depth, tokens):
    lengths = np.array([12, 3, 7, 1])
    other = np.where(np.arange(12)[None] < lengths[:, None], tokens, 36 - tokens)
    arguments = model.config, depth, model.params, model.router_state, routers
    for call in (
        lambda t: teacher_forced_logits(*arguments, t, lengths, LABELS),
        lambda t: decide(*arguments, DepthPolicy(), t, lengths).logits,
    ):
        np.testing.assert_array_equal(call(tokens), call(other))


def test_deciding_is_a_loop_over_layers(any_model, routers, depth, tokens):
    """A prompt's decision at a layer is read from the stream that its earlier decisions made."""
    lengths = np.array([12, 3, 7, 1])
    arguments = any_model.config, depth, any_model.params, any_model.router_state, routers
    got = decide(*arguments, DepthPolicy(), tokens, lengths)
    seen = set()
    for row, length in enumerate(lengths):
        prompt, labels = tokens[row : row + 1, :length], []
        for layer in range(3):
            entering = any_model.stream(prompt, path_of([*labels, 0]))[-1]
            router = jax.tree.map(lambda leaf: leaf[layer], routers)  # noqa: B023
            labels.append(int(route(depth, router, entering, jnp.ones((1, length), bool))[0].argmax()))
        np.testing.assert_array_equal(got.labels[row], labels)
        want = any_model.logits(prompt, path_of(labels))[0]
        np.testing.assert_allclose(logits(got.output)[row, :length], want, atol=2e-5)
        seen |= set(labels)
    assert len(seen) > 1
    forced = teacher_forced_logits(*arguments, tokens, lengths, got.labels)
    np.testing.assert_allclose(forced, got.logits, atol=1e-4)


def test_the_knob_reaches_the_decision(model, routers, depth, tokens):
    arguments = model.config, depth, model.params, model.router_state, routers
    for knob, label in ((-1.0, 0), (0.5, 1), (1.0, 2)):
        assert (np.asarray(decide(*arguments, DepthPolicy(knob), tokens, FULL).labels) == label).all()


def test_the_base_is_frozen_and_the_routers_are_not(model, routers, depth, tokens):
    def loss(params, routers):
        pooled, valid = scanned._forced_windows(
            model.config, depth, params, {}, jnp.asarray(tokens), jnp.asarray(FULL), jnp.asarray(LABELS)
        )
        return jnp.sum(stacked_logits(depth, routers, pooled, valid) ** 2)

    of_base, of_routers = jax.grad(loss, argnums=(0, 1))(model.params, routers)
    for leaf in jax.tree.leaves(of_base):
        assert not np.asarray(leaf).any()
    for leaf in jax.tree.leaves(of_routers):
        assert np.abs(np.asarray(leaf)).reshape(3, -1).max(1).min() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: masked_forward(*m, np.ones((2, 4), int), [4, 4], [[1, 1, 1]]), "labels shape"),
        (lambda m: masked_forward(*m, np.ones((1, 4), int), [4], [[1, 1]]), "labels shape"),
        (lambda m: masked_forward(*m, np.ones((1, 4), int), [4], [[1, 1, 3]]), r"labels = \[3\]"),
        (lambda m: masked_forward(*m, np.ones((1, 4), int), [0], [[1, 1, 1]]), r"lengths = \[0\]"),
        (lambda m: masked_forward(*m, np.ones((1, 4), int), [5], [[1, 1, 1]]), r"lengths = \[5\]"),
        (lambda m: masked_forward(*m, np.ones((1, 4), int), [4, 4], [[1, 1, 1]]), "lengths shape"),
        (
            lambda m: agreed_forward(*m, np.ones((2, 4), int), [4, 4], [[1, 1, 1], [1, 0, 1]]),
            r"mixed decisions = \[1\]: expected one decision for the whole batch",
        ),
        (lambda m: agreed_forward(*m, np.ones((2, 4), int), [4, 4], [1, -1, 1]), r"labels = \[-1\]"),
        (
            lambda m: forced_windows(m[0], DepthConfig(4, 2), *m[1:], np.ones((1, 4), int), [0], [[1, 1, 1]]),
            "no sequence is empty",
        ),
    ],
)
def test_bad_input(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(of_model(model))
