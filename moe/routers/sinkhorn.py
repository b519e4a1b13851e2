"""S-BASE: balanced assignment by a Sinkhorn plan (BASE 2103.16716; S-BASE 2202.01169, as in Megatron-core).

    plan = diag(u) exp(z) diag(v) with rows summing to 1 / T and columns to 1 / E;   I = top-k of the plan's rows
    w_i = sigmoid(z_i) for k = 1, softmax(z)_i for k > 1

The plan takes no gradient. It couples the tokens of a pass, so the choice is not causal in training; at evaluation it
is the plain top-k of z. Legend: T tokens of the pass, E experts, k active, d hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from moe.config import require
from moe.routing import RouterOutput, at_least_float32, token_choice, top_k_indices


def sinkhorn_plan(logits: Array, valid: Array, tolerance: float, iterations: int) -> Array:
    """The balanced plan [T, E] of logits [T, E]; rows of tokens that are not `valid` [T] are zero.

    Rows and columns are scaled in turn until the columns' mean absolute relative change is below `tolerance`.
    """
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)  # a row's scale is the plan's to choose
    cost = jnp.where(valid[:, None], jnp.exp(shifted), 0.0)
    num_experts = cost.shape[1]
    tokens = jnp.maximum(jnp.sum(valid, dtype=cost.dtype), 1.0)
    tiny = jnp.finfo(cost.dtype).tiny

    def rows(column: Array) -> Array:
        return jnp.where(valid, 1.0 / tokens, 0.0) / jnp.maximum(cost @ column, tiny)

    def columns(row: Array) -> Array:
        return 1.0 / num_experts / jnp.maximum(row @ cost, tiny)

    def going_on(carry: tuple[Array, Array, Array]) -> Array:
        return (carry[1] > tolerance) & (carry[2] < iterations)

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        column, _, count = carry
        new = columns(rows(column))
        return new, jnp.mean(jnp.abs(new - column) / new), count + 1

    start = jnp.ones((num_experts,), cost.dtype), jnp.asarray(jnp.inf, cost.dtype), jnp.int32(0)
    column = jax.lax.while_loop(going_on, step, start)[0]
    return rows(column)[:, None] * cost * column[None]


@dataclass(frozen=True)
class Sinkhorn:
    """See the module."""

    top_k: int
    tolerance: float
    iterations: int
    causal = False

    def init_state(self) -> dict:
        return {}

    def __call__(
        self, x: Array, logits: Array, token_ids: Array, router_state: dict, key: Array | None
    ) -> tuple[RouterOutput, dict[str, Array]]:
        del x, router_state
        logits = at_least_float32(logits)
        frozen = jax.lax.stop_gradient(logits)
        scores = frozen if key is None else sinkhorn_plan(frozen, token_ids >= 0, self.tolerance, self.iterations)
        indices = top_k_indices(scores, self.top_k)
        probs = jax.nn.softmax(logits, axis=-1)
        gate = jax.nn.sigmoid(logits) if self.top_k == 1 else probs
        return token_choice(probs, logits, indices, jnp.take_along_axis(gate, indices, axis=-1)), {}


def make(num_experts: int, top_k: int, tolerance: float = 1e-4, iterations: int = 100) -> Sinkhorn:
    """Raises ValueError unless 1 <= top_k <= num_experts, tolerance > 0 and iterations >= 1."""
    require(1 <= top_k <= num_experts, "moe.top_k", top_k, f"1 <= top_k <= num_experts = {num_experts}")
    require(tolerance > 0, "moe.router tolerance", tolerance, "above 0")
    require(iterations >= 1, "moe.router iterations", iterations, "at least 1")
    return Sinkhorn(top_k, tolerance, iterations)
