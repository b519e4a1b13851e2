"""Bilevel methods where everything is known: sources 1/2 |w - mu_i|^2, validation 1/2 |w - mu_0|^2.

Then w*(lam) = sum_i p_i mu_i, and the penalty's gradient in lam is alpha / (1 + alpha) of the exact one, component by
component. How near methods come to the best weights is printed beside it.

Legend: K sources, d dimensions.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.experiment import Study, StudyProgress
from optim import bilevel, implicit
from optim.bilevel import weights_of

SOURCES, DIM = 4, 3
ALPHAS = (1.0, 10.0, 100.0)
STEPS, EVERY = 3000, 60


def inner_sums(w: Array, batch: Array) -> tuple[Array, Array]:
    """One sample of each source."""
    return 0.5 * jnp.sum((w[None] - batch) ** 2, axis=1), jnp.ones(batch.shape[0])


def outer_sum(w: Array, batch: Array) -> tuple[Array, Array]:
    return 0.5 * jnp.sum((w - batch) ** 2), jnp.ones(())


def drawn(seed: int) -> tuple[Array, Array]:
    """Centres mu [K, d] and a target [d] inside their hull, so that some weights reach it."""
    rng = np.random.default_rng([seed, 7])
    centres = rng.standard_normal((SOURCES, DIM))
    return jnp.asarray(centres, jnp.float32), jnp.asarray(rng.dirichlet(np.ones(SOURCES)) @ centres, jnp.float32)


def gradient_ratio(alpha: float, lam: Array, centres: Array, target: Array) -> Array:
    """The penalty's gradient over the exact one [K], at the minimum of both models."""
    best = weights_of(lam) @ centres
    frozen = {"w_opt": optax.set_to_zero(), "u_opt": optax.set_to_zero(), "lam_opt": optax.sgd(1.0)}
    made = bilevel.penalty_bilevel(outer_sum, inner_sums, alpha=alpha, **frozen)
    state = made.init((target + alpha * best) / (1 + alpha), SOURCES, lam)._replace(u=best)
    moved, _ = made.step(state, centres[None], target[None])
    exact = jax.grad(lambda lam: outer_sum(weights_of(lam) @ centres, target)[0])(lam)
    return (lam - moved.lam) / exact


def oracle(alpha: float, seed: int, out: Path, progress: StudyProgress) -> tuple[dict[str, float], dict[str, Any]]:
    """`ratio` to the exact gradient, and the largest distance of a component from alpha / (1 + alpha)."""
    del out, progress
    lam = jnp.asarray(np.random.default_rng([seed, 8]).standard_normal(SOURCES), jnp.float32)
    with jax.enable_x64(True):
        exact = [jnp.asarray(x, jnp.float64) for x in (lam, *drawn(seed))]
        ratio = gradient_ratio(alpha, *exact)
        error = float(jnp.max(jnp.abs(ratio - alpha / (1 + alpha))))
        return {"ratio": float(jnp.mean(ratio)), "ratio_error": error}, {}


def outer(w: Array, target: Array) -> Array:
    return outer_sum(w, target)[0]


def inner(lam: Array, w: Array, centres: Array) -> Array:
    return jnp.dot(weights_of(lam), inner_sums(w, centres)[0])


def found_by(name: str, centres: Array, target: Array) -> tuple[Array, Array]:
    """Weights after every EVERY steps [P, K], and the outer loss of w*(lam) there [P]."""
    zero, lam = jnp.zeros(DIM), jnp.zeros(SOURCES)
    if name == "penalty":
        tx = optax.sgd(0.1)
        made = bilevel.penalty_bilevel(outer_sum, inner_sums, alpha=4.0, w_opt=optax.sgd(0.1), u_opt=tx, lam_opt=tx)
        state: Any = made.init(zero, SOURCES)
        step = lambda state: made.step(state, centres[None], target[None])[0]  # noqa: E731
    elif name == "soba":
        soba = implicit.soba(outer, inner, learning_rate=0.5, lam_learning_rate=0.3)
        state, step = soba.init(lam, zero), lambda state: soba.step(state, (target,), (centres,))
    else:
        f2sa = implicit.f2sa(outer, inner, alpha=lambda k: 0.25 / (4 + 0.01 * k), gamma=0.5, multiplier=4.0,
                             difference=0.01, xi=1.0)  # fmt: skip
        state, step = f2sa.init(lam, zero), lambda state: f2sa.step(state, (target,), (centres,))

    def recorded(state: Any, _: None) -> tuple[Any, Array]:
        state = jax.lax.fori_loop(0, EVERY, lambda _, s: step(s), state)
        return state, weights_of(state.lam)

    _, path = jax.jit(lambda state: jax.lax.scan(recorded, state, None, length=STEPS // EVERY))(state)
    return path, jax.vmap(lambda p: outer(p @ centres, target))(path)


def searched(name: str, seed: int, out: Path, progress: StudyProgress) -> tuple[dict[str, float], dict[str, Any]]:
    """`outer_gap`: the validation loss of w*(lam) at the end; the best is 0."""
    del out, progress
    path, losses = found_by(name, *drawn(seed))
    steps = [float(EVERY * (i + 1)) for i in range(len(path))]
    series = {"path_steps": steps, "path": np.asarray(path).round(4).tolist(), "loss": np.asarray(losses).tolist()}
    return {"outer_gap": float(losses[-1])}, series


def studies() -> dict[str, Study]:
    fixed = {"sources": SOURCES, "dimensions": DIM, "steps": STEPS}
    oracles = {f"alpha_{alpha:g}": Study(functools.partial(oracle, alpha), {"alpha": alpha}) for alpha in ALPHAS}
    return oracles | {name: Study(functools.partial(searched, name), fixed) for name in ("penalty", "f2sa", "soba")}
