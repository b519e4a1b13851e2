"""Rotary position embedding (2104.09864), half-split as in Llama, and its stretches to longer contexts.

A pair of dimensions i turns by position * w_i, w_i = theta^(-2i / D). Stretched by a factor s from a context of C:

    linear    w_i / s                                                    (2306.15595)
    dynamic   theta (s n / C - (s - 1))^(D / (D - 2)) as the base once the length n passes C ([code] transformers)
    yarn      (1 - r_i) w_i + r_i w_i / s, r a ramp over the dimensions between those that turn beta_fast and beta_slow
              times in C; cos and sin times 0.1 ln(s) + 1                (2309.00071, section 3)
    llama3    w_i / s for wavelengths above C / low, w_i below C / high, interpolated by C / wavelength between ([code]
              transformers)
Legend: B sequences, S positions, H heads, D rotated width.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from moe.config import RopeScaling


def rope_tables(
    positions: Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Array, Array]:
    """cos and signed sin [B, S, 1, D] of positions [B, S] for `apply_rope`."""
    base: float | Array = theta
    if scaling is not None and scaling.kind == "dynamic":
        stretch = scaling.factor * (jnp.max(positions) + 1) / scaling.original_context - (scaling.factor - 1)
        base = theta * jnp.maximum(stretch, 1.0) ** (head_dim / (head_dim - 2))
    inverse = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None and scaling.kind != "dynamic":
        inverse = inverse * stretched(head_dim, theta, scaling)
    angle = positions.astype(jnp.float32)[..., None, None] * inverse.reshape(1, 1, 1, -1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if scaling is not None and (factor := attention_factor(scaling)) != 1.0:
        cos, sin = cos * factor, sin * factor
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (x_i, x_{i + D/2}) of x [B, S, H, D]: the halves swap places, the table holds the signs."""
    swapped = jnp.roll(x, x.shape[-1] // 2, axis=-1)
    return x * cos.astype(x.dtype) + swapped * sin.astype(x.dtype)


def stretched(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """What multiplies w_i [D / 2], for the kinds that do not depend on the length; float64."""
    s, context, index = scaling.factor, scaling.original_context, np.arange(head_dim // 2)
    if scaling.kind == "linear":
        return np.full(head_dim // 2, 1 / s)
    turns = context * theta ** (-2 * index / head_dim) / (2 * math.pi)  # in the original context: C / wavelength
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = (turns - low) / (high - low)
        return np.where(turns < low, 1 / s, np.where(turns > high, 1.0, (1 - kept) / s + kept))

    def dimension(rotations: float) -> float:
        """The (fractional) pair that turns so many times in the original context."""
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    ramp = np.clip((index - first) / (last - first if last != first else 1e-3), 0, 1)
    return (1 - ramp) + ramp / s


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """0.1 m ln(s) + 1, the growth of attention's temperature with the stretch; 1 without a stretch."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def attention_factor(scaling: RopeScaling) -> float:
    """What multiplies cos and sin."""
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_scale(scaling.factor, scaling.mscale) / yarn_scale(scaling.factor, scaling.mscale_all_dim)
    return yarn_scale(scaling.factor)
