"""The contract between routers, token policies, dispatchers and losses.

Legend: T tokens, E experts, K static maximum of experts per token, B sequences, S positions, d hidden.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from moe.config import MoEConfig, require

ScaleOn = Literal["output", "input"]


@struct.dataclass
class RouterOutput:
    """What a router decides about T tokens. The layer does not care which router made it.

    Attributes:
      indices: [T, K] int32, the chosen experts.
      weights: [T, K] float32, combine weights (no gradient through the choice, only through the weights).
      valid: [T, K] bool; False drops the assignment (padding tokens, unused slots of a variable-k router,
        capacity). Token policies edit this field and nothing else.
      probs: [T, E] float32, the distribution balance losses average (softmax, or normalised sigmoid).
      logits: [T, E] float32.
      counts: [E] float32, valid assignments per expert; sum(counts) == sum(valid).
      scale_on: whether `weights` multiply the expert's output (all but Llama 4) or its input.
    """

    indices: Array
    weights: Array
    valid: Array
    probs: Array
    logits: Array
    counts: Array
    scale_on: ScaleOn = struct.field(pytree_node=False, default="output")


class Router(Protocol):
    """A pure function of its inputs, in float32: `(x, logits, token_ids, router_state, key) -> (RouterOutput, losses)`.

    `x` [T, d] is the layer's input, `logits` [T, E] = x W_r, `token_ids` [T] (hash routers), `router_state` what
    `init_state` made (biases, controllers: they move once per optimiser step, outside), `key` a per-layer PRNG key.
    `losses` are the router's own terms, each a *sum over tokens*: the train step divides once by the token count.
    """

    def init_state(self) -> Any: ...

    def __call__(
        self, x: Array, logits: Array, token_ids: Array, router_state: Any, key: Array
    ) -> tuple[RouterOutput, dict[str, Array]]: ...


def expert_counts(indices: Array, valid: Array, num_experts: int) -> Array:
    """Valid assignments per expert, [..., T, K] -> [..., E] float32 (exact below 2**24; bf16 only to 256)."""
    one_hot = jax.nn.one_hot(jnp.where(valid, indices, num_experts), num_experts, dtype=jnp.float32)
    return jnp.sum(one_hot, axis=(-3, -2))


def drop_padding(routing: RouterOutput, token_valid: Array) -> RouterOutput:
    """The token policy every layer applies: assignments of padding tokens (`token_valid` [T] False) are dropped."""
    valid = routing.valid & token_valid[:, None]
    return replace(routing, valid=valid, counts=expert_counts(routing.indices, valid, routing.probs.shape[-1]))


def import_object(path: str, what: str) -> Any:
    """Loads `package.module:name`; raises ValueError naming `what` when there is no such thing."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{what} = {path!r}: expected an import path `package.module:name` ({error})") from error


def make_router(config: MoEConfig) -> Router:
    """The router a config names: `softmax_topk` means `moe.routers.softmax_topk:make`, `a.b:c` is an import path."""
    path = config.router if ":" in config.router else f"moe.routers.{config.router}:make"
    factory = import_object(path, "moe.router")
    require(callable(factory), "moe.router", config.router, "a factory called as factory(num_experts=E, top_k=k)")
    options = {"renormalize": config.renormalize}
    accepted = {name: value for name, value in options.items() if name in inspect.signature(factory).parameters}
    return factory(num_experts=config.num_experts, top_k=config.top_k, **accepted)


def top_k_indices(scores: Array, k: int) -> Array:
    """[T, E] -> [T, k] int32, ties to the lowest index first."""
    return jax.lax.top_k(jax.lax.stop_gradient(scores), k)[1].astype(jnp.int32)
