"""Ways to find weights of sources: `method = "scalebio(alpha=10)"` names one of these functions.

    uniform        every source alike
    proportional   by tokens
    only           one source alone: the bound, where it is known which one is clean
    scalebio       the penalty method as in the paper                        (optim/bilevel.py)
    released       the same as in the authors' preview code
    f2sa, soba     bilevel by plain SGD, of first and second order           (optim/implicit.py)
    doremi, doge   a proxy model whose weights move with it                  (optim/domain_weights.py)
    rho            sources' shares of what RHO-loss selects                  (optim/selection.py)
    influence      sources' shares of the samples whose gradients resemble validation's (LESS)

All have one budget, and as many steps as it pays for: passes are counted for each, references and proxies included.

Legend: K sources, A passes, B sequences of one.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.optimizers import layer_labels
from experiments.scalebio.problem import FORWARD, Method, Metrics, Problem, flat, mean_loss, mixed_loss
from experiments.scalebio.proxies import doge, doremi
from experiments.scalebio.selections import influence, rho
from experiments.step import Batch
from moe.config import require
from optim import bilevel, implicit
from optim.bilevel import weights_of
from optim.layerwise import adam_of_part
from optim.parts import Part, active_layers, whole

__all__ = [
    "doge", "doremi", "f2sa", "influence", "only", "proportional", "released", "rho", "scalebio", "soba", "uniform",
]  # fmt: skip


def fixed(weights: np.ndarray) -> Method:
    def never(state: Any, batch: Batch, validation: Batch) -> tuple[Any, Metrics]:
        raise AssertionError("fixed weights are not searched for")

    return Method(lambda params: (), never, lambda state: jnp.asarray(weights, jnp.float32), 0, 0.0)


def uniform(problem: Problem) -> Method:
    return fixed(np.full(problem.num_sources, 1 / problem.num_sources))


def proportional(problem: Problem) -> Method:
    return fixed(np.array(problem.tokens) / sum(problem.tokens))


def only(problem: Problem, source: int = 0) -> Method:
    require(0 <= source < problem.num_sources, "method: source", source, f"0 to {problem.num_sources - 1}")
    return fixed(np.eye(problem.num_sources)[source])


def scalebio(
    problem: Problem, alpha: float = 10.0, lam_rate: float = 1e-2, layers: int = 0, update_gap: int = 20
) -> Method:
    """ScaleBiO; `layers` > 0 trains so many of the layers at a time (LISA), the same ones in both models."""
    require_rate("lam_rate", lam_rate)
    steps = problem.affordable(3.0)
    part, tx = trained_part(problem, layers, update_gap, steps, seed=0)
    made = bilevel.penalty_bilevel(
        problem.outer, problem.inner, alpha=alpha, w_opt=tx, u_opt=tx, lam_opt=optax.adam(lam_rate), part=part
    )
    return of_bilevel(problem, made, steps)


def released(
    problem: Problem, alpha: float = 10.0, lam_rate: float = 1e-2, layers: int = 0, update_gap: int = 20
) -> Method:
    """As the preview code: layers drawn apart, lam decays by 0.01, sources that a pass lacks drop out."""
    require_rate("lam_rate", lam_rate)
    steps = problem.affordable(3.0)
    (part, tx), (part_u, _) = (trained_part(problem, layers, update_gap, steps, seed) for seed in (0, 1))
    decayed = optax.adamw(lam_rate, weight_decay=0.01)
    made = bilevel.released_bilevel(
        problem.outer, problem.inner, alpha=alpha, w_opt=tx, u_opt=tx, lam_opt=decayed, part=part, part_u=part_u
    )
    return of_bilevel(problem, made, steps)


def require_rate(name: str, value: float) -> None:
    require(0 < value < math.inf, f"method: {name}", value, "a finite number above 0")


def trained_part(
    problem: Problem, layers: int, update_gap: int, steps: int, seed: int
) -> tuple[Part, optax.GradientTransformation]:
    """Everything, by the run's own optimiser; or some layers at a time, by Adam at the run's highest rate."""
    if not layers:
        return whole, problem.optimizer(steps)
    of, labels = problem.run.optimizer, layer_labels("adam")
    tx = adam_of_part(of.learning_rate, labels, update_gap=update_gap, b1=of.b1, b2=of.b2)
    tx = optax.chain(optax.clip_by_global_norm(of.clip_norm), tx)
    return active_layers(labels, layers, update_gap, seed=seed), tx


def of_bilevel(problem: Problem, made: bilevel.Bilevel, steps: int) -> Method:
    def step(state: Any, batch: Batch, validation: Batch) -> tuple[Any, Metrics]:
        state, found = made.step(state, batch, validation)
        return state, {"loss": found["outer_loss"], "gap": found["gap"], "grad_norm": found["grad_norm_w"]}

    init = lambda params: made.init(params, problem.num_sources)  # noqa: E731
    return Method(init, step, lambda state: weights_of(state.lam), steps, 3.0)


def f2sa(
    problem: Problem, rate: float = 0.3, lam_rate: float = 1.0, multiplier: float = 1.0, growth: float = 0.01
) -> Method:
    """F2SA: SGD for w, u and lam, a multiplier m that grows by `growth` a step; u's rate is `rate`, w's rate / (2 m).

    Per step: a gradient of the outer loss, two of the inner one, and its values at both models again, for lam.
    """
    of_w = lambda step: rate / (2 * (multiplier + growth * step))  # noqa: E731
    made = implicit.f2sa(
        functools.partial(mean_loss, problem), functools.partial(by_logits, problem), alpha=of_w, gamma=rate,
        multiplier=multiplier, difference=growth, xi=2 * lam_rate / rate,
    )  # fmt: skip
    return of_implicit(problem, made, 3 + 2 * FORWARD)


def soba(problem: Problem, rate: float = 0.1, lam_rate: float = 1.0) -> Method:
    """SOBA: a gradient of the outer loss, one of the inner, and its vector-Jacobian product, about two more."""
    losses = functools.partial(mean_loss, problem), functools.partial(by_logits, problem)
    return of_implicit(problem, implicit.soba(*losses, learning_rate=rate, lam_learning_rate=lam_rate), 4.0)


def by_logits(problem: Problem, lam: Array, params: Any, batch: Batch) -> Array:
    return mixed_loss(problem, weights_of(lam), params, batch)


def of_implicit(problem: Problem, made: implicit.BilevelMethod, passes: float) -> Method:
    def step(state: Any, batch: Batch, validation: Batch) -> tuple[Any, Metrics]:
        state = made.step(state, (flat(validation),), (flat(batch),))
        return state, {"largest_weight": jnp.max(weights_of(state.lam))}

    init = lambda params: made.init(jnp.zeros(problem.num_sources), params)  # noqa: E731
    return Method(init, step, lambda state: weights_of(state.lam), problem.affordable(passes), passes)
