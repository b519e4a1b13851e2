"""From router logits to decisions, with one knob between less and more depth (Dr.LLM 2510.12773).

The knob k in [-1, 1] moves the probabilities between four marks, in a straight line from each to the next:

    k      -1      -0.5      0.5       1
           skip    router    execute   repeat        (one-hot, but for the router's own)

Neutral is -0.5, not 0. Above 0.5 the router is not asked any more: the paper's text mixes its probabilities in, the
released code goes from execute to repeat, as here, so that no mark is jumped at.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from moe.config import require
from moe.depth.paths import EXECUTE, REPEAT, SKIP

NEUTRAL = -0.5


@dataclass(frozen=True)
class DepthPolicy:
    """Decides by the likeliest of mixed probabilities; ties go to the shallower decision.

    Attributes:
      knob: in [-1, 1]; -0.5 is the router alone.
    """

    knob: float = NEUTRAL

    def __post_init__(self) -> None:
        require(-1.0 <= self.knob <= 1.0, "knob", self.knob, "a number from -1 to 1")

    def mixed(self, logits: Array) -> Array:
        """Probabilities [..., 3] from router logits [..., 3], float32."""
        router = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        skip, execute, repeat = (jax.nn.one_hot(jnp.full(logits.shape[:-1], c), 3) for c in (SKIP, EXECUTE, REPEAT))
        if self.knob <= -0.5:
            low, high, t = skip, router, (self.knob + 1.0) / 0.5
        elif self.knob <= 0.5:
            low, high, t = router, execute, self.knob + 0.5
        else:
            low, high, t = execute, repeat, (self.knob - 0.5) / 0.5
        return (1.0 - t) * low + t * high

    def __call__(self, logits: Array) -> Array:
        """Decisions [...] int32, 0 skip, 1 execute, 2 repeat, from router logits [..., 3]."""
        if self.knob == NEUTRAL:  # not through probabilities, which round two logits to one number
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jnp.argmax(self.mixed(logits), axis=-1).astype(jnp.int32)
