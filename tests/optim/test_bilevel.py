"""The penalty's gradient against closed forms, implicit differentiation and autodiff; what batches may lack; meshes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optim.bilevel import check_sources, penalty_bilevel, released_bilevel, weights_of
from optim.domain_weights import domain_sums
from parallel.mesh import make_mesh

S, DIM = 4, 3


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def centres(dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(0).standard_normal((S, DIM)), dtype)


def target(dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(1).standard_normal(DIM), dtype)


def quadratic(w, batch):
    """One sample of each source: l_i = |w - mu_i|^2 / 2."""
    return 0.5 * jnp.sum((w[None] - batch) ** 2, axis=1), jnp.ones(batch.shape[0], w.dtype)


def to_target(w, batch):
    return 0.5 * jnp.sum((w - batch) ** 2), jnp.ones((), w.dtype)


def still():
    """Optimisers that leave both models where they are and show lam's gradient."""
    return {"w_opt": optax.set_to_zero(), "u_opt": optax.set_to_zero(), "lam_opt": optax.sgd(1.0)}


def hypergradient(outer, inner, alpha, lam, w, u, batch, validation, make=penalty_bilevel, **options):
    """What a step says d/dlam is, with the models at these places."""
    method = make(outer, inner, alpha=alpha, **still(), **options)
    state = method.init(w, lam.shape[0], lam)._replace(u=u)
    new, metrics = jax.jit(method.step)(state, batch, validation)
    return np.asarray(lam - new.lam), metrics


@pytest.mark.parametrize("alpha", [0.5, 1.0, 10.0, 100.0])
def test_on_quadratics_it_is_alpha_over_one_plus_alpha_of_the_exact_one(x64, alpha):
    mu, aim, lam = centres(), target(), jnp.asarray([0.3, -1.0, 0.5, 0.1])
    best = weights_of(lam) @ mu
    w = (aim + alpha * best) / (1 + alpha)
    found, _ = hypergradient(to_target, quadratic, alpha, lam, w, best, mu[None], aim[None])
    exact = jax.grad(lambda lam: to_target(weights_of(lam) @ mu, aim)[0])(lam)
    h = 1e-6
    differences = [
        (to_target(weights_of(lam.at[i].add(h)) @ mu, aim)[0] - to_target(weights_of(lam.at[i].add(-h)) @ mu, aim)[0])
        / (2 * h)
        for i in range(S)
    ]
    np.testing.assert_allclose(exact, differences, rtol=1e-7)
    np.testing.assert_allclose(found, alpha / (1 + alpha) * exact, rtol=1e-10)


def ridge():
    """Sources' regressions X_i w = y_i, with a pull to 0; (inner loss, batch, outer loss, batch, solver)."""
    rng = np.random.default_rng(2)
    x, y = jnp.asarray(rng.standard_normal((S, 6, DIM))), jnp.asarray(rng.standard_normal((S, 6)))
    xv, yv = jnp.asarray(rng.standard_normal((8, DIM))), jnp.asarray(rng.standard_normal(8))

    def inner(w, batch):
        x, y = batch
        losses = jnp.mean((x @ w - y) ** 2, axis=1) + 0.1 * jnp.sum(w**2)
        return losses, jnp.ones(x.shape[0])

    def outer(w, batch):
        return jnp.mean((batch[0] @ w - batch[1]) ** 2), jnp.ones(())

    def solve(objective):
        zero = jnp.zeros(DIM)
        return -jnp.linalg.solve(jax.hessian(objective)(zero), jax.grad(objective)(zero))  # a quadratic's minimum

    return inner, (x[None], y[None]), outer, (xv[None], yv[None]), solve


