"""MixLoRA's feed-forward: the frozen SwiGLU becomes E experts, itself with adapters of their own.

    o_e = (silu(h1_e) * h3_e) W2 + s a_e A2_e B2_e,   h1_e = x W1 + s x A1_e B1_e,   y = sum_e w_e o_e

(Li et al. 2404.15159, Eq. 6.) x W1 and x W3 are the same for all experts and made once, as in the released code. The
last map is linear, so its frozen product is also made once, of sum_e w_e a_e: 3 products with frozen weights, where the
released code has 2 + k and separate experts have 3 k. With DoRA a factor per expert stands behind W2, which is then
applied to each slot.

Legend: T tokens, K slots, E experts, d hidden, f feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from kernels.lora import slot_lora, slot_lora_sum
from moe.lora.dense import Adaptation, Choice, LoRA, direction_scale, mixed
from parallel.mesh import AXES, on_shards

TOKENS = P(AXES, None)


def adapted_feed_forward(
    adapt: Adaptation,
    x: Array,
    gate_up: Array,
    down: Array,
    gate_up_bias: Array | None = None,
    down_bias: Array | None = None,
) -> Array:
    """A SwiGLU with the adapters of its sublayer: one router before all of it, or adapters at each map.

    x [..., d], gate_up [d, 2f], down [f, d], biases [2f] and [d] or None -> [..., d].
    """
    config, f = adapt.config, down.shape[0]
    assert config is not None
    halves = {"gate": gate_up[:, :f], "up": gate_up[:, f:]}
    if config.experts is not None and config.experts.routing == "ffn":
        flat = x.reshape(-1, x.shape[-1])
        weights = halves | {"down": down}
        loras = {name: adapt.parameters(name, weight, x.dtype) for name, weight in weights.items() if adapt.has(name)}
        choice = adapt.choice("ffn", flat)
        out = mix_lora_feed_forward(
            flat, gate_up, down, loras, choice, config.scale,
            gate_up_bias=gate_up_bias, down_bias=down_bias, dropout=adapt.dropped_out,
        )  # fmt: skip
        return out.reshape(x.shape)
    both = x @ gate_up
    parts = [adapt(name, x, both[..., i * f : (i + 1) * f], weight) for i, (name, weight) in enumerate(halves.items())]
    if gate_up_bias is not None:
        biases = gate_up_bias[:f], gate_up_bias[f:]
        parts = [part + jnp.expand_dims(bias, range(part.ndim - 1)) for part, bias in zip(parts, biases, strict=True)]
    hidden = jax.nn.silu(parts[0]) * parts[1]
    out = adapt("down", hidden, hidden @ down, down)
    return out if down_bias is None else out + jnp.expand_dims(down_bias, range(out.ndim - 1))


def mix_lora_feed_forward(
    x: Array,
    gate_up: Array,
    down: Array,
    loras: Mapping[str, LoRA],
    choice: Choice,
    scale: float,
    *,
    gate_up_bias: Array | None = None,
    down_bias: Array | None = None,
    dropout: Callable[[str, Array], Array] = lambda target, x: x,
) -> Array:
    """The weighted sum of the chosen experts, [T, d].

    Args:
      x: [T, d]. gate_up: [d, 2f], gate first. down: [f, d]. Biases [2f] and [d] or None.
      loras: adapters of `gate`, `up`, `down`, those that there are; one without experts (E = 1) is in all of them.
      choice: of the router. A slot that is not kept goes through the frozen feed-forward.
      dropout: what the adapters of a target see in place of its input.
    """
    f = down.shape[0]
    both = x @ gate_up
    halves = []
    for i, target in enumerate(("gate", "up")):
        weight, base = gate_up[:, i * f : (i + 1) * f], both[:, i * f : (i + 1) * f]
        half = _by_slot(dropout(target, x), base, weight, loras.get(target), choice, scale)
        if gate_up_bias is not None:
            half = half + gate_up_bias[None, None, i * f : (i + 1) * f]
        halves.append(half)
    hidden = jax.nn.silu(halves[0]) * halves[1]  # [T, K or 1, f]
    out = _down(hidden, down, loras.get("down"), choice, scale, dropout)
    if down_bias is not None:
        out = out + jnp.sum(choice.weights, axis=-1, keepdims=True).astype(out.dtype) * down_bias[None]
    return out


def _by_slot(x: Array, base: Array, weight: Array, lora: LoRA | None, choice: Choice, scale: float) -> Array:
    """The map to `base` [T, f] with each slot's adapter, [T, K, f]; [T, 1, f] where all slots are alike."""
    if lora is None:
        return base[:, None]
    if lora.b.shape[0] == 1:
        return mixed(x, base, weight, lora, None, scale)[:, None]
    change = scale * _slots(x[:, None], lora, choice)
    if lora.magnitude is None:
        return base[:, None] + change
    return _scaled(base[:, None] + change, weight, lora, choice, scale)


def _down(
    hidden: Array,
    weight: Array,
    lora: LoRA | None,
    choice: Choice,
    scale: float,
    dropout: Callable[[str, Array], Array],
) -> Array:
    """Of hidden [T, K or 1, f], the slots' weighted sum behind the last map, [T, d]."""
    weights = choice.weights.astype(hidden.dtype)
    total = jnp.einsum("tk,tkf->tf", weights, jnp.broadcast_to(hidden, (*weights.shape, hidden.shape[-1])))
    if lora is None:
        return total @ weight
    if lora.b.shape[0] == 1:
        return mixed(dropout("down", total), total @ weight, weight, lora, None, scale)
    hidden = jnp.broadcast_to(hidden, (*weights.shape, hidden.shape[-1]))
    seen = dropout("down", hidden)
    if lora.magnitude is None:
        specs = (P(AXES, None, None), P(), P(), TOKENS, TOKENS)
        summed = on_shards(slot_lora_sum, specs, TOKENS)
        change = summed(seen, lora.a, lora.b, choice.indices, weights * choice.kept)
        return total @ weight + scale * change
    change = scale * _slots(seen, lora, choice)
    slots = _scaled(hidden @ weight + change, weight, lora, choice, scale)
    return jnp.einsum("tk,tkd->td", weights, slots)


def _slots(x: Array, lora: LoRA, choice: Choice) -> Array:
    """Each slot of x [T, K or 1, in] through its expert's two thin matrices, [T, K, o]; zero where not kept."""
    rows = P(AXES, None, None)
    return on_shards(slot_lora, (rows, P(), P(), TOKENS, TOKENS), rows)(
        x, lora.a, lora.b, choice.indices, choice.kept
    )


def _scaled(slots: Array, weight: Array, lora: LoRA, choice: Choice, scale: float) -> Array:
    """slots [T, K, o] times DoRA's factor of each slot's expert; as they are where the slot is not kept."""
    beyond = direction_scale(weight, lora, scale)[choice.indices] - 1.0
    return slots + slots * jnp.where(choice.kept[..., None], beyond, 0.0).astype(slots.dtype)
