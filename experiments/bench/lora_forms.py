"""One feed-forward with low-rank experts in the forms that `bench lora-experts` compares; see there.

Legend: T tokens, E experts, k active, r rank, d hidden, f feed-forward width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from experiments.bench.parts import normal
from kernels.lora import Implementation, slot_lora, slot_lora_sum
from moe.config import require
from moe.lora.dense import Choice, LoRA, mixed
from moe.lora.feed_forward import mix_lora_feed_forward

PLAIN_RANK, SCALE = 80, 2.0


@dataclass(frozen=True)
class FeedForwardShape:
    """A frozen SwiGLU with experts; the defaults are SmolLM2-135M's and MixLoRA's."""

    tokens: int = 512
    hidden: int = 576
    ffn_dim: int = 1536
    experts: int = 8
    top_k: int = 2
    rank: int = 16
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("tokens", "hidden", "ffn_dim", "experts", "top_k", "rank"):
            require(getattr(self, name) >= 1, f"shape.{name}", getattr(self, name), "an integer of at least 1")
        require(self.top_k <= self.experts, "shape.top_k", self.top_k, f"at most experts = {self.experts}")
        require(self.dtype in ("float32", "bfloat16"), "shape.dtype", self.dtype, "float32 or bfloat16")

    @property
    def words(self) -> str:
        return f"T={self.tokens} d={self.hidden} f={self.ffn_dim} {self.dtype}"

    def flops(self, frozen_products: int, adapters: int, rank: int) -> int:
        """Multiply-adds, times two, of so many frozen products and adapters of each token: forward, to the inputs, and
        for the three maps' adapters to their weights."""
        frozen = 2 * frozen_products * self.hidden * self.ffn_dim
        return 2 * self.tokens * (frozen + 3 * 3 * adapters * rank * (self.hidden + self.ffn_dim))


@dataclass(frozen=True)
class Problem:
    """Frozen gate_up [d, 2f] and down [f, d]; x [T, d]; experts and the plain adapter by target; a routing."""

    shape: FeedForwardShape
    gate_up: Array
    down: Array
    x: Array
    experts: dict[str, LoRA]
    plain: dict[str, LoRA]
    choice: Choice

    @classmethod
    def of(cls, shape: FeedForwardShape) -> Problem:
        d, f, dtype = shape.hidden, shape.ffn_dim, jnp.dtype(shape.dtype)

        def draw(seed: int, *size: int) -> Array:
            return normal(seed, *size, scale=size[-2] ** -0.5).astype(dtype)

        def adapters(seed: int, experts: int, rank: int) -> dict[str, LoRA]:
            sides = {"gate": (d, f), "up": (d, f), "down": (f, d)}
            return {
                name: LoRA(draw(seed + i, experts, n, rank), draw(seed + i + 3, experts, rank, m), None)
                for i, (name, (n, m)) in enumerate(sides.items())
            }

        weights, indices = jax.lax.top_k(jax.nn.softmax(normal(3, shape.tokens, shape.experts)), shape.top_k)
        weights = weights / jnp.sum(weights, axis=1, keepdims=True)
        choice = Choice(indices, weights, jnp.ones(indices.shape, bool))
        return cls(
            shape, draw(0, d, 2 * f), draw(1, f, d), normal(2, shape.tokens, d).astype(dtype),
            adapters(10, shape.experts, shape.rank), adapters(20, 1, min(PLAIN_RANK, d, f)), choice,
        )  # fmt: skip


def plain_lora(x: Array, loras: dict[str, LoRA], of: Problem) -> Array:
    """LoRA beside the three maps of one feed-forward."""
    both, f = x @ of.gate_up, of.down.shape[0]
    gate, up = (
        mixed(x, both[:, half], of.gate_up[:, half], loras[name], None, SCALE)
        for name, half in (("gate", slice(0, f)), ("up", slice(f, None)))
    )
    hidden = jax.nn.silu(gate) * up
    return mixed(hidden, hidden @ of.down, of.down, loras["down"], None, SCALE)


