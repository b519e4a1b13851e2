"""Cross-entropy whose weights come from its own losses: what `RunConfig.reweighting` adds to the training step.

A unit is a sequence, with the mean loss of its predicted tokens, or a token. Weights are `optim.reweighting`'s, of all
units of a pass or of the optimiser step, whatever the mesh: losses are one global array here, and no rank exists. They
sum to 1 over the step, so that gradients of its passes are added as they are (DESIGN contract 6).

The weight of a sequence does not grow with its tokens: `uniform` is the mean over sequences, where the unweighted loss
is the mean over tokens. The two are one if all have as many.

Legend: A accumulation passes, B sequences per pass, S positions; units are [B], or [B, S] for tokens.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from experiments.config import ReweightingConfig
from kernels.cross_entropy import token_nll
from moe.routing import import_object, parse_call
from moe.transformer import TransformerOutput
from optim.reweighting import Score, reweighted_loss, sample_weights, score_named, warm_temperature
from parallel.mesh import AXES, on_shards


class Weighting(NamedTuple):
    """How one pass is weighted; leaves lead with [A] until it is scanned.

    Attributes:
      r: the step's temperature.
      share: what the weights of this pass sum to, where they are of its own losses.
      weights: of its units, where all passes' losses are known beforehand; else None.
    """

    r: Array
    share: Array
    weights: Array | None


def make_score(spec: str) -> Score:
    """`lin_upper`, `ohem(share=0.5)`, or an import path `package.module:name(option=...)` to a function of
    `optim.reweighting.Losses`.

    Raises:
      ValueError: no such score, or one that does not take these options.
    """
    what = "reweighting.strategy"
    name, options = parse_call(spec, what)
    score = functools.partial(import_object(name, what) if ":" in name else score_named(name), **options)
    try:
        weigh = functools.partial(sample_weights, strategy=score, r=1.0)
        jax.eval_shape(weigh, jax.ShapeDtypeStruct((2,), jnp.float32))
    except TypeError as error:
        raise ValueError(f"{what} = {spec!r}: expected options that {name} takes ({error})") from error
    return score


def pass_weighting(config: ReweightingConfig, step: Array, counted: Array) -> Weighting:
    """Each pass by itself, those with anything to predict alike. counted: [A, B, S] weights of the targets."""
    passes = counted.shape[0]
    share = 1.0 / jnp.maximum(jnp.sum(jnp.any(counted > 0, axis=(1, 2))), 1)
    r, ones = _temperature(config, step), jnp.ones((passes,))
    return Weighting(r * ones, share * ones, None)


def step_weighting(config: ReweightingConfig, step: Array, losses: Array, active: Array) -> Weighting:
    """All passes together: units [A, B] or [A, B, S] of a forward pass over all of them."""
    r, ones = _temperature(config, step), jnp.ones(losses.shape[:1])
    batch_first = losses.swapaxes(0, 1), active.swapaxes(0, 1)  # what is flattened stays split as the batch is
    return Weighting(r * ones, ones, _weights(config, r, *batch_first).swapaxes(0, 1))


def unit_losses(config: ReweightingConfig, nll: Array, counted: Array) -> tuple[Array, Array]:
    """Losses [B] or [B, S] of the units from those of tokens [B, S], and whether there is anything to predict."""
    if config.level == "token":
        return nll, counted > 0
    tokens = counted.sum(axis=1)
    return jnp.sum(nll * counted, axis=1) / jnp.maximum(tokens, 1.0), tokens > 0


def token_losses(out: TransformerOutput, targets: Array) -> Array:
    """Negative log-likelihoods [B, S] in nats; chunked on each device's own tokens."""
    hidden, tokens = out.hidden.reshape(-1, out.hidden.shape[-1]), P(AXES)

    def local(hidden: Array, head: Array, targets: Array) -> Array:
        return token_nll(hidden, head.astype(hidden.dtype), targets)

    fn = on_shards(local, (P(AXES, None), P(), tokens), tokens)
    return fn(hidden, out.head, targets.reshape(-1)).reshape(targets.shape)


def weighted_cross_entropy(
    config: ReweightingConfig,
    out: TransformerOutput,
    targets: Array,
    counted: Array,
    weighting: Weighting,
    total_targets: Array,
) -> tuple[Array, dict[str, Array]]:
    """This pass' share of the weighted loss, and sums over passes: `loss`, the unweighted mean over tokens, to compare
    methods by; `weighted_loss`; what `with_effective_samples` needs."""
    nll = token_losses(out, targets)
    losses, active = unit_losses(config, nll, counted)
    weights = weighting.weights
    if weights is None:
        weights = weighting.share * _weights(config, weighting.r, losses, active)
    loss = reweighted_loss(losses, weights)
    return loss, {
        "loss": jnp.sum(nll * counted) / jnp.maximum(total_targets, 1.0),
        "weighted_loss": loss,
        "squared_weights": jnp.sum(weights**2),
        "units": jnp.sum(active, dtype=jnp.float32),
    }


def with_effective_samples(sums: dict[str, Array]) -> dict[str, Array]:
    """`effective_samples`, 1 / sum of squared weights over the whole step, as a share of its units; nothing else if
    nothing is weighted."""
    if "squared_weights" not in sums:
        return sums
    kept = {name: value for name, value in sums.items() if name not in ("squared_weights", "units")}
    tiny = jnp.finfo(jnp.float32).tiny  # of a step without anything to predict
    return kept | {"effective_samples": 1.0 / jnp.maximum(sums["squared_weights"] * sums["units"], tiny)}


def _temperature(config: ReweightingConfig, step: Array) -> Array:
    return jnp.asarray(warm_temperature(config.r, config.warmup_steps, config.warm_r)(step))


def _weights(config: ReweightingConfig, r: Array, losses: Array, active: Array) -> Array:
    """Weights of units of any shape, which sum to 1."""
    flat = sample_weights(
        losses.reshape(-1),
        strategy=make_score(config.strategy),
        r=r,
        delta=config.delta,
        mask=active.reshape(-1),
        clip_quantile=config.clip_quantile,
    )
    return flat.reshape(losses.shape)
