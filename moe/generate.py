"""Text generation: one pass over the prompts, then one token at a time against a cache of keys and values.

Layers are taken out of their stacks first: a loop over stacked layers reads and writes every layer's weights once more
at each token, and decoding is bound by exactly that traffic. Prompts of different lengths are padded on the right; a
cache slot is a position, so what padding writes is overwritten before anything may see it.

Legend: B sequences, S prompt positions (padded), C cache slots, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe.config import ModelConfig, require
from moe.lora.config import AdapterConfig
from moe.lora.dense import COLLECTION
from moe.routing import make_router
from moe.transformer import Block, Cache, PerLayer, RMSNorm, Shared, rotations

BUCKET = 32  # prompts and caches are padded to multiples of this, so that few lengths are compiled


class Model(Protocol):
    """What is generated from: `moe.pretrained.model.Pretrained`, or anything with these. One that also has `adapters`
    and their `adapter_config` is adapted (`moe.lora.adapters.Adapted`)."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def params(self) -> Any: ...
    @property
    def router_state(self) -> Any: ...


class Weights(NamedTuple):
    """Variables (`params`, and `adapters` where there are any) with one entry per layer, and each layer's router state;
    the head is [d, V]."""

    embedding: Array
    head: Array
    final_norm: Any
    layers: tuple[dict[str, Any], ...]
    router_states: tuple[Any, ...]


def unstacked(config: ModelConfig, params: Any, router_state: Any, adapters: Any = None) -> Weights:
    """Parameters [L, ...] of a `Transformer` as separate layers: a copy of all but an embedding.

    The head is turned, also where it is the embedding: a product with few rows streams [d, V] at the memory's pace,
    [V, d] at a third to three quarters of it (XLA:CPU).
    """
    layers, states, moe_layer = [], [], 0
    collections = {"params": params} | ({} if adapters is None else {COLLECTION: adapters})
    for run, (kind, group) in enumerate(groupby(config.layer_kinds)):
        of_run = {name: tree.get(f"runs_{run}", {}) for name, tree in collections.items()}
        for i, _ in enumerate(group):
            layers.append(jax.tree.map(lambda leaf, i=i: leaf[i], of_run))
            of_layer = jax.tree.map(lambda leaf, i=moe_layer: leaf[i], router_state) if kind == "moe" else {}
            states.append(of_layer)
            moe_layer += kind == "moe"
    head = params["embedding"] if config.tie_embeddings else params["head"]
    return Weights(params["embedding"], jnp.transpose(head), params["final_norm"], tuple(layers), tuple(states))


def empty_caches(config: ModelConfig, batch: int, slots: int) -> tuple[Cache, ...]:
    """A cache of C = `slots` positions for each layer, in the compute dtype."""
    dtype = jnp.dtype(config.compute_dtype)
    if config.latent is None:
        shapes = ((batch, slots, config.num_kv_heads, config.head_dim),) * 2
    else:
        shapes = ((batch, slots, 1, config.latent.kv_rank + config.latent.rope_dim),)
    return tuple(tuple(jnp.zeros(shape, dtype) for shape in shapes) for _ in range(config.num_layers))


def cached_forward(
    config: ModelConfig,
    weights: Weights,
    tokens: Array,
    segment_ids: Array,
    positions: Array,
    caches: tuple[Cache, ...],
    adapters: AdapterConfig | None = None,
) -> tuple[Array, tuple[Cache, ...]]:
    """The transformer on new tokens and their positions [B, Q] -> hidden [B, Q, d] after the final norm, and caches."""
    x = jnp.take(weights.embedding, tokens, axis=0).astype(config.compute_dtype)
    shared = Shared(tokens, segment_ids, positions, rotations(config, positions))
    windows = config.windows or (None,) * config.num_layers
    written = []
    for kind, window, layer, state, cache in zip(
        config.layer_kinds, windows, weights.layers, weights.router_states, caches, strict=True
    ):
        block = Block(config, kind, adapters)
        x, (*_, cache) = block.apply(layer, x, PerLayer(state, None, window or None), shared, cache)
        written.append(cache)
    return apply_norm(config, weights, x), tuple(written)


def apply_norm(config: ModelConfig, weights: Weights, x: Array) -> Array:
    norm: nn.Module = RMSNorm(config.norm_eps)
    return norm.apply({"params": weights.final_norm}, x)  # pyright: ignore[reportReturnType]


class Sampling(NamedTuple):
    """temperature 0 takes the likeliest token; top_p < 1 draws from the smallest set of tokens with that mass."""

    temperature: float = 0.0
    top_p: float = 1.0