def test_it_tends_to_implicit_differentiation_as_alpha_grows(x64):
    inner, batch, outer, validation, solve = ridge()
    first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)  # noqa: E731
    lam = jnp.asarray([0.2, 0.0, -0.4, 0.9])
    level = lambda lam, w: jnp.dot(weights_of(lam), inner(w, first(batch))[0])  # noqa: E731
    best = solve(partial(level, lam))
    cross = jax.jacobian(jax.grad(level, argnums=1), argnums=0)(lam, best)
    pull = jax.grad(lambda w: outer(w, first(validation))[0])(best)
    implicit = -cross.T @ jnp.linalg.solve(jax.hessian(partial(level, lam))(best), pull)
    errors = []
    for alpha in (100.0, 1e3, 1e4):
        w = solve(lambda w, alpha=alpha: outer(w, first(validation))[0] + alpha * level(lam, w))
        found, _ = hypergradient(outer, inner, alpha, lam, w, best, batch, validation)
        errors.append(np.abs(found - implicit).max() / np.abs(implicit).max())
    assert errors[0] < 0.03
    np.testing.assert_allclose(np.asarray(errors[:-1]) / np.asarray(errors[1:]), 10, rtol=0.05)  # O(1 / alpha)


def places(rng):
    return jnp.asarray(rng.standard_normal(DIM)), jnp.asarray(rng.standard_normal(DIM))


def test_its_closed_form_and_autodiff_agree(x64):
    mu, aim, lam, alpha = centres(), target(), jnp.asarray([0.3, -1.0, 0.5, 0.1]), 7.0
    w, u = places(np.random.default_rng(3))
    found, metrics = hypergradient(to_target, quadratic, alpha, lam, w, u, mu[None], aim[None])
    p = np.asarray(weights_of(lam))
    g = np.asarray(quadratic(w, mu)[0] - quadratic(u, mu)[0])
    np.testing.assert_allclose(found, alpha * p * (g - p @ g), rtol=1e-12)
    penalty = lambda lam: alpha * jnp.dot(weights_of(lam), quadratic(w, mu)[0] - quadratic(u, mu)[0])  # noqa: E731
    np.testing.assert_allclose(found, jax.grad(penalty)(lam), rtol=1e-12)
    np.testing.assert_allclose(metrics["gap"], p @ g, rtol=1e-12)


def test_both_models_descend_their_own_objective(x64):
    mu, aim, lam, alpha = centres(), target(), jnp.asarray([0.3, -1.0, 0.5, 0.1]), 3.0
    w, u = places(np.random.default_rng(3))
    method = penalty_bilevel(to_target, quadratic, alpha=alpha, w_opt=optax.sgd(0.1), u_opt=optax.sgd(0.1),
                             lam_opt=optax.sgd(1.0))  # fmt: skip
    state = method.init(w, S, lam)._replace(u=u)
    new, _ = method.step(state, mu[None], aim[None])
    best = weights_of(lam) @ mu
    np.testing.assert_allclose(new.w, w - 0.1 * (alpha * (w - best) + w - aim), rtol=1e-12)
    np.testing.assert_allclose(new.u, u - 0.1 * alpha * (u - best), rtol=1e-12)


def searched(mu, aim, steps=20, lam=None, alpha=5.0, **options):
    method = penalty_bilevel(to_target, quadratic, alpha=alpha, w_opt=optax.adam(0.05), u_opt=optax.adam(0.05),
                             lam_opt=optax.adam(0.1), **options)  # fmt: skip
    state, step = method.init(jnp.zeros(DIM), mu.shape[0], lam), jax.jit(method.step)
    for _ in range(steps):
        state, metrics = step(state, mu[None], aim[None])
    assert step._cache_size() == 1
    return state, metrics


def test_a_constant_in_lam_changes_nothing(x64):
    lam = jnp.asarray([0.3, -1.0, 0.5, 0.1])
    one, _ = searched(centres(), target(), lam=lam)
    other, _ = searched(centres(), target(), lam=lam + 2.5)
    np.testing.assert_allclose(other.lam - 2.5, one.lam, atol=1e-10)
    np.testing.assert_allclose(other.w, one.w, atol=1e-10)


