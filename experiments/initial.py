"""Where a run starts when not from its seed alone: from a parent's parameters or a pretrained model's, upcycled or not.

A `Source` is looked at before anything is compiled (`open_source`, `check_source`) and read when a run has no
checkpoint of its own yet (`started`). A run that goes on never reads it again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from experiments.config import PARENT, RunConfig
from experiments.data.corpus import Corpus, open_corpus
from experiments.overrides import flatten
from experiments.step import TrainState, init_state, make_optimizer, state_shardings
from moe.config import ModelConfig, require
from moe.transformer import init_params, init_router_state
from moe.upcycle import check, check_around, leaf_shapes, upcycle
from parallel.checkpoint import Checkpoints


class Parent(NamedTuple):
    """A run trained beforehand: its config, at the seed of the run that starts from it, and its directory."""

    config: RunConfig
    out: Path


@dataclass(frozen=True)
class Source:
    """Parameters to start from: whose they are, and `read(mesh) -> (params, router_state)`, arrays on the mesh."""

    model: ModelConfig
    read: Callable[[Mesh], tuple[Any, Any]]


def fingerprint(config: RunConfig, corpus: Corpus, parent: Parent | None = None) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued: the config, flattened, the corpus, and the same of the
    parent. Not the mesh, nor how often it is saved: a run may move to other devices."""
    flat = flatten(config) | {"corpus_hash": corpus.content_hash}
    kept = {name: value for name, value in flat.items() if name != "checkpoint_every" and not name.startswith("mesh.")}
    if parent is not None:
        own = fingerprint(parent.config, open_corpus(parent.config.data))
        kept |= {f"parent.{name}": value for name, value in own.items()}
    return kept


def open_source(config: RunConfig, parent: Parent | None) -> Source | None:
    """What `config.init` names, None for random parameters. ValueError if it is not there; nothing large is read."""
    init = config.init
    if not init.source:
        return None
    if not init.parent:
        return Source(pretrained_config(init.source), functools.partial(read_pretrained, init.source))
    if parent is None:
        raise ValueError(f"init.source = {init.source!r}: expected a preset with parents; {PARENT}NAME is one of them")
    here = parent._replace(config=replace(parent.config, mesh=config.mesh))
    return Source(parent.config.model, functools.partial(read_parent, here))


def check_source(config: RunConfig, source: Source) -> None:
    """ValueError unless the source is a model like `config.model`, its leaves of the same shapes (it names the first
    that is not), or can be upcycled to it."""
    if config.init.upcycle:
        check(source.model, config.model, config.init.upcycle)
        return
    check_around(source.model, config.model)
    whole = lambda model: lambda: (init_params(model, jax.random.key(0)), init_router_state(model))  # noqa: E731
    got, wanted = (leaf_shapes(jax.eval_shape(whole(model))) for model in (source.model, config.model))
    for name in wanted | got:
        leaf = f"init.source {config.init.source!r}: {name.partition('.')[2]}.shape"
        require(got.get(name) == wanted.get(name), leaf, got.get(name), f"{wanted.get(name)}, as config.model has it")


def started(
    config: RunConfig, tx: optax.GradientTransformation, source: Source, mesh: Mesh, params: Any, router_state: Any
) -> TrainState:
    """A fresh state around `params` and `router_state` as `source.read` gave them, upcycled if asked; the key that
    upcycling draws from is a function of the seed."""

    def make(params: Any, router_state: Any) -> TrainState:
        fresh = init_state(config, tx)  # compiled away but for what is kept of it
        if config.init.upcycle:
            key = jax.random.fold_in(jax.random.key(config.seed), 2)
            params, router_state = upcycle(source.model, params, config.model, config.init.upcycle, key)
        params = jax.tree.map(lambda leaf, own: leaf.astype(own.dtype), params, fresh.params)
        return replace(fresh, params=params, opt_state=tx.init(params), router_state=router_state)

    shardings = state_shardings(jax.eval_shape(functools.partial(init_state, config, tx)), tx, mesh)
    return jax.jit(make, out_shardings=shardings)(params, router_state)


def read_parent(parent: Parent, mesh: Mesh) -> tuple[Any, Any]:
    """The parent's parameters and router state after its last step, on the mesh. ValueError if it is not that far."""
    config = parent.config
    tx = make_optimizer(config.optimizer, config.steps)
    abstract = jax.eval_shape(functools.partial(init_state, config, tx))
    shardings = state_shardings(abstract, tx, mesh)
    placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
    made = fingerprint(config, open_corpus(config.data))
    with Checkpoints(parent.out / "checkpoints", fingerprint=made) as saved:
        require(saved.latest() == config.steps, "parent steps", saved.latest(), f"{config.steps}, a finished parent")
        state = saved.restore(placed)
    return state.params, state.router_state


@functools.lru_cache(maxsize=8)
def pretrained_config(name: str) -> ModelConfig:
    """The config of a pretrained model; its files are opened, not read. ValueError if it is not there or broken."""
    from moe.pretrained.checkpoint import open_checkpoint

    return open_checkpoint(name).config


def read_pretrained(name: str, mesh: Mesh) -> tuple[Any, Any]:
    """A pretrained model's parameters in float32 and its router state, on the mesh."""
    from moe.pretrained.model import load

    model = load(name, mesh=mesh)
    return model.params, model.router_state
