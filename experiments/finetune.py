"""Fine-tuning of adapters: the base is an argument that nothing differentiates, and only adapters have gradients,
moments and checkpoints.

    loss = (sum over answer tokens of -log p) / (number of answer tokens) + penalty(adapters, what their routers tell)

Batches are split over the mesh, adapters are on every device. A run is a function of (key, step), and goes on where its
folder's checkpoint is.

Legend: B rows, S positions, A answer tokens of a row at most, d hidden, L layers, E experts.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from experiments.config import OptimizerConfig
from experiments.evaluation.scoring import Scorer
from experiments.initial import pretrained_config, read_pretrained
from experiments.overrides import flatten
from experiments.step import make_optimizer, summed_cross_entropy
from experiments.stepping import Progress, stepped
from experiments.tasks.training import Batch
from moe.config import ComputeDtype, ModelConfig, require
from moe.lora.adapters import abstract_adapters, init_adapters, require_adapters
from moe.lora.config import AdapterConfig
from moe.lora.dense import COLLECTION
from moe.lora.losses import balance, router_losses
from moe.losses import RoutingStats
from moe.metrics import max_violation
from moe.transformer import Transformer, TransformerOutput
from parallel.checkpoint import Checkpoints
from parallel.intact import checksum
from parallel.leaves import flatten as leaves_by_path
from parallel.mesh import BATCH, make_mesh
from parallel.sharding import path_name, tree_shardings

Sites = Mapping[str, RoutingStats]
Penalty = Callable[[Any, Sites], Array]  # (adapters, statistics of their routers) -> what is added to the loss


class Base(NamedTuple):
    """A frozen model."""

    config: ModelConfig
    params: Any
    router_state: Any


@functools.lru_cache(maxsize=1)
def released(source: str, dtype: str) -> Base:
    """A pretrained model, a name or a directory as `generate --model` takes it, its parameters and arithmetic in
    `dtype`. ValueError if it is not there."""
    params, router_state = read_pretrained(source, make_mesh())
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return Base(released_config(source, dtype), params, router_state)


def released_config(source: str, dtype: str, absent: ModelConfig | None = None) -> ModelConfig:
    """The config of `released`; `absent` where there is no source, or none that can be read (ValueError without it)."""
    try:
        require(bool(source), "source", source, "a pretrained model")
        return replace(pretrained_config(source), compute_dtype=cast(ComputeDtype, dtype))
    except ValueError:
        if absent is None:
            raise
        return absent


@dataclass(frozen=True)
class FinetuneConfig:
    """Attributes:
      optimizer: as of training runs; `final_fraction` 1 is a constant rate.
      steps, batch_size: optimiser steps, and rows of each.
      hard: each row's tokens go to the expert of its task, whatever the router says.
      checkpoint_every: steps between checkpoints; 0 for only the last one.
    """

    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=2e-4, warmup_steps=0, final_fraction=1.0, weight_decay=0.0, b2=0.999
        )
    )
    steps: int = 200
    batch_size: int = 16
    hard: bool = False
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


@struct.dataclass
class AdapterState:
    """What a checkpoint holds: finished steps, the adapters that are trained (None for the others), their moments."""

    step: Array
    trained: Any
    opt_state: Any


def no_penalty(adapters: Any, sites: Sites) -> Array:
    """For adapters without routers."""
    return jnp.float32(0)


@functools.lru_cache
def balanced(weight: float, top_k: int) -> Penalty:
    """`weight` times the balance loss, every layer for itself (1 is uniform), and the routers' own terms."""
    return lambda adapters, sites: weight * balance(sites, top_k) + router_losses(sites)


def everything(name: str) -> bool:
    """All adapters are trained."""
    return True


def routers_only(name: str) -> bool:
    """LoRA-Mixer's second paradigm: experts stay as they are."""
    return "router_" in name


