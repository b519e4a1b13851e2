"""A search for weights of a corpus' sources, step by step on a mesh, kept and resumed; its path is part of its state.

Legend: A passes, B sequences of one, S positions, K sources, P points of the path.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.config import RunConfig
from experiments.data.corpus import Corpus
from experiments.data.pipeline import batch_at, domain_datasets, make_dataset
from experiments.initial import open_source
from experiments.scalebio.problem import Method
from experiments.step import Batch
from experiments.stepping import Progress, stepped
from moe.config import require
from moe.transformer import abstract_params, init_params
from optim.bilevel import check_sources
from parallel.checkpoint import Checkpoints
from parallel.mesh import AXES
from parallel.sharding import tree_shardings

POINTS = 30


@struct.dataclass
class SearchState:
    """What a checkpoint holds: finished steps, the method's state, the weights [P, K] after steps of equal distance."""

    step: Array
    method: Any
    path: Array


def search(
    method: Method,
    run: RunConfig,
    corpus: Corpus,
    validation: Corpus,
    mesh: Mesh,
    out: Path,
    mark: dict[str, Any],
    progress: Progress | None = None,
) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Goes through the method's steps in `out`, or on from the checkpoint there.

    Args:
      run: its model, seed, batch and length of sequences; training batches are of `corpus`' training split, as many
        sequences of each source; validation batches, as large, of `validation`'s validation split.
      mark: what else must be equal for a checkpoint to be taken up.

    Returns:
      the weights [K], and the path: steps [P] and weights [P, K].

    Raises:
      ValueError, NotFinite, KeyboardInterrupt: as `experiments.stepping.stepped` and the checkpoints do.
    """
    every = max(1, method.steps // POINTS)
    train = balanced(corpus, run)
    held_out = make_dataset(validation, "validation", run.data.seq_len, run.seed)
    with jax.set_mesh(mesh), Checkpoints(out / "checkpoints", fingerprint=mark) as saved:
        init = functools.partial(begin, method, len(corpus.domains), every)
        shardings = tree_shardings(jax.eval_shape(init, abstract_params(run.model)), mesh)
        state = jax.jit(init, out_shardings=shardings)(first_params(run, mesh))
        if saved.latest() is not None:
            state = saved.restore(state)
        step_fn = jax.jit(functools.partial(one_step, method, every), donate_argnums=0, out_shardings=(shardings, None))

        def one(state: SearchState, step: int) -> tuple[SearchState, dict[str, Array]]:
            of_validation = batch_at(held_out, step * run.batch_size, run.batch_size)
            return step_fn(state, on_mesh(train(step), run, mesh), on_mesh(of_validation, run, mesh))

        state = stepped(state, one, method.steps, saved, out, checkpoint_every=run.checkpoint_every, progress=progress)
        weights, path = jax.device_get((method.weights(state.method), state.path))
    return weights, [every * (i + 1) for i in range(len(path))], path


def first_params(run: RunConfig, mesh: Mesh) -> Any:
    """Those that a run of this config and seed begins with."""
    source = open_source(run, None)
    if source is not None:
        return source.read(mesh)[0]
    init = functools.partial(init_params, run.model, jax.random.fold_in(jax.random.key(run.seed), 0))
    return jax.jit(init, out_shardings=tree_shardings(abstract_params(run.model), mesh))()


def begin(method: Method, num_sources: int, every: int, params: Any) -> SearchState:
    return SearchState(jnp.int32(0), method.init(params), jnp.zeros((method.steps // every, num_sources)))


def one_step(
    method: Method, every: int, state: SearchState, batch: Batch, validation: Batch
) -> tuple[SearchState, dict[str, Array]]:
    moved, metrics = method.step(state.method, batch, validation)
    done = state.step + 1
    at = jnp.where(done % every == 0, done // every - 1, state.path.shape[0])  # out of range is dropped
    path = state.path.at[at].set(method.weights(moved), mode="drop")
    return SearchState(done, moved, path), metrics


def balanced(corpus: Corpus, run: RunConfig) -> Callable[[int], dict[str, np.ndarray]]:
    """step -> sequences of that step, B / K of each source, each source's windows in an order of their own.

    Raises:
      ValueError: a batch that is no multiple of the sources.
    """
    count = len(corpus.domains)
    require(run.batch_size % count == 0, "run.batch_size", run.batch_size, f"a multiple of the {count} sources")
    each = run.batch_size // count
    sources = domain_datasets(corpus, "train", run.data.seq_len, run.seed)

    def at(step: int) -> dict[str, np.ndarray]:
        parts = [batch_at(source, step * each, each) for source in sources]
        check_sources(np.concatenate([part["domain"] for part in parts]), count)
        # One of each source after another: every pass and every device then has as many of each, where it can.
        return {name: np.stack([part[name] for part in parts], 1).reshape(run.batch_size, *parts[0][name].shape[1:])
                for name in parts[0]}  # fmt: skip

    return at


def on_mesh(rows: dict[str, np.ndarray], run: RunConfig, mesh: Mesh) -> Batch:
    """Leaves [A B, ...] as [A, B, ...], every pass split over the mesh; every process has all of them."""
    placed = {}
    for name in ("tokens", "segment_ids", "positions", "domain"):
        leaf = rows[name].reshape(run.accumulation, -1, *rows[name].shape[1:])
        sharding = NamedSharding(mesh, P(None, AXES, *[None] * (leaf.ndim - 2)))
        placed[name] = jax.make_array_from_callback(leaf.shape, sharding, lambda index, leaf=leaf: leaf[index])
    return placed
