"""Models with random weights, drawn rather than initialised: nothing is compiled for that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.transformer import Transformer, init_router_state


@pytest.fixture(scope="session")
def drawn():
    """config -> (params, router state)."""

    def draw(config, seed=0):
        state, blank, rng = init_router_state(config), jnp.zeros((1, 4), jnp.int32), np.random.default_rng(seed)

        def parameters():
            variables = Transformer(config).init(jax.random.key(0), blank, blank + 1, blank, state, None)
            return variables["params"]

        def leaf(path, shape):
            noise = config.init_std * rng.standard_normal(shape.shape, np.float32)
            return jnp.asarray(1 + noise if path[-1].key == "scale" else noise)

        return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(parameters)), state

    return draw