def finetune(
    base: Base,
    adapters: AdapterConfig,
    batches: Callable[[int], Batch],
    config: FinetuneConfig,
    key: Array,
    out: Path,
    *,
    start: Any = None,
    trainable: Callable[[str], bool] = everything,
    penalty: Penalty = no_penalty,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> Any:
    """Trains adapters of a base in `out`, going on from the checkpoint there; returns them, where the base lies.

    Args:
      batches: step -> the rows of that step, always of the same shapes.
      key: first weights, dropout and routers' noise are drawn from it.
      start: adapters to begin with; None for fresh ones.
      trainable: which leaves are trained, by their path with slashes.
      penalty: added to the loss. The same object for the same program: nothing is compiled twice.
      mesh: of `parallel.mesh`; by default one device.
      progress: called after every step.

    Raises:
      ValueError: adapters that do not fit the base; nothing to train; a folder of another base, start, key, `config`
        or `adapters`. Other `batches`, `trainable` or `penalty` go unnoticed: they belong in the folder's name.
      NotFinite: a loss or gradient that is not; the step is not saved.
      KeyboardInterrupt: after Ctrl-C, once the state is saved.
    """
    mesh = make_mesh() if mesh is None else mesh
    require(config.batch_size % mesh.size == 0, "batch_size", config.batch_size, f"a multiple of {mesh.size} devices")
    with jax.set_mesh(mesh):
        everywhere = NamedSharding(mesh, P())
        params = jax.device_put(base.params, tree_shardings(base.params, mesh))
        router_state = jax.device_put(base.router_state, everywhere)
        if start is None:
            start = init_adapters(base.config, adapters, params, jax.random.fold_in(key, 0))
        require_adapters(base.config, adapters, start)
        first, frozen = split(jax.device_put(start, everywhere), trainable)
        require(bool(jax.tree.leaves(first)), "trainable", "nothing", "leaves of the adapters")
        check_frozen(params, first)
        optimizer = config.optimizer
        flat = 1 + optimizer.warmup_steps if optimizer.final_fraction == 1.0 else config.steps  # all lengths are one
        step_fn, tx = compiled(base.config, adapters, optimizer, flat, config.hard, penalty, mesh)
        mark = {"base": fingerprint(params), "start": fingerprint(start), "key": jax.random.key_data(key).tolist()}
        mark |= flatten(replace(config, checkpoint_every=0)) | flatten(adapters, "adapters.")
        with Checkpoints(out / "checkpoints", fingerprint=mark) as saved:
            first = jax.tree.map(jnp.copy, first)  # a step takes its buffers, which may be the caller's
            state = AdapterState(jnp.int32(0), first, tx.init(first))
            state = jax.device_put(state, everywhere)
            if saved.latest() is not None:
                state = saved.restore(state)
            one = functools.partial(step_fn, params, router_state, frozen, jax.random.fold_in(key, 1))
            run = lambda state, step: one(state, placed(batches(step), mesh))  # noqa: E731
            every = config.checkpoint_every
            state = stepped(state, run, config.steps, saved, out, checkpoint_every=every, progress=progress)
        return jax.device_put(merged(state.trained, frozen), whole_beside(base.params))


def whole_beside(params: Any) -> Sharding:
    """On every device that a base lies on, whole: both are arguments of one program, whatever mesh trained them."""
    lies = jax.tree.leaves(params)[0].sharding
    return NamedSharding(lies.mesh, P()) if isinstance(lies, NamedSharding) else lies


def split(tree: Any, chosen: Callable[[str], bool]) -> tuple[Any, Any]:
    """(chosen leaves, the others), each with None in place of the rest; `merged` joins them."""
    part = lambda wanted: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, leaf: leaf if chosen(path_name(path)) is wanted else None, tree
    )
    return part(True), part(False)


def merged(chosen: Any, others: Any) -> Any:
    return jax.tree.map(lambda a, b: b if a is None else a, chosen, others, is_leaf=lambda leaf: leaf is None)


