"""Hypergradients in closed form and by finite differences; SOBA and F2SA reach the stationary point of the problem."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optim.implicit import f2sa, hypergradient, hypergradient_cg, soba

DIM, SOURCES = 4, 3
CENTRES = np.random.default_rng(0).standard_normal((SOURCES, DIM))
GOAL = np.array([0.5, 0.2, 0.3]) @ CENTRES + 0.3 * np.linalg.svd(CENTRES[1:] - CENTRES[:1])[2][-1]
LAM = np.array([0.2, -0.7, 0.4])


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def jacobian(p):
    return np.diag(p) - np.outer(p, p)


def split(w):
    return {"a": jnp.asarray(w[:1]), "b": jnp.asarray(w[1:].reshape(1, -1))}


def join(w):
    return jnp.concatenate([w["a"], w["b"].reshape(-1)])


def outer(w):
    return 0.5 * jnp.sum((join(w) - GOAL) ** 2)


def inner(lam, w):
    """Sources 1/2 |w - mu_i|^2, mixed by softmax(lam): w* = sum p mu."""
    return jax.nn.softmax(lam) @ (0.5 * jnp.sum((join(w)[None] - CENTRES) ** 2, axis=1))


def exact(lam):
    p = softmax(lam)
    return jacobian(p) @ CENTRES @ (p @ CENTRES - GOAL)


class Ridge:
    """Sources 1/(2 n) |X_i w - y_i|^2 + rho/2 |w|^2, in NumPy: the solution and its gradient by hand."""

    rho = 0.1

    def __init__(self):
        rng = np.random.default_rng(1)
        self.x, self.y = rng.standard_normal((SOURCES, 12, DIM)), rng.standard_normal((SOURCES, 12))
        self.gram = np.einsum("snd,sne->sde", self.x, self.x) / 12 + self.rho * np.eye(DIM)[None]
        self.right = np.einsum("snd,sn->sd", self.x, self.y) / 12

    def solve(self, lam):
        p = softmax(lam)
        return np.linalg.solve(np.einsum("s,sde->de", p, self.gram), p @ self.right)

    def value(self, lam):
        return 0.5 * ((self.solve(lam) - GOAL) ** 2).sum()

    def gradient(self, lam):
        p, w = softmax(lam), self.solve(lam)
        v = np.linalg.solve(np.einsum("s,sde->de", p, self.gram), w - GOAL)
        return -jacobian(p) @ (self.gram @ w - self.right) @ v

    def inner(self, lam, w):
        residual = jnp.einsum("snd,d->sn", jnp.asarray(self.x), join(w)) - jnp.asarray(self.y)
        per_source = 0.5 * jnp.mean(residual**2, axis=1) + 0.5 * self.rho * jnp.sum(join(w) ** 2)
        return jax.nn.softmax(lam) @ per_source


def differences(value, lam, h=1e-5):
    return np.array([(value(lam + h * e) - value(lam - h * e)) / (2 * h) for e in np.eye(len(lam))])


@pytest.mark.parametrize("method", [hypergradient, lambda *args: hypergradient_cg(*args, tol=1e-12)])
def test_quadratics(method):
    with jax.enable_x64(True):
        got = jax.jit(lambda lam, w: method(outer, inner, lam, w))(jnp.asarray(LAM), split(softmax(LAM) @ CENTRES))
    np.testing.assert_allclose(got, exact(LAM), rtol=1e-11)
    value = lambda lam: 0.5 * ((softmax(lam) @ CENTRES - GOAL) ** 2).sum()  # noqa: E731
    np.testing.assert_allclose(got, differences(value, LAM), atol=1e-9)


@pytest.mark.parametrize("method", [hypergradient, lambda *args: hypergradient_cg(*args, tol=1e-13)])
def test_ridge_regressions(method):
    ridge = Ridge()
    with jax.enable_x64(True):
        hyper = jax.jit(lambda lam, w: method(outer, ridge.inner, lam, w))
        got = hyper(jnp.asarray(LAM), split(ridge.solve(LAM)))
    np.testing.assert_allclose(got, ridge.gradient(LAM), rtol=1e-9)
    np.testing.assert_allclose(got, differences(ridge.value, LAM), atol=1e-9)
    assert np.abs(got).max() > 1e-2


def test_lam_may_be_a_tree():
    """A ridge's own penalty: w* = (A + r I)^-1 b, d outer / d r = - (w* - goal) (A + r I)^-1 w*."""
    ridge, r = Ridge(), 0.4
    system = ridge.gram.sum(0) + r * np.eye(DIM)
    w = np.linalg.solve(system, ridge.right.sum(0))
    with jax.enable_x64(True):
        matrix, right = jnp.asarray(ridge.gram.sum(0)), jnp.asarray(ridge.right.sum(0))

        def penalised(lam, w):
            x = join(w)
            return 0.5 * x @ matrix @ x - right @ x + 0.5 * lam["r"] * x @ x

        got = hypergradient(outer, penalised, {"r": jnp.asarray(r)}, split(w))
    np.testing.assert_allclose(got["r"], -(w - GOAL) @ np.linalg.solve(system, w), rtol=1e-11)


