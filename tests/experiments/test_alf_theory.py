"""alf-lb's theory: the statements hold where they are proved, against HiGHS and arbitrary inputs, in float64."""

import json

import numpy as np
import pytest

from experiments.alf_lb import theory
from experiments.alf_lb.theory import (
    audit,
    crowding,
    decreasing,
    descend,
    dual_value,
    identity_terms,
    inverse_sqrt,
    lagrangian,
    loads,
    logistic_scores,
    lp_optimum,
    moved_tokens,
    preference_violations,
    proportional,
    select,
    sign,
    target,
    update,
)
from experiments.alf_lb.theory_figure import draw

RULES = {
    "sign": sign,
    "proportional": lambda u: proportional(300 * u),
    "c/n": lambda u: decreasing(300 * u),
    "c/sqrt(n)": lambda u: inverse_sqrt(300 * u),
}
TINY = theory.Sizes(
    dual_tokens=16, load_tokens=64, load_experts=4, steps=40, batches=128, batch_tokens=64, checkpoints=(8, 32, 128)
)


def instance(seed: int, tokens: int = 64, experts: int = 8):
    return logistic_scores(np.random.default_rng(seed), tokens, experts)


def random_selection(rng: np.random.Generator, tokens: int, experts: int, k: int):
    return select(rng.standard_normal((tokens, experts)), np.zeros(experts), k)


# Selection and the dual function.


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_selection_is_the_top_k_with_ties_to_the_lowest_index(k):
    rng = np.random.default_rng(k)
    scores, bias = rng.integers(0, 3, (200, 8)).astype(float), rng.integers(-1, 2, 8).astype(float)
    x = select(scores, bias, k)
    for row, chosen in zip(scores + bias, x):
        by_value_then_index = sorted(range(8), key=lambda e: (-row[e], e))[:k]
        assert sorted(by_value_then_index) == np.flatnonzero(chosen).tolist()


@pytest.mark.parametrize("k", [1, 3])
def test_equal_scores_follow_the_tie_order(k):
    x = select(np.full((10, 6), 0.5), np.zeros(6), k)
    assert loads(x).tolist() == [10] * k + [0] * (6 - k)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_common_shift_changes_neither_selection_nor_dual_value(k):
    scores, bias = instance(0), np.random.default_rng(1).normal(0, 0.1, 8)
    for shift in (-3.0, 0.5, 100.0):
        np.testing.assert_array_equal(select(scores, bias + shift, k), select(scores, bias, k))
        assert dual_value(scores, bias + shift, k) == pytest.approx(dual_value(scores, bias, k), abs=1e-9)


def test_the_dual_value_is_the_lagrangian_of_the_best_selection():
    """By enumeration of all selections of a small instance."""
    rng = np.random.default_rng(2)
    scores, bias = rng.random((3, 3)), rng.normal(0, 0.3, 3)
    every = [np.eye(3, dtype=bool)[[a, b, c]] for a in range(3) for b in range(3) for c in range(3)]
    assert dual_value(scores, bias, 1) == pytest.approx(max(lagrangian(scores, x, bias, 1) for x in every), abs=1e-12)


def test_loads_minus_target_is_a_subgradient():
    scores, rng = instance(3), np.random.default_rng(4)
    for _ in range(50):
        p, q = rng.normal(0, 0.2, (2, 8))
        gradient = loads(select(scores, p, 2)) - target(64, 8, 2)
        assert dual_value(scores, q, 2) >= dual_value(scores, p, 2) + gradient @ (q - p) - 1e-10


