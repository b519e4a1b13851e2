"""The batch every timed train step learns."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from experiments.bench.shape import StepShape
from experiments.step import Batch


def random_batch(shape: StepShape) -> Batch:
    """One accumulation pass of uniformly random tokens, one segment per sequence: leaves [1, B, S + 1] int32."""
    size = (1, shape.batch, shape.seq + 1)
    tokens = np.random.default_rng(0).integers(0, shape.vocab, size, dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape.seq + 1, dtype=np.int32), size)
    leaves = {"tokens": tokens, "segment_ids": np.ones(size, np.int32), "positions": positions}
    return {name: jnp.asarray(leaf) for name, leaf in leaves.items()}
