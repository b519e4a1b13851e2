"""Oracles of the global-batch balance study (closed forms, identities, invariances), values and gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.losses import (
    BalancePrior,
    balance_loss,
    group_sum,
    routing_stats,
    scoped_balance_loss,
    selection_frequency,
    shuffled_frequency,
    z_loss,
)
from moe.routers.softmax_topk import make
from moe.routing import drop_padding

L, B, S, E, K = 2, 8, 6, 8, 2
SCOPES = ["sequence", "microbatch", "device", "global_prefix", "global_exact", "ema"]
GROUP = {"sequence": 1, "microbatch": 2, "device": 4}  # sequences that share one f; the other scopes have one f for all


def stats_of(logits, token_valid=None, k=K, kept=None):
    """Stacked statistics [L, B, ...] of logits [L, B, S, E]."""
    token_valid = np.ones(logits.shape[1:3], bool) if token_valid is None else token_valid
    return stacked_stats(logits, token_valid, kept, k)


@functools.partial(jax.jit, static_argnames="k")
def stacked_stats(logits, token_valid, kept, k):
    b, s, e = logits.shape[1:]

    def one(z):
        routing, losses = make(e, k)(None, z.reshape(b * s, e), None, {}, None)
        routing = drop_padding(routing, token_valid.reshape(-1))
        return routing_stats(routing, token_valid, losses, routing.valid if kept is None else kept)

    return jax.tree.map(lambda *x: jnp.stack(x), *[one(z) for z in logits])


def random_logits(seed=0, shape=(L, B, S, E), scale=2.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape, scale=scale), jnp.float32)


def frequency_of(stats, k=K):
    """[L, 1, E]: f of all tokens."""
    return selection_frequency(stats.balance_counts.sum(axis=1), stats.tokens.sum(axis=1), k)[:, None]


def loss(stats, scope, total, k=K, mb=None, **kwargs):
    """Unless they are given, `ema` gets the f that steps like this one leave behind, `global_prefix` an empty prior."""
    layers, _, experts = stats.prob_sums.shape
    kwargs.setdefault("prior", BalancePrior.zeros(layers, experts))
    if scope == "ema":
        kwargs.setdefault("frequency", frequency_of(stats, k))
    size = GROUP.get(scope, 1) if mb is None else mb
    return balance_of(stats, scope, top_k=k, total_tokens=total, group_size=size, **kwargs)


balance_of = jax.jit(scoped_balance_loss, static_argnames=("scope", "top_k", "group_size"))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_uniform_probabilities_and_balanced_choices_give_one(scope, k):
    tokens = E  # per sequence: each expert is chosen k times
    counts = jnp.full((1, B, E), float(k))
    uniform = stats_of(jnp.zeros((1, B, tokens, E)), k=k)
    stats = uniform.replace(counts=counts, balance_counts=counts)
    assert loss(stats, scope, B * tokens, k) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_collapse_on_one_expert_gives_the_number_of_experts(scope):
    logits = jnp.zeros((1, B, S, E)).at[..., 3].set(100.0)
    assert loss(stats_of(logits, k=1), scope, B * S, k=1) == pytest.approx(E, rel=1e-6)


def test_micro_minus_global_is_the_covariance_over_micro_batches():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        f = rng.dirichlet(np.ones(E), size=(L, 4))
        p = rng.dirichlet(np.ones(E), size=(L, 4))
        tokens = 4 * S
        micro = balance_loss(jnp.asarray(f), jnp.asarray(p) * S, tokens)
        exact = balance_loss(jnp.asarray(f.mean(1, keepdims=True)), jnp.asarray(p.sum(1, keepdims=True)) * S, tokens)
        covariance = ((f - f.mean(1, keepdims=True)) * (p - p.mean(1, keepdims=True))).mean(axis=1)
        assert abs(float(micro - exact) - E * covariance.sum(-1).mean()) < 1e-12


def test_scopes_on_real_routing_obey_the_same_identity():
    stats = stats_of(random_logits())
    f = selection_frequency(group_sum(stats.counts, 2), group_sum(stats.tokens, 2), K)
    p = group_sum(stats.prob_sums, 2) / (2 * S)
    covariance = jnp.mean((f - f.mean(1, keepdims=True)) * (p - p.mean(1, keepdims=True)), axis=1)
    gap = loss(stats, "microbatch", B * S) - loss(stats, "global_exact", B * S)
    assert float(gap) == pytest.approx(float(E * covariance.sum(-1).mean()), abs=1e-6)
    assert float(gap) > 1e-3


def test_identical_micro_batches_make_all_scopes_agree():
    one = random_logits(shape=(L, 1, S, E))
    stats = stats_of(jnp.tile(one, (1, B, 1, 1)))
    values = [float(loss(stats, scope, B * S)) for scope in SCOPES]
    np.testing.assert_allclose(values, values[0], rtol=1e-6)


def test_permuting_sequences_changes_micro_but_not_global():
    logits = random_logits()
    permuted = logits[:, np.random.default_rng(1).permutation(B)]
    a, b = stats_of(logits), stats_of(permuted)
    assert float(loss(a, "global_exact", B * S)) == pytest.approx(float(loss(b, "global_exact", B * S)), rel=1e-6)
    assert abs(float(loss(a, "microbatch", B * S) - loss(b, "microbatch", B * S))) > 1e-4


@pytest.mark.parametrize("scope", SCOPES)
def test_gradient_matches_the_closed_form(scope):
    """d L / d logits_t = (E / T) s_t (f - <f, s_t>) with the f of the token's group, over L layers' mean; for `ema`
    with the f of earlier steps."""
    logits = random_logits()
    earlier = frequency_of(stats_of(random_logits(seed=9)))
    given = {"frequency": earlier} if scope == "ema" else {}
    grad = jax.grad(lambda z: loss(stats_of(z), scope, B * S, **given))(logits)
    stats, s = stats_of(logits), jax.nn.softmax(logits)
    size = GROUP.get(scope, B)
    f = jnp.repeat(selection_frequency(group_sum(stats.counts, size), group_sum(stats.tokens, size), K), size, axis=1)
    f = (jnp.broadcast_to(earlier, f.shape) if scope == "ema" else f)[:, :, None]
    expected = E / (B * S) / L * s * (f - jnp.sum(f * s, axis=-1, keepdims=True))
    np.testing.assert_allclose(grad, expected, atol=1e-7)


def accumulate(logits, passes, scope):
    """Sum of the scope's shares over accumulation passes, as the train step forms it; `ema` knows an earlier step."""
    parts = jnp.split(logits, passes, axis=1)
    every = stats_of(logits)
    layers, _, experts = every.prob_sums.shape
    prior, total = BalancePrior.zeros(layers, experts), 0.0
    known = {"global_exact": every, "ema": stats_of(random_logits(seed=9))}
    frequency = frequency_of(known[scope]) if scope in known else None
    for part in parts:
        stats = stats_of(part)
        total += loss(stats, scope, B * S, prior=prior, frequency=frequency)
        prior = prior.add(stats)
    return total


