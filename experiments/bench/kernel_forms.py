"""The implementations that `bench kernels` times, each a function of the same operands and load.

    dense       one product of equal FLOPs, all rows by one matrix: what grouping is measured against
    triton      our kernels, on GPU (kernels/grouped_gpu.py)
    blocks      our loop over blocks, on CPU (kernels/grouped_matmul.py). Its backward is one loop for both gradients,
                of which the compiler drops the weights' when it is not asked for, but not the rows'
    ragged_dot  XLA's
    capacity    rows gathered into 1.25 N / E slots per expert and multiplied as one batch; rows beyond are dropped
    tokamax     tokamax.ragged_dot as it chooses, where it is installed; products only

All FFNs but the dense one gather tokens, weigh and combine; the transposes of `capacity` are JAX's own.

Legend: T tokens, k experts per token, E experts, N = T k rows sorted by expert, C slots, d model width, f expert width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from experiments.bench.moe_layer import padding_share
from experiments.bench.roofline import LOADS, KernelShape, load_counts, load_indices
from kernels.grouped_ffn import grouped_ffn
from kernels.grouped_gpu import products, weight_gradients
from kernels.grouped_matmul import automatic_block_sizes, group_of_row, grouped_matmul, sort_rows
from kernels.tiles import tile_for
from moe.layer import swiglu

CAPACITY_FACTOR = 1.25
OURS = {"cpu": "blocks", "gpu": "triton"}
# Products of N rows by d x f matrices in each kernel that an operation of `triton` launches.
LAUNCHES = {
    "forward": {"rows_kernel": 1},
    "dlhs": {"rows_kernel": 1},
    "drhs": {"weights_kernel": 1},
    "ffn forward": {"swiglu_kernel": 2, "rows_kernel": 1},
    "ffn forward+backward": {"swiglu_kernel": 2, "rows_kernel": 3, "swiglu_backward_kernel": 1, "weights_kernel": 3},
}
Product = Callable[[Array, Array, Array], Array]  # rows, matrices, counts


class Operands(NamedTuple):
    """Of the products x and g, [N, .], and w; of the FFN tokens, weights and the gradient of what it gives, [T, .], and
    gate_up and down; for dense the matrices of one expert."""

    x: Array
    g: Array
    w: Array
    tokens: Array
    weights: Array
    d_out: Array
    gate_up: Array
    down: Array
    one: tuple[Array, Array, Array]  # w, gate_up, down


class Load(NamedTuple):
    """Rows of each expert [E] and the experts of each token [T, k]."""

    counts: Array
    indices: Array


Form = Callable[[Operands, Load], Any]


@partial(jax.jit, static_argnums=0)
def make_operands(shape: KernelShape) -> Operands:
    """Random, drawn on the device; products have about unit size."""
    rows, d, f, experts = shape.rows, shape.hidden, shape.width, shape.experts
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*size: int, inner: int = 1) -> Array:
        return (jax.random.normal(next(keys), size) * inner**-0.5).astype(shape.dtype)

    w, gate_up, down = (normal(experts, *of, inner=of[0]) for of in ((d, f), (d, 2 * f), (f, d)))
    return Operands(
        x=normal(rows, d), g=normal(rows, f), w=w, tokens=normal(shape.tokens, d),
        weights=jax.random.uniform(next(keys), (shape.tokens, shape.top_k)), d_out=normal(shape.tokens, d),
        gate_up=gate_up, down=down, one=(w[0], gate_up[0], down[0]),
    )  # fmt: skip


def make_loads(shape: KernelShape) -> dict[str, Load]:
    made = {}
    for name in LOADS:
        counts = load_counts(name, shape.rows, shape.experts)
        made[name] = Load(jnp.asarray(counts), jnp.asarray(load_indices(counts, shape.tokens)))
    return made


def contestants(backend: str, operation: str, shape: KernelShape) -> dict[str, Form]:
    """The implementations of one operation on this backend, dense first."""
    ours, capacity = OURS[backend], capacity_of(shape)
    if operation.startswith("ffn"):
        grouped = {name: of_ffn(partial(dropless_ffn, name))[operation] for name in (ours, "ragged_dot")}
        padded = of_ffn(partial(capacity_ffn, capacity))[operation]
        return {"dense": DENSE[operation], **grouped, "capacity": padded}
    own = TRITON[operation] if backend == "gpu" else of_product(blocks_product)[operation]
    made = {"dense": DENSE[operation], ours: own, "ragged_dot": of_product(lax.ragged_dot)[operation]}
    made["capacity"] = partial(CAPACITY[operation], capacity)
    if has_tokamax():
        made["tokamax"] = of_product(tokamax_product)[operation]
    return made


def of_product(product: Product) -> dict[str, Form]:
    """The three operations of a differentiable grouped product."""
    return {
        "forward": lambda of, load: product(of.x, of.w, load.counts),
        "dlhs": lambda of, load: jax.vjp(lambda x: product(x, of.w, load.counts), of.x)[1](of.g)[0],
        "drhs": lambda of, load: jax.vjp(lambda w: product(of.x, w, load.counts), of.w)[1](of.g)[0],
    }


def of_ffn(ffn: Callable[..., Array]) -> dict[str, Form]:
    """The two operations of a differentiable FFN of tokens, weights, gate_up, down and, without gradient, indices."""

    def forward(of: Operands, load: Load) -> Array:
        return ffn(of.tokens, of.weights, of.gate_up, of.down, load.indices)

    def both(of: Operands, load: Load) -> Any:
        arrays = of.tokens, of.weights, of.gate_up, of.down
        out, pull = jax.vjp(lambda *arrays: ffn(*arrays, load.indices), *arrays)
        return out, pull(of.d_out)

    return {"ffn forward": forward, "ffn forward+backward": both}


def dropless_ffn(name: Any, x: Array, weights: Array, gate_up: Array, down: Array, indices: Array) -> Array:
    valid = jnp.ones(indices.shape, bool)
    return grouped_ffn(x, indices, weights, valid, gate_up, down, implementation=name)


def blocks_product(x: Array, w: Array, counts: Array) -> Array:
    return grouped_matmul(x, w, counts, implementation="blocks")


def has_tokamax() -> bool:
    return importlib.util.find_spec("tokamax") is not None


def tokamax_product(x: Array, w: Array, counts: Array) -> Array:
    return importlib.import_module("tokamax").ragged_dot(x, w, counts)


TRITON: dict[str, Form] = {
    "forward": lambda of, load: products(of.x, of.w, load.counts, of.x.shape[0]),
    "dlhs": lambda of, load: products(of.g, of.w, load.counts, of.x.shape[0], transposed=True),
    "drhs": lambda of, load: weight_gradients(of.x, of.g, load.counts, of.x.shape[0]),
}


def dense_backward(of: Operands, load: Load) -> Any:
    """The cotangent is x again: random is all it has to be."""
    out, pull = jax.vjp(swiglu, of.x, *of.one[1:])
    return out, pull(of.x)


DENSE: dict[str, Form] = {
    "forward": lambda of, load: of.x @ of.one[0],
    "dlhs": lambda of, load: of.g @ of.one[0].T,
    "drhs": lambda of, load: of.x.T @ of.g,
    "ffn forward": lambda of, load: swiglu(of.x, *of.one[1:]),
    "ffn forward+backward": dense_backward,
}


def capacity_of(shape: KernelShape) -> int:
    """C: slots of an expert."""
    return int(np.ceil(CAPACITY_FACTOR * shape.rows / shape.experts))


class Slots(NamedTuple):
    """`row` [E, C]: the sorted row of each slot, where `held`. `group`, `slot` [N]: where each sorted row is, if
    `kept`."""

    row: Array
    held: Array
    group: Array
    slot: Array
    kept: Array

    @classmethod
    def of(cls, counts: Array, num_rows: int, capacity: int) -> Slots:
        starts, place = jnp.cumsum(counts) - counts, jnp.arange(capacity, dtype=jnp.int32)
        held = place[None] < counts[:, None]
        group = group_of_row(counts, num_rows)
        slot = jnp.arange(num_rows, dtype=jnp.int32) - starts[group]
        return cls(jnp.where(held, starts[:, None] + place[None], 0), held, group, slot, slot < capacity)

    def gather(self, rows: Array) -> Array:
        """[N, .] -> [E, C, .]; empty slots are zero."""
        return jnp.where(self.held[..., None], rows[self.row], jnp.zeros((), rows.dtype))

    def scatter(self, slots: Array) -> Array:
        """[E, C, .] -> [N, .]; dropped rows are zero."""
        rows = slots[self.group, jnp.minimum(self.slot, slots.shape[1] - 1)]
        return jnp.where(self.kept[:, None], rows, jnp.zeros((), slots.dtype))


def capacity_rows(capacity: int, x: Array, w: Array, counts: Array) -> Array:
    slots = Slots.of(counts, x.shape[0], capacity)
    return slots.scatter(slots.gather(x) @ w)


def capacity_weights(capacity: int, of: Operands, load: Load) -> Array:
    slots = Slots.of(load.counts, of.x.shape[0], capacity)
    return jnp.einsum("ecd,ecf->edf", slots.gather(of.x), slots.gather(of.g))


CAPACITY: dict[str, Callable[..., Array]] = {
    "forward": lambda capacity, of, load: capacity_rows(capacity, of.x, of.w, load.counts),
    "dlhs": lambda capacity, of, load: capacity_rows(capacity, of.g, of.w.swapaxes(1, 2), load.counts),
    "drhs": capacity_weights,
}


def capacity_ffn(capacity: int, x: Array, weights: Array, gate_up: Array, down: Array, indices: Array) -> Array:
    """Tokens to slots, the SwiGLU of all experts as a batch, and the weighted sums of what was not dropped."""
    rows = sort_rows(indices.reshape(-1), gate_up.shape[0])
    slots = Slots.of(rows.counts, rows.order.shape[0], capacity)
    made = swiglu(slots.gather(x[rows.order // indices.shape[1]]), gate_up, down)
    assigned = slots.scatter(made)[rows.position].reshape(*indices.shape, -1)
    return jnp.sum(assigned * weights[..., None].astype(x.dtype), axis=1)


def padding(name: str, operation: str, shape: KernelShape, counts: np.ndarray) -> float | None:
    """The share of multiplied rows that hold none of the load's; None where only the compiler knows.

    Of several kernels it is the share of all their products' rows; of the weights' gradient, whose tiles contract rows,
    the rows come BK at a time.
    """
    if name == "dense":
        return 0.0
    if name == "capacity":
        slots = shape.experts * capacity_of(shape)
        return 1.0 - float(np.minimum(counts, capacity_of(shape)).sum()) / slots
    if name == "blocks":
        return padding_share(counts, automatic_block_sizes(shape.rows, shape.experts))
    if name != "triton":
        return None
    multiplied = 0.0
    for kernel, times in LAUNCHES[operation].items():
        tile = tile_for(kernel, jnp.dtype(shape.dtype), shape.rows // shape.experts)
        held = 1.0 - padding_share(counts, (tile.BK if kernel == "weights_kernel" else tile.BM,))
        multiplied += times / held
    return 1.0 - sum(LAUNCHES[operation].values()) / multiplied
