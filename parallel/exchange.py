"""Tokens to the devices that hold their experts and back: dropless, static shapes, two token all-to-alls.

Every device sorts its assignments by expert, so what goes to one peer is contiguous, and copies it into a block of
the most that can ever go there, C = T * min(K, E/D) rows (a token meets at most E/D experts of one device). How many
rows of a block are real, and for which experts, follows from the [D, E] counts, gathered once (an integer all-gather,
no third all-to-all). Both buffers keep this layout on every platform. XLA:CPU sends whole blocks, padding too; others
send the real rows alone (`jax.lax.ragged_all_to_all`, which XLA:CPU lacks).

Legend: T local tokens, K assignments per token, d hidden, E experts, D devices on the axis, C rows per peer.
"""

from __future__ import annotations

from functools import partial
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
      send_sizes: [D] int32, real rows to each peer.
      receive_sizes: [D] int32, real rows from each peer.
    """

    send_row: Array
    slot: Array
    received_expert: Array
    send_sizes: Array
    receive_sizes: Array


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

    known = valid & (indices >= 0) & (indices < num_experts)
    expert = jnp.where(known, indices, num_experts).reshape(total)
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
    sizes = per_peer.astype(jnp.int32), ends[:, -1].astype(jnp.int32)
    return ExchangePlan(send_row, slot.astype(jnp.int32), received, *sizes)


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


def _static(rows: Array, send_sizes: Array, receive_sizes: Array, *, axis: str) -> Array:
    """Whole blocks travel, padding too."""
    del send_sizes, receive_sizes
    return jax.lax.all_to_all(rows, axis, split_axis=0, concat_axis=0, tiled=True)


def _ragged(rows: Array, send_sizes: Array, receive_sizes: Array, *, axis: str) -> Array:
    """The first `send_sizes` rows of each block travel; zeros where nothing arrives."""
    devices = send_sizes.shape[0]
    capacity = rows.shape[0] // devices
    blocks = capacity * jnp.arange(devices, dtype=jnp.int32)
    here = jnp.full((devices,), capacity * jax.lax.axis_index(axis), jnp.int32)  # my block in every peer's buffer

    @jax.custom_batching.custom_vmap
    def exchange(rows: Array, *offsets_and_sizes: Array) -> Array:
        return jax.lax.ragged_all_to_all(rows, jnp.zeros_like(rows), *offsets_and_sizes, axis_name=axis)

    @exchange.def_vmap
    def _(n: int, batched: list[bool], *args: Array) -> tuple[Array, bool]:
        """All n at once, as n slices for each peer (the primitive's own rule wants every offset batched)."""
        rows, *rest = (a if b else jnp.broadcast_to(a, (n, *a.shape)) for a, b in zip(args, batched, strict=True))
        step = rows.shape[1] * jnp.arange(n, dtype=jnp.int32)[:, None]
        merged = (a.T.reshape(-1) for a in (rest[0] + step, rest[1], rest[2] + step, rest[3]))
        return exchange(rows.reshape(-1, rows.shape[-1]), *merged).reshape(rows.shape), True

    return exchange(rows, blocks, send_sizes, here, receive_sizes)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def all_to_all_rows(rows: Array, send_sizes: Array, receive_sizes: Array, axis: str) -> Array:
    """[D * C, d] in blocks by destination -> [D * C, d] in blocks by source; past the sizes, zeros or the sender's own.

    With the sizes swapped it is its own inverse and its own gradient (the ragged primitive's own would exchange the
    offsets first: two all-to-alls more).
    """
    branches = partial(_static, axis=axis), partial(_ragged, axis=axis)
    return jax.lax.platform_dependent(rows, send_sizes, receive_sizes, cpu=branches[0], default=branches[1])


def _all_to_all_rows_fwd(
    rows: Array, send_sizes: Array, receive_sizes: Array, axis: str
) -> tuple[Array, tuple[Array, Array]]:
    return all_to_all_rows(rows, send_sizes, receive_sizes, axis), (send_sizes, receive_sizes)


def _all_to_all_rows_bwd(axis: str, sizes: tuple[Array, Array], grad: Array) -> tuple[Array, None, None]:
    send_sizes, receive_sizes = sizes
    return all_to_all_rows(grad, receive_sizes, send_sizes, axis), None, None


all_to_all_rows.defvjp(_all_to_all_rows_fwd, _all_to_all_rows_bwd)


def send_to_experts(x_assigned: Array, plan: ExchangePlan, axis: str) -> Array:
    """[T, d] or [T * K, d] rows -> received rows [D * C, d]; with T rows each is sent once per assignment."""
    total = plan.slot.shape[0]
    copies = total // x_assigned.shape[0]
    forward = jnp.where(plan.send_row < total, plan.send_row // copies, x_assigned.shape[0])
    rows = take_rows(x_assigned, forward, plan.slot.reshape(-1, copies))
    return all_to_all_rows(rows, plan.send_sizes, plan.receive_sizes, axis)


def return_to_tokens(rows: Array, plan: ExchangePlan, axis: str) -> Array:
    """Results [D * C, d] of the received rows -> [T * K, d] in assignment order; zeros for dropped ones."""
    returned = all_to_all_rows(rows, plan.receive_sizes, plan.send_sizes, axis)
    return take_rows(returned, plan.slot, plan.send_row[:, None])
