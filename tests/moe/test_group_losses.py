"""Importance loss, losses between groups of experts (DeepSeek-V2) and ReMoE's regulariser: closed forms and loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import losses
from moe.losses import (
    routing_stats,
    scoped_balance_loss,
    squared_variation,
)
from moe.routers import remoe, softmax_topk
from moe.routing import drop_padding, token_choice

L, B, S, E, K = 2, 6, 5, 8, 2
LENGTHS = np.array([5, 2, 4, 1, 5, 3])
MASK = jnp.arange(S)[None, :] < jnp.asarray(LENGTHS)[:, None]


def stats_of(logits, mask=None, k=K, router=None, state=None):
    """Stacked statistics [L, B, ...] of logits [L, B, S, E]."""
    mask = np.ones(logits.shape[1:3], bool) if mask is None else mask
    return stacked_stats(logits, mask, state or {}, router or softmax_topk.make(logits.shape[-1], k))


@functools.partial(jax.jit, static_argnames="router")
def stacked_stats(logits, mask, state, router):
    b, s, e = logits.shape[1:]
    ids = jnp.where(mask.reshape(-1), 0, -1)

    def one(z):
        routing, own = router(None, z.reshape(b * s, e), ids, state, None)
        routing = drop_padding(routing, mask.reshape(-1))
        return routing_stats(routing, mask, own, routing.valid)

    return jax.tree.map(lambda *x: jnp.stack(x), *[one(z) for z in logits])


def by_hand(indices, probs, valid=None):
    """Statistics of one layer and one sequence from indices [T, K] and probs [T, E]."""
    indices, probs = np.asarray(indices, np.int32), np.asarray(probs, np.float32)
    return stats_by_hand(indices, probs, np.ones(indices.shape, bool) if valid is None else np.asarray(valid))


@jax.jit
def stats_by_hand(indices, probs, valid):
    routing = token_choice(probs, jnp.log(probs), indices, jnp.ones(indices.shape), valid)
    stats = routing_stats(routing, jnp.ones((1, len(indices)), bool), {}, valid)
    return jax.tree.map(lambda x: x[None], stats)


def random_logits(seed=0, shape=(L, B, S, E)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape, scale=2.0), jnp.float32)


balance_loss = jax.jit(scoped_balance_loss, static_argnames=("scope", "top_k", "group_size"))
importance_loss = jax.jit(losses.importance_loss, static_argnums=1)
device_stats = jax.jit(losses.device_stats, static_argnums=1)
communication_stats = jax.jit(losses.communication_stats, static_argnums=1)


def balance(stats, scope="global_exact", k=K, group_size=1):
    total = float(stats.tokens[0].sum())
    return float(balance_loss(stats, scope, top_k=k, total_tokens=total, group_size=group_size))


# Importance


@pytest.mark.parametrize(("used", "expected"), [(1, E - 1), (2, E / 2 - 1), (E, 0.0)])
def test_importance_of_experts_used_alike_is_in_closed_form(used, expected):
    """m of E experts sharing everything: CV^2 = E / m - 1; all of them: zero."""
    logits = 200.0 * jax.nn.one_hot(jnp.arange(32).reshape(4, 8) % used, E)[None]
    assert float(importance_loss(stats_of(logits), 4, 32)) == pytest.approx(expected, abs=1e-6)


def test_importance_of_equal_probabilities_is_zero():
    assert float(importance_loss(stats_of(jnp.zeros((L, B, S, E))), 1, B * S)) == 0.0


@pytest.mark.parametrize("group_size", [1, 2, B])
@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
def test_importance_is_the_normalised_variance_of_each_group_weighted_by_its_tokens(group_size, mask):
    """CV^2 = E sum_i P_i^2 - 1 with P the group's mean probabilities; a loop over the groups."""
    logits = random_logits()
    valid = np.ones((B, S), bool) if mask is None else np.asarray(mask)
    probs, total, expected = np.asarray(jax.nn.softmax(logits), np.float64), valid.sum(), 0.0
    for layer in range(L):
        for start in range(0, B, group_size):
            rows = slice(start, start + group_size)
            p = probs[layer, rows][valid[rows]]
            expected += len(p) * (E * (p.mean(axis=0) ** 2).sum() - 1) / total / L
    got = importance_loss(stats_of(logits, mask), group_size, float(total))
    assert float(got) == pytest.approx(expected, rel=1e-5)