def test_conjugate_gradient_needs_as_many_products_as_parameters():
    ridge = Ridge()
    with jax.enable_x64(True):
        args = (outer, ridge.inner, jnp.asarray(LAM), split(ridge.solve(LAM)))
        rough = hypergradient_cg(*args, tol=0.0, maxiter=1)
        full = hypergradient_cg(*args, tol=0.0, maxiter=DIM)
    np.testing.assert_allclose(full, ridge.gradient(LAM), rtol=1e-8)
    assert np.abs(rough - full).max() > 1e-3


def run(method, steps, lam=LAM, w=None):
    """The last state of `steps` steps from w = 0, in one compiled loop."""
    step = jax.jit(lambda state: jax.lax.fori_loop(0, steps, lambda _, s: method.step(s), state))
    return step(method.init(jnp.asarray(lam), split(np.zeros(DIM) if w is None else w)))


SOBA = {"learning_rate": 0.4, "lam_learning_rate": 0.1}
# alpha_k m_k = gamma / 2, as in the paper's rates; the multiplier grows fivefold in 20,000 steps.
F2SA = {
    "alpha": lambda k: 0.2 / (50 + 0.01 * k), "gamma": 0.4, "multiplier": 50.0, "difference": 0.01, "xi": 100.0,
    "inner_steps": 5,
}  # fmt: skip


def stationary():
    """GOAL lies off the plane of the centres: the weights of its projection, which is within the triangle."""
    edges = (CENTRES[1:] - CENTRES[:1]).T
    rest = np.linalg.lstsq(edges, GOAL - CENTRES[0], rcond=None)[0]
    p = np.concatenate([[1 - rest.sum()], rest])
    assert p.min() > 0.1
    assert np.linalg.norm(p @ CENTRES - GOAL) > 0.2
    return p


@pytest.mark.parametrize(("method", "options", "steps"), [(soba, SOBA, 20_000), (f2sa, F2SA, 20_000)])
def test_they_reach_the_stationary_point_of_quadratics(method, options, steps):
    with jax.enable_x64(True):
        state = run(method(outer, inner, **options), steps)
        p = np.asarray(jax.nn.softmax(state.lam))
        w, lower = np.asarray(join(state.w)), np.asarray(join(state.u if method is f2sa else state.w))
    np.testing.assert_allclose(p, stationary(), atol=1e-6)
    np.testing.assert_allclose(exact(np.asarray(state.lam)), 0, atol=1e-6)
    np.testing.assert_allclose(lower, stationary() @ CENTRES, atol=1e-6)
    if method is f2sa:  # the penalty leaves w where outer + m inner is least
        m = float(state.multiplier)
        np.testing.assert_allclose(m, 250, rtol=1e-6)
        np.testing.assert_allclose(w, (GOAL + m * stationary() @ CENTRES) / (1 + m), atol=1e-6)
    assert int(state.count) == steps


