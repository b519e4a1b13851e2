"""Weights from losses: formulas in float64, what they maximise, what leaves them unchanged, and one batch in shards.

The oracle is NumPy's, written out from the paper's formulas; everything global is computed again inside `shard_map`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.optimize import minimize

from optim.reweighting import (
    SCORES,
    effective_samples,
    excess,
    kl_weights,
    ohem,
    reweighted_loss,
    sample_weights,
    warm_temperature,
)

SPREAD = ("lin_upper", "quadratic", "extremes", "rising")
LOSSES = np.array([2.31, 0.42, 3.05, 1.77, 2.9, 0.97, 1.2, 4.44])


def oracle(losses, strategy, r, delta=1.0):
    """Float64, all samples counted."""
    h = 2 * delta * (losses - losses.min()) / (losses.max() - losses.min()) - delta
    f = {
        "uniform": lambda: 0 * losses,
        "lin_upper": lambda: np.minimum(h + delta, delta),
        "quadratic": lambda: 1 - h**2 / delta**2,
        "extremes": lambda: np.abs(h),
        "rising": lambda: (h + delta) / 2,
        "kl_dro": lambda: losses,
        "focal": lambda: np.log(1 - np.exp(-losses)),
        "ohem": lambda: np.where(losses >= np.sort(losses)[-int(np.ceil(len(losses) / 4))], 0.0, -np.inf),
    }[strategy]()
    w = np.exp((f - f.max()) / r)
    return w / w.sum()


def weights(losses, strategy="lin_upper", r=0.4, **options):
    """Compiled, in float64."""
    with jax.enable_x64(True):
        run = jax.jit(lambda losses: sample_weights(losses, strategy=strategy, r=r, **options))
        return np.asarray(run(jnp.asarray(losses, jnp.float64)))


def test_every_score_has_an_oracle():
    for name in SCORES:
        assert oracle(LOSSES, name, 1.0).sum() == pytest.approx(1)


@pytest.mark.parametrize("strategy", SCORES)
@pytest.mark.parametrize(("r", "delta"), [(1.0, 1.0), (0.4, 1.0), (0.4, 2.5), (0.05, 0.3)])
def test_weights_are_the_formulas(strategy, r, delta):
    found = weights(LOSSES, strategy, r, delta=delta)
    np.testing.assert_allclose(found, oracle(LOSSES, strategy, r, delta), rtol=1e-12)
    assert found.sum() == pytest.approx(1, abs=1e-14)


def test_numbers_worked_out_by_hand():
    """h = -1, -1/2, 0, 1: LinUpper's f = 0, 1/2, 1, 1; r = 1/2 gives 1 : e : e^2 : e^2."""
    e = np.e
    np.testing.assert_allclose(weights([1.0, 2.0, 3.0, 5.0], r=0.5), np.array([1, e, e**2, e**2]) / (1 + e + 2 * e**2))


def test_ohem_is_the_mean_of_the_hardest_and_keeps_ties():
    hardest = np.isin(LOSSES, np.sort(LOSSES)[-2:])
    np.testing.assert_allclose(weights(LOSSES, "ohem"), hardest / 2)
    tied = np.array([1.0, 3.0, 3.0, 3.0, 0.5, 0.0, 2.0, 2.0])
    np.testing.assert_allclose(weights(tied, "ohem"), (tied == 3) / 3)
    for share, kept in ((0.3, 3), (0.7, 7), (0.01, 1), (1.0, 10)):
        assert np.count_nonzero(sample_weights(jnp.arange(10.0), strategy=partial(ohem, share=share), r=1.0)) == kept


def test_focal_weights_are_powers_of_what_is_missing():
    """gamma = 2."""
    missing = (1 - np.exp(-LOSSES)) ** 2
    np.testing.assert_allclose(weights(LOSSES, "focal", r=0.5), missing / missing.sum(), rtol=1e-12)


def test_another_function_stands_in_for_a_name():
    reference = np.linspace(0.0, 3.0, 8)
    found = weights(LOSSES, partial(excess, reference=jnp.asarray(reference)), r=0.7)
    np.testing.assert_allclose(found, oracle(LOSSES - reference, "kl_dro", 0.7), rtol=1e-6)


@pytest.mark.parametrize("r", [0.2, 1.0, 5.0])
def test_weights_maximise_score_minus_divergence(r):
    """Against sequential quadratic programming on the simplex."""
    scores = np.array([0.3, -1.0, 0.9, 0.9, -0.2])

    def objective(w):
        return -(w @ scores - r * np.sum(w * np.log(5 * w)))

    start = np.array([0.1, 0.4, 0.2, 0.1, 0.2])
    simplex = {"type": "eq", "fun": lambda w: w.sum() - 1}
    solved = minimize(objective, start, bounds=[(1e-9, 1)] * 5, constraints=simplex, tol=1e-13)
    with jax.enable_x64(True):
        found = np.asarray(kl_weights(jnp.asarray(scores), r))
    np.testing.assert_allclose(found, solved.x, atol=1e-5)
    assert objective(found) <= solved.fun + 1e-12