@pytest.mark.parametrize(
    ("scope", "passes"),
    [
        (scope, passes)
        for scope in SCOPES
        if scope != "global_prefix"
        for passes in (2, 4)
        if (scope, passes) != ("device", 4)
    ],
)
def test_accumulation_changes_no_scope_but_the_prefix(scope, passes):
    """As long as a pass holds whole groups: what one device holds of a pass shrinks with the passes."""
    logits = random_logits()
    value, grad = jax.value_and_grad(lambda z: accumulate(z, passes, scope))(logits)
    given = {"frequency": frequency_of(stats_of(random_logits(seed=9)))} if scope == "ema" else {}
    expected, expected_grad = jax.value_and_grad(lambda z: loss(stats_of(z), scope, B * S, **given))(logits)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(grad, expected_grad, atol=1e-8)


def test_prefix_equals_exact_for_one_pass_and_uses_the_global_f_at_the_last():
    logits = random_logits()
    assert float(accumulate(logits, 1, "global_prefix")) == pytest.approx(
        float(accumulate(logits, 1, "global_exact")), rel=1e-6
    )
    first, last = jnp.split(logits, 2, axis=1)
    prior = BalancePrior.zeros(L, E).add(stats_of(first))
    share = loss(stats_of(last), "global_prefix", B * S, prior=prior)
    every = stats_of(logits)
    exact = selection_frequency(every.counts.sum(1), every.tokens.sum(1), K)[:, None]
    assert float(share) == pytest.approx(float(loss(stats_of(last), "global_exact", B * S, frequency=exact)), rel=1e-6)
    assert abs(float(accumulate(logits, 2, "global_prefix") - accumulate(logits, 2, "global_exact"))) > 1e-5


@pytest.mark.parametrize("scope", SCOPES)
def test_padding_equals_the_batch_without_it(scope):
    """Unequal valid counts: masked tokens leave f, P and the totals, and groups weigh by their tokens."""
    logits = random_logits(shape=(1, B, S, E))
    lengths = np.random.default_rng(2).integers(1, S + 1, size=B)
    mask = jnp.arange(S)[None, :] < jnp.asarray(lengths)[:, None]
    total = float(lengths.sum())
    got = loss(stats_of(logits, mask), scope, total)
    size = GROUP.get(scope, B)
    expected = 0.0
    for start in range(0, B, size):
        rows = np.concatenate([np.asarray(logits[0, i, : lengths[i]]) for i in range(start, start + size)])
        s = np.asarray(jax.nn.softmax(jnp.asarray(rows)))
        chosen = np.argsort(-s, axis=-1, kind="stable")[:, :K]
        f = np.bincount(chosen.ravel(), minlength=E) / (K * len(rows))
        expected += E * float(f @ s.sum(axis=0)) / total
    assert float(got) == pytest.approx(expected, rel=1e-5)


