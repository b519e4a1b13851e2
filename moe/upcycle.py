"""Sparse upcycling: a mixture of experts that starts from a trained dense model's parameters.

    copy   every expert is the dense FFN                                           (Komatsuzaki et al., 2212.05055)
    split  the f neurons are a shared expert and G shards; E = N G experts are N copies of each shard, and the G experts
           of one copy, a virtual group, have one router column                    (He et al., 2410.07524)
    drop   copy; then each expert draws a share r of its neurons anew, from the normal with their mean and deviation
                                                                                   (Nakamura et al., 2502.19261)

Exact at step 0, copy and split: with w_i the combine weights of a token's chosen experts,

    sum_i w_i FFN_i(x) = sum_j m_j D_j act(x U_j),   m_j = sum of w_i over the chosen copies of shard j   (copy: G = 1)

is the dense FFN once D_j is divided by m_j. So m_j must be the same for every token, shard and virtual group: the
router's weights have one sum s (m_j = s / G), and a choice of k = c G experts is c whole virtual groups, which equal
columns give. s = 1 for the renormalised routers (Mixtral, Qwen3, gpt-oss), 2.5 for DeepSeek-V3's, whose down
projections are divided by it. Routers whose weights have no fixed sum (OLMoE's plain softmax, Switch, sigmoid, ReLU,
expert choice) are refused, and policies that drop tokens too. The papers differ: 2212.05055 renormalises for images
and lets language models start worse [recalled]; 2410.07524 scales the weights by what softmax-then-top-k loses on
average; here every start is exact, or refused.

Neurons are split in the order they have: a trained FFN's are exchangeable. A shared expert's gate starts at w = 0, so
it passes sigmoid(0) = 1/2 of an output twice as large. Expert j of virtual group n is expert n G + j: neighbours, so
that groups of consecutive experts (DeepSeek's routers) hold whole virtual groups.

Trap: copies have equal outputs, so at step 0 the task loss sends no gradient to the router, whose weights' sum is
fixed; it does once experts differ (each sees its own tokens). Shards and redrawn neurons differ at once.
Legend: L MoE layers of a run, d hidden, f dense width, e expert width, E experts, k active, G shards, N = E / G groups.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe.config import ModelConfig, MoEConfig, require
from moe.policies import Dropless, make_policy
from moe.routing import from_spec, make_router, parse_call
from moe.transformer import abstract_params, init_params, init_router_state

# What may differ between a model and one that takes its parameters: which layers are experts, and how it computes.
FREE = ("moe", "first_dense", "moe_every", "dense_layers", "init_std", "remat", "compute_dtype", "unroll", "context")
METHODS = ("copy", "split", "drop")
TOLERANCE = 1e-5  # of the weights' sum between tokens
SUMS = "combine weights with one sum for every token, over every shard (such as softmax_topk, renormalised)"

Params = dict[str, Any]


class Method(Protocol):
    """A way to make experts, called as `method(ffn, moe, mass, key)`: the dense FFN's leaves stacked over L layers
    (gate_up [L, d, 2f], down [L, f, d], perhaps biases) -> the MoE layers' `experts`, and `shared` if there is one.

    `shards` is G, `mass` what `shard_mass` measures, `router_std` the router's initial standard deviation.
    """

    @property
    def shards(self) -> int: ...

    @property
    def router_std(self) -> float: ...

    def widths(self, moe: MoEConfig) -> int:
        """Width of the dense FFN this layer is made from."""
        ...

    def __call__(self, ffn: Params, moe: MoEConfig, mass: float, key: Array) -> Params: ...


@dataclass(frozen=True)
class Copy:
    """Every expert is the dense FFN, down projection over the sum of the weights."""

    router_std: float
    shards = 1

    def widths(self, moe: MoEConfig) -> int:
        require(moe.shared_dim == 0, "moe.shared_dim", moe.shared_dim, "0: the experts are whole copies (see `split`)")
        return moe.expert_dim

    def __call__(self, ffn: Params, moe: MoEConfig, mass: float, key: Array) -> Params:
        del key
        whole = dict(ffn) | {name: ffn[name] / mass for name in ("down", "down_bias") if name in ffn}
        return {"experts": {name: copies(leaf[:, None], moe.num_experts) for name, leaf in whole.items()}}


@dataclass(frozen=True)
class Split:
    """A shared expert of the first neurons, then G shards of the others, each in N copies; see the module."""

    router_std: float
    shards: int

    def widths(self, moe: MoEConfig) -> int:
        for name in ("num_experts", "top_k"):
            value = getattr(moe, name)
            require(value % self.shards == 0, f"moe.{name}", value, f"a multiple of {self.shards} shards")
        return moe.shared_dim + self.shards * moe.expert_dim

    def __call__(self, ffn: Params, moe: MoEConfig, mass: float, key: Array) -> Params:
        del key
        shared, groups = moe.shared_dim, moe.num_experts // self.shards
        halves = lambda leaf: jnp.split(leaf, 2, axis=-1)  # noqa: E731

        def columns(leaf: Array) -> Array:
            """[L, ..., G e] -> [L, G, ..., e]"""
            parts = leaf[..., shared:].reshape(*leaf.shape[:-1], self.shards, moe.expert_dim)
            return jnp.moveaxis(parts, -2, 1)

        both = lambda leaf: jnp.concatenate([columns(half) for half in halves(leaf)], axis=-1)  # noqa: E731
        down = ffn["down"][:, shared:]
        down = down.reshape(down.shape[0], self.shards, moe.expert_dim, -1)
        experts = {"gate_up": both(ffn["gate_up"]), "down": down / mass}
        if "gate_up_bias" in ffn:  # all weights together carry the output's bias
            bias = ffn["down_bias"][:, None] / (self.shards * mass)
            experts |= {"gate_up_bias": both(ffn["gate_up_bias"]), "down_bias": copies(bias, self.shards)}
        made: Params = {"experts": {name: copies(leaf, groups) for name, leaf in experts.items()}}
        if shared:
            gate_up = jnp.concatenate([half[..., :shared] for half in halves(ffn["gate_up"])], axis=-1)
            twice = 2.0 if moe.shared_gate else 1.0  # sigmoid(0) = 1/2
            gate = {"gate": jnp.zeros((*gate_up.shape[:2], 1), gate_up.dtype)} if moe.shared_gate else {}
            made["shared"] = {"ffn": {"gate_up": gate_up, "down": ffn["down"][:, :shared] * twice}, **gate}
        return made


@dataclass(frozen=True)
class Drop:
    """`Copy`, then floor(r f) neurons of each expert and layer are drawn anew: their gate columns, up columns and down
    rows each from the normal with the mean and deviation of what is replaced. Not exact, as published; biases stay."""

    router_std: float
    ratio: float
    shards = 1

    def widths(self, moe: MoEConfig) -> int:
        return Copy(self.router_std).widths(moe)

    def __call__(self, ffn: Params, moe: MoEConfig, mass: float, key: Array) -> Params:
        made = Copy(self.router_std)(ffn, moe, mass, key)
        experts = made["experts"]
        keys = jax.random.split(key, experts["down"].shape[:2])
        redraw = jax.vmap(jax.vmap(functools.partial(redrawn, ratio=self.ratio)))
        gate_up, down = redraw(experts["gate_up"], experts["down"], keys)
        return {"experts": experts | {"gate_up": gate_up, "down": down}}


def redrawn(gate_up: Array, down: Array, key: Array, *, ratio: float) -> tuple[Array, Array]:
    """One expert with floor(ratio f) neurons drawn anew: gate_up [d, 2f], down [f, d]."""
    width = down.shape[0]
    keys = jax.random.split(key, 4)
    dropped = jax.random.permutation(keys[0], width) < int(ratio * width)
    gate, up = jnp.split(gate_up, 2, axis=-1)
    gate, up, rows = (_redrawn(leaf, dropped, key) for leaf, key in zip((gate, up, down.T), keys[1:], strict=True))
    return jnp.concatenate([gate, up], axis=-1), rows.T


def _redrawn(weights: Array, dropped: Array, key: Array) -> Array:
    """weights [d, f] with the columns `dropped` [f] replaced; their statistics in float32."""
    values, mask = weights.astype(jnp.float32), jnp.broadcast_to(dropped[None], weights.shape)
    mean, std = jnp.mean(values, where=mask), jnp.std(values, where=mask)
    new = mean + std * jax.random.normal(key, weights.shape)
    return jnp.where(mask, new.astype(weights.dtype), weights)


def copies(leaf: Array, count: int) -> Array:
    """[L, G, ...] -> [L, count G, ...], all of G and again."""
    return jnp.tile(leaf, (1, count, *[1] * (leaf.ndim - 2)))


def copy(router_std: float = 0.02) -> Copy:
    """See `Copy`; 0.02 is the paper's [recalled]."""
    return Copy(router_std)


