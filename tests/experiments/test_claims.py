"""The verdict rule, branch by branch, on numbers small enough to check by head."""

import math

import pytest

from experiments.claims import Claim, judge, mean_std, overall, stated


def claim(kind="difference", direction="lower", size=0.02, metric="val_ce"):
    return Claim("ours beats theirs", metric, "ours", "theirs", kind, direction, size, "none")


def measured(ours, theirs, metric="val_ce"):
    return {"ours": {metric: ours}, "theirs": {metric: theirs}}


@pytest.mark.parametrize(
    ("kind", "direction", "size", "ours", "theirs", "verdict"),
    [
        # every seed has the sign and the mean reaches the size
        ("difference", "lower", 0.5, [1.0, 1.5], [2.0, 2.0], "holds"),
        ("difference", "higher", 0.5, [2.0, 2.5], [1.0, 2.0], "holds"),
        ("ratio", "higher", 3.0, [4.0, 6.0], [1.0, 2.0], "holds"),
        ("ratio", "lower", 2.0, [1.0, 1.0], [3.0, 2.0], "holds"),
        # exactly the size is enough, in every direction
        ("difference", "lower", 0.5, [1.5], [2.0], "holds"),
        ("difference", "higher", 0.5, [2.0], [1.5], "holds"),
        ("ratio", "higher", 2.0, [4.0], [2.0], "holds"),
        ("ratio", "lower", 4.0, [0.5], [2.0], "holds"),
        # within a margin: a little worse is allowed, by every seed
        ("margin", "lower", 0.1, [2.05, 2.08], [2.0, 2.0], "holds"),
        ("margin", "lower", 0.1, [2.05, 2.11], [2.0, 2.0], "inconclusive"),
        ("margin", "lower", 0.1, [2.2, 2.11], [2.0, 2.0], "does not hold"),
        ("margin", "higher", -0.1, [1.95], [2.0], "holds"),
        # the sign everywhere, the mean too small
        ("difference", "lower", 0.5, [1.9, 1.9], [2.0, 2.0], "inconclusive"),
        ("ratio", "higher", 3.0, [2.0, 2.0], [1.0, 1.0], "inconclusive"),
        # a mean that is large enough does not make up for a seed against it
        ("difference", "lower", 0.5, [0.0, 2.1], [2.0, 2.0], "inconclusive"),
        ("ratio", "higher", 3.0, [9.0, 0.9], [1.0, 1.0], "inconclusive"),
        ("ratio", "lower", 2.0, [0.01, 1.01], [1.0, 1.0], "inconclusive"),
        # no seed has the sign; equal is not better
        ("difference", "lower", 0.5, [2.1, 3.0], [2.0, 2.0], "does not hold"),
        ("difference", "higher", 0.0, [2.0, 2.0], [2.0, 2.0], "does not hold"),
        ("ratio", "higher", 1.0, [1.0], [1.0], "does not hold"),
        ("ratio", "lower", 1.0, [2.0, 3.0], [1.0, 1.0], "does not hold"),
    ],
)
def test_rule(kind, direction, size, ours, theirs, verdict):
    assert judge(claim(kind, direction, size), measured(ours, theirs)).verdict == verdict


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("direction", ["higher", "lower"])
@pytest.mark.parametrize("kind", ["ratio", "difference"])
def test_a_seed_that_is_not_finite_fails(kind, direction, bad):
    """Whichever sign infinity would have: the other seed keeps the claim from failing, nothing lets it hold."""
    good = 9.0 if direction == "higher" else 0.1
    one = claim(kind, direction, 1.0)
    assert judge(one, measured([good, good], [1.0, 1.0])).verdict != "does not hold"
    assert judge(one, measured([good, bad], [1.0, 1.0])).verdict == "inconclusive"
    assert judge(one, measured([bad, bad], [1.0, 1.0])).verdict == "does not hold"


def test_a_ratio_to_zero_fails_and_raises_nothing():
    assert judge(claim("ratio", "higher", 3.0), measured([1.0], [0.0])).verdict == "does not hold"


def test_seeds_are_paired_in_order():
    """The same numbers in another order are other pairs, so another verdict."""
    paired = judge(claim(size=0.05), measured([1.0, 2.0, 3.0], [1.1, 2.1, 3.1]))
    assert paired.verdict == "holds"
    assert paired.values == pytest.approx((-0.1, -0.1, -0.1))
    assert judge(claim(size=0.05), measured([1.0, 2.0, 3.0], [3.1, 1.1, 2.1])).verdict == "inconclusive"


def test_judged_carries_values_mean_and_sample_deviation():
    found = judge(claim(), measured([1.0, 2.0, 6.0], [2.0, 2.0, 2.0]))
    assert found.values == (-1.0, 0.0, 4.0)
    assert found.mean == pytest.approx(1.0)
    assert found.std == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert mean_std([3.5]) == (3.5, 0.0)


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], [1.0, 2.0]), ([1.0, 2.0], [1.0]), ([], [])])
def test_unpaired_seeds_are_refused(ours, theirs):
    with pytest.raises(ValueError, match="seeds"):
        judge(claim(), measured(ours, theirs))


def test_missing_arm_and_metric_list_what_there_is():
    arms = measured([1.0], [2.0])
    with pytest.raises(ValueError, match=r"'ours'.*theirs"):
        judge(claim(), {"theirs": arms["theirs"]})
    with pytest.raises(ValueError, match=r"'test_ce'.*val_ce"):
        judge(claim(metric="test_ce"), arms)


@pytest.mark.parametrize(("kind", "size"), [("ratio", 0.5), ("difference", -0.1)])
def test_a_size_against_its_own_direction_is_refused(kind, size):
    with pytest.raises(ValueError, match=r"claim\.size"):
        claim(kind, "lower", size)


def test_overall():
    holds = judge(claim(), measured([1.0], [2.0]))
    unsure = judge(claim(), measured([1.99], [2.0]))
    fails = judge(claim(), measured([3.0], [2.0]))
    assert overall([holds, holds]) == "holds"
    assert overall([holds, unsure]) == "inconclusive"
    assert overall([holds, unsure, fails]) == "does not hold"
    assert overall([fails, holds]) == "does not hold"


@pytest.mark.parametrize(
    ("kind", "direction", "size", "text"),
    [
        ("ratio", "higher", 3.0, ">= 3x"),
        ("ratio", "lower", 4.0, "<= 0.25x"),
        ("difference", "higher", 0.02, ">= 0.02"),
        ("difference", "lower", 0.0159, "<= -0.0159"),
    ],
)
def test_stated_size_has_its_sign(kind, direction, size, text):
    assert stated(claim(kind, direction, size)) == text
