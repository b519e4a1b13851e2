"""Token policies: which of a routing's assignments are carried out. A policy edits `routing.valid` and nothing else.

Capacity (GShard 2006.16668, Switch 2101.03961): every expert takes at most C assignments of a group of N tokens,

    C = ceil(factor * k N / E),

and drops the rest; a dropped token keeps only its residual. Legend: T tokens, K (static) and k experts per token,
E experts, B sequences, S positions, N tokens of one group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import jax
import jax.numpy as jnp
from jax import Array

from moe.config import MoEConfig, require
from moe.routing import RouterOutput, expert_counts, from_spec, require_causal

Drop = Literal["position", "probability"]
Order = Literal["choice", "token"]


class TokenPolicy(Protocol):
    """`policy(routing of T = B * S tokens, num_sequences=B, training=...) -> routing` with fewer valid assignments."""

    def __call__(self, routing: RouterOutput, *, num_sequences: int, training: bool) -> RouterOutput: ...


@dataclass(frozen=True)
class Dropless:
    """Every valid assignment is carried out."""

    def __call__(self, routing: RouterOutput, *, num_sequences: int, training: bool) -> RouterOutput:
        del num_sequences, training
        return routing


@dataclass(frozen=True)
class Capacity:
    """At most C assignments per expert and group.

    Attributes:
      factor, eval_factor: capacity over the balanced load, in training and at evaluation (ST-MoE: 1.25 and 2).
      drop: who goes when an expert is full: the later ones (`position`) or the less probable ones (`probability`;
        V-MoE's batch priority, Megatron's `probs`: a token's place then depends on later tokens).
      order: of `position`: all first choices before any second one (`choice`, GShard) or token by token (`token`,
        MaxText). Only `token` is strictly causal: a later token's first choice can displace an earlier one's second.
      group: sequences that share a capacity, consecutive ones; 0 for all of the pass.
    """

    num_experts: int
    top_k: int
    factor: float
    eval_factor: float
    drop: Drop
    order: Order
    group: int

    @property
    def causal(self) -> bool:
        return self.drop == "position"

    def limit(self, group_tokens: int, training: bool) -> int:
        """C for a group of that many tokens, padding included (shapes are static)."""
        factor = self.factor if training else self.eval_factor
        return math.ceil(factor * self.top_k * group_tokens / self.num_experts)

    def __call__(self, routing: RouterOutput, *, num_sequences: int, training: bool) -> RouterOutput:
        group = self.group or num_sequences
        require(num_sequences % group == 0, "moe.policy group", group, f"a divisor of {num_sequences} sequences")
        num_tokens, width = routing.indices.shape
        groups = num_sequences // group
        split = lambda x: x.reshape(groups, num_tokens // groups, width)  # noqa: E731
        experts = split(jnp.where(routing.valid, routing.indices, self.num_experts))
        chosen = jnp.take_along_axis(routing.probs, routing.indices, axis=1)
        rank = jax.vmap(self._rank)(experts, split(jax.lax.stop_gradient(chosen)))
        kept = rank.reshape(num_tokens, width) < self.limit(num_tokens // groups, training)
        valid = routing.valid & kept
        return replace(routing, valid=valid, counts=expert_counts(routing.indices, valid, self.num_experts))

    def _rank(self, experts: Array, probs: Array) -> Array:
        """Place of each assignment in its expert's queue; experts, probs [N, K] -> [N, K] int32. E is nobody's."""
        by_choice = self.order == "choice" or self.drop == "probability"
        line = lambda x: x.T.reshape(-1) if by_choice else x.reshape(-1)  # noqa: E731
        expert, queue = line(experts), jnp.arange(experts.size)
        if self.drop == "probability":
            queue = jnp.argsort(-line(probs), stable=True)
        order = queue[jnp.argsort(expert[queue], stable=True)]
        first = jnp.searchsorted(expert[order], jnp.arange(self.num_experts + 1), side="left")
        rank = jnp.zeros(experts.size, jnp.int32)
        rank = rank.at[order].set((jnp.arange(experts.size) - first[expert[order]]).astype(jnp.int32))
        return rank.reshape(experts.T.shape).T if by_choice else rank.reshape(experts.shape)


def dropless(num_experts: int, top_k: int) -> Dropless:
    """The policy of every preset without a capacity; the sizes are those every policy is made with."""
    del num_experts, top_k
    return Dropless()


def capacity(
    num_experts: int,
    top_k: int,
    factor: float,
    eval_factor: float | None = None,
    drop: Drop = "position",
    order: Order = "choice",
    group: int = 1,
) -> Capacity:
    """See `Capacity`; `eval_factor` is `factor` unless given. ValueError for options out of range."""
    eval_factor = factor if eval_factor is None else eval_factor
    for name, value in (("factor", factor), ("eval_factor", eval_factor)):
        require(0 < value < math.inf, f"moe.policy {name}", value, "a finite number above 0")
    require(drop in get_args(Drop), "moe.policy drop", drop, f"one of {', '.join(get_args(Drop))}")
    require(order in get_args(Order), "moe.policy order", order, f"one of {', '.join(get_args(Order))}")
    require(group >= 0, "moe.policy group", group, "a number of sequences, or 0 for the whole pass")
    return Capacity(num_experts, top_k, factor, eval_factor, drop, order, group)


def make_policy(config: MoEConfig) -> TokenPolicy:
    """The policy a config names. ValueError if it is unknown, or not causal and not allowed."""
    sizes = {"num_experts": config.num_experts, "top_k": config.top_k}
    policy = from_spec(config.policy, "moe.policies:{}", "moe.policy", **sizes)
    require_causal(policy, config, "moe.policy", config.policy)
    return policy
