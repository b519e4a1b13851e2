"""Small models with every parameter random, and blocks applied one by one as the oracle."""

from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import ModelConfig, MoEConfig
from moe.depth.router import DepthConfig, init_routers
from moe.pretrained.ours import abstract_model
from moe.transformer import Block, PerLayer, Shared, rms_norm, rotations

DENSE = ModelConfig(
    vocab_size=37, hidden=16, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=20, moe=None, init_std=0.3
)
MOE = MoEConfig(num_experts=4, top_k=2, expert_dim=12, dispatcher="einsum", router="loss_free")
CONFIGS = {
    "dense": DENSE,
    "moe_mixed_windows": ModelConfig(**(vars(DENSE) | {"moe": MOE, "dense_layers": (1,), "windows": (4, 0, 3)})),
}
DEPTH = DepthConfig(hidden=6, num_windows=4)


@partial(jax.jit, static_argnums=(0, 1, 2))
def block(config: ModelConfig, kind: Any, window: int | None, params: Any, state: Any, x: Any, shared: Shared) -> Any:
    return Block(config, kind).apply({"params": params}, x, PerLayer(state, None, window), shared)[0]


class Model(NamedTuple):
    config: ModelConfig
    params: Any
    router_state: Any

    def stream(self, tokens: Any, path: Any) -> list[jax.Array]:
        """The residual stream [B, S, d] before, between and after the blocks of a path, one application each."""
        config = self.config
        tokens = jnp.asarray(tokens)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        shared = Shared(tokens, jnp.ones_like(tokens), positions, rotations(config, positions))
        stream = [self.params["embedding"][tokens]]
        kinds = config.layer_kinds
        for layer in path:
            run = sum(a != b for a, b in pairwise(kinds[: layer + 1]))
            begin = max((i for i in range(1, layer + 1) if kinds[i] != kinds[i - 1]), default=0)
            params = jax.tree.map(lambda leaf: leaf[layer - begin], self.params[f"runs_{run}"])  # noqa: B023
            moe_layer = kinds[:layer].count("moe")
            state = jax.tree.map(lambda leaf: leaf[moe_layer], self.router_state)  # noqa: B023
            window = config.windows[layer] or None if config.windows else None
            of_kind = state if kinds[layer] == "moe" else {}
            stream.append(block(config, kinds[layer], window, params, of_kind, stream[-1], shared))
        return stream

    def logits(self, tokens: Any, path: Any) -> np.ndarray:
        """Logits [B, S, V] of unpadded tokens along a path."""
        hidden = rms_norm(self.stream(tokens, path)[-1], self.params["final_norm"]["scale"], self.config.norm_eps)
        return np.asarray(hidden @ self.params["head"].T)


def random_like(shapes: Any, seed: int, scale: float) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32), shapes)


@pytest.fixture(params=CONFIGS)
def any_model(request) -> Model:
    config = CONFIGS[request.param]
    params, router_state = abstract_model(config)
    return Model(config, random_like(params, 0, 0.4), random_like(router_state, 1, 1.0))


@pytest.fixture
def model() -> Model:
    return Model(DENSE, random_like(abstract_model(DENSE)[0], 0, 0.4), {})


@pytest.fixture
def routers() -> Any:
    """Random routers that decide 0, 1 and 2 each on some prompts."""
    shapes = jax.eval_shape(lambda key: init_routers(DEPTH, 16, 3, key), jax.random.key(0))
    return random_like(shapes, 0, 1.5)


@pytest.fixture
def depth() -> DepthConfig:
    return DEPTH


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 37, (4, 12)).astype(np.int32)