def check_frozen(params: Any, trained: Any) -> None:
    """ValueError if an array of the base is among those that are trained."""
    frozen = {id(leaf) for leaf in jax.tree.leaves(params)}
    both = [path_name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(trained) if id(leaf) in frozen]
    require(not both, "trainable", both, "no parameter of the base")


def fingerprint(tree: Any) -> int:
    """One number for all values of a tree, the same on every mesh."""
    found = leaves_by_path(tree)
    return zlib.crc32(repr(sorted(zip(found, checksum(found)))).encode())


@functools.lru_cache(maxsize=32)
def compiled(
    config: ModelConfig,
    adapters: AdapterConfig,
    optimizer: OptimizerConfig,
    steps: int,
    hard: bool,
    penalty: Penalty,
    mesh: Mesh,
) -> tuple[Any, optax.GradientTransformation]:
    """The jitted `adapter_step(params, router_state, frozen, key, state, batch)`, and its optimiser."""
    tx = make_optimizer(optimizer, steps)
    step = functools.partial(adapter_step, config=config, adapters=adapters, tx=tx, hard=hard, penalty=penalty)
    return jax.jit(step, donate_argnums=4, out_shardings=NamedSharding(mesh, P())), tx


def adapter_step(
    params: Any,
    router_state: Any,
    frozen: Any,
    key: Array,
    state: AdapterState,
    batch: Batch,
    *,
    config: ModelConfig,
    adapters: AdapterConfig,
    tx: optax.GradientTransformation,
    hard: bool,
    penalty: Penalty,
) -> tuple[AdapterState, dict[str, Array]]:
    """One optimiser step of the adapters; the base has no gradient, no moments, and is not returned."""

    def loss_of(trained: Any) -> tuple[Array, dict[str, Array]]:
        tree, labels = merged(trained, frozen), batch.task if hard else None
        model = config, adapters, params, router_state, tree
        out = adapted(*model, batch, jax.random.fold_in(key, state.step), labels)  # type: ignore[arg-type]
        count = jnp.sum(batch.weights)
        ce = summed_cross_entropy(out, batch.targets, batch.weights) / jnp.maximum(count, 1.0)  # type: ignore[arg-type]
        added = penalty(tree, out.adapter_stats)
        return ce + added, {"loss": ce, "penalty": added, "answer_tokens": count}

    (_, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(state.trained)
    updates, opt_state = tx.update(grads, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    return AdapterState(state.step + 1, trained, opt_state), metrics | {"grad_norm": optax.tree.norm(grads)}


def adapted(
    config: ModelConfig,
    adapters: AdapterConfig | None,
    params: Any,
    router_state: Any,
    tree: Any,
    batch: Batch,
    key: Array | None,
    labels: Array | None,
) -> TransformerOutput:
    """The adapted model on a batch, its hidden states those that answers follow: [B, A, d]. Key None: evaluation."""
    positions = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None], batch.tokens.shape)
    variables = {"params": params} | ({} if adapters is None else {COLLECTION: tree})
    inputs = batch.tokens, batch.segment_ids, positions, router_state, key, labels
    out: Any = Transformer(config, adapters).apply(variables, *inputs)
    return out._replace(hidden=jnp.take_along_axis(out.hidden, jnp.asarray(batch.where)[..., None], axis=1))


def placed(batch: Batch, mesh: Mesh) -> Batch:
    """The rows split over the mesh; every process has all of them and keeps its own."""
    sharding = NamedSharding(mesh, BATCH)
    put = lambda leaf: jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])  # noqa: E731
    return Batch(*map(put, batch))


