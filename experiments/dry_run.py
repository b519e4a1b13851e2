"""What a run would cost, without running it: the step is lowered on a mesh of devices that need not exist."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.config import RunConfig
from experiments.step import TrainState, init_state, make_optimizer, state_shardings, train_step
from moe.config import ModelConfig
from optim.sharding import bytes_per_device
from parallel.mesh import AXES
from parallel.sharding import path_name


def parameter_counts(params: Any, model: ModelConfig) -> tuple[int, int]:
    """(total, active per token): routed experts count k / E, an untied embedding is a lookup and counts nothing."""
    total = active = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name, size = path_name(path), math.prod(leaf.shape)
        total += size
        if "/experts/" in name and model.moe is not None:
            active += size * model.moe.top_k // model.moe.num_experts
        elif not (name == "embedding" and not model.tie_embeddings):
            active += size
    return total, active


def flops_per_token(active: int) -> int:
    """Forward and backward, 6 per active parameter; attention products (12 S H D per layer, halved by the causal mask)
    are left out, as in the peer benchmark."""
    return 6 * active


def abstract_state(config: RunConfig) -> tuple[TrainState, Any]:
    """ShapeDtypeStructs of the whole state, and the optimiser it was made with."""
    tx = make_optimizer(config.optimizer, config.steps)
    return jax.eval_shape(functools.partial(init_state, config, tx)), tx


def dry_run(config: RunConfig) -> dict[str, float | int]:
    """Lowers one training step of `config` on a simulated mesh of its own size and counts.

    Returns:
      devices, parameters, active_parameters, flops_per_token, tokens_per_step, flops_per_step,
      parameter_bytes_per_device, state_bytes_per_device (parameters, moments, counters), gradient_bytes_per_device.

    Raises:
      ValueError: whatever a real run would refuse.
    """
    axes = (config.mesh.data, config.mesh.fsdp, config.mesh.expert)
    mesh = AbstractMesh(axes, AXES, axis_types=(AxisType.Auto,) * 3)
    state, tx = abstract_state(config)
    shardings = state_shardings(state, tx, mesh)  # type: ignore[arg-type]
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    shape = (config.accumulation, config.batch_size // config.accumulation, config.data.seq_len + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, P(None, AXES, None)))
    batch = dict.fromkeys(("tokens", "segment_ids", "positions"), tokens)
    step = jax.jit(functools.partial(train_step, config=config, tx=tx), donate_argnums=0)
    with jax.sharding.use_abstract_mesh(mesh):
        step.trace(jax.tree.map(place, state, shardings), batch).lower(lowering_platforms=("cpu",))
    total, active = parameter_counts(state.params, config.model)
    tokens_per_step = config.batch_size * config.data.seq_len
    parameter_bytes = bytes_per_device(state.params, shardings.params)
    return {
        "devices": math.prod(axes),
        "parameters": total,
        "active_parameters": active,
        "flops_per_token": flops_per_token(active),
        "tokens_per_step": tokens_per_step,
        "flops_per_step": flops_per_token(active) * tokens_per_step,
        "parameter_bytes_per_device": parameter_bytes,
        "gradient_bytes_per_device": parameter_bytes,
        "state_bytes_per_device": parameter_bytes + bytes_per_device(state.opt_state, shardings.opt_state),
    }
