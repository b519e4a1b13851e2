"""The mesh, and the one way to run a function on each device's own shard.

Axes: `data` replicates parameters, `fsdp` shards them, `expert` holds different experts. All three carry different
sequences: the batch dimension is split over their product, so a device is never idle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "expert")
BATCH = P(AXES)  # spec of an array whose first dimension is the batch


def make_mesh(data: int = 1, fsdp: int = 1, expert: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of data x fsdp x expert devices with Auto axes (Explicit ones break Linen's initialisers).

    Raises:
      ValueError: if an axis is below 1 or there are fewer devices than the product.
    """
    shape = (data, fsdp, expert)
    for name, size in zip(AXES, shape):
        if size < 1:
            raise ValueError(f"mesh.{name} = {size}: expected at least 1")
    devices = list(jax.devices() if devices is None else devices)
    wanted = math.prod(shape)
    if len(devices) < wanted:
        raise ValueError(f"mesh = {data} x {fsdp} x {expert}: expected at most {len(devices)} devices, needs {wanted}")
    return Mesh(np.array(devices[:wanted]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def expert_axis_size() -> int:
    """Devices along `expert` in the mesh set by `jax.set_mesh`; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["expert"]


def on_shards(fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`fn` on each device's own part (jax.shard_map over the mesh set by `jax.set_mesh`); `fn` itself on one device.

    Kernels run through this: their loops and sorts must see local arrays, never be partitioned by the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return fn
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)