@pytest.mark.parametrize("strategy", sorted(SCORES.keys() - {"ohem"}))  # soft at infinity alone
def test_a_large_temperature_is_the_plain_mean(strategy):
    losses = jnp.asarray(LOSSES, jnp.float32)
    found = reweighted_loss(losses, sample_weights(losses, strategy=strategy, r=1e6))
    assert float(found) == pytest.approx(LOSSES.mean(), rel=1e-6)


@pytest.mark.parametrize("strategy", SCORES)
def test_an_infinite_temperature_is_uniform(strategy):
    np.testing.assert_array_equal(weights(LOSSES, strategy, r=np.inf), np.full(8, 1 / 8))


@pytest.mark.parametrize("strategy", SPREAD)
def test_scale_and_offset_of_the_losses_do_not_matter(strategy):
    want = weights(LOSSES, strategy)
    for a, b in ((3.0, 0.0), (1e-4, 0.0), (0.1, 7.0), (1.0, -5.0)):
        np.testing.assert_allclose(weights(a * LOSSES + b, strategy), want, rtol=1e-9)


@pytest.mark.parametrize("strategy", SCORES)
def test_samples_have_no_order(strategy):
    order = np.random.default_rng(0).permutation(8)
    np.testing.assert_allclose(weights(LOSSES[order], strategy), weights(LOSSES, strategy)[order], rtol=1e-12)


def test_lin_upper_does_not_tell_apart_the_harder_half():
    losses = np.sort(LOSSES)
    found, hard = weights(losses), losses >= (losses[0] + losses[-1]) / 2
    assert np.ptp(found[hard]) == 0
    easy = found[~hard]
    assert (np.diff(easy) > 0).all()
    assert easy.max() < found.max()


@pytest.mark.parametrize("r", [1.0, 0.4, 0.1])
@pytest.mark.parametrize("delta", [1.0, 0.5])
@pytest.mark.parametrize("strategy", ["lin_upper", "rising"])
def test_the_ratio_of_weights_is_bounded_by_delta_over_r(strategy, r, delta):
    found = weights(LOSSES, strategy, r, delta=delta)
    assert found.max() / found.min() == pytest.approx(np.exp(delta / r), rel=1e-9)


def test_a_smaller_temperature_leaves_fewer_effective_samples():
    """A batch of 48, as the table of the released settings; the draw is our own."""
    losses = np.random.default_rng(0).gamma(4.0, 0.7, 48)
    sizes = [float(effective_samples(jnp.asarray(weights(losses, r=r)))) for r in (np.inf, 1.0, 0.4, 0.1)]
    assert sizes[0] == pytest.approx(48)
    assert (np.diff(sizes) < 0).all()
    assert 40 < sizes[1] < 48
    assert 10 < sizes[3] < 32


@pytest.mark.parametrize("strategy", SCORES)
def test_the_gradient_is_the_one_of_frozen_weights(strategy):
    rng = np.random.default_rng(1)
    inputs, targets, theta, direction = (rng.standard_normal(s) for s in ((8, 5), 8, 5, 5))
    with jax.enable_x64(True):

        def losses(theta):
            return jnp.asarray(inputs) @ theta - jnp.asarray(targets)

        def loss(theta):
            own = losses(theta) ** 2 + 0.1
            return reweighted_loss(own, sample_weights(own, strategy=strategy, r=0.4))

        exact = np.asarray(jax.jit(jax.grad(loss))(theta))
        own = (inputs @ theta - targets) ** 2 + 0.1
        frozen = oracle(own, strategy, 0.4)
        np.testing.assert_allclose(exact, (2 * frozen * (inputs @ theta - targets)) @ inputs, rtol=1e-9)
        value = lambda step: frozen @ ((inputs @ (theta + step * direction) - targets) ** 2)  # noqa: E731
        np.testing.assert_allclose(exact @ direction, (value(1e-5) - value(-1e-5)) / 2e-5, rtol=1e-7)


@pytest.mark.parametrize("strategy", SCORES)
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_equal_losses_and_a_single_one_weigh_the_same(strategy, value):
    for size in (1, 5):
        found = sample_weights(jnp.full((size,), value), strategy=strategy, r=0.05)
        np.testing.assert_allclose(found, np.full(size, 1 / size), rtol=1e-6)


