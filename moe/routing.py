"""The contract between routers, token policies, dispatchers and losses.

Legend: T tokens, E experts, K static maximum of experts per token, B sequences, S positions, d hidden.
"""

from __future__ import annotations

import ast
import importlib
from dataclasses import replace
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import PartitionSpec as P

from kernels.routing_gpu import route
from moe.config import MoEConfig, require
from parallel.mesh import AXES, on_shards

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
      balance_indices: [T, K] int32 or None, the choices the balance loss counts where they are not `indices`
        (DeepSeek-V3 counts the top-k of the scores without the bias).
      observed: any pytree of sums over tokens that the router's `update` wants of the whole optimiser step.
    """

    indices: Array
    weights: Array
    valid: Array
    probs: Array
    logits: Array
    counts: Array
    scale_on: ScaleOn = struct.field(pytree_node=False, default="output")
    balance_indices: Array | None = None
    observed: Any = None


class Router(Protocol):
    """A pure function of its inputs, in float32: `(x, logits, token_ids, router_state, key) -> (RouterOutput, losses)`.

    `x` [T, d] is the layer's input, `logits` [T, E] = x W_r, `token_ids` [T] (-1 where padding), `router_state` what
    `init_state` made, `key` a per-layer PRNG key, or None at evaluation: nothing is drawn then. `losses` are the
    router's own terms with their coefficients, each a *sum over tokens*: the train step divides once by the token
    count. A router with parameters of its own is a Linen module.

    Three things are optional. `router_input(x, key) -> x` changes what W_r multiplies in training (jitter).
    `causal = False` says that a token's choice depends on later tokens: such a router is refused unless
    `moe.allow_noncausal`. `update(state, counts, observed) -> state` moves biases and controllers, once per optimiser
    step: state and `observed` (RouterOutput's, summed over the step) lead with the layers [L, ...], `counts` [L, G, E]
    are the assignments of every micro-batch.
    """

    def init_state(self) -> Any: ...

    def __call__(
        self, x: Array, logits: Array, token_ids: Array, router_state: Any, key: Array | None
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


def parse_call(text: str, what: str) -> tuple[str, dict[str, Any]]:
    """`name(option=literal, ...)` or `name` -> (name, options); ValueError naming `what` for anything else."""
    name, parenthesis, rest = text.partition("(")
    try:
        call = ast.parse(f"f{parenthesis}{rest}" if parenthesis else "f()", mode="eval").body
        assert isinstance(call, ast.Call)
        assert not call.args
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise ValueError(f"{what} = {text!r}: expected `name` or `name(option=value, ...)`") from error
    return name.strip(), options


def from_spec(spec: str, known: str, what: str, **arguments: Any) -> Any:
    """Calls the factory a spec names, `name(option=literal)`, with the options and `arguments`.

    A name is looked up as `known.format(name)`; one with a colon is an import path itself.

    Raises:
      ValueError: no such factory, or one that does not take these options.
    """
    name, options = parse_call(spec, what)
    factory = import_object(name if ":" in name else known.format(name), what)
    require(callable(factory), what, spec, f"a factory called as factory({', '.join(arguments)})")
    try:
        return factory(**arguments, **options)
    except TypeError as error:
        raise ValueError(f"{what} = {spec!r}: expected options that {name} takes ({error})") from error


def make_router(config: MoEConfig) -> Router:
    """The router a config names: `softmax_topk` means `moe.routers.softmax_topk:make`, `a.b:c` is an import path."""
    sizes = {"num_experts": config.num_experts, "top_k": config.top_k}
    router = from_spec(config.router, "moe.routers.{}:make", "moe.router", **sizes)
    require_causal(router, config, "moe.router", config.router)
    return router


def require_causal(part: Any, config: MoEConfig, what: str, spec: str) -> None:
    """Every model here is causal: a part that looks at later tokens must be allowed by name."""
    causal = getattr(part, "causal", True)
    require(
        causal or config.allow_noncausal,
        what,
        spec,
        "a choice that does not depend on later tokens, or moe.allow_noncausal = True",
    )


def update_router_state(config: MoEConfig, state: Any, counts: Array, observed: Any) -> Any:
    """The routers' state after an optimiser step, see `Router.update`; unchanged for routers that keep none."""
    update = getattr(make_router(config), "update", None)
    return state if update is None else update(state, jax.lax.stop_gradient(counts), observed)


def at_least_float32(logits: Array) -> Array:
    """Routers decide in float32 whatever the compute type (float64 stays, for tests)."""
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def top_k_indices(scores: Array, k: int) -> Array:
    """[T, E] -> [T, k] int32, ties to the lowest index first."""
    return jax.lax.top_k(jax.lax.stop_gradient(scores), k)[1].astype(jnp.int32)


def fused_top_k(logits: Array, top_k: int, **options: Any) -> tuple[Array, Array, Array | None]:
    """Indices and weights [T, K] and probabilities [T, E] by the fused router, one kernel on a GPU, each device for its
    own tokens. Options, meaning and errors are those of `kernels.routing_gpu.route`."""
    tokens = P(AXES, None)

    def on_shard(logits: Array, bias: Array | None) -> tuple[Array, Array, Array | None]:
        made = route(logits, top_k, bias=bias, **options)
        return made.indices, made.weights, made.probs

    bias = options.pop("bias", None)
    return on_shards(on_shard, (tokens, P()), tokens)(logits, bias)


def token_choice(
    probs: Array, logits: Array, indices: Array, weights: Array, valid: Array | None = None, **more: Any
) -> RouterOutput:
    """A RouterOutput with its counts; every assignment valid unless `valid` [T, K] says otherwise."""
    valid = jnp.ones(indices.shape, bool) if valid is None else valid
    counts = expert_counts(indices, valid, probs.shape[-1])
    return RouterOutput(indices.astype(jnp.int32), weights, valid, probs, logits, counts, **more)
