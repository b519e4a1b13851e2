"""Weights of samples from their own losses: LinUpper, Quadratic, Extremes and their siblings.

Sow et al., "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining", 2502.06733. With l_i
the mean loss of sample i of the M of an optimiser step, and no state nor gradient of its own:

    w = argmax_w  sum_i w_i f_i - r KL(w || uniform),  so  w_i = exp(f_i / r) / sum_j exp(f_j / r)       `kl_weights`
    h_i = 2 delta (l_i - min l) / (max l - min l) - delta                               in [-delta, delta], `spread`
    loss = sum_i w_i l_i                                                                           `reweighted_loss`

r is the strength of the penalty: large is uniform, small is the maximum alone. A method is its score f, a function of
the batch; `SCORES` names them, and any other function may stand in for a name. What needs no score but such a form
(focal, hard examples, KL-DRO) is a score too.

Minimum, maximum and sum are of the whole batch. Under `jit` arrays are global and nothing is to be said; inside
`jax.shard_map`, `axis_name` makes each a collective of one number. No rank is looked at, so that no device can take
another's weights, as one released implementation does that picks them by its rank within a node. Under accumulation a
batch is what the caller passes: one pass, or all of them.

Where the released code differs: it divides by max(max l - min l, 1e-6), which makes noise of losses that are equal;
here equal means within rounding, and such samples weigh the same. The name `upper` means LinUpper in one of its two
repositories and `rising` in the other, and is refused.

Legend: M samples (sequences, or tokens, flattened).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.core import Tracer

from optim.checks import require

AxisName = str | Sequence[str] | None
_AMBIGUOUS = (
    "`lin_upper`, which rises and is flat for the harder half (what fms-fsdp calls `upper`), or `rising`, which rises "
    "all the way (what the GPT-2 code calls `upper`)"
)


@dataclass(frozen=True)
class Losses:
    """What a score looks at.

    Attributes:
      values: [M] float32, under `axis_name` this shard's; without gradient.
      active: [M] bool; the others weigh nothing and are in no statistic.
      delta: half the width of `spread`.
      axis_name: the mapped axes that the batch is split over.
    """

    values: Array
    active: Array
    delta: float = 1.0
    axis_name: AxisName = None

    def least(self) -> Array:
        return _reduced(lax.pmin, jnp.min(jnp.where(self.active, self.values, jnp.inf)), self.axis_name)

    def most(self) -> Array:
        return _reduced(lax.pmax, jnp.max(jnp.where(self.active, self.values, -jnp.inf)), self.axis_name)

    def spread(self) -> Array:
        """h: the least loss at -delta, the greatest at delta; 0 everywhere if they are equal but for rounding."""
        least, most = self.least(), self.most()
        rounding = 8 * jnp.finfo(self.values.dtype).eps * jnp.maximum(jnp.abs(least), jnp.abs(most))
        equal = most - least <= rounding  # False for NaN, which is to be seen
        width = jnp.where(equal, 1.0, most - least)
        return jnp.where(equal, 0.0, 2 * self.delta * (self.values - least) / width - self.delta)

    def everywhere(self) -> tuple[Array, Array]:
        """`values` and `active` of the whole batch, for what no reduction can tell: M numbers travel."""
        if self.axis_name is None:
            return self.values, self.active
        return tuple(lax.all_gather(x, self.axis_name, tiled=True) for x in (self.values, self.active))  # type: ignore


Score = Callable[..., Array]  # (Losses, options) -> f [M]


def uniform(losses: Losses) -> Array:
    """Every sample alike: the mean over samples, which is a mean over tokens only if all have as many."""
    return jnp.zeros_like(losses.values)


def lin_upper(losses: Losses) -> Array:
    """min(h + delta, delta): less for what is learned already, the same for all from the midrange up."""
    return jnp.minimum(losses.spread() + losses.delta, losses.delta)


def quadratic(losses: Losses) -> Array:
    """1 - h^2 / delta^2: the middle ("mid" in the code)."""
    return 1 - (losses.spread() / losses.delta) ** 2


def extremes(losses: Losses) -> Array:
    """|h|: both ends."""
    return jnp.abs(losses.spread())


def rising(losses: Losses) -> Array:
    """(h + delta) / 2, all the way up: in the GPT-2 code alone, as `upper`."""
    return (losses.spread() + losses.delta) / 2


def kl_dro(losses: Losses) -> Array:
    """The loss itself: the worst case within a KL ball, as in IR-DRO ("Take the Bull by the Horns", Chen et al.,
    2402.14270 [recalled]). Not invariant to the losses' scale: r is in nats."""
    return losses.values


