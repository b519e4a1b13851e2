"""AdamW with clipping, a decay mask and a warmup-cosine schedule: the baseline of every other optimiser."""

from __future__ import annotations

import re
from typing import Any

import jax
import optax


def warmup_cosine(peak: float, warmup_steps: int, total_steps: int, final_fraction: float) -> optax.Schedule:
    """Linear to `peak` over `warmup_steps`, cosine to `final_fraction * peak` at `total_steps`, constant after."""
    warmup = min(warmup_steps, max(total_steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / max(warmup, 1),
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(total_steps, warmup + 1),
        end_value=peak * final_fraction,
    )


# Norm scales, biases (`bq` is that of `wq`) and attention sinks, by name: stacked layers give them a second dimension.
UNDECAYED = re.compile(r".*(scale|bias)|b[qkvo]|b(q|kv)_down|sinks")


def decay_mask(params: Any) -> Any:
    """True for weights, False for what UNDECAYED names."""
    return jax.tree_util.tree_map_with_path(lambda path, _: UNDECAYED.fullmatch(path[-1].key) is None, params)


def adamw(
    schedule: optax.Schedule, *, b1: float = 0.9, b2: float = 0.95, weight_decay: float = 0.1, clip_norm: float = 1.0
) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled decay on weights, step size (Loshchilov & Hutter 1711.05101)."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1=b1, b2=b2),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
    )