def sample(logits: Array, sampling: Sampling, key: Array) -> Array:
    """A token [B] for each row of logits [B, V], float32."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1.0:
        ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probs = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # the likeliest token is always kept
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


@partial(jax.jit, static_argnames=("config", "adapters", "sampling"), donate_argnames=("caches",))
def advance(
    config: ModelConfig,
    adapters: AdapterConfig | None,
    sampling: Sampling,
    weights: Weights,
    tokens: Array,
    lengths: Array,
    start: Array,
    caches: tuple[Cache, ...],
    key: Array,
) -> tuple[Array, tuple[Cache, ...]]:
    """Feeds tokens [B, Q], of which `lengths` [B] are real, at positions from `start` [B] on; the next token [B]."""
    offsets = jnp.arange(tokens.shape[1])[None]
    segment_ids = (offsets < lengths[:, None]).astype(jnp.int32)
    hidden, caches = cached_forward(config, weights, tokens, segment_ids, start[:, None] + offsets, caches, adapters)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    logits = jnp.dot(last, weights.head.astype(last.dtype), preferred_element_type=jnp.float32)
    return sample(logits, sampling, key), caches


class Generator:
    """Generates from one model, its layers unstacked once.

    Raises:
      ValueError: a router or token policy that looks at other tokens: its choices differ with a cache.
    """

    def __init__(self, model: Model) -> None:
        self.config = model.config
        if (moe := model.config.moe) is not None:
            causal = getattr(make_router(moe), "causal", True)
            require(causal, "model.moe.router", moe.router, "a causal router, for generation")
            require(moe.policy == "dropless", "model.moe.policy", moe.policy, "dropless, for generation")
        self.adapters: AdapterConfig | None = getattr(model, "adapter_config", None)
        if self.adapters is not None and (experts := self.adapters.experts) is not None:
            causal = getattr(make_router(experts.as_moe), "causal", True)
            require(causal, "experts.router", experts.router, "a causal router, for generation")
            require(experts.policy == "dropless", "experts.policy", experts.policy, "dropless, for generation")
        self.weights = unstacked(model.config, model.params, model.router_state, getattr(model, "adapters", None))

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Collection[int] = (),
    ) -> Iterator[np.ndarray]:
        """Yields the next token of every sequence, int32 [B], as it is made; -1 for a sequence that has ended.

        Args:
          prompts: token ids, of any lengths.
          max_new_tokens: the most tokens a sequence gets.
          temperature, top_p: see `Sampling`.
          seed: of the draws, which are a function of (seed, step, sequence).
          stop: ids that end a sequence; the id itself is yielded.

        Raises:
          ValueError: an empty prompt, a token that is not in the vocabulary, more positions than the model's context,
            or options out of range; before anything is compiled.
        """
        check_prompts(self.config, prompts, max_new_tokens)
        require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
        require(0.0 <= temperature < float("inf"), "temperature", temperature, "a finite number, 0 or more")
        require(0.0 < top_p <= 1.0, "top_p", top_p, "above 0, at most 1")
        return self._tokens(prompts, max_new_tokens, Sampling(temperature, top_p), seed, frozenset(stop))

    def _tokens(
        self, prompts: Sequence[Sequence[int]], steps: int, sampling: Sampling, seed: int, stop: frozenset[int]
    ) -> Iterator[np.ndarray]:
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        padded = np.zeros((len(prompts), padded_length(lengths.max())), np.int32)
        for row, prompt in zip(padded, prompts):
            row[: len(prompt)] = prompt
        caches = empty_caches(self.config, len(prompts), max(padded_length(lengths.max() + steps), padded.shape[1]))
        key, zeros = jax.random.key(seed), np.zeros_like(lengths)
        ended = np.zeros(len(prompts), bool)
        step = partial(advance, self.config, self.adapters, sampling, self.weights)
        tokens, caches = step(padded, lengths, zeros, caches, jax.random.fold_in(key, 0))
        for i in range(1, steps + 1):
            new = np.asarray(tokens)
            yield np.where(ended, -1, new)
            ended = ended | np.isin(new, list(stop))
            if i == steps or ended.all():
                return
            tokens, caches = step(tokens[:, None], zeros + 1, lengths + i - 1, caches, jax.random.fold_in(key, i))


def generate(model: Model, prompts: Sequence[Sequence[int]], **options: Any) -> Iterator[np.ndarray]:
    """`Generator(model)(prompts, **options)`, for one call."""
    return Generator(model)(prompts, **options)


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int = 0) -> None:
    """ValueError for a prompt that is empty, holds an id outside of the vocabulary, or leaves the context."""
    require(len(prompts) > 0, "prompts", prompts, "at least one prompt")
    for i, prompt in enumerate(prompts):
        require(len(prompt) > 0, f"prompts[{i}]", list(prompt), "at least one token")
        wrong = [token for token in prompt if not 0 <= token < config.vocab_size]
        require(not wrong, f"prompts[{i}] token", wrong[:1], f"ids from 0 to {config.vocab_size - 1}")
        total = len(prompt) + max_new_tokens
        fits = config.context == 0 or total <= config.context
        asked = f"{len(prompt)} tokens + max_new_tokens = {max_new_tokens}"
        require(fits, f"prompts[{i}] length", asked, f"at most the model's context of {config.context}")


def padded_length(length: int) -> int:
    """The least multiple of BUCKET that holds so many positions."""
    return -(-int(length) // BUCKET) * BUCKET