def focal(losses: Losses) -> Array:
    """log(1 - exp(-l)), so that w_i is proportional to (1 - p_i)^gamma for gamma = 1 / r, with p_i the likelihood
    (of a sequence: per token, geometric mean). Lin et al., "Focal Loss for Dense Object Detection", 1708.02002, eq. 4;
    there the factor is not normalised and has a gradient, here neither."""
    smallest = jnp.finfo(losses.values.dtype).tiny
    return jnp.log(-jnp.expm1(-jnp.maximum(losses.values, smallest)))


def ohem(losses: Losses, share: float = 0.25) -> Array:
    """0 for the hardest ceil(share M) samples and those that tie with the last of them, else -inf: equal weights on
    these, whatever r below infinity. Online hard example mining, Shrivastava et al., 1604.03540; a mean like it is
    the conditional value at risk. One all-gather under `axis_name`."""
    require(0 < share <= 1, "share", share, "above 0, at most 1")
    values, active = losses.everywhere()
    descending = -jnp.sort(jnp.where(active, -values, jnp.inf))
    kept = jnp.ceil((1 - 1e-6) * share * jnp.sum(active)).astype(jnp.int32)  # 0.3 of 10 is 3 in float32 too
    least = descending[jnp.maximum(kept, 1) - 1]
    return jnp.where(losses.values < least, -jnp.inf, 0.0)


def excess(losses: Losses, reference: Array) -> Array:
    """Loss above a reference model's, [M] (under `axis_name` of this shard): what is learnable, not yet learned and not
    noise. RHO-loss, Mindermann et al., 2206.07137, which keeps the first few; as weights, with r in nats. Bind the
    reference with `functools.partial`."""
    return losses.values - reference.astype(losses.values.dtype)


SCORES: dict[str, Score] = {
    "uniform": uniform,
    "lin_upper": lin_upper,
    "quadratic": quadratic,
    "extremes": extremes,
    "rising": rising,
    "kl_dro": kl_dro,
    "focal": focal,
    "ohem": ohem,
}


def score_named(name: str) -> Score:
    """A member of `SCORES`. ValueError for another name, and for `upper`, which says what it may mean."""
    require(name != "upper", "strategy", name, _AMBIGUOUS)
    require(name in SCORES, "strategy", name, f"one of {', '.join(SCORES)}")
    return SCORES[name]


def kl_weights(scores: Array, r: Any, *, active: Array | None = None, axis_name: AxisName = None) -> Array:
    """argmax over the simplex of sum_i w_i scores_i - r KL(w || uniform): softmax(scores / r).

    Args:
      scores: [M]; -inf excludes a sample.
      r: above 0; infinity is uniform over the active ones.
      active: [M] bool; the others get 0. If none is, all get 0.
      axis_name: see `sample_weights`.
    """
    active = jnp.ones(scores.shape, bool) if active is None else active
    top = _reduced(lax.pmax, jnp.max(jnp.where(active, scores, -jnp.inf)), axis_name)
    exponent = jnp.where(jnp.isinf(r), 0.0, jnp.where(active, scores - top, 0.0) / r)
    exp = jnp.where(active, jnp.exp(exponent), 0.0)
    total = _reduced(lax.psum, jnp.sum(exp), axis_name)
    return exp / jnp.where(total == 0, 1.0, total)