def test_importance_of_finer_groups_is_larger_and_of_none_is_zero():
    """Jensen: the mean over sequences is at least the pooled one. A batch without tokens costs nothing, not NaN."""
    stats = stats_of(random_logits())
    values = [float(importance_loss(stats, size, B * S)) for size in (1, 2, B)]
    assert values[0] > values[1] > values[2] > 0
    empty = stats_of(random_logits(), jnp.zeros((B, S), bool))
    assert float(importance_loss(empty, 2, 0.0)) == 0.0
    assert float(squared_variation(jnp.zeros(E))) == 0.0


def test_importance_gradient_equals_finite_differences_in_float64():
    with jax.enable_x64(True):
        logits = jnp.asarray(np.random.default_rng(3).normal(size=(1, 2, 3, 4)))
        mask = jnp.asarray([[True, True, True], [True, False, True]])
        value = lambda z: importance_loss(stats_of(z, mask), 1, 5.0)  # noqa: E731
        grad, eps = jax.jit(jax.grad(value))(logits), 1e-6
        step = jax.jit(jax.vmap(lambda d: (value(logits + eps * d) - value(logits - eps * d)) / (2 * eps)))
        basis = jnp.eye(logits.size).reshape(-1, *logits.shape)
        np.testing.assert_allclose(grad.reshape(-1), step(basis), atol=1e-8)
        np.testing.assert_array_equal(grad[0, 1, 1], 0.0)
        assert float(jnp.abs(grad).max()) > 1e-3


# Groups of experts: devices