class Answers(NamedTuple):
    """Of N rows.

    Attributes:
      right: [N] bool, every token of the answer is the likeliest one.
      nats: [N] float32, -log p of the answer.
      counts: by site [N, L, E], how often each expert was chosen.
    """

    right: np.ndarray
    nats: np.ndarray
    counts: dict[str, np.ndarray]

    @property
    def max_violation(self) -> float:
        """MaxVio of the counts pooled over all rows, mean over layers and sites; NaN without routers."""
        found = [float(max_violation(counts.sum(axis=0)).mean()) for counts in self.counts.values()]
        return float(np.mean(found)) if found else math.nan


def answered(
    base: Base, adapters: AdapterConfig | None, tree: Any, batch: Batch, size: int, hard: bool = False
) -> Answers:
    """Whether a model writes the answers, `size` rows at a time, by one pass over each with the answer laid before it.

    That says the same as writing greedily: up to its first wrong token what is written is the answer so far, so all
    tokens are the likeliest after the ones before them if and only if greedy decoding writes them.
    """
    parts, count = [], len(batch.tokens)
    for first in range(0, count, size):
        part = batch.rows(slice(first, first + size))
        filled = Batch(*(np.pad(leaf, ((0, size - len(leaf)), *[(0, 0)] * (leaf.ndim - 1))) for leaf in part))
        found = _answered(base.config, adapters, hard, base.params, base.router_state, tree, filled)
        parts.append(jax.device_get(found))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _answered(
    config: ModelConfig, adapters: AdapterConfig | None, hard: bool, params: Any, router_state: Any, tree: Any,
    batch: Batch,
) -> Answers:
    labels = jnp.asarray(batch.task) if hard else None
    out = adapted(config, adapters, params, router_state, tree, batch, None, labels)
    logits = jnp.einsum("bad,vd->bav", out.hidden, out.head.astype(out.hidden.dtype)).astype(jnp.float32)
    kept = jnp.asarray(batch.weights) > 0
    right = jnp.all((jnp.argmax(logits, axis=-1) == batch.targets) | ~kept, axis=-1)
    nats = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    counts = {site: jnp.swapaxes(stats.counts, 0, 1) for site, stats in out.adapter_stats.items()}
    return Answers(right, jnp.sum(nats * batch.weights, axis=-1), counts)  # type: ignore[arg-type]


class AdaptedScorer(Scorer):
    """Scores with an adapted model, or with the base (adapters None); `counts` [L, E] by site, of all tokens read."""

    def __init__(self, base: Base, adapters: AdapterConfig | None, tree: Any, batch_size: int):
        super().__init__(*base, batch_size)
        self.adapters, self.tree = adapters, tree
        self.counts: dict[str, np.ndarray] = {}

    def hidden(self, tokens: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray) -> Array:
        model = self.config, self.adapters, self.params, self.router_state, self.tree
        hidden, counts = _hidden(*model, tokens, segment_ids, positions)
        self.counts = {site: self.counts.get(site, 0) + np.asarray(count) for site, count in counts.items()}
        return hidden


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hidden(
    config: ModelConfig, adapters: AdapterConfig | None, params: Any, router_state: Any, tree: Any, tokens: Array,
    segment_ids: Array, positions: Array,
) -> tuple[Array, dict[str, Array]]:
    """[B * S, d], and the experts' counts [L, E] by site."""
    variables = {"params": params} | ({} if adapters is None else {COLLECTION: tree})
    out: Any = Transformer(config, adapters).apply(variables, tokens, segment_ids, positions, router_state, None)
    counts = {site: stats.counts.sum(axis=1) for site, stats in out.adapter_stats.items()}
    return out.hidden.reshape(-1, out.hidden.shape[-1]), counts


def state_bytes(config: ModelConfig, adapters: AdapterConfig, optimizer: OptimizerConfig) -> dict[str, int]:
    """Bytes of the adapters, and of their moments; nothing is made."""
    tree = abstract_adapters(config, adapters)
    moments = jax.eval_shape(make_optimizer(optimizer, 1).init, tree)
    size = lambda leaves: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(leaves))  # noqa: E731
    return {"adapter_bytes": size(tree), "moment_bytes": size(moments)}
