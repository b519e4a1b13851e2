"""What routers promise beyond the battery: plans, controllers, biases, options. Closed forms where there are any."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import MoEConfig
from moe.routers import expert_choice, loss_free, remoe, sinkhorn, softmax_topk, top_p
from moe.routing import make_router, update_router_state

E, K, T = 8, 2, 512


def logits_of(seed=0, tokens=T, experts=E, spread=1.0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(tokens, experts)) + spread * np.linspace(1, -1, experts), jnp.float32)


def call(router, logits, state=None, ids=None, key=None):
    ids = jnp.zeros(len(logits), jnp.int32) if ids is None else ids
    return router(None, logits, ids, router.init_state() if state is None else state, key)


# Sinkhorn


@pytest.mark.parametrize("padded", [False, True])
def test_sinkhorn_marginals(padded):
    valid = jnp.arange(T) % 3 != 0 if padded else jnp.ones(T, bool)
    plan = sinkhorn.sinkhorn_plan(20.0 * logits_of(), valid, 1e-5, 2000)
    np.testing.assert_allclose(plan.sum(axis=0), 1 / E, rtol=1e-3)
    np.testing.assert_allclose(plan.sum(axis=1), np.asarray(valid) / np.asarray(valid).sum(), rtol=1e-5)


def test_sinkhorn_balances_in_training_and_is_plain_top_k_at_evaluation():
    router, logits = sinkhorn.make(E, K), logits_of(spread=2.0)
    plain = call(router, logits)[0]
    np.testing.assert_array_equal(plain.indices, jax.lax.top_k(logits, K)[1])
    planned = call(router, logits, key=jax.random.key(0))[0]
    violation = lambda counts: float(counts.max() / counts.mean() - 1)  # noqa: E731
    assert violation(plain.counts) > 1.0
    assert violation(planned.counts) < 0.2


# Loss-free balancing


def test_sign_and_proportional_rules_in_closed_form():
    counts = jnp.asarray([[[6.0, 2, 4, 4], [8, 0, 4, 4]], [[4, 4, 4, 4], [4, 4, 4, 4]]])  # L = 2, G = 2
    state = {"bias": jnp.zeros((2, 4)), "updates": jnp.zeros(2, jnp.int32)}
    sign = loss_free.make(4, 2, step_size=0.1)
    np.testing.assert_allclose(sign.update(state, counts, None)["bias"], [[-0.1, 0.1, 0, 0], [0, 0, 0, 0]], atol=1e-7)
    proportional = loss_free.make(4, 2, step_size=0.1, rule="proportional")
    np.testing.assert_allclose(
        proportional.update(state, counts, None)["bias"], [[-0.075, 0.075, 0, 0], [0, 0, 0, 0]], atol=1e-7
    )


def test_local_is_the_mean_of_what_each_micro_batch_asks_for():
    counts = jnp.asarray([[[6.0, 2, 4, 4], [3, 5, 4, 4], [4, 4, 5, 3]]])
    state = {"bias": jnp.zeros((1, 4)), "updates": jnp.zeros(1, jnp.int32)}
    local = loss_free.make(4, 2, step_size=0.3, pool="local").update(state, counts, None)["bias"]
    np.testing.assert_allclose(local, [[0.0, 0.0, -0.1, 0.1]], atol=1e-7)
    pooled = loss_free.make(4, 2, step_size=0.3).update(state, counts, None)["bias"]
    np.testing.assert_allclose(pooled, [[-0.3, 0.3, -0.3, 0.3]], atol=1e-7)  # 13, 11, 13, 11


def test_updates_freeze_the_bias_after_so_many_steps():
    router = loss_free.make(4, 2, step_size=0.1, updates=2)
    counts, state = jnp.asarray([[[6.0, 2, 4, 4]]]), {"bias": jnp.zeros((1, 4)), "updates": jnp.zeros(1, jnp.int32)}
    seen = []
    for _ in range(4):
        state = router.update(state, counts, None)
        seen.append(np.asarray(state["bias"]))
    assert not np.allclose(seen[0], seen[1])
    np.testing.assert_array_equal(seen[1], seen[3])


def test_the_bias_chooses_and_never_weighs():
    router, logits = loss_free.make(E, K), logits_of()
    bias = jnp.linspace(-0.2, 0.2, E)
    plain = call(router, logits)[0]
    biased = call(router, logits, {"bias": bias, "updates": jnp.int32(0)})[0]
    scores = jax.nn.sigmoid(logits)
    np.testing.assert_array_equal(biased.indices, jax.lax.top_k(scores + bias[None], K)[1])
    np.testing.assert_allclose(biased.weights, jnp.take_along_axis(scores, biased.indices, 1), rtol=1e-6)
    same = np.sort(plain.indices) == np.sort(biased.indices)
    assert 0 < same.all(axis=1).mean() < 1
    shifted = call(router, logits, {"bias": bias + 5.0, "updates": jnp.int32(0)})[0]
    np.testing.assert_array_equal(shifted.indices, biased.indices)


def test_margins_say_what_bias_would_choose_an_expert():
    """s + b of expert e raised to just above (below) its threshold puts it in (out of) the top k."""
    scores = np.asarray(jax.nn.sigmoid(logits_of(tokens=6)), np.float64)
    bias = np.linspace(-0.1, 0.1, E)
    found = np.asarray(loss_free.margins(jnp.asarray(scores + bias), jnp.asarray(scores), K), np.float64)
    for t in range(len(scores)):
        for e in range(E):
            for above in (1e-3, -1e-3):
                biased = scores[t] + bias
                biased[e] = scores[t, e] - found[t, e] + above
                assert (e in np.argsort(-biased)[:K]) == (above > 0)


def test_quantiles_from_a_histogram_are_exact_to_a_bin():
    values = np.random.default_rng(0).normal(size=(3001, 4)) * 0.3
    valid = np.arange(3001) % 2 == 0
    counted = loss_free.histogram(jnp.asarray(values, jnp.float32), jnp.asarray(valid))
    np.testing.assert_array_equal(counted.sum(axis=1), valid.sum())
    for share in (0.1, 0.5, 0.75):
        want = np.quantile(values[valid], share, axis=0)
        np.testing.assert_allclose(loss_free.quantile(counted, share), want, atol=2 * loss_free.REACH / loss_free.BINS)


@pytest.mark.parametrize(
    ("options", "steps"),
    [("step_size=5e-3", 200), ("rule='proportional', step_size=0.02", 300), ("rule='quantile'", 20)],
)
def test_every_rule_balances_given_scores(options, steps):
    router = make_router(MoEConfig(E, K, 8, router=f"loss_free({options})"))
    logits, start = logits_of(tokens=2048, spread=2.0), router.init_state()

    def step(state, _):
        routing, _ = call(router, logits, state)
        stacked = jax.tree.map(lambda leaf: leaf[None], state)
        observed = None if routing.observed is None else routing.observed[None]
        new = router.update(stacked, routing.counts[None, None], observed)
        return jax.tree.map(lambda leaf: leaf[0], new), routing.counts.max() / routing.counts.mean() - 1

    _, violations = jax.lax.scan(step, start, None, length=steps)
    assert violations[0] > 1.0
    assert violations[-1] < 0.1


# ReMoE


def test_remoe_controller_reaches_the_wanted_sparsity():
    """A toy router whose logits shrink with the L1 term, as training would make them: z <- z - lr d L_reg / d z."""
    router = remoe.make(E, K, start=1e-4)

    def regulariser(logits, state):
        routing, _ = call(router, logits, state)
        frequency = jax.lax.stop_gradient(routing.counts) / (K * T)
        return E * jnp.sum(frequency * routing.probs.sum(0)) / T, routing

    def step(carry, _):
        logits, state = carry
        grad, routing = jax.grad(regulariser, has_aux=True)(logits, state)
        logits = logits - 20.0 * grad + 0.003  # the task's pull back up
        stacked = {"lambda": state["lambda"][None]}
        state = {"lambda": router.update(stacked, routing.counts[None, None], routing.observed[None])["lambda"][0]}
        return (logits, state), routing.counts.sum() / T / E

    _, density = jax.lax.scan(step, (logits_of(spread=0.3), router.init_state()), None, length=1500)
    assert density[0] > 0.4
    assert abs(float(density[-200:].mean()) - K / E) < 0.02


def test_remoe_regulariser_is_its_closed_form_and_its_controller_moves_all_layers_alike():
    router, logits = remoe.make(E, K), logits_of(tokens=16)
    state = {"lambda": jnp.float32(0.5)}
    routing, _ = call(router, logits, state)
    z = np.maximum(np.asarray(logits, np.float64), 0)
    counts = (z > 0).sum(axis=0)
    want = 0.5 * E / (K * 16**2) * (counts * z.sum(axis=0)).sum()
    got = E * jnp.sum(routing.counts / (K * 16) * routing.probs.mean(axis=0))
    assert float(got) == pytest.approx(want, rel=1e-6)
    np.testing.assert_allclose(routing.weights, z, rtol=1e-6)
    counts = jnp.stack([jnp.full((1, E), 10.0), jnp.full((1, E), 1.0)])  # 5 and 0.5 experts per token: 2.75 > K
    moved = router.update({"lambda": jnp.ones(2)}, counts, jnp.full(2, 16.0))["lambda"]
    np.testing.assert_allclose(moved, 1.2)


# Top-p and expert choice


def test_top_p_takes_the_smallest_set_with_more_than_p():
    routing, losses = call(top_p.make(E, K, p=0.6, entropy_weight=2.0), logits_of(tokens=64))
    probs = np.asarray(routing.probs, np.float64)
    for t in range(64):
        mass = np.cumsum(np.sort(probs[t])[::-1])
        assert int(routing.valid[t].sum()) == int(np.argmax(mass > 0.6)) + 1
    assert float(losses["entropy"]) == pytest.approx(2.0 * -(probs * np.log(probs)).sum(), rel=1e-5)
    whole = call(top_p.make(E, K, p=0.6, renormalize=True), logits_of(tokens=64))[0]
    np.testing.assert_allclose((whole.weights * whole.valid).sum(axis=1), 1.0, rtol=1e-6)


def test_expert_choice_is_each_columns_top_tokens():
    logits = logits_of(tokens=32)
    routing = call(expert_choice.make(E, K), logits)[0]
    taken = np.argsort(-np.asarray(jax.nn.softmax(logits, axis=-1)), axis=0)[: K * 32 // E]
    want = np.zeros((32, E), bool)
    np.put_along_axis(want, taken, True, axis=0)
    np.testing.assert_array_equal(routing.valid, want)


# Options


def test_a_router_without_state_keeps_none():
    config = MoEConfig(E, K, 8)
    assert update_router_state(config, {}, jnp.zeros((2, 3, E)), None) == {}
    assert softmax_topk.make(E, K).init_state() == {}


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ("none_such", "moe.router = 'moe.routers.none_such:make'"),
        ("softmax_topk(", "moe.router = 'softmax_topk\\('"),
        ("softmax_topk(renormalise=True)", "expected options that softmax_topk takes"),
        ("softmax_topk(renormalize=print)", "expected `name` or"),
        ("expert_choice", "allow_noncausal"),
        ("sinkhorn", "allow_noncausal"),
        ("loss_free(step_size=0)", "step_size = 0"),
        ("loss_free(step_size=float('nan'))", "expected `name` or"),
        ("loss_free(rule='sgd')", "rule = 'sgd'"),
        ("loss_free(pool='node')", "pool = 'node'"),
        ("loss_free(rule='quantile', score='softmax')", "rule = 'quantile'"),
        ("loss_free(groups=3)", "groups = 3"),
        ("top_p(p=1.0)", "p = 1.0"),
        ("top_p(max_k=9)", "max_k = 9"),
        ("remoe(factor=1.0)", "factor = 1.0"),
        ("remoe(start=0.0)", "start = 0.0"),
    ],
)
def test_bad_options_name_field_and_value(router, message):
    with pytest.raises(ValueError, match=message):
        make_router(MoEConfig(E, K, 8, router=router))