def test_permuted_sources_have_permuted_weights(x64):
    order = np.array([2, 0, 3, 1])
    one, _ = searched(centres(), target())
    other, _ = searched(centres()[order], target())
    np.testing.assert_allclose(other.lam, one.lam[order], atol=1e-10)


def test_identical_sources_have_no_gradient(x64):
    mu = jnp.broadcast_to(centres()[:1], (S, DIM))
    w, u = places(np.random.default_rng(3))
    found, _ = hypergradient(to_target, quadratic, 5.0, jnp.asarray([0.3, -1.0, 0.5, 0.1]), w, u, mu[None],
                             target()[None])  # fmt: skip
    np.testing.assert_allclose(found, 0, atol=1e-15)


def test_without_a_penalty_lam_stays(x64):
    state, metrics = searched(centres(), target(), alpha=lambda step: 0.0)
    np.testing.assert_array_equal(state.lam, np.zeros(S))
    assert np.isfinite(metrics["gap"])


def test_it_finds_the_source_that_validation_resembles(x64):
    mu = centres()
    state, metrics = searched(mu, mu[2], steps=400)
    assert int(jnp.argmax(state.lam)) == 2
    assert metrics["weights"][2] > 0.9


# --- samples of sources: what a batch lacks, passes, meshes ---


def samples(rng, source, mu):
    """[B, DIM] around the centres of their sources."""
    return mu[source] + 0.3 * rng.standard_normal((len(source), DIM))


def sampled(w, batch):
    x, source = batch
    return domain_sums(0.5 * jnp.sum((w[None] - x) ** 2, axis=1), source, S)


def of_samples(w, batch):
    return 0.5 * jnp.sum((w[None] - batch) ** 2), jnp.float32(batch.shape[0])


def test_means_are_of_the_whole_batch_over_passes(x64):
    rng, mu = np.random.default_rng(5), np.asarray(centres())
    source = rng.integers(0, S, 12)
    x, validation, lam = samples(rng, source, mu), rng.standard_normal((6, DIM)), jnp.asarray([0.3, -1.0, 0.5, 0.1])
    w, u = places(rng)

    def stepped(passes):
        method = penalty_bilevel(of_samples, sampled, alpha=3.0, w_opt=optax.sgd(0.1), u_opt=optax.sgd(0.1),
                                 lam_opt=optax.sgd(1.0))  # fmt: skip
        cut = lambda leaf: jnp.asarray(leaf.reshape(passes, -1, *leaf.shape[1:]))  # noqa: E731
        return jax.jit(method.step)(method.init(w, S, lam)._replace(u=u), (cut(x), cut(source)), cut(validation))

    one, three = stepped(1), stepped(3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-12), one, three)
    naive = [np.mean(0.5 * np.sum((np.asarray(w) - x[source == i]) ** 2, axis=1)) for i in range(S)]
    np.testing.assert_allclose(one[1]["loss_w"], naive, rtol=1e-6)
    np.testing.assert_allclose(one[1]["outer_loss"], np.mean(0.5 * np.sum((np.asarray(w) - validation) ** 2, axis=1)),
                               rtol=1e-6)  # fmt: skip


def expected_gradient(make, mu, draws, **options):
    """Mean over batches of four samples, in which source 0 is seen seldom, of the gradient at uniform weights."""
    rng = np.random.default_rng(6)
    w, u = jnp.asarray(mu[0] + 1.0), jnp.asarray(mu[0] + 0.2)
    method = make(of_samples, sampled, alpha=1.0, **still(), **options)
    state = method.init(w, S)._replace(u=u)
    source = rng.choice(S, size=(draws, 4), p=[0.1, 0.3, 0.3, 0.3])
    x = mu[source] + 0.3 * rng.standard_normal((*source.shape, DIM))
    validation = jnp.zeros((1, 1, DIM))
    one = lambda x, source: -method.step(state, (x[None], source[None]), validation)[0].lam  # noqa: E731
    grads = np.asarray(jax.jit(jax.vmap(one))(jnp.asarray(x), jnp.asarray(source)))
    return grads.mean(axis=0), grads.std(axis=0) / np.sqrt(draws)