@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
@pytest.mark.parametrize(("scope", "size"), [("sequence", 1), ("microbatch", 3), ("device", 2), ("global_exact", B)])
def test_one_expert_a_device_is_the_expert_loss_and_one_device_is_exactly_one(scope, size, mask):
    stats = stats_of(random_logits(), mask)
    assert balance(device_stats(stats, E), scope, group_size=size) == balance(stats, scope, group_size=size)
    assert balance(device_stats(stats, 1), scope, group_size=size) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_device_loss_is_the_paper_s_formula(devices):
    """2405.04434, Eqs. 26-28: sum_i f'_i P'_i, f' the mean of E / (k T) c_j over the group, P' the sum of its P_j."""
    logits = random_logits(shape=(1, B, S, E))
    probs = np.asarray(jax.nn.softmax(logits), np.float64).reshape(B * S, E)
    chosen = np.argsort(-probs, axis=1)[:, :K]
    f = np.bincount(chosen.ravel(), minlength=E) * E / (K * B * S)
    expected = float(f.reshape(devices, -1).mean(axis=1) @ probs.mean(axis=0).reshape(devices, -1).sum(axis=1))
    assert balance(device_stats(stats_of(logits), devices)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_uniform_routing_is_one_and_collapse_is_the_number_of_devices(devices):
    probs = np.full((E, E), 1 / E)
    indices = [[t, (t + 1) % E] for t in range(E)]
    assert balance(device_stats(by_hand(indices, probs), devices)) == pytest.approx(1.0, abs=1e-6)
    logits = jnp.zeros((1, B, S, E)).at[..., 3].set(100.0)
    assert balance(device_stats(stats_of(logits, k=1), devices), k=1) == pytest.approx(devices, rel=1e-6)


def test_devices_do_not_see_what_happens_within_them():
    """Moving a choice to another expert of the same group changes the expert loss alone."""
    probs = np.random.default_rng(0).dirichlet(np.ones(4), size=6)
    one, other = by_hand([[0, 2]] * 6, probs), by_hand([[1, 3]] * 6, probs)
    assert balance(device_stats(one, 2)) == balance(device_stats(other, 2))
    assert balance(one) != pytest.approx(balance(other), rel=1e-3)


def test_devices_must_divide_the_experts():
    stats = stats_of(random_logits())
    for group in (device_stats, communication_stats):
        for devices in (0, 3, 9) if group is device_stats else (3, 9):
            with pytest.raises(ValueError, match=rf"balance.devices = {devices}: expected a divisor of 8"):
                group(stats, devices)


# Groups of experts: communication


@pytest.mark.parametrize(
    ("indices", "sent"),
    [
        ([[0, 1]] * 5, [5, 0]),  # both experts on device 0: the token travels once
        ([[0, 2]] * 5, [5, 5]),
        ([[3, 1]] * 5, [5, 5]),
        ([[0, 1], [2, 3], [0, 3], [1, 2], [3, 2]], [3, 4]),
    ],
    ids=["same", "two", "two_reversed", "mixed"],
)
def test_a_token_counts_once_for_every_device_it_is_sent_to(indices, sent):
    """2405.04434, Eqs. 29-31: sum_i f''_i P''_i with f''_i = D / (M T) tokens sent to i, M = D = 2."""
    probs = np.random.default_rng(1).dirichlet(np.ones(4), size=5)
    stats = communication_stats(by_hand(indices, probs), 2)
    np.testing.assert_array_equal(stats.counts[0, 0], sent)
    np.testing.assert_array_equal(stats.balance_counts[0, 0], sent)
    expected = 2 / (2 * 5) * np.array(sent) @ probs.mean(axis=0).reshape(2, 2).sum(axis=1)
    assert balance(stats, k=2) == pytest.approx(float(expected), rel=1e-6)


def test_one_expert_a_device_makes_communication_the_expert_loss():
    stats = stats_of(random_logits(), MASK)
    np.testing.assert_array_equal(communication_stats(stats, E).counts, stats.counts)
    assert balance(communication_stats(stats, E)) == pytest.approx(balance(stats), rel=1e-6)


def test_every_token_on_every_device_is_one():
    """The most there is: M = D devices each, whatever the probabilities."""
    probs = np.random.default_rng(2).dirichlet(np.ones(4), size=7)
    assert balance(communication_stats(by_hand([[1, 2]] * 7, probs), 2), k=2) == pytest.approx(1.0, rel=1e-6)


def test_invalid_assignments_count_nowhere():
    """A dropped second choice, and padding, leave no trace in either kind of group."""
    indices, probs = [[0, 2], [0, 2], [1, 3]], np.full((3, 4), 0.25)
    stats = by_hand(indices, probs, [[True, False], [False, False], [True, True]])
    np.testing.assert_array_equal(communication_stats(stats, 2).counts[0, 0], [2, 1])
    np.testing.assert_array_equal(device_stats(stats, 2).counts[0, 0], [2, 1])
    padded = communication_stats(stats_of(random_logits(), MASK), 2)
    assert (np.asarray(padded.counts.sum(axis=-1)) <= 2 * LENGTHS).all()
    assert (np.asarray(padded.counts.max(axis=-1)) <= LENGTHS).all()


# ReMoE's regulariser: the balance loss of probabilities lambda relu(z)


@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
@pytest.mark.parametrize(("scope", "size"), [("global_exact", B), ("device", 2), ("sequence", 1)])
def test_remoe_regulariser_is_the_paper_s_formula_in_every_scope(scope, size, mask):
    """2412.14711, Eqs. 6 and 9: lambda E / (k T^2) sum_i c_i sum_t relu(z_ti), T the tokens of a group; groups weigh
    by their tokens."""
    logits, strength = random_logits(seed=4), 0.3
    state = {"lambda": jnp.float32(strength)}
    stats = stats_of(logits, mask, router=remoe.make(E, K), state=state)
    valid = np.ones((B, S), bool) if mask is None else np.asarray(mask)
    z, expected = np.maximum(np.asarray(logits, np.float64), 0.0), 0.0
    for layer in range(L):
        for start in range(0, B, size):
            rows = slice(start, start + size)
            w = z[layer, rows][valid[rows]]
            tokens = len(w)
            one = strength * E / (K * tokens**2) * ((w > 0).sum(axis=0) * w.sum(axis=0)).sum()
            expected += tokens / valid.sum() * one / L
    assert balance(stats, scope, group_size=size) == pytest.approx(expected, rel=1e-5)
