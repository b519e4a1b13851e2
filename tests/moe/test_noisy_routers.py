"""Routers that draw or ignore the token: closed forms, distributions, and what evaluation leaves out."""

import math
from collections import Counter
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import MoEConfig
from moe.routers import gshard, noisy_topk, switch, uniform
from moe.routers import hash as hash_router
from moe.routers import random as random_router
from moe.routing import make_router

T, D, E, K = 12, 5, 6, 2
KEY = jax.random.key(3)


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape, scale=scale), jnp.float32)


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def route(router, logits, key=None, ids=None, x=None):
    ids = jnp.arange(len(logits)) if ids is None else ids
    return router(x, logits, ids, {}, key)[0]


# Switch and GShard


@pytest.mark.parametrize(("module", "k"), [(switch, 1), (gshard, 2)])
def test_jitter_multiplies_each_element_by_its_own_uniform_draw(module, k):
    eps, x = 0.3, normal(200, 50).astype(jnp.bfloat16)
    out = module.make(E, k, jitter=eps).router_input(x, KEY)
    ratio = np.asarray(out / x.astype(jnp.float32), np.float64)
    n = ratio.size
    assert out.dtype == jnp.float32
    assert ratio.min() >= 1 - eps - 1e-6
    assert ratio.max() <= 1 + eps + 1e-6
    assert abs(ratio.mean() - 1) < 4 * eps / math.sqrt(3 * n)
    # variance of U(-eps, eps): eps^2 / 3; of its square: eps^4 (1/5 - 1/9)
    assert abs(ratio.var() - eps**2 / 3) < 4 * eps**2 * math.sqrt((1 / 5 - 1 / 9) / n)
    assert len(np.unique(np.round(ratio, 6))) > n / 3


@pytest.mark.parametrize(("module", "k"), [(switch, 1), (gshard, 2)])
def test_no_jitter_leaves_the_input(module, k):
    x = normal(T, D)
    np.testing.assert_array_equal(module.make(E, k).router_input(x, KEY), x)


def test_switch_takes_the_argmax_with_its_own_probability():
    logits = normal(T, E)
    out, p = route(switch.make(E, 1, jitter=0.1), logits), softmax(np.asarray(logits))
    np.testing.assert_array_equal(out.indices[:, 0], p.argmax(-1))
    np.testing.assert_allclose(out.weights[:, 0], p.max(-1), rtol=1e-6)
    gradient = jax.grad(lambda z: jnp.sum(route(switch.make(E, 1), z).weights))(logits)
    assert float(jnp.abs(gradient).max()) > 1e-2  # not renormalised: the task loss reaches the router


def test_gshard_keeps_the_second_expert_with_twice_its_weight():
    n = 4000
    for g2 in (0.02, 0.1, 0.25, 0.4):
        row = np.full(4, -30.0)
        row[[3, 1]] = np.log([1 - g2, g2])
        out = route(gshard.make(4, 2), jnp.asarray(np.tile(row, (n, 1)), jnp.float32), KEY)
        kept = np.asarray(out.valid[:, 1]).mean()
        assert abs(kept - 2 * g2) < 4 * math.sqrt(2 * g2 * (1 - 2 * g2) / n), g2
        assert bool(out.valid[:, 0].all())
        np.testing.assert_array_equal(out.indices, np.tile([3, 1], (n, 1)))
        np.testing.assert_allclose(out.weights, np.tile([1 - g2, g2], (n, 1)), rtol=1e-5)  # kept or not
        assert float(out.counts[1]) == kept * n


def test_gshard_draws_with_the_normalised_weight():
    n, p = 4000, np.array([0.3, 0.2, 0.17, 0.17, 0.16])  # raw: 2 * 0.2; normalised: 2 * 0.2 / 0.5
    out = route(gshard.make(5, 2), jnp.asarray(np.tile(np.log(p), (n, 1)), jnp.float32), KEY)
    assert abs(np.asarray(out.valid[:, 1]).mean() - 0.8) < 4 * math.sqrt(0.8 * 0.2 / n)