def split(shards: int, router_std: float = 0.02) -> Split:
    """See `Split`. The target's shared_dim + shards * expert_dim is the dense width. ValueError unless shards >= 1."""
    require(isinstance(shards, int) and shards >= 1, "upcycle shards", shards, "at least 1")
    return Split(router_std, shards)


def drop(ratio: float = 0.5, router_std: float = 0.02) -> Drop:
    """See `Drop`; 0.5 is what the paper recommends. ValueError unless 0 < ratio <= 1."""
    require(0 < ratio <= 1, "upcycle ratio", ratio, "above 0, at most 1")
    return Drop(router_std, ratio)


def make_method(spec: str) -> Method:
    """`copy`, `split(shards=2)`, `drop(ratio=0.5)`, or an import path of a factory; ValueError for anything else."""
    name = parse_call(spec, "upcycle")[0]
    require(":" in name or name in METHODS, "upcycle", spec, f"one of {', '.join(METHODS)}, or package.module:factory")
    method = from_spec(spec, "moe.upcycle:{}", "upcycle")
    require(all(hasattr(method, name) for name in ("shards", "router_std", "widths")), "upcycle", spec, "a Method")
    require(method.router_std > 0, "upcycle router_std", method.router_std, "above 0: equal logits choose expert 0")
    return method