def test_a_batch_that_lacks_a_source_does_not_bias_the_weights(x64):
    """Sources drawn from one distribution must have no weight over each other in expectation, seldom seen or not."""
    mu = np.broadcast_to(np.asarray(centres())[:1], (S, DIM))
    mean, error = expected_gradient(penalty_bilevel, mu, 20_000)
    assert np.all(np.abs(mean) < 4 * error), (mean, error)
    mean, error = expected_gradient(released_bilevel, mu, 20_000)
    assert abs(mean[0]) > 20 * error[0], (mean, error)  # the released code's way does


def test_a_missing_source_has_no_gradient_and_no_say(x64):
    rng, mu = np.random.default_rng(5), np.asarray(centres())
    source, lam = np.array([0, 0, 1, 3]), jnp.asarray([0.3, -1.0, 0.5, 0.1])
    x = samples(rng, source, mu)
    w, u = places(rng)
    batch = jnp.asarray(x)[None], jnp.asarray(source)[None]
    found, metrics = hypergradient(of_samples, sampled, 3.0, lam, w, u, batch, jnp.zeros((1, 2, DIM)))
    assert abs(found[2]) < 1e-14  # of weights and losses around 1, in float64
    assert metrics["present"].tolist() == [True, True, False, True]
    here = np.array([0, 1, 3])
    q = np.asarray(weights_of(lam[here]))
    of = lambda m: np.array([np.mean(0.5 * np.sum((np.asarray(m) - x[source == i]) ** 2, axis=1)) for i in here])  # noqa: E731
    g = of(w) - of(u)
    np.testing.assert_allclose(found[here], 3.0 * q * (g - q @ g), rtol=1e-6)


def test_the_released_form_counts_each_pass_and_drops_what_it_lacks(x64):
    rng, mu = np.random.default_rng(5), np.asarray(centres())
    source, lam = np.array([[0, 0, 1], [0, 2, 2]]), jnp.asarray([0.3, -1.0, 0.5, 0.1])
    x = samples(rng, source.reshape(-1), mu).reshape(2, 3, DIM)
    w, u = places(rng)
    batch = jnp.asarray(x), jnp.asarray(source)
    found, _ = hypergradient(of_samples, sampled, 3.0, lam, w, u, batch, jnp.zeros((1, 2, DIM)), make=released_bilevel)

    def penalty(lam):
        p, total = weights_of(lam), 0.0
        for model, sign in ((w, 1.0), (u, -1.0)):
            for rows, ids in zip(x, source, strict=True):
                for i in set(ids.tolist()):
                    total += sign * p[i] * jnp.mean(0.5 * jnp.sum((model[None] - rows[ids == i]) ** 2, axis=1)) / 2
        return 3.0 * total

    np.testing.assert_allclose(found, jax.grad(penalty)(lam), rtol=1e-6)


def test_u_may_have_a_batch_of_its_own(x64):
    mu, aim, lam = centres(), target(), jnp.asarray([0.3, -1.0, 0.5, 0.1])
    w, u = places(np.random.default_rng(3))
    method = penalty_bilevel(to_target, quadratic, alpha=2.0, paired=False, **still())
    state = method.init(w, S, lam)._replace(u=u)
    new, _ = method.step(state, mu[None], aim[None], 2 * mu[None])
    p, g = np.asarray(weights_of(lam)), np.asarray(quadratic(w, mu)[0] - quadratic(u, 2 * mu)[0])
    np.testing.assert_allclose(lam - new.lam, 2.0 * p * (g - p @ g), rtol=1e-12)