class ReachableRidge(Ridge):
    """A goal beside what some weights give, so that the best weights are all above 0."""

    def __init__(self):
        super().__init__()
        self.goal = self.solve(np.array([0.3, 0.0, -0.3])) + np.array([0.05, -0.02, 0.03, 0.04])

    def outer(self, w):
        return 0.5 * jnp.sum((join(w) - self.goal) ** 2)

    def multiplier_of(self, lam):
        w, p = self.solve(lam), softmax(lam)
        return -np.linalg.solve(np.einsum("s,sde->de", p, self.gram), w - self.goal)

    def gradient_at(self, lam):
        return jacobian(softmax(lam)) @ (self.gram @ self.solve(lam) - self.right) @ self.multiplier_of(lam)


def test_soba_on_ridge_regressions():
    ridge = ReachableRidge()
    with jax.enable_x64(True):
        state = run(soba(ridge.outer, ridge.inner, learning_rate=0.3, lam_learning_rate=1.0), 30_000)
        lam, w, v = np.asarray(state.lam), np.asarray(join(state.w)), np.asarray(join(state.v))
    np.testing.assert_allclose(ridge.gradient_at(lam), 0, atol=1e-9)
    np.testing.assert_allclose(w, ridge.solve(lam), atol=1e-8)
    np.testing.assert_allclose(v, ridge.multiplier_of(lam), atol=1e-8)
    assert np.abs(ridge.gradient_at(LAM)).max() > 1e-3 < np.abs(v).max()


def test_f2sa_on_ridge_regressions_errs_by_one_over_its_multiplier():
    ridge, left = ReachableRidge(), []
    with jax.enable_x64(True):
        for m in (20.0, 200.0):
            method = f2sa(
                ridge.outer, ridge.inner, alpha=0.2 / m, gamma=0.3, multiplier=m, difference=0.0, xi=5 * m,
                inner_steps=10,
            )  # fmt: skip
            left.append(np.abs(ridge.gradient_at(np.asarray(run(method, 30_000).lam))).max())
    assert 7 < left[0] / left[1] < 13
    assert left[1] < 1e-4


def test_one_step_of_soba_by_hand():
    """At w = 0 with v given: H = I, so v moves by v + (w - goal), lam by - J (CENTRES v)."""
    v = np.arange(1.0, 5.0)
    with jax.enable_x64(True):
        method = soba(outer, inner, learning_rate=lambda k: 0.1 / (k + 1), lam_learning_rate=0.2)
        state = method.init(jnp.asarray(LAM), split(np.zeros(DIM)))._replace(v=split(v), count=jnp.int32(1))
        after = jax.jit(method.step)(state)
    p = softmax(LAM)
    np.testing.assert_allclose(join(after.w), 0.05 * p @ CENTRES, rtol=1e-6)
    np.testing.assert_allclose(join(after.v), v - 0.05 * (v - GOAL), rtol=1e-6)
    np.testing.assert_allclose(after.lam, LAM + 0.2 * jacobian(p) @ CENTRES @ v, rtol=1e-12)


def test_one_step_of_f2sa_by_hand():
    alpha, gamma, m, xi = 0.01, 0.3, 5.0, 2.0
    with jax.enable_x64(True):
        method = f2sa(
            outer, inner, alpha=alpha, gamma=gamma, multiplier=m, difference=0.5, xi=xi, inner_steps=2,
        )  # fmt: skip
        after = jax.jit(method.step)(method.init(jnp.asarray(LAM), split(np.ones(DIM))))
    p, w, u = softmax(LAM), np.ones(DIM), np.ones(DIM)
    for _ in range(2):
        w, u = w - alpha * (w - GOAL + m * (w - p @ CENTRES)), u - gamma * (u - p @ CENTRES)
    gap = 0.5 * ((w - CENTRES) ** 2).sum(1) - 0.5 * ((u - CENTRES) ** 2).sum(1)
    np.testing.assert_allclose(join(after.w), w, rtol=1e-12)
    np.testing.assert_allclose(join(after.u), u, rtol=1e-12)
    np.testing.assert_allclose(after.lam, LAM - xi * alpha * m * jacobian(p) @ gap, rtol=1e-12)
    assert float(after.multiplier) == 5.5


