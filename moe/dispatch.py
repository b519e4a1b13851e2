"""Dispatchers: from tokens and a routing to the experts' weighted sum. All are equal on one routing.

The layer calls one method, `apply(x, routing, experts)`. Capacity is not here: it is a token policy that edits
`routing.valid` beforehand. Legend: T tokens, K assignments per token, E experts, d hidden, f expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from kernels.grouped_ffn import Activation, Implementation, grouped_ffn
from moe.config import MoEConfig, require
from moe.routing import RouterOutput
from parallel import exchange
from parallel.mesh import AXES, expert_axis_size, on_shards


class ExpertParams(NamedTuple):
    """gate_up [E, d, 2f] (gate first, then up; [E, d, f] for activations without a gate), down [E, f, d], and biases
    [E, 2f] and [E, d] or None."""

    gate_up: Array
    down: Array
    gate_up_bias: Array | None = None
    down_bias: Array | None = None


class Dispatcher(Protocol):
    """`apply(x [T, d], routing, experts) -> [T, d]`; invalid assignments contribute zero."""

    def apply(self, x: Array, routing: RouterOutput, experts: ExpertParams) -> Array: ...


@dataclass(frozen=True)
class Grouped:
    """Sort by expert, grouped FFN, weighted gather back: dropless, work proportional to the valid assignments.

    `implementation="reference"` is the oracle instead: one-hot einsums of every expert on every token, E / K times the
    work.
    """

    implementation: Implementation = "auto"
    block_size: int = 0
    activation: Activation = "swiglu"

    def apply(self, x: Array, routing: RouterOutput, experts: ExpertParams) -> Array:
        return grouped_ffn(
            x,
            routing.indices,
            routing.weights,
            routing.valid,
            experts.gate_up,
            experts.down,
            gate_up_bias=experts.gate_up_bias,
            down_bias=experts.down_bias,
            activation=self.activation,
            block_size=self.block_size,
            scale_on=routing.scale_on,
            implementation=self.implementation,
        )


@dataclass(frozen=True)
class Exchange:
    """Experts spread over a mesh axis: all-to-all, `inner` on those held here, all-to-all back. In shard_map."""

    inner: Dispatcher
    axis: str = "expert"

    def apply(self, x: Array, routing: RouterOutput, experts: ExpertParams) -> Array:
        local = experts.down.shape[0]
        (num_tokens, top_k), d = routing.indices.shape, x.shape[-1]
        num_experts = local * jax.lax.axis_size(self.axis)
        plan = exchange.plan_exchange(routing.indices, routing.valid, num_experts=num_experts, axis=self.axis)
        weights = (routing.weights * routing.valid).astype(x.dtype)[..., None]
        on_input = routing.scale_on == "input"
        sent = (x[:, None] * weights).reshape(num_tokens * top_k, d) if on_input else x
        rows = exchange.send_to_experts(sent, plan, self.axis)
        results = self.inner.apply(rows, _received(plan.received_expert, local), experts)
        back = exchange.return_to_tokens(results, plan, self.axis).reshape(num_tokens, top_k, d)
        return jnp.sum(back if on_input else back * weights, axis=1)


def _received(expert: Array, num_experts: int) -> RouterOutput:
    """Received rows as a routing with K = 1: each row goes to its one expert with weight 1, padding to none."""
    valid = expert < num_experts
    empty = jnp.zeros((expert.shape[0], 0), jnp.float32)
    return RouterOutput(
        indices=jnp.where(valid, expert, 0)[:, None],
        weights=jnp.ones((expert.shape[0], 1), jnp.float32),
        valid=valid[:, None],
        probs=empty,
        logits=empty,
        counts=empty[0],
    )


def make_dispatcher(config: MoEConfig) -> Dispatcher:
    """The local dispatcher a config names."""
    names: dict[str, Implementation] = {
        "auto": "auto", "blocks": "blocks", "einsum": "reference", "ragged": "ragged_dot", "triton": "triton"
    }  # fmt: skip
    return Grouped(names[config.dispatcher], config.block_size, config.activation)


def dispatch(x: Array, routing: RouterOutput, experts: ExpertParams, local: Dispatcher) -> Array:
    """Applies `local` to tokens sharded over the current mesh, exchanging them over `expert` where that axis is real.

    x [T, d] and the routing are split over all axes, experts over `expert` (and gathered over `fsdp` on entry).
    """
    require(x.shape[0] >= 1, "num_tokens", x.shape[0], "at least one token")
    inner: Dispatcher = Exchange(local) if expert_axis_size() > 1 else local

    def shard(x: Array, indices: Array, weights: Array, valid: Array, experts: ExpertParams) -> Array:
        none = jnp.zeros((indices.shape[0], 0), jnp.float32)  # dispatchers read no probabilities
        return inner.apply(x, RouterOutput(indices, weights, valid, none, none, none[0], routing.scale_on), experts)

    tokens = P(AXES, None)
    fn = on_shards(shard, (tokens, tokens, tokens, tokens, P("expert")), tokens)
    return fn(x, routing.indices, routing.weights, routing.valid, experts)