def sample_weights(
    losses: Array,
    *,
    strategy: str | Score,
    r: Any,
    delta: float = 1.0,
    mask: Array | None = None,
    axis_name: AxisName = None,
    clip_quantile: float = 1.0,
) -> Array:
    """Weights [M] of the samples of one batch, summing to 1 over all of it; constants to differentiation.

    Args:
      losses: [M], of whatever float type: statistics are float32.
      strategy: a name of `SCORES`, or a function (Losses) -> [M].
      r: strength of the KL penalty, above 0, or a traced number (see `warm_temperature`); infinity is uniform.
      delta: LinUpper's weights differ by exp(delta / r) at most, `rising`'s and `extremes`' as well.
      mask: [M] bool or number, samples to count: those with a token to predict. The others get weight 0.
      axis_name: inside `jax.shard_map`, the axes the batch is split over. Elsewhere losses are the whole batch.
      clip_quantile: scores see losses of at most this quantile, so that one outlier does not press all others
        together; 1 is off, as published. One all-gather under `axis_name`.

    Equal losses and a single one weigh the same. A NaN among traced losses makes the loss NaN.

    Raises:
      ValueError: an unknown or ambiguous strategy; r or delta not above 0; losses that are not [M], or (where they are
        concrete) not finite, with the first sample's index; no sample to count.
    """
    score = score_named(strategy) if isinstance(strategy, str) else strategy
    _check(losses, r, delta, mask, clip_quantile)
    values = lax.stop_gradient(losses).astype(jnp.promote_types(losses.dtype, jnp.float32))
    active = jnp.ones(losses.shape, bool) if mask is None else mask > 0
    seen = Losses(values, active, delta, axis_name)
    if clip_quantile < 1:
        everyone, counted = seen.everywhere()
        cap = jnp.nanquantile(jnp.where(counted, everyone, jnp.nan), clip_quantile)
        seen = Losses(jnp.minimum(values, cap), active, delta, axis_name)
    return kl_weights(score(seen), lax.stop_gradient(r), active=active, axis_name=axis_name)


def reweighted_loss(losses: Array, weights: Array, axis_name: AxisName = None) -> Array:
    """sum_i weights_i losses_i, with the gradient sum_i weights_i grad losses_i. Auxiliary losses are added outside.
    Losses that weigh nothing must be finite all the same. It is no mean over samples: methods are compared by that."""
    return _reduced(lax.psum, jnp.sum(lax.stop_gradient(weights) * losses), axis_name)


def effective_samples(weights: Array, axis_name: AxisName = None) -> Array:
    """1 / sum_i weights_i^2: M if uniform, 1 if one sample is everything (Kish)."""
    return 1 / _reduced(lax.psum, jnp.sum(weights**2), axis_name)


def warm_temperature(r: float, warmup_steps: int, warm_r: float = 100.0) -> optax.Schedule:
    """r(step): `warm_r` for the first steps, then `r`. 100 is nearly uniform (the 7B runs: 2000 steps), infinity is a
    plain mean (the GPT-2 code's `burnout_steps`: 1000).

    Raises:
      ValueError: r or warm_r not above 0, steps that are no whole number or negative.
    """
    require(_positive(r), "r", r, "a number above 0")
    require(_positive(warm_r), "warm_r", warm_r, "a number above 0 (infinity is the plain mean)")
    whole = isinstance(warmup_steps, int | np.integer) and not isinstance(warmup_steps, bool) and warmup_steps >= 0
    require(whole, "warmup_steps", warmup_steps, "a whole number, 0 or more")
    return optax.join_schedules([optax.constant_schedule(warm_r), optax.constant_schedule(r)], [warmup_steps])


def _reduced(collective: Callable[..., Any], value: Array, axis_name: AxisName) -> Array:
    return value if axis_name is None else collective(value, axis_name)


def _positive(value: Any) -> bool:
    """Above 0 and not NaN; traced numbers pass."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return _traced(value) or ((number or getattr(value, "shape", None) == ()) and float(value) > 0)


def _traced(value: Any) -> bool:
    return isinstance(value, Tracer)


def _check(losses: Array, r: Any, delta: float, mask: Array | None, clip_quantile: float) -> None:
    expected = "[M], one number per sample: a mean over its tokens (to weight tokens, flatten them)"
    require(len(losses.shape) == 1 and losses.shape[0] >= 1, "losses.shape", losses.shape, expected)
    require(jnp.issubdtype(losses.dtype, jnp.floating), "losses.dtype", losses.dtype.name, "a float type")
    require(_positive(r), "r", r, "a number above 0")
    require(_positive(delta) and math.isfinite(delta), "delta", delta, "a finite number above 0")
    require(0 < clip_quantile <= 1, "clip_quantile", clip_quantile, "above 0, at most 1 (off)")
    if mask is not None:
        require(mask.shape == losses.shape, "mask.shape", mask.shape, f"the losses' {losses.shape}")
    if _traced(losses) or _traced(mask):
        return
    counted = np.ones(losses.shape, bool) if mask is None else np.asarray(mask) > 0
    require(bool(counted.any()), "mask", "no sample", "at least one sample with a token to predict")
    wrong = np.flatnonzero(counted & ~np.isfinite(np.asarray(losses, np.float32)))
    found = (f"losses[{wrong[0]}]", float(losses[wrong[0]])) if wrong.size else ("losses", None)
    require(not wrong.size, *found, "a finite number")