@pytest.mark.parametrize("strategy", SPREAD)
def test_rounding_is_no_difference(strategy):
    losses = jnp.asarray([2.5, np.nextafter(np.float32(2.5), 3), 2.5, 2.5], jnp.float32)
    np.testing.assert_array_equal(sample_weights(losses, strategy=strategy, r=0.05), np.full(4, 0.25, np.float32))


@pytest.mark.parametrize("strategy", SCORES)
def test_samples_without_tokens_weigh_nothing_and_are_in_no_statistic(strategy):
    losses = np.insert(LOSSES, [0, 3, 8], [0.0, 99.0, np.nan])
    mask = jnp.asarray(np.insert(np.full(8, 17.0), [0, 3, 8], 0.0))  # counts of tokens
    found = weights(losses, strategy, mask=mask)
    np.testing.assert_allclose(found, np.insert(weights(LOSSES, strategy), [0, 3, 8], 0.0), rtol=1e-12)


def test_a_traced_batch_without_any_token_weighs_nothing():
    run = jax.jit(lambda losses, mask: sample_weights(losses, strategy="lin_upper", r=1.0, mask=mask))
    np.testing.assert_array_equal(run(jnp.zeros(4), jnp.zeros(4)), np.zeros(4))


@pytest.mark.parametrize("strategy", SCORES)
def test_losses_of_half_precision_have_statistics_of_single(strategy):
    """1, 1 + 2^-7, 3: exact in bfloat16, whose differences of h are not."""
    losses = np.array([1.0, 1.0078125, 3.0, 2.5])
    found = sample_weights(jnp.asarray(losses, jnp.bfloat16), strategy=strategy, r=0.4)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, oracle(losses, strategy, 0.4), rtol=1e-5)


def test_an_outlier_presses_the_others_together_unless_it_is_clipped():
    losses = np.append(np.linspace(1.0, 2.0, 99), 1000.0)
    assert np.ptp(weights(losses, "rising")[:99]) < 1e-3 * weights(losses, "rising").max()
    cap = np.quantile(losses, 0.98)
    clipped = weights(losses, "rising", clip_quantile=0.98)
    np.testing.assert_allclose(clipped, oracle(np.minimum(losses, cap), "rising", 0.4), rtol=1e-9)
    padded = weights(np.append(losses, 5e3), "rising", clip_quantile=0.98, mask=jnp.arange(101) < 100)
    np.testing.assert_allclose(padded[:100], clipped, rtol=1e-12)


@pytest.mark.parametrize("clip_quantile", [1.0, 0.7])
@pytest.mark.parametrize("strategy", SCORES)
def test_eight_shards_weigh_as_one_batch(strategy, clip_quantile):
    rng = np.random.default_rng(2)
    losses = jnp.asarray(rng.gamma(4.0, 0.7, 32), jnp.float32)
    mask = jnp.asarray(rng.random(32) < 0.8).at[:4].set(False)  # the first device has none
    run = partial(sample_weights, strategy=strategy, r=0.4, clip_quantile=clip_quantile)
    want = jax.jit(run)(losses, mask=mask)
    axes = ("data", "expert")
    mesh = jax.make_mesh((4, 2), axes, axis_types=(AxisType.Auto,) * 2)

    def local(losses, mask):
        w = run(losses, mask=mask, axis_name=axes)
        return w, reweighted_loss(losses, w, axes)[None], effective_samples(w, axes)[None]

    mapped = jax.shard_map(local, mesh=mesh, in_specs=P(axes), out_specs=P(axes), check_vma=False)
    found, loss, effective = jax.jit(mapped)(losses, mask)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(loss, np.full(8, np.asarray(want) @ np.asarray(losses)), rtol=1e-5)
    np.testing.assert_allclose(effective, np.full(8, 1 / np.sum(np.asarray(want) ** 2)), rtol=1e-5)
    spread = jax.device_put(losses, NamedSharding(mesh, P(axes)))
    np.testing.assert_allclose(jax.jit(run)(spread, mask=mask), want, rtol=1e-5, atol=1e-9)


def test_three_numbers_are_what_travels():
    mapped = jax.shard_map(
        partial(sample_weights, strategy="lin_upper", r=0.4, axis_name="data"),
        mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=P("data"), out_specs=P("data"), check_vma=False,
    )  # fmt: skip
    text = str(jax.make_jaxpr(mapped)(jnp.zeros(32)))
    assert {name: text.count(f" {name}[") for name in ("pmin", "pmax", "psum", "all_gather")} == {
        "pmin": 1, "pmax": 2, "psum": 1, "all_gather": 0,
    }  # fmt: skip


@pytest.mark.parametrize("strategy", SCORES)
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_traced_loss_that_is_not_finite_is_seen_in_the_sum(strategy, wrong):
    losses = jnp.asarray(np.append(LOSSES, wrong), jnp.float32)
    run = jax.jit(lambda losses: reweighted_loss(losses, sample_weights(losses, strategy=strategy, r=1.0)))
    assert not np.isfinite(run(losses))