# T1: identity.


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("u", [1e-1, 1e-2, 1e-3, 1e-5])
def test_identity_along_a_trajectory(k, rule, u):
    scores = instance(k)
    path = descend(scores, RULES[rule](u), 30, k)
    assert audit(scores, path, k)[0] < 1e-10
    wanted = target(64, 8, k)
    for n in range(30):
        p, new_p = path.bias[n], path.bias[n + 1]
        x, new_x = select(scores, p, k), select(scores, new_p, k)
        descent, switching = identity_terms(scores, x, p, new_x, new_p, k)
        assert path.dual[n + 1] - path.dual[n] == pytest.approx(descent + switching, abs=1e-10)
        ceiling = (new_p - p) @ (loads(new_x) - loads(x))
        assert -1e-10 <= switching <= ceiling + 1e-10
        if rule == "sign":
            assert descent == pytest.approx(-u * np.abs(loads(x) - wanted).sum(), abs=1e-10)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_identity_for_any_selections_and_step_sizes(k):
    rng = np.random.default_rng(k)
    for _ in range(20):
        scores, p, eps = rng.normal(0, 2, (40, 7)), rng.normal(0, 1, 7), rng.normal(0, 0.1, 7)
        x, new_x = random_selection(rng, 40, 7, k), random_selection(rng, 40, 7, k)
        gradient = loads(x) - target(40, 7, k)
        new_p = p - eps * gradient
        descent, switching = identity_terms(scores, x, p, new_x, new_p, k)
        assert descent == pytest.approx(-(eps * gradient**2).sum(), abs=1e-10)
        change = lagrangian(scores, new_x, new_p, k) - lagrangian(scores, x, p, k)
        assert change == pytest.approx(descent + switching, abs=1e-10)


def test_the_lagrangian_is_mostly_monotone_for_small_steps_only():
    scores = instance(0, 512, 8)
    optimum = descend(scores, inverse_sqrt(1.0), 2000, 1).bias[-1]
    start = optimum + np.random.default_rng(0).normal(0, 0.003, 8)
    shares = [descend(scores, sign(u), 300, 1, start).monotone_share() for u in (1e-2, 1e-5)]
    assert shares[0] < 0.7
    assert shares[1] > 0.9