def test_a_constant_changes_nothing():
    with jax.enable_x64(True):
        w = split(np.ones(DIM))
        got = [hypergradient(outer, inner, jnp.asarray(LAM + c), w) for c in (0.0, 7.0)]
        np.testing.assert_allclose(*got, rtol=1e-10)
        np.testing.assert_allclose(got[0].sum(), 0, atol=1e-14)
        for method, options in ((soba, SOBA), (f2sa, F2SA)):
            one, other = (run(method(outer, inner, **options), 50, LAM + c) for c in (0.0, 7.0))
            np.testing.assert_allclose(np.asarray(other.lam) - 7.0, one.lam, rtol=1e-9)
            np.testing.assert_allclose(join(other.w), join(one.w), rtol=1e-9)
            assert np.abs(np.asarray(one.lam) - LAM).max() > 1e-3


def test_batches_reach_both_functions():
    """Noise of zero mean on the centres and the goal: the mean of lam's last steps is near the stationary point."""
    rng = np.random.default_rng(3)
    noise = jnp.asarray(0.3 * rng.standard_normal((20_000, 2, DIM)), jnp.float32)
    noisy_outer = lambda w, e: 0.5 * jnp.sum((join(w) - jnp.asarray(GOAL, jnp.float32) - e) ** 2)  # noqa: E731

    def noisy_inner(lam, w, e):
        centres = jnp.asarray(CENTRES, jnp.float32) + e[None]
        return jax.nn.softmax(lam) @ (0.5 * jnp.sum((join(w)[None] - centres) ** 2, axis=1))

    method = soba(noisy_outer, noisy_inner, learning_rate=0.1, lam_learning_rate=0.05)
    start = method.init(jnp.zeros(SOURCES), jax.tree.map(lambda x: x.astype(jnp.float32), split(np.zeros(DIM))))

    def body(state, e):
        state = method.step(state, (e[0],), (e[1],))
        return state, jax.nn.softmax(state.lam)

    _, path = jax.jit(lambda s: jax.lax.scan(body, s, noise))(start)
    np.testing.assert_allclose(np.asarray(path[10_000:]).mean(0), stationary(), atol=0.05)


NUMBERS = (outer, inner, jnp.zeros(SOURCES), split(np.zeros(DIM, np.float32)))


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: hypergradient(lambda w: w["a"], *NUMBERS[1:]), "outer"),
        (lambda: hypergradient(outer, lambda lam, w: lam, *NUMBERS[2:]), "inner"),
        (lambda: hypergradient(lambda w: 0.5 * jnp.sum(w**2), lambda _, w: 0.5 * w @ w, 0.0, jnp.ones(5000)), "w ="),
        (lambda: hypergradient_cg(*NUMBERS, tol=float("nan")), "tol"),
        (lambda: hypergradient_cg(*NUMBERS, maxiter=0), "maxiter"),
        (lambda: soba(outer, inner, **SOBA | {"learning_rate": 0.0}), "learning_rate"),
        (lambda: soba(outer, inner, **SOBA | {"lam_learning_rate": float("inf")}), "lam_learning_rate"),
        (lambda: soba(outer, inner, **SOBA).init(jnp.array([0.0, jnp.nan]), NUMBERS[3]), "lam"),
        (lambda: f2sa(outer, inner, **F2SA).init(jnp.array([0.0, jnp.nan]), NUMBERS[3]), "lam"),
        (lambda: f2sa(outer, inner, **F2SA | {"alpha": -1.0}), "alpha"),
        (lambda: f2sa(outer, inner, **F2SA | {"gamma": float("nan")}), "gamma"),
        (lambda: f2sa(outer, inner, **F2SA | {"xi": 0.0}), "xi"),
        (lambda: f2sa(outer, inner, **F2SA | {"multiplier": 0.0}), "multiplier"),
        (lambda: f2sa(outer, inner, **F2SA | {"difference": -1.0}), "difference"),
        (lambda: f2sa(outer, inner, **F2SA | {"inner_steps": 0}), "inner_steps"),
        (lambda: run(soba(lambda w: join(w), inner, **SOBA), 1), "outer"),
        (lambda: run(f2sa(outer, lambda lam, w: lam, **F2SA), 1), "inner"),
    ],
)
def test_bad_input(call, field):
    with pytest.raises(ValueError, match=field):
        call()