def activations(rows: Array, loras: dict[str, LoRA], of: Problem, how: Implementation) -> Array:
    """Each slot's, [T, k, f]; rows [T, k, d], or [T, 1, d] for frozen products shared by the slots of a token."""
    f, (indices, _, kept) = of.down.shape[0], of.choice
    both = rows @ of.gate_up
    gate, up = (
        both[..., half] + SCALE * slot_lora(rows, loras[name].a, loras[name].b, indices, kept, implementation=how)
        for name, half in (("gate", slice(0, f)), ("up", slice(f, None)))
    )
    return jax.nn.silu(gate) * up


def each_slot_down(hidden: Array, loras: dict[str, LoRA], of: Problem, how: Implementation) -> Array:
    """Down of every slot, then their weighted sum."""
    indices, weights, kept = of.choice
    change = slot_lora(hidden, loras["down"].a, loras["down"].b, indices, kept, implementation=how)
    return jnp.einsum("tk,tkd->td", weights.astype(hidden.dtype), hidden @ of.down + SCALE * change)


def naive(x: Array, loras: dict[str, LoRA], of: Problem, how: Implementation = "auto") -> Array:
    # Behind the barrier the compiler cannot see that a token's rows are alike.
    rows = jax.lax.optimization_barrier(jnp.broadcast_to(x[:, None], (x.shape[0], of.shape.top_k, x.shape[1])))
    return each_slot_down(activations(rows, loras, of, how), loras, of, how)


def shared(x: Array, loras: dict[str, LoRA], of: Problem, how: Implementation = "auto") -> Array:
    return each_slot_down(activations(x[:, None], loras, of, how), loras, of, how)


def ours(x: Array, loras: dict[str, LoRA], of: Problem) -> Array:
    return mix_lora_feed_forward(x, of.gate_up, of.down, loras, of.choice, SCALE)


def summed(x: Array, loras: dict[str, LoRA], of: Problem, how: Implementation) -> Array:
    """`ours` by a named form of the adapters' products."""
    hidden, weights = activations(x[:, None], loras, of, how), of.choice.weights.astype(x.dtype)
    total, (a, b, _) = jnp.einsum("tk,tkf->tf", weights, hidden), loras["down"]
    return total @ of.down + SCALE * slot_lora_sum(hidden, a, b, of.choice.indices, weights, implementation=how)


def sorted_form() -> Implementation:
    return "blocks" if jax.default_backend() == "cpu" else "ragged_dot"


def contestants(shape: FeedForwardShape) -> dict[str, tuple[Callable[..., Array], int]]:
    """By name what is timed, of (x, adapters, problem), and the arithmetic it needs."""
    k, rank, form = shape.top_k, shape.rank, sorted_form()
    plain = min(PLAIN_RANK, shape.hidden, shape.ffn_dim)
    return {
        "LoRA": (plain_lora, shape.flops(3, 1, plain)),
        "naive": (naive, shape.flops(3 * k, k, rank)),
        "shared": (shared, shape.flops(2 + k, k, rank)),
        "ours": (ours, shape.flops(3, k, rank)),
        "ours, concat": (functools.partial(summed, how="concat"), shape.flops(3, k, rank)),
        f"ours, {form}": (functools.partial(summed, how=form), shape.flops(3, k, rank)),
    }


def forward_backward(fn: Callable[..., Array], of: Problem, loras: dict[str, LoRA]) -> Callable[[], Any]:
    """A compiled call: output and gradients of x and the adapters. Frozen weights are arguments, not constants."""

    @jax.jit
    def run(x: Array, loras: dict[str, LoRA], gate_up: Array, down: Array, choice: Choice, cotangent: Array) -> Any:
        given = Problem(of.shape, gate_up, down, of.x, {}, {}, choice)
        out, pull = jax.vjp(lambda x, loras: fn(x, loras, given), x, loras)
        return out, pull(cotangent)

    cotangent = normal(9, *of.x.shape).astype(of.x.dtype)
    return lambda: run(of.x, loras, of.gate_up, of.down, of.choice, cotangent)