# T2: preference.


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("u", [3e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_moved_token_prefers_its_new_expert(rule, u, seed):
    scores = instance(seed, 256, 8)
    path = descend(scores, RULES[rule](u), 400, 1)
    wanted, moves = path.target, 0
    for n in range(400):
        p, new_p = path.bias[n], path.bias[n + 1]
        x, new_x = select(scores, p, 1), select(scores, new_p, 1)
        token, old, new = moved_tokens(x, new_x)
        moves += len(token)
        gain = (new_p - p)[new] - (new_p - p)[old]
        assert np.all(gain > 0)
        margin = (scores + p)[token, old] - (scores + p)[token, new]
        assert np.all((margin >= -1e-12) & (margin <= gain + 1e-12))
        assert preference_violations(scores, x, p, new_x, new_p) == 0
        counts = path.counts[n]
        if rule == "sign":
            assert np.all(np.sign(counts - wanted)[old] > np.sign(counts - wanted)[new])
            assert np.all(gain <= 2 * u + 1e-12)
        else:
            assert np.all(counts[old] > counts[new])
    assert moves > 0


def test_preference_violations_counts_what_is_wrong():
    scores, p = np.array([[0.6, 0.5], [0.9, 0.1]]), np.zeros(2)
    x, moved = select(scores, p, 1), np.array([[False, True], [False, True]])
    toward, away = np.array([-0.1, 0.1]), np.array([0.1, -0.1])
    assert preference_violations(scores, x, p, x, toward) == 0
    assert preference_violations(scores, x, p, moved, toward) == 1  # 0.8 is more than the 0.2 gained
    assert preference_violations(scores, x, p, moved, away) == 2


# T3: approximate balance.


@pytest.mark.parametrize(("u", "steps"), [(1e-3, 1000), (1e-4, 1000), (1e-5, 1000)])
def test_loads_end_within_experts_minus_one_of_the_target(u, steps):
    """T = 2048, E = 16, k = 1, skewed; each u starts where the next larger one ended, for time."""
    scores, bias = instance(0, 2048, 16), None
    for coarse in (1e-2, 1e-3, 1e-4):
        if coarse > u:
            bias = descend(scores, sign(coarse), 800, 1, bias).bias[-1]
    path = descend(scores, sign(u), steps, 1, bias)
    tail = path.max_deviation()[-200:]
    print(f"u = {u:g}: largest deviation {tail.max():g}, crowding {crowding(scores, path.bias[-1], 2 * u)}")
    assert tail.max() <= 15
    if u == 1e-5:
        assert crowding(scores, path.bias[-1], 2 * u) <= 1


def test_a_step_moves_at_most_one_token_per_pair_where_margins_are_apart():
    """The premise itself: wherever crowding is at most 1, no load changes by more than E - 1."""
    scores, u, seen = instance(1, 256, 8), 1e-3, 0
    path = descend(scores, sign(u), 1000, 1)
    for n in range(1000):
        if crowding(scores, path.bias[n], 2 * u) <= 1:
            seen += 1
            assert np.abs(path.counts[n + 1] - path.counts[n]).max() <= 7
    assert seen > 100


def test_crowding_counts_near_ties_per_pair():
    scores = np.array([[0.5, 0.49, 0.0], [0.5, 0.495, 0.0], [0.49, 0.5, 0.0], [0.5, 0.4, 0.0]])
    assert [crowding(scores, np.zeros(3), w) for w in (0.001, 0.007, 0.02, 0.2)] == [0, 1, 2, 3]


# T4: strong duality, against HiGHS.


@pytest.mark.parametrize(("tokens", "experts", "k"), [(128, 8, 2), (60, 5, 1), (30, 8, 3), (48, 6, 6)])
def test_the_prices_of_the_lp_minimise_the_dual_function(tokens, experts, k):
    """Also where kT/E is no whole number (30, 8, 3)."""
    scores = instance(tokens, tokens, experts)
    value, prices = lp_optimum(scores, k)
    assert dual_value(scores, prices, k) == pytest.approx(value, abs=1e-9)
    rng = np.random.default_rng(0)
    for scale in (0.01, 0.1, 1.0):
        for _ in range(20):
            assert dual_value(scores, prices + rng.normal(0, scale, experts), k) >= value - 1e-9


def test_the_trajectory_nears_the_lp_optimum_as_u_falls():
    scores = instance(0, 128, 8)
    value, _ = lp_optimum(scores, 2)
    gaps = [
        descend(scores, sign(u), steps, 2).dual[1:] - value for u, steps in ((1e-2, 500), (1e-3, 1500), (1e-4, 9000))
    ]
    print("absolute gap, late mean", [f"{gap[-100:].mean():.2e}" for gap in gaps])
    assert all(gap.min() >= -1e-9 for gap in gaps)  # weak duality on the way
    best = [gap.min() for gap in gaps]
    assert best[0] > best[1] > best[2]
    assert best[2] < 1e-3


# The rules.


def test_the_proportional_rule_keeps_the_sum_and_the_sign_rule_does_not():
    scores = instance(0, 100, 8)
    for rule in (proportional(0.3), decreasing(1.0), inverse_sqrt(1.0)):
        np.testing.assert_allclose(descend(scores, rule, 500, 2).bias.sum(axis=1), 0, atol=1e-13)
    assert np.abs(descend(scores, sign(1e-2), 500, 2).bias.sum(axis=1)).max() > 1e-2


def test_a_zero_step_leaves_routing_unchanged():
    start = np.random.default_rng(0).normal(0, 0.1, 8)
    path = descend(instance(0), lambda counts, wanted, n: np.zeros(8), 5, 2, start)
    assert np.all(path.bias == start)
    assert np.all(path.counts == path.counts[0])
    assert np.all(path.dual == path.dual[0])
    assert path.monotone_share() == 1


def test_one_step_of_each_rule_by_hand():
    counts = np.array([5, 3, 4, 4])  # T = 16, k = 1, L = 4
    expected = np.array([-1, 1, 0, 0])
    for rule, n, size in (
        (sign(0.1), 1, 0.1),
        (sign(0.1), 7, 0.1),
        (proportional(0.1), 7, 0.1 / 16),
        (decreasing(0.1), 4, 0.1 / 64),
        (inverse_sqrt(0.1), 4, 0.1 / 32),
    ):
        np.testing.assert_allclose(update(np.ones(4), counts, rule, n, 16, 1), 1 + size * expected, rtol=0, atol=1e-15)


def test_violation_and_deviation_of_a_trajectory():
    path = theory.Trajectory(np.zeros((1, 4)), np.array([[6, 2, 4, 4]]), np.zeros(1), 4.0)
    assert path.max_deviation().tolist() == [2.0]
    assert path.max_violation().tolist() == [0.5]


# T5 and T6: a stream of batches.


@pytest.fixture(scope="module")
def stream():
    """The sheet's sizes: 4000 batches of 512 tokens, 8 experts, k = 1."""
    batches = logistic_scores(np.random.default_rng(1), 4000, 512, 8)
    rules = {name: theory.RULES[name] for name in ("sign_1e-2", "sign_1e-3", "c_over_n", "c_over_sqrt_n")}
    return batches, *theory.stream_regret(rules, batches, 1)


def test_regret_is_logarithmic_for_c_over_n_and_linear_for_a_constant_sign_step(stream):
    _, regret, _, _ = stream
    at = {name: [curve[n - 1] for n in (250, 1000, 4000)] for name, curve in regret.items()}
    print({name: [round(float(value), 4) for value in values] for name, values in at.items()})
    assert at["c_over_n"][2] / at["c_over_n"][1] < 1.05
    assert at["sign_1e-2"][2] / at["sign_1e-2"][1] > 2
    late = {name: values[2] - values[1] for name, values in at.items()}
    assert 0 < late["c_over_n"] < late["c_over_sqrt_n"] < late["sign_1e-2"]
    # Those ratios hold the cost of the start: over ten other streams the sign rule's is 1.4 to 2.8. Increments do not.
    # From 1000 to 4000 against 250 to 1000: 4 if regret is linear, 2 if it goes as sqrt(n), 1 if as log(n).
    middle = {name: values[1] - values[0] for name, values in at.items()}
    assert late["sign_1e-2"] / middle["sign_1e-2"] == pytest.approx(4, rel=0.1)
    assert late["c_over_sqrt_n"] / middle["c_over_sqrt_n"] == pytest.approx(2, rel=0.3)


def test_no_bias_beats_the_best_fixed_one_on_its_stream(stream):
    batches, _, streams, best = stream
    counts = theory.stream_loads(batches, best, 1).sum(axis=0)
    assert np.abs(counts / counts.sum() - 1 / 8).max() < 1e-4
    assert best.sum() == pytest.approx(0, abs=1e-12)
    tokens = batches.reshape(-1, 8)[::7]
    value = dual_value(tokens, best, 1)
    rng = np.random.default_rng(0)
    for _ in range(4):
        assert dual_value(tokens, best + rng.normal(0, 0.02, 8), 1) > value
    assert dual_value(tokens, streams["sign_1e-2"].bias[-1], 1) > value


def test_max_violation_has_a_floor_from_sampling(stream):
    batches, _, streams, best = stream
    floor = (theory.stream_loads(batches, best, 1).max(axis=1) / 64 - 1).mean()
    print(f"floor {floor:.4f}")
    assert 0.15 < floor < 0.21  # 1.42 standard deviations of a binomial load, 0.17, is the Gaussian guess
    assert streams["c_over_n"].max_violation[-1000:].mean() == pytest.approx(floor, rel=0.05)
    assert streams["sign_1e-2"].max_violation[-1000:].mean() > 1.2 * floor


def test_the_curvature_is_the_slope_of_the_loads():
    """A Laplacian, and the derivative of the expected loads by finite differences."""
    tokens = logistic_scores(np.random.default_rng(0), 2_000_000, 4)
    bias = np.array([0.05, -0.05, 0.02, -0.02])
    hessian = theory.curvature(tokens, bias, 2, width=0.005)
    np.testing.assert_allclose(hessian.sum(axis=0), 0, atol=1e-12)
    assert np.all(hessian - np.diag(np.diag(hessian)) <= 0)
    step = 0.02
    for e in range(4):
        ahead, behind = (loads(select(tokens, bias + s * step * np.eye(4)[e], 2)) / len(tokens) for s in (1, -1))
        np.testing.assert_allclose((ahead - behind) / (2 * step), hessian[e], atol=0.03)


def test_a_stream_is_routed_by_past_loads_only():
    """Changing batch 5 changes the bias from batch 6 on."""
    batches = logistic_scores(np.random.default_rng(0), 10, 32, 4)
    other = batches.copy()
    other[5] = other[5][:, ::-1]
    a, b = (theory.follow(proportional(1.0), s, 1).bias for s in (batches, other))
    np.testing.assert_array_equal(a[:6], b[:6])
    assert np.any(a[6] != b[6])


# The study and its picture.


def test_study_gives_finite_numbers_for_every_rule_and_a_picture(tmp_path):
    told = []
    metrics, series = theory.study(0, lambda done, name: told.append((done, name)), TINY)
    assert [done for done, _ in told] == list(range(1, theory.STAGES + 1))
    assert list(metrics) == list(series) == list(theory.RULES)
    keys = set(metrics["c_over_n"])
    assert {"dual_gap", "max_deviation", "regret_8", "regret_32", "regret_128", "regret_growth", "floor"} <= keys
    for found in metrics.values():
        assert set(found) == keys
        assert all(type(value) is float and np.isfinite(value) for value in found.values())
        assert found["identity_error"] < 1e-10
        assert found["preference_violations"] == 0
        assert found["floor"] > 0
    assert all(len(values) <= 100 for run in series.values() for values in run.values())
    assert theory.study(0, sizes=TINY)[0] == metrics
    draw(json.loads(json.dumps(series)), tmp_path / "a.png")
    draw(series, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("count", [1, 5, 100, 8001])
def test_thinned_points_keep_the_ends(count):
    kept = theory.thin(count)
    assert [kept[0], kept[-1]] == [0, count - 1]
    assert len(kept) <= 100
    assert np.all(np.diff(kept) > 0)


# Bad input: one ValueError that names the field, the value and what was expected.


@pytest.mark.parametrize("k", [0, -1, 9, 1.5])
def test_bad_k(k):
    with pytest.raises(ValueError, match=f"^k = {k}: expected 1 <= k <= E = 8"):
        select(instance(0), np.zeros(8), k)
    with pytest.raises(ValueError, match=f"^k = {k}: expected"):
        lp_optimum(instance(0), k)
    with pytest.raises(ValueError, match=f"^k = {k}: expected"):
        descend(instance(0), sign(1e-3), 1, k)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite(value):
    scores = instance(0)
    scores[3, 2] = value
    for call in (
        lambda: select(scores, np.zeros(8), 1),
        lambda: dual_value(scores, np.zeros(8), 1),
        lambda: lp_optimum(scores, 1),
        lambda: descend(scores, sign(1e-3), 1, 1),
        lambda: theory.follow(sign(1e-3), scores[None], 1),
    ):
        with pytest.raises(ValueError, match="^scores = '1 of 512 NaN or infinite': expected finite scores"):
            call()


def test_bias_of_the_wrong_shape_or_value():
    with pytest.raises(ValueError, match=r"^bias.shape = \(7,\): expected \(8,\)"):
        select(instance(0), np.zeros(7), 1)
    with pytest.raises(ValueError, match="^bias = .*nan.*: expected finite"):
        descend(instance(0), sign(1e-3), 1, 1, np.full(8, np.nan))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([4, 4, 4, 3], r"^sum\(counts\) = 15: expected k \* tokens = 16"),
        ([8, 8, 8, 8], r"^sum\(counts\) = 32: expected k \* tokens = 16"),
        ([4.5, 3.5, 4.0, 4.0], "^counts = .*4.5.*: expected whole"),
        ([-1, 9, 4, 4], "^counts = .*-1.*: expected whole"),
        ([np.nan, 8, 4, 4], "^counts = .*nan.*: expected whole"),
    ],
)
def test_counts_that_lost_or_doubled_tokens(counts, message):
    with pytest.raises(ValueError, match=message):
        update(np.zeros(4), np.array(counts), sign(1e-3), 1, 16, 1)


@pytest.mark.parametrize("value", [0.0, -1e-3, float("nan"), float("inf")])
@pytest.mark.parametrize(("rule", "name"), [(sign, "u"), (proportional, "u"), (decreasing, "c"), (inverse_sqrt, "c")])
def test_step_sizes_that_are_not_positive(rule, name, value):
    with pytest.raises(ValueError, match=f"^{name} = {value!r}: expected a finite number > 0"):
        rule(value)


def test_preference_is_about_one_expert_per_token():
    x = random_selection(np.random.default_rng(0), 10, 4, 2)
    with pytest.raises(ValueError, match="^experts per token = .*: expected k = 1"):
        moved_tokens(x, x)
