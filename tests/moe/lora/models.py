"""A tiny model, inputs for it, and adapters that have been trained a little (random, B not zero)."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.config import ModelConfig
from moe.lora.adapters import init_adapters
from moe.lora.config import AdapterConfig
from moe.transformer import Transformer, TransformerOutput, init_params

CONFIG = ModelConfig(
    vocab_size=64, hidden=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, moe=None
)
LENGTH = 12


@cache
def base(config: ModelConfig = CONFIG, std: float = 0.05) -> Any:
    """Parameters large enough for every part to matter."""
    made = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf * std / 0.02, made)


def tokens(batch: int = 2) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (batch, LENGTH), 0, CONFIG.vocab_size)


@cache
def trained(adapters: AdapterConfig, config: ModelConfig = CONFIG, seed: int = 3) -> Any:
    """Random adapters of every size for `base(config)`, magnitudes near their own."""
    made = init_adapters(config, adapters, base(config), jax.random.key(seed))
    leaves, tree = jax.tree.flatten(made)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noise = [0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.map(jnp.add, made, jax.tree.unflatten(tree, noise))


@partial(jax.jit, static_argnums=(0, 1))
def _run(config: ModelConfig, adapters: AdapterConfig | None, variables: Any, rows: Any, key: Any, labels: Any) -> Any:
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1])[None], rows.shape)
    ones = jnp.ones_like(rows)
    return Transformer(config, adapters).apply(variables, rows, ones, positions, {}, key, labels)


def run(
    params: Any,
    adapters: AdapterConfig | None = None,
    tree: Any = None,
    rows: jax.Array | None = None,
    *,
    config: ModelConfig = CONFIG,
    key: Any = None,
    labels: Any = None,
) -> TransformerOutput:
    """Compiled once for each model, adapters and shape: the batteries call it often."""
    variables = {"params": params} | ({} if adapters is None else {"adapters": tree})
    return _run(config, adapters, variables, tokens() if rows is None else rows, key, labels)


def logits(*args: Any, **more: Any) -> jax.Array:
    out = run(*args, **more)
    return out.hidden @ out.head.T


def assert_close(found: Any, wanted: Any, share: float = 1e-4) -> None:
    """Within a share of the largest magnitude, leaf by leaf."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(one, other, rtol=0, atol=share * float(jnp.max(jnp.abs(other))) + 1e-30)