def test_no_valid_token_gives_zero_not_nan():
    stats = stats_of(random_logits(), jnp.zeros((B, S), bool))
    for scope in SCOPES:
        assert float(loss(stats, scope, 0.0)) == 0.0


def test_shuffled_sample_of_all_tokens_is_the_global_frequency_and_small_ones_scatter_around_it():
    stats = stats_of(random_logits())
    indices = stats.indices.reshape(L, B * S, K)
    keys = jax.random.split(jax.random.key(0), 64)
    exact = selection_frequency(stats.counts.sum(1), stats.tokens.sum(1), K)
    whole = shuffled_frequency(indices, keys[:2], B * S, E, K)
    np.testing.assert_allclose(whole, jnp.broadcast_to(exact[:, None], whole.shape), atol=1e-6)
    some = shuffled_frequency(indices, keys, 2 * S, E, K)
    np.testing.assert_allclose(some.sum(-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(some.mean(axis=1), exact, atol=0.04)
    assert float(some.std(axis=1).mean()) > 0.02


def test_shuffled_sample_ignores_padding():
    mask = jnp.ones((B, S), bool).at[4:].set(False)
    stats = stats_of(random_logits(), mask)
    f = shuffled_frequency(stats.indices.reshape(L, B * S, K), jax.random.split(jax.random.key(0), 3), B * S, E, K)
    np.testing.assert_allclose(f.sum(-1), 1.0, atol=1e-6)


def test_z_loss_closed_form_and_gradient():
    assert float(z_loss(stats_of(jnp.zeros((L, B, S, E))), B * S)) == pytest.approx(np.log(E) ** 2, rel=1e-6)
    logits = random_logits()
    grad = jax.grad(lambda z: z_loss(stats_of(z), B * S))(logits)
    z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    np.testing.assert_allclose(grad, 2 * z * jax.nn.softmax(logits) / (L * B * S), atol=1e-7)


def test_bad_scope_and_missing_inputs_are_named():
    stats = stats_of(random_logits())
    with pytest.raises(ValueError, match=r"balance.scope = 'node'.*global_exact"):
        loss(stats, "node", 1.0)
    with pytest.raises(ValueError, match="prior"):
        loss(stats, "global_prefix", 1.0, prior=None)
    with pytest.raises(ValueError, match="frequency"):
        loss(stats, "shuffle_micro", 1.0)
    with pytest.raises(ValueError, match=r"frequency = None.*scope ema"):
        loss(stats, "ema", 1.0, frequency=None)
    with pytest.raises(ValueError, match="micro_batch_size = 3"):
        loss(stats, "microbatch", 1.0, mb=3)
    with pytest.raises(ValueError, match="frequency.dtype"):
        balance_loss(jnp.ones((1, 1, E), jnp.bfloat16), jnp.ones((1, 1, E)), 1.0)


def test_ema_is_the_ratio_of_decayed_counts_and_starts_at_nothing():
    """Over unequal steps: sum_n decay^n c_n / (k sum_n decay^n T_n), a mean weighted by tokens, without bias."""
    decay, seen = 0.75, BalancePrior.zeros(L, E)
    none_yet = selection_frequency(seen.counts, seen.tokens, K)[:, None]
    assert float(loss(stats_of(random_logits()), "ema", B * S, frequency=none_yet)) == 0.0
    counts, tokens = np.zeros((L, E)), 0.0
    for step, rows in enumerate((8, 2, 5)):
        stats = stats_of(random_logits(seed=step), jnp.arange(B)[:, None] < jnp.full((1, S), rows))
        seen = seen.decayed(decay, BalancePrior.zeros(L, E).add(stats))
        counts, tokens = decay * counts + np.asarray(stats.counts.sum(1), np.float64), decay * tokens + rows * S
    f = selection_frequency(seen.counts, seen.tokens, K)
    np.testing.assert_allclose(f, counts / (K * tokens), rtol=1e-6)
    np.testing.assert_allclose(f.sum(axis=-1), 1.0, rtol=1e-6)


def test_every_pair_of_scopes_differs_on_uneven_data():
    """Otherwise a scope could silently be another one."""
    logits = random_logits()
    values = {s: float(accumulate(logits, 2, s)) for s in SCOPES}
    for a, b in itertools.combinations(SCOPES, 2):
        assert abs(values[a] - values[b]) > 1e-6, (a, b)
