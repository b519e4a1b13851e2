"""Token policies against a loop over assignments, and in closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import MoEConfig
from moe.policies import capacity, make_policy
from moe.routing import token_choice

B, S, E, K = 4, 6, 5, 2
T = B * S


def routing_of(seed=0, k=K, valid=None):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(0.5 * np.ones(E), size=T).astype(np.float32)
    indices = np.argsort(-probs, axis=1, kind="stable")[:, :k].astype(np.int32)
    weights = np.take_along_axis(probs, indices, axis=1)
    return token_choice(*map(jnp.asarray, (probs, np.log(probs), indices, weights)), valid)


def kept_by_loop(routing, limit, group, drop, order):
    """[T, K] bool: assignments join their expert's queue in the stated order, the first C stay."""
    indices, valid, probs = (np.asarray(a) for a in (routing.indices, routing.valid, routing.probs))
    tokens, k = indices.shape
    per_group = tokens // B * (group or B)
    kept = np.zeros((tokens, k), bool)
    for first in range(0, tokens, per_group):
        line = [(t, j) for j in range(k) for t in range(first, first + per_group)]
        if drop == "probability":
            line.sort(key=lambda a: -probs[a[0], indices[a]])
        elif order == "token":
            line.sort()
        queue = np.zeros(E, int)
        for a in line:
            if valid[a]:
                kept[a] = queue[indices[a]] < limit
                queue[indices[a]] += 1
    return kept


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("group", [0, 1, 2])
@pytest.mark.parametrize(("drop", "order"), [("position", "choice"), ("position", "token"), ("probability", "choice")])
def test_kept_assignments_are_those_of_a_loop(drop, order, group, padded):
    valid = jnp.asarray(np.random.default_rng(1).random((T, K)) < 0.8) if padded else None
    routing = routing_of(valid=valid)
    policy = capacity(E, K, factor=0.8, drop=drop, order=order, group=group)
    got = jax.jit(lambda r: policy(r, num_sequences=B, training=True))(routing)
    limit = math.ceil(0.8 * K * S * (group or B) / E)
    want = kept_by_loop(routing, limit, group, drop, order)
    np.testing.assert_array_equal(got.valid, want)
    assert not np.asarray(got.valid & ~routing.valid).any()
    np.testing.assert_array_equal(got.counts, np.bincount(np.asarray(routing.indices)[want], minlength=E))
    assert want.sum() < np.asarray(routing.valid).sum(), "the case drops something"
    for field in ("indices", "weights", "probs"):
        np.testing.assert_array_equal(getattr(got, field), getattr(routing, field))


def test_everything_on_one_expert_drops_all_but_its_capacity():
    routing = routing_of(k=1).replace(indices=jnp.full((T, 1), 3, jnp.int32))
    policy = capacity(E, 1, factor=1.25, group=1)
    got = policy(routing, num_sequences=B, training=True)
    limit = math.ceil(1.25 * S / E)
    assert float(got.counts[3]) == B * limit
    np.testing.assert_array_equal(got.valid.reshape(B, S), np.arange(S) < limit * np.ones((B, 1)))
    assert not np.asarray(got.weights * got.valid)[~np.asarray(got.valid)].any()


def test_a_large_factor_is_dropless_and_evaluation_has_its_own():
    routing = routing_of()
    tight = capacity(E, K, factor=0.5, eval_factor=float(E), group=1)
    assert bool(tight(routing, num_sequences=B, training=False).valid.all())
    assert not bool(tight(routing, num_sequences=B, training=True).valid.all())
    assert tight.limit(S, training=True) == math.ceil(0.5 * K * S / E)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("capacity(factor=0)", "factor = 0"),
        ("capacity(factor=1, drop='last')", "drop = 'last'"),
        ("capacity(factor=1, order='random')", "order = 'random'"),
        ("capacity(factor=1, group=-1)", "group = -1"),
        ("capacity", "expected options that capacity takes"),
        ("capacity(1.0)", "expected `name` or `name\\(option=value"),
        ("none_such", "moe.policy = 'moe.policies:none_such'"),
        ("capacity(factor=1, drop='probability')", "allow_noncausal"),
    ],
)
def test_bad_input_names_field_and_value(policy, message):
    with pytest.raises(ValueError, match=message):
        make_policy(MoEConfig(E, K, 8, policy=policy))


def test_a_group_that_does_not_divide_the_pass_is_refused():
    with pytest.raises(ValueError, match="group = 3"):
        capacity(E, K, factor=1.0, group=3)(routing_of(), num_sequences=B, training=True)