@partial(jax.jit, static_argnums=0)
def regression_error(strategy, rate, seed):
    """Distance of least squares by SGD from the truth: 400 steps of 64 samples in 20 dimensions, 90% of which are
    redundant, zero in all but five."""
    key = jax.random.key(seed)
    truth = jax.random.normal(jax.random.fold_in(key, 1 << 20), (20,))

    def step(theta, i):
        redundant, value = jax.random.split(jax.random.fold_in(key, i))
        redundant = jax.random.uniform(redundant, (64, 1)) < 0.9
        x = jnp.where(redundant & (jnp.arange(20) >= 5)[None], 0.0, jax.random.normal(value, (64, 20)))

        def loss(theta):
            losses = (x @ (theta - truth)) ** 2
            return reweighted_loss(losses, sample_weights(losses, strategy=strategy, r=0.4))

        return theta - rate * jax.grad(loss)(theta), None

    return jnp.sum((jax.lax.scan(step, jnp.zeros(20), jnp.arange(400))[0] - truth) ** 2)


@pytest.mark.parametrize("seed", range(3))
def test_redundant_data_is_learned_sooner_at_one_rate_and_a_higher_rate_does_the_same(seed):
    """The paper's toy (figure 7), and what it does not show: the plain mean at its own rate is as good."""
    order = ["lin_upper", "quadratic", "uniform", "extremes"]
    errors = [float(regression_error(strategy, 0.02, seed)) for strategy in order]
    assert errors == sorted(errors)
    assert errors[1] < errors[2] / 10
    assert float(regression_error("uniform", 0.3, seed)) < errors[1] / 10


def test_the_temperature_is_warm_first():
    r = warm_temperature(0.4, 3)
    np.testing.assert_allclose([float(r(i)) for i in range(5)], [100, 100, 100, 0.4, 0.4])
    assert float(warm_temperature(0.4, 0)(0)) == pytest.approx(0.4)
    burned_in = warm_temperature(0.4, 2, np.inf)
    step = jax.jit(lambda i: sample_weights(jnp.asarray(LOSSES), strategy="lin_upper", r=burned_in(i)))
    np.testing.assert_array_equal(step(1), np.full(8, 0.125, np.float32))
    np.testing.assert_allclose(step(2), oracle(LOSSES, "lin_upper", 0.4), rtol=1e-5)


def test_a_released_temperature_of_100_is_nearly_uniform():
    found = weights(LOSSES, r=100.0)
    assert found.max() / found.min() == pytest.approx(1.01, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0.0}, "r = 0.0: expected a number above 0"),
        ({"r": -1.0}, "r = -1.0"),
        ({"r": float("nan")}, "r = nan"),
        ({"r": "1"}, "r = '1'"),
        ({"delta": 0.0}, "delta = 0.0"),
        ({"delta": float("inf")}, "delta = inf"),
        ({"strategy": "mid"}, "strategy = 'mid': expected one of uniform, lin_upper"),
        ({"strategy": "upper"}, "strategy = 'upper': expected `lin_upper`.*fms-fsdp.*`rising`.*GPT-2"),
        ({"losses": jnp.ones((4, 3))}, r"losses.shape = \(4, 3\): expected \[M\]"),
        ({"losses": jnp.ones((0,))}, r"losses.shape = \(0,\)"),
        ({"losses": jnp.ones(())}, r"losses.shape = \(\)"),
        ({"losses": jnp.ones(4, jnp.int32)}, "losses.dtype = 'int32'"),
        ({"losses": jnp.asarray([1.0, 2.0, np.nan, 1.0])}, r"losses\[2\] = nan: expected a finite number"),
        ({"losses": jnp.asarray([1.0, np.inf, np.nan, 1.0])}, r"losses\[1\] = inf"),
        ({"mask": jnp.zeros(4)}, "mask = 'no sample': expected at least one"),
        ({"mask": jnp.ones(3)}, r"mask.shape = \(3,\)"),
        ({"clip_quantile": 0.0}, "clip_quantile = 0.0"),
        ({"strategy": partial(ohem, share=0.0)}, "share = 0.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_bad_input_names_field_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        sample_weights(**({"losses": jnp.ones(4), "strategy": "lin_upper", "r": 1.0} | change))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0.0, 5), "r = 0.0"), ((1.0, -1), "warmup_steps = -1"), ((1.0, 2.5), "warmup_steps = 2.5"),
     ((1.0, 5, float("nan")), "warm_r = nan")],
    ids=str,
)  # fmt: skip
def test_bad_schedules_name_field_and_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        warm_temperature(*arguments)
