"""Scores, a bias for the choice alone, groups of experts: the routers of DeepSeek-V2, -V3, GLM-4.5 and Kimi-K2.

    s  = softmax(z)  or  sigmoid(z)                                            z = x W_r
    s' = s + b                               b of the router's state, selection_bias=True; else s' = s
    G  = the `kept_groups` groups of consecutive experts whose score is best, s'_i = -inf outside of them
    I  = top-k(s'),  w_i = scaling s_i  or  scaling s_i / (sum_I s + 1e-20)    (renormalize=True), never with b

A group's score is the best s' in it (`max`: V2 2405.04434), the sum of its two best (`top2`: V3's released code) or of
its k / kept_groups best (`topk`: the V3 report 2412.19437, Megatron; for V3's 8 / 4 the same as `top2`). With one group
for each device or node this *is* device- or node-limited routing: a token reaches at most `kept_groups` of them.

b starts at zero and nothing here moves it: its updates are another router's. With b, the balance loss counts the plain
top-k of s, without b and without groups, as V3's sequence-wise loss does (2412.19437, Eqs. 17-20); without b, it counts
the experts chosen.

Traps: groups masked with 0 instead of -inf are chosen once s + b < 0. Renormalised with k = 1 gives weight `scaling`,
so the task loss sends no gradient to the router.
Legend: T tokens, E experts, k active, d hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from moe.config import require
from moe.routing import RouterOutput, at_least_float32, fused_top_k, token_choice, top_k_indices

Score = Literal["softmax", "sigmoid"]
GroupScore = Literal["max", "top2", "topk"]


def choose(
    scores: Array,
    bias: Array | None,
    top_k: int,
    groups: int = 1,
    kept_groups: int = 1,
    group_score: GroupScore = "max",
) -> Array:
    """The k best of scores + bias within the best groups: scores [T, E], bias [E] or None -> [T, k] int32, best first.

    The options are those that `require_groups` lets pass. No gradient.
    """
    biased = jax.lax.stop_gradient(scores if bias is None else scores + bias[None])
    if kept_groups < groups:
        grouped = biased.reshape(*biased.shape[:-1], groups, -1)
        counted = {"max": 1, "top2": 2, "topk": top_k // kept_groups}[group_score]
        best = jnp.sum(jax.lax.top_k(grouped, counted)[0], axis=-1)
        kept = jnp.any(jax.nn.one_hot(top_k_indices(best, kept_groups), groups, dtype=bool), axis=-2)
        biased = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(biased.shape)
    return top_k_indices(biased, top_k)


def require_groups(num_experts: int, top_k: int, groups: int, kept_groups: int, group_score: str) -> None:
    """ValueError unless `choose` finds k experts in every choice of groups."""
    require(1 <= top_k <= num_experts, "moe.top_k", top_k, f"1 <= top_k <= num_experts = {num_experts}")
    require(groups >= 1 and num_experts % groups == 0, "moe.router groups", groups, f"a divisor of {num_experts}")
    size = num_experts // groups
    require(1 <= kept_groups <= groups, "moe.router kept_groups", kept_groups, f"1 to groups = {groups}")
    require(kept_groups * size >= top_k, "moe.router kept_groups", kept_groups, f"groups of {size} to hold k = {top_k}")
    known = get_args(GroupScore)
    require(group_score in known, "moe.router group_score", group_score, f"one of {', '.join(known)}")
    require(
        group_score != "top2" or size >= 2, "moe.router group_score", group_score, f"two experts a group, not {size}"
    )
    require(
        group_score != "topk" or top_k % kept_groups == 0,
        "moe.router group_score",
        group_score,
        f"k = {top_k} to be a multiple of kept_groups = {kept_groups}",
    )


@dataclass(frozen=True)
class GroupLimited:
    """See the module; state {"bias": [E] float32} with `selection_bias`, else {}."""

    num_experts: int
    top_k: int
    score: Score
    groups: int
    kept_groups: int
    group_score: GroupScore
    selection_bias: bool
    renormalize: bool
    scaling: float
    fused: bool = False

    def init_state(self) -> dict[str, Array]:
        return {"bias": jnp.zeros((self.num_experts,), jnp.float32)} if self.selection_bias else {}

    def __call__(
        self, x: Array, logits: Array, token_ids: Array, router_state: dict[str, Array], key: Array | None
    ) -> tuple[RouterOutput, dict[str, Array]]:
        del x, token_ids, key
        logits = at_least_float32(logits)
        bias = router_state["bias"] if self.selection_bias else None
        if self.fused:
            return self.fused_choice(logits, bias), {}
        if self.score == "softmax":
            scores = probs = jax.nn.softmax(logits, axis=-1)
        else:
            scores = jax.nn.sigmoid(logits)
            probs = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
        indices = choose(scores, bias, self.top_k, self.groups, self.kept_groups, self.group_score)
        weights = jnp.take_along_axis(scores, indices, axis=-1)
        if self.renormalize:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        counted = top_k_indices(scores, self.top_k) if self.selection_bias else None
        return token_choice(probs, logits, indices, self.scaling * weights, balance_indices=counted), {}

    def fused_choice(self, logits: Array, bias: Array | None) -> RouterOutput:
        """The same by one kernel on GPU, and one more where the balance loss counts another choice."""
        choice = partial(fused_top_k, logits, self.top_k, score=self.score)
        indices, weights, probs = choice(bias=bias, renormalize=self.renormalize, scaling=self.scaling)
        counted = choice(with_probs=False)[0] if self.selection_bias else None
        return token_choice(jnp.asarray(probs), logits, indices, weights, balance_indices=counted)


def make(
    num_experts: int,
    top_k: int,
    score: Score = "softmax",
    groups: int = 1,
    kept_groups: int = 1,
    group_score: GroupScore = "max",
    selection_bias: bool = False,
    renormalize: bool = False,
    scaling: float = 1.0,
    fused: bool = False,
) -> GroupLimited:
    """See the module; `fused` runs one kernel on GPU.

    Raises:
      ValueError: options out of range, groups that leave fewer than k experts, or groups for the kernel, which knows
        none.
    """
    require(score in get_args(Score), "moe.router score", score, f"one of {', '.join(get_args(Score))}")
    require_groups(num_experts, top_k, groups, kept_groups, group_score)
    for name, value in (("selection_bias", selection_bias), ("renormalize", renormalize), ("fused", fused)):
        require(isinstance(value, bool), f"moe.router {name}", value, "True or False")
    require(0 < scaling < math.inf, "moe.router scaling", scaling, "a finite number above 0")
    require(not fused or kept_groups == groups, "moe.router fused", fused, "False where groups are left out")
    return GroupLimited(
        num_experts, top_k, score, groups, kept_groups, group_score, selection_bias, renormalize, scaling, fused
    )