def test_one_and_eight_devices_are_one_method():
    rng, mu = np.random.default_rng(7), np.asarray(centres(jnp.float32))
    source = rng.integers(0, S, 16)
    x, validation = samples(rng, source, mu).astype(np.float32), rng.standard_normal((8, DIM)).astype(np.float32)
    method = penalty_bilevel(of_samples, sampled, alpha=5.0, w_opt=optax.adam(0.05), u_opt=optax.adam(0.05),
                             lam_opt=optax.adam(0.1))  # fmt: skip

    def run(devices):
        mesh = make_mesh(data=devices)
        with jax.set_mesh(mesh):
            rows, whole = NamedSharding(mesh, P(None, "data")), NamedSharding(mesh, P())
            batch = jax.device_put((x[None], source[None]), rows)
            held_out = jax.device_put(validation[None], rows)
            state = jax.device_put(method.init(jnp.zeros(DIM), S), whole)
            step = jax.jit(method.step, donate_argnums=0)
            for _ in range(10):
                state, metrics = step(state, batch, held_out)
        return jax.device_get((state, metrics))

    one, eight = run(1), run(8)
    assert np.abs(one[0].lam).max() > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), one, eight)


# --- bad input ---


def method(**options):
    settings = {"alpha": 1.0, "w_opt": optax.sgd(0.1), "u_opt": optax.sgd(0.1), "lam_opt": optax.sgd(0.1)} | options
    return penalty_bilevel(to_target, settings.pop("inner", quadratic), **settings)


@pytest.mark.parametrize(("options", "field"), [
    ({"alpha": 0.0}, "alpha"), ({"alpha": -1.0}, "alpha"), ({"alpha": float("nan")}, "alpha"),
    ({"alpha": float("inf")}, "alpha"), ({"lam_opt": optax.adamw(0.1, weight_decay=0.01)}, "lam_opt"),
    ({"lam_opt": optax.adamw(optax.linear_schedule(0.0, 0.1, 10), weight_decay=0.01)}, "lam_opt"),
])  # fmt: skip
def test_bad_settings_are_refused(options, field):
    with pytest.raises(ValueError, match=f"^{field} = "):
        method(**options)


def test_lam_decays_when_asked():
    decayed = optax.adamw(0.1, weight_decay=0.01)
    made = method(lam_opt=decayed, lam_decay=True)
    assert made.init(jnp.zeros(DIM), S).lam.shape == (S,)


@pytest.mark.parametrize(("num_sources", "lam", "field"), [
    (1, None, "num_sources"), (S, np.zeros(S + 1, np.float32), "lam.shape"),
    (S, np.array([0, np.nan, 0, 0], np.float32), "lam"),
])  # fmt: skip
def test_a_bad_start_is_refused(num_sources, lam, field):
    with pytest.raises(ValueError, match=f"^{field} = "):
        method().init(jnp.zeros(DIM), num_sources, lam)


def test_batches_that_do_not_fit_the_pairing_are_refused():
    mu, aim = centres(jnp.float32)[None], target(jnp.float32)[None]
    for made, other in ((method(), mu), (method(paired=False), None)):
        with pytest.raises(ValueError, match="^other = "):
            made.step(made.init(jnp.zeros(DIM), S), mu, aim, other)


def test_losses_of_other_shapes_are_refused():
    mu, aim = centres(jnp.float32)[None], target(jnp.float32)[None]
    made = method(inner=to_target)
    with pytest.raises(ValueError, match="^inner_loss = "):
        made.step(made.init(jnp.zeros(DIM), S), jnp.zeros((1, DIM)), aim)
    made = penalty_bilevel(quadratic, quadratic, alpha=1.0, **still())
    with pytest.raises(ValueError, match="^outer_loss = "):
        made.step(made.init(jnp.zeros(DIM), S), mu, mu)


@pytest.mark.parametrize("ids", [[], [0, 1, S], [-1, 0]])
def test_foreign_sources_are_refused(ids):
    with pytest.raises(ValueError, match="^source id"):
        check_sources(np.array(ids, np.int32), S)