def test_gshard_always_keeps_both_at_evaluation_and_of_equals():
    logits = normal(T, E)
    out, p = route(gshard.make(E, 2), logits), np.sort(softmax(np.asarray(logits)), -1)
    assert bool(out.valid.all())
    np.testing.assert_allclose(out.weights.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(out.weights[:, 0], p[:, -1] / (p[:, -1] + p[:, -2]), rtol=1e-5)
    assert bool(route(gshard.make(E, 2), jnp.zeros((500, E)), KEY).valid.all())


# Noisy top-k


def noisy_call(router, x, logits, noise_weight, key, ids=None):
    ids = jnp.arange(len(logits)) if ids is None else ids
    return router.apply({"params": {"noise": noise_weight}}, x, logits, ids, {}, key)


def test_noise_weight_is_one_zero_parameter_of_a_module_named_gate():
    router = noisy_topk.make(E, K)
    params = router.init(KEY, normal(T, D), normal(T, E), jnp.arange(T), {}, KEY)["params"]
    assert router.name == "gate"
    assert router.init_state() == {}
    assert list(params) == ["noise"]
    np.testing.assert_array_equal(params["noise"], np.zeros((D, E)))


@pytest.mark.parametrize("key", [None, KEY])
def test_without_noise_it_is_top_k_of_the_logits(key):
    x, logits = jnp.abs(normal(T, D)) + 1, normal(T, E)
    out, losses = noisy_call(
        noisy_topk.make(E, K, 0.1), x, logits, jnp.full((D, E), 3.0 if key is None else -100.0), key
    )
    order = np.argsort(-np.asarray(logits), -1)[:, :K]
    np.testing.assert_array_equal(out.indices, order)
    np.testing.assert_allclose(out.weights, softmax(np.take_along_axis(np.asarray(logits), order, -1)), rtol=1e-6)
    np.testing.assert_allclose(out.probs, softmax(np.asarray(logits)), rtol=1e-5)
    assert list(losses) == ([] if key is None else ["load"])
    assert all(np.isfinite(v) for v in losses.values())


def test_noise_has_the_scale_softplus_of_the_noise_logits():
    n = 4000
    weight = jnp.asarray([[0.5, -1.0, 2.0]])
    out, _ = noisy_call(noisy_topk.make(3, 3), jnp.ones((n, 1)), jnp.zeros((n, 3)), weight, KEY)
    ratios = np.log(
        np.asarray(out.weights, np.float64)
    )  # of sorted H: undo the sort, log-weights are H minus a constant
    h = np.empty_like(ratios)
    np.put_along_axis(h, np.asarray(out.indices), ratios, -1)
    s2 = np.log1p(np.exp(np.asarray(weight[0], np.float64))) ** 2
    for i, j in ((0, 1), (1, 2), (0, 2)):
        v = s2[i] + s2[j]
        assert abs(np.var(h[:, i] - h[:, j]) - v) < 4 * v * math.sqrt(2 / n)
        assert abs(np.mean(h[:, i] - h[:, j])) < 4 * math.sqrt(v / n)


def naive_probability(logits, noisy, scale, k):
    """Eqs. 8-9 of the paper, one entry at a time, in float64."""
    out = np.empty_like(logits)
    for t in range(logits.shape[0]):
        for i in range(logits.shape[1]):
            threshold = np.sort(np.delete(noisy[t], i))[-k]
            out[t, i] = 0.5 * (1 + math.erf((logits[t, i] - threshold) / scale[t, i] / math.sqrt(2)))
    return out


def load_inputs(k, seed=1):
    rng = np.random.default_rng(seed)
    logits, scale = rng.normal(size=(T, E)), np.exp(rng.normal(size=(T, E), scale=0.5))
    return logits, logits + scale * rng.normal(size=(T, E)), scale, k


@pytest.mark.parametrize("k", [1, 2, E - 1])
def test_chosen_probability_is_the_papers(k):
    logits, noisy, scale, k = load_inputs(k)
    got = noisy_topk.chosen_probability(*(jnp.asarray(a, jnp.float32) for a in (logits, noisy, scale)), k)
    np.testing.assert_allclose(got, naive_probability(logits, noisy, scale, k), atol=1e-6)


def test_chosen_probability_is_a_frequency_of_redrawn_noise():
    logits, noisy, scale, k = load_inputs(2)
    got = np.asarray(noisy_topk.chosen_probability(*(jnp.asarray(a) for a in (logits, noisy, scale)), k))
    rng, n = np.random.default_rng(7), 4000
    for i in range(E):
        again = np.tile(noisy[:, None], (1, n, 1))
        again[:, :, i] = logits[:, None, i] + scale[:, None, i] * rng.normal(size=(T, n))
        rank = (again > again[:, :, i : i + 1]).sum(-1)
        frequency = (rank < k).mean(1)
        # 72 comparisons: 5 sigma, and one count of slack where the probability is near 0 or 1
        assert np.all(np.abs(frequency - got[:, i]) < 5 * np.sqrt(got[:, i] * (1 - got[:, i]) / n) + 1 / n)


def test_chosen_probability_is_one_where_every_expert_is_chosen():
    logits, noisy, scale, _ = load_inputs(E)
    np.testing.assert_array_equal(noisy_topk.chosen_probability(*map(jnp.asarray, (logits, noisy, scale)), E), 1.0)


def test_load_loss_is_a_sum_over_valid_tokens():
    x, logits, weight = normal(T, D), normal(T, E, seed=1), normal(D, E, seed=2)
    ids = jnp.arange(T).at[jnp.asarray([3, T - 1])].set(-1)
    router = noisy_topk.make(E, K, 0.25)
    got = noisy_call(router, x, logits, weight, KEY, ids)[1]["load"]
    z, xs = np.asarray(logits, np.float64), np.asarray(x, np.float64)
    scale = np.log1p(np.exp(xs @ np.asarray(weight, np.float64)))
    noisy = z + scale * np.asarray(jax.random.normal(jax.random.fold_in(KEY, 1), (T, E)), np.float64)
    load = naive_probability(z, noisy, scale, K)[np.asarray(ids) >= 0].sum(0)
    assert float(got) == pytest.approx(0.25 * (T - 2) * load.var() / load.mean() ** 2, rel=1e-4)
    assert noisy_call(noisy_topk.make(E, K), x, logits, weight, KEY)[1] == {}
    padding = noisy_call(router, x, logits, weight, KEY, jnp.full((T,), -1))[1]["load"]
    assert float(padding) == 0.0


def test_load_has_the_gradient_of_its_finite_differences():
    """With the draw held fixed; in float64, through the threshold too."""
    with jax.enable_x64(True):
        logits, noisy, scale, k = (jnp.asarray(a) if not isinstance(a, int) else a for a in load_inputs(2))
        noise = (noisy - logits) / scale

        def loss(z, s):
            return noisy_topk.squared_variation(noisy_topk.chosen_probability(z, z + noise * s, s, k).sum(0))

        step = 1e-6
        for argument, gradient in enumerate(jax.grad(loss, (0, 1))(logits, scale)):
            for t, i in ((0, 0), (2, 5), (7, 3), (11, 1)):
                move = jnp.zeros((T, E)).at[t, i].set(step)
                up = loss(*(a + move * (n == argument) for n, a in enumerate((logits, scale))))
                down = loss(*(a - move * (n == argument) for n, a in enumerate((logits, scale))))
                assert float(gradient[t, i]) == pytest.approx(float(up - down) / (2 * step), rel=1e-5, abs=1e-9)


def test_load_reaches_the_noise_weight_and_the_logits_through_the_router():
    x, logits, weight = normal(T, D), normal(T, E, seed=1), normal(D, E, seed=2, scale=0.5)
    inputs = (logits, weight)

    def loss(*inputs):
        return noisy_call(noisy_topk.make(E, K, 1.0), x, *inputs, KEY)[1]["load"]

    for n, gradient in enumerate(jax.grad(loss, (0, 1))(*inputs)):
        step = 3e-4 * normal(*gradient.shape, seed=9)  # the load has kinks, where noisy logits change places
        up, down = (loss(*(a + sign * step if m == n else a for m, a in enumerate(inputs))) for sign in (1, -1))
        assert float(jnp.abs(gradient).max()) > 1e-3
        assert float(jnp.sum(gradient * step)) == pytest.approx(float(up - down) / 2, rel=1e-2)


# Hash


@pytest.mark.parametrize("table", ["random", "balanced"])
@pytest.mark.parametrize("k", [1, 3])
def test_hash_is_a_function_of_the_token_id(table, k):
    v = 40
    ids = jnp.asarray(np.random.default_rng(0).integers(0, v, 200))
    router = hash_router.make(E, k, vocab_size=v, table=table)
    first, second = route(router, normal(200, E), KEY, ids), route(router, normal(200, E, seed=1), None, ids[::-1])
    np.testing.assert_array_equal(first.indices, second.indices[::-1])
    by_id = {int(i): tuple(row) for i, row in zip(ids, np.asarray(first.indices))}
    assert all(by_id[int(i)] == tuple(row) for i, row in zip(ids, np.asarray(first.indices)))
    assert all(len(set(row)) == k for row in by_id.values())
    other = hash_router.make(E, k, vocab_size=v, table=table, seed=1)
    assert not np.array_equal(route(other, normal(200, E), None, ids).indices, first.indices)


@pytest.mark.parametrize(("v", "e", "k"), [(40, 6, 1), (40, 6, 4), (37, 8, 3), (5, 8, 3), (48, 8, 8), (7, 1, 1)])
def test_balanced_table_gives_every_expert_as_many_ids(v, e, k):
    table = hash_router.hash_table(v, e, k, "balanced", 0)
    counts = np.bincount(table.reshape(-1), minlength=e)
    assert table.shape == (v, k)
    assert counts.max() - counts.min() <= 1
    assert all(len(set(row)) == k for row in table)


def test_random_table_is_uniform_over_subsets():
    n = 20_000
    table = hash_router.hash_table(n, 4, 2, "random", 0)
    seen = Counter(tuple(sorted(row)) for row in table.tolist())
    assert len(seen) == 6
    assert all(abs(c / n - 1 / 6) < 4 * math.sqrt(1 / 6 * 5 / 6 / n) for c in seen.values())


def test_hash_weights():
    logits, ids = normal(T, E), jnp.arange(T) % 4
    chosen = lambda out: np.take_along_axis(np.asarray(logits), np.asarray(out.indices), -1)  # noqa: E731
    one, two = (route(hash_router.make(E, k, vocab_size=4), logits, ids=ids) for k in (1, 2))
    np.testing.assert_allclose(one.weights, 1 / (1 + np.exp(-chosen(one))), rtol=1e-5)
    np.testing.assert_allclose(two.weights, softmax(chosen(two)), rtol=1e-5)
    plain = route(hash_router.make(E, 2, vocab_size=4, gated=False), logits, ids=ids)
    np.testing.assert_array_equal(plain.weights, np.full((T, 2), 0.5))


def test_hash_of_padding_and_of_unknown_ids_is_an_expert():
    out = route(hash_router.make(E, 2, vocab_size=4), normal(4, E), ids=jnp.asarray([-1, 0, 3, 99]))
    np.testing.assert_array_equal(out.indices[0], out.indices[1])
    np.testing.assert_array_equal(out.indices[3], out.indices[2])


# Random and uniform


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("k", [1, 3])
def test_random_is_uniform_and_distinct(key, k):
    n = 3000
    out = route(random_router.make(E, k), normal(n, E), key)
    p = k / E
    assert np.all(np.abs(np.asarray(out.counts) / n - p) < 4 * math.sqrt(p * (1 - p) / n))
    assert np.all(np.diff(np.sort(np.asarray(out.indices), -1), axis=-1) > 0)
    np.testing.assert_allclose(out.weights, 1 / k, rtol=1e-7)
    np.testing.assert_allclose(out.probs, 1 / E, rtol=1e-7)


def test_random_draws_anew_in_training_and_by_token_id_at_evaluation():
    router, ids = random_router.make(E, K), jnp.asarray([5, 2, 5, -1, 7, 2])
    same = jnp.full((200,), 5)
    assert len(np.unique(route(router, jnp.zeros((200, E)), KEY, same).indices[:, 0])) == E
    first, second = (route(router, jnp.zeros((200, E)), k, same).indices for k in jax.random.split(KEY))
    assert not np.array_equal(first, second)
    out = np.asarray(route(router, normal(6, E), None, ids).indices)
    np.testing.assert_array_equal(out[0], out[2])
    np.testing.assert_array_equal(out[1], out[5])
    np.testing.assert_array_equal(route(router, normal(6, E, seed=4), None, ids[::-1]).indices, out[::-1])


@pytest.mark.parametrize(("n", "k"), [(12, 1), (12, 4), (7, 3)])
def test_uniform_counts_are_exact(n, k):
    out = route(uniform.make(E, k), normal(n, E), KEY)
    np.testing.assert_array_equal(out.indices, [[(t * k + j) % E for j in range(k)] for t in range(n)])
    np.testing.assert_array_equal(out.counts, [n * k // E + (i < n * k % E) for i in range(E)])
    np.testing.assert_allclose(out.weights, 1 / k, rtol=1e-7)


# What all of them share


SPECS = {
    "switch(jitter=0.2)": 1,
    "gshard(jitter=0.2)": 2,
    "noisy_topk(load_weight=0.1)": 2,
    "hash(vocab_size=16)": 2,
    "random": 2,
    "uniform": 2,
}


@pytest.mark.parametrize("spec", SPECS)
def test_evaluation_is_deterministic_and_everything_is_float32(spec):
    router = make_router(MoEConfig(num_experts=E, top_k=SPECS[spec], router=spec))
    x, logits, ids = normal(T, D).astype(jnp.bfloat16), normal(T, E).astype(jnp.bfloat16), jnp.arange(T)
    params = {"params": {"noise": jnp.ones((D, E))}} if hasattr(router, "apply") else None
    call = lambda key: (  # noqa: E731
        router(x, logits, ids, router.init_state(), key)
        if params is None
        else router.apply(params, x, logits, ids, {}, key)
    )
    out, losses = jax.jit(lambda: call(None))()
    again, _ = call(None)
    train, train_losses = jax.jit(call)(KEY)
    assert losses == {}
    for name in ("indices", "valid", "counts"):
        np.testing.assert_array_equal(getattr(out, name), getattr(again, name))
    assert out.indices.dtype == jnp.int32
    for name in ("weights", "probs", "logits", "counts"):
        assert getattr(out, name).dtype == getattr(train, name).dtype == jnp.float32, name
    assert all(v.dtype == jnp.float32 and v.shape == () for v in train_losses.values())
    assert out.indices.shape == out.weights.shape == out.valid.shape == (T, SPECS[spec])
    assert float(out.counts.sum()) == float(out.valid.sum()) == T * SPECS[spec]
    np.testing.assert_allclose(out.probs.sum(-1), 1.0, rtol=1e-6)
    assert {f.name for f in fields(out)} == {f.name for f in fields(train)}


@pytest.mark.parametrize(
    ("spec", "k", "words"),
    [
        ("switch", 2, ("moe.top_k", "2")),
        ("switch(jitter=-0.1)", 1, ("jitter", "-0.1")),
        ("switch(jitter=1.0)", 1, ("jitter", "1.0")),
        ("gshard", 1, ("moe.top_k", "1")),
        ("gshard(jitter=1.5)", 2, ("jitter", "1.5")),
        ("noisy_topk(load_weight=-1.0)", 2, ("load_weight", "-1.0")),
        ("hash", 2, ("vocab_size", "0")),
        ("hash(vocab_size=9, table='learned')", 2, ("table", "learned")),
        ("hash(vocab_size=9, seed=-3)", 2, ("seed", "-3")),
        ("random(seed=-1)", 2, ("seed", "-1")),
        ("uniform(seed=1)", 2, ("moe.router", "uniform(seed=1)")),
    ],
)
def test_bad_options_are_named(spec, k, words):
    with pytest.raises(ValueError) as error:
        make_router(MoEConfig(num_experts=E, top_k=k, router=spec))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("module", [noisy_topk, random_router, uniform])
@pytest.mark.parametrize("k", [0, E + 1])
def test_top_k_beyond_the_experts_is_refused(module, k):
    with pytest.raises(ValueError, match=rf"moe.top_k = {k}"):
        module.make(E, k)