def upcycled_config(dense: ModelConfig, method: str, num_experts: int, top_k: int, **moe: Any) -> ModelConfig:
    """The dense model's config with MoE layers whose expert width fits the method; `moe` are MoEConfig's other fields.

    Which layers they are is for the caller to replace. ValueError if the dense width cannot be divided so.
    """
    shards, shared = make_method(method).shards, moe.get("shared_dim", 0)
    routed = dense.ffn_dim - shared
    fits = routed > 0 and routed % shards == 0
    require(fits, "moe.shared_dim", shared, f"ffn_dim - shared_dim = {routed} to be shards of equal width")
    moe.setdefault("expert_bias", dense.ffn_bias)
    made = MoEConfig(num_experts, top_k, routed // shards, **moe)
    target = replace(dense, moe=made)
    check(dense, target, method)
    return target


def check(dense: ModelConfig, target: ModelConfig, spec: str) -> None:
    """Raises ValueError unless `upcycle` can make `target` from `dense`; see the module for what routers must do."""
    method, moe = make_method(spec), target.moe
    require(dense.moe is None, "upcycle model.moe", dense.moe, "None: a dense model to start from")
    if moe is None or not target.num_moe_layers:
        raise ValueError(f"model.moe = {moe!r}: expected MoE layers to make by {spec}")
    check_around(dense, target)
    width = method.widths(moe)
    parts = f"{method.shards} x moe.expert_dim + moe.shared_dim = {width} to be the dense ffn_dim = {dense.ffn_dim}"
    require(width == dense.ffn_dim, "moe.expert_dim", moe.expert_dim, parts)
    require(moe.activation == "swiglu", "moe.activation", moe.activation, "swiglu, the dense layers' own")
    require(moe.expert_bias or not dense.ffn_bias, "moe.expert_bias", False, "True: the dense layers have biases")
    require(
        not (dense.ffn_bias and moe.shared_dim), "moe.shared_dim", moe.shared_dim, "0: a shared expert has no biases"
    )
    dropless = isinstance(make_policy(moe), Dropless)
    require(dropless, "moe.policy", moe.policy, "dropless: a dropped token loses its FFN")
    shard_mass(moe, method.shards)


def check_around(source: ModelConfig, target: ModelConfig) -> None:
    """ValueError unless both compute the same but for their FFNs, so that parameters mean the same in both."""
    for field in dataclasses.fields(ModelConfig):
        mine, theirs = getattr(target, field.name), getattr(source, field.name)
        require(field.name in FREE or mine == theirs, f"model.{field.name}", mine, f"{theirs!r}, as in the source")


@functools.lru_cache(maxsize=64)
def shard_mass(moe: MoEConfig, shards: int) -> float:
    """The weights' sum over the chosen copies of one shard, m in the module, found by asking the router about tokens at
    random, in training and at evaluation, with equal columns within each virtual group.

    Raises:
      ValueError: if it is not one number above 0 for all tokens and shards, or the weights scale the experts' input.
    """
    router, rng = make_router(moe), np.random.default_rng(0)
    tokens, hidden, groups = 256, 8, moe.num_experts // shards
    sums = []
    with jax.ensure_compile_time_eval():  # constants, also where the caller is being traced
        x = jnp.asarray(rng.normal(size=(tokens, hidden)), jnp.float32)
        logits = jnp.repeat(jnp.asarray(rng.normal(size=(tokens, groups)), jnp.float32), shards, axis=1)
        ids, state = jnp.arange(tokens, dtype=jnp.int32), router.init_state()
        for key in (jax.random.key(0), None):
            asked = x, logits, ids, state, key
            if isinstance(router, nn.Module):
                routing, _ = router.init_with_output(jax.random.key(1), *asked)[0]
            else:
                routing, _ = router(*asked)
            require(routing.scale_on == "output", "moe.router", moe.router, f"{SUMS}, not ones of the experts' input")
            of_shard = jax.nn.one_hot(routing.indices % shards, shards)
            weights = routing.weights * routing.valid
            sums.append(np.asarray(jnp.sum(weights[..., None] * of_shard, axis=1)))
    found = np.stack(sums)
    mass = float(found.mean())
    same = mass > 0 and bool(np.all(np.abs(found - mass) <= TOLERANCE * mass))
    require(same, "moe.router", moe.router, f"{SUMS}; here from {found.min():.4g} to {found.max():.4g}")
    return mass


def upcycle(dense: ModelConfig, params: Params, target: ModelConfig, method: str, key: Array) -> tuple[Params, Any]:
    """The target's parameters and router state from a dense model's parameters; a function of its arguments alone.

    Leaves keep their type and everything but the FFN of MoE layers is taken as it is. May be traced.

    Raises:
      ValueError: where `check` does, or `params` are not those of `dense`.
    """
    check(dense, target, method)
    got, wanted = leaf_shapes(params), leaf_shapes(abstract_params(dense))
    for name in wanted | got:
        require(got.get(name) == wanted.get(name), f"params {name}.shape", got.get(name), str(wanted.get(name)))
    return _upcycled(params, key, target=target, spec=method), init_router_state(target)


@functools.partial(jax.jit, static_argnames=("target", "spec"))
def _upcycled(params: Params, key: Array, *, target: ModelConfig, spec: str) -> Params:
    """Compiled as a whole, so that of the fresh parameters only those are drawn that survive: a router's beyond W_r."""
    method, moe = make_method(spec), target.moe
    assert moe is not None
    mass, layer = shard_mass(moe, method.shards), 0
    fresh = init_params(target, jax.random.fold_in(key, 0))
    made = {name: leaf for name, leaf in params.items() if name != "runs_0"}
    for run, (kind, group) in enumerate(groupby(target.layer_kinds)):
        length = len(list(group))
        block = jax.tree.map(lambda leaf: leaf[layer : layer + length], params["runs_0"])  # noqa: B023
        if kind == "moe":
            ffn = block.pop("ffn")
            if moe.expert_bias and "down_bias" not in ffn:
                ffn |= _no_bias(ffn)
            keys = jax.random.split(jax.random.fold_in(key, 1 + run), 2)
            block["moe"] = fresh[f"runs_{run}"]["moe"] | method(ffn, moe, mass, keys[0])
            columns = (length, target.hidden, moe.num_experts // method.shards)
            router = method.router_std * jax.random.truncated_normal(keys[1], -2.0, 2.0, columns)
            block["moe"]["router"] = jnp.repeat(router, method.shards, axis=-1)
            block["moe"] = jax.tree.map(lambda leaf: leaf.astype(ffn["down"].dtype), block["moe"])  # noqa: B023
        made[f"runs_{run}"] = block
        layer += length
    return made


def _no_bias(ffn: Params) -> Params:
    zeros = lambda leaf: jnp.zeros((leaf.shape[0], leaf.shape[-1]), leaf.dtype)  # noqa: E731
    return {f"{name}_bias": zeros(ffn[name]) for name in ("gate_up", "down")}


def leaf_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by dotted name, `runs_0.ffn.down`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): jnp.shape(leaf) for path, leaf in leaves}
