"""Tokens to the devices that hold their experts and back: dropless, static shapes, two token all-to-alls.

Every device sorts its assignments by expert, so what goes to one peer is contiguous, and copies it into a buffer of
the most that can ever go there, C = T * min(K, E/D) rows (a token meets at most E/D experts of one device). Which row
is for which expert follows from the [D, E] counts, gathered once (an integer all-gather, no third all-to-all).
`jax.lax.ragged_all_to_all` would send no padding, but XLA:CPU lacks it.

Legend: T local tokens, K assignments per token, d hidden, E experts, D devices on the axis, C rows per peer.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class ExchangePlan(NamedTuple):
    """Index maps of one exchange; all static shapes.

    Attributes:
      send_row: [D * C] int32, which assignment (of T * K) fills each row of the send buffer; T * K for none.
      slot: [T * K] int32, where in the send buffer each assignment went; D * C for dropped ones.
      received_expert: [D * C] int32, local expert of each received row; E / D for padding.
    """

    send_row: Array
    slot: Array
    received_expert: Array


def rows_per_peer(num_tokens: int, top_k: int, experts_per_device: int) -> int:
    """C, the static bound on assignments from one device to another."""
    return num_tokens * min(top_k, experts_per_device)


def plan_exchange(indices: Array, valid: Array, *, num_experts: int, axis: str) -> ExchangePlan:
    """The maps for local `indices`, `valid` [T, K]; call inside shard_map over `axis`.

    Raises:
      ValueError: if num_experts is not divisible by the axis size.
    """
    devices = jax.lax.axis_size(axis)
    if num_experts % devices:
        raise ValueError(f"num_experts = {num_experts}: expected a multiple of the {axis} axis size {devices}")
    local = num_experts // devices
    num_tokens, top_k = indices.shape
    capacity, total = rows_per_peer(num_tokens, top_k, local), num_tokens * top_k

    expert = jnp.where(valid, indices, num_experts).reshape(total)
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    rank = jnp.zeros((total,), jnp.int32).at[order].set(jnp.arange(total, dtype=jnp.int32))
    counts = jnp.sum(jax.nn.one_hot(expert, num_experts, dtype=jnp.int32), axis=0)
    per_peer = counts.reshape(devices, local).sum(axis=1)
    start = jnp.cumsum(per_peer) - per_peer

    column = jnp.arange(capacity, dtype=jnp.int32)[None, :]
    source = jnp.minimum(start[:, None] + column, total - 1)
    send_row = jnp.where(column < per_peer[:, None], order[source], total).reshape(-1)
    peer = jnp.minimum(expert // local, devices - 1)
    slot = jnp.where(expert < num_experts, peer * capacity + rank - start[peer], devices * capacity)

    all_counts = jax.lax.all_gather(counts, axis)  # [D, E]
    mine = jax.lax.dynamic_slice_in_dim(all_counts, jax.lax.axis_index(axis) * local, local, axis=1)
    ends = jnp.cumsum(mine, axis=1)  # [D, E / D]: rows from one peer arrive sorted by expert
    received = jnp.sum(column[:, :, None] >= ends[:, None, :], axis=-1, dtype=jnp.int32).reshape(-1)
    return ExchangePlan(send_row, slot.astype(jnp.int32), received)


@jax.custom_vjp
def take_rows(x: Array, forward: Array, backward: Array) -> Array:
    """x[forward] with zeros where forward == len(x): [N, d], [M] -> [M, d].

    `backward` [N, R] lists the rows of the result that copy each row of x (M for none): the gradient is a gather and a
    sum over R, in a fixed order, where autodiff would scatter-add.
    """
    del backward
    return jnp.take(x, forward, axis=0, mode="fill", fill_value=0)


def _take_rows_fwd(x: Array, forward: Array, backward: Array) -> tuple[Array, Array]:
    return take_rows(x, forward, backward), backward


def _take_rows_bwd(backward: Array, grad: Array) -> tuple[Array, None, None]:
    return jnp.take(grad, backward, axis=0, mode="fill", fill_value=0).sum(axis=1), None, None


take_rows.defvjp(_take_rows_fwd, _take_rows_bwd)


def all_to_all_rows(rows: Array, axis: str) -> Array:
    """[D * C, d] grouped by destination -> [D * C, d] grouped by source. It is its own inverse."""
    return jax.lax.all_to_all(rows, axis, split_axis=0, concat_axis=0, tiled=True)


def send_to_experts(x_assigned: Array, plan: ExchangePlan, axis: str) -> Array:
    """[T, d] or [T * K, d] rows -> received rows [D * C, d]; with T rows each is sent once per assignment."""
    total = plan.slot.shape[0]
    copies = total // x_assigned.shape[0]
    forward = jnp.where(plan.send_row < total, plan.send_row // copies, x_assigned.shape[0])
    return all_to_all_rows(take_rows(x_assigned, forward, plan.slot.reshape(-1, copies)), axis)


def return_to_tokens(rows: Array, plan: ExchangePlan, axis: str) -> Array:
    """Results [D * C, d] of the received rows -> [T * K, d] in assignment order; zeros for dropped ones."""
    return take_rows(all_to_all_rows(rows, axis), plan.slot, plan.send_row[:, None])
