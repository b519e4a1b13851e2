"""What a product of row groups has to cost: its arithmetic, its bytes, and the time of both at a device's ceilings.

Legend: T tokens, k experts per token, E experts, N = T k rows sorted by expert, d model width, f expert width.

    forward               x [N, d], w [E, d, f] -> [N, f]
    dlhs                  g [N, f], w           -> [N, d]
    drhs                  x [N, d], g [N, f]    -> [E, d, f]
    ffn forward           tokens [T, d], gate_up [E, d, 2f], down [E, f, d] -> [T, d], a SwiGLU in every expert
    ffn forward+backward  the same, and the gradients of tokens, gate_up and down
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.bench.peak import seconds_of
from experiments.bench.streaming import StreamMeter
from moe.config import require

# How many products of N rows with d x f matrices each operation is.
PRODUCTS = {"forward": 1, "dlhs": 1, "drhs": 1, "ffn forward": 3, "ffn forward+backward": 9}
LOADS = ("balanced", "zipf", "one-hot")
COPY_BYTES = 2**31
# Launches of one sample: as many as last so long, for on GPU a launch and a wait weigh. On CPU two could run at once.
SAMPLE_SECONDS = {"cpu": 0.0, "gpu": 2e-3}


@dataclass(frozen=True)
class KernelShape:
    """One layer's grouped products."""

    tokens: int
    top_k: int
    experts: int
    hidden: int
    width: int
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "dtype":
                require(isinstance(value, int) and value >= 1, f"shape.{name}", value, "an integer of at least 1")
        require(self.top_k <= self.experts, "shape.top_k", self.top_k, f"at most experts = {self.experts}")
        require(self.dtype in ("float32", "bfloat16"), "shape.dtype", self.dtype, "float32 or bfloat16")

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k

    @property
    def name(self) -> str:
        return f"E={self.experts} k={self.top_k}"


def shapes(backend: str) -> tuple[KernelShape, ...]:
    """(E, k) of (8, 2), (64, 8), (128, 8). On GPU the last two are OLMoE-1B-7B's and Qwen3-30B-A3B's layers, and no
    operand fits an L2 cache of 50 MB; on CPU they are small enough for two cores."""
    if backend == "cpu":
        sizes = (1024, 2, 8, 64, 128), (512, 8, 64, 64, 128), (512, 8, 128, 64, 128)
        return tuple(KernelShape(*of) for of in sizes)
    sizes = (8192, 2, 8, 2048, 4096), (8192, 8, 64, 2048, 1024), (8192, 8, 128, 2048, 768)
    return tuple(KernelShape(*of, dtype="bfloat16") for of in sizes)


def load_counts(load: str, rows: int, experts: int) -> np.ndarray:
    """Rows of each expert, [E] int32, that sum to `rows`.

    `balanced` differs by one row at most; `zipf` gives expert e a share of 1 / (e + 1), rounded by largest remainders;
    `one-hot` gives all to the first.
    """
    require(load in LOADS, "load", load, f"one of {', '.join(LOADS)}")
    share = {
        "balanced": np.ones(experts),
        "zipf": 1.0 / np.arange(1, experts + 1),
        "one-hot": np.arange(experts) == 0,
    }[load]
    exact = rows * share / share.sum()
    counts = np.floor(exact).astype(np.int32)
    counts[np.argsort(counts - exact, kind="stable")[: rows - counts.sum()]] += 1
    return counts


def load_indices(counts: np.ndarray, tokens: int) -> np.ndarray:
    """Experts of each token, [T, k] int32, whose counts are `counts`, in random order.

    A skewed load has tokens that meet one expert several times: no router sends them, but no implementation minds.
    """
    ids = np.repeat(np.arange(counts.size, dtype=np.int32), counts)
    return np.random.default_rng(0).permutation(ids).reshape(tokens, -1)


def flops(operation: str, shape: KernelShape) -> int:
    """Multiply-adds times two; activations and sums over k are not counted."""
    return 2 * PRODUCTS[operation] * shape.rows * shape.hidden * shape.width


def least_bytes(operation: str, shape: KernelShape, counts: np.ndarray) -> int:
    """Every input read once and every result written once, in the shape's dtype, with nothing between them kept.

    Weights of empty experts are not read, but their gradients are written.
    """
    rows, matrix, used = shape.rows, shape.hidden * shape.width, int(np.count_nonzero(counts))
    tokens = shape.tokens * shape.hidden
    elements = {
        "forward": rows * (shape.hidden + shape.width) + used * matrix,
        "dlhs": rows * (shape.hidden + shape.width) + used * matrix,
        "drhs": rows * (shape.hidden + shape.width) + shape.experts * matrix,
        "ffn forward": 2 * tokens + 3 * used * matrix,
        "ffn forward+backward": 4 * tokens + 3 * (used + shape.experts) * matrix,
    }[operation]
    return elements * jnp.dtype(shape.dtype).itemsize


@dataclass(frozen=True)
class Ceilings:
    """What a device reached here: the best median rate of a dense product, and the best pace of memory."""

    flops_per_second: float
    product: str
    product_rates: dict[str, float]
    bytes_per_second: float
    stream: str
    stream_rates: dict[str, float]

    def floor(self, operation: str, shape: KernelShape, counts: np.ndarray) -> float:
        """Seconds below which no implementation can be: those of the arithmetic or of the bytes."""
        arithmetic = flops(operation, shape) / self.flops_per_second
        return max(arithmetic, least_bytes(operation, shape, counts) / self.bytes_per_second)


def measure_ceilings(backend: str, dtype: str, squares: Sequence[int], samples: int = 5) -> Ceilings:
    """Square products of `dtype`; reads of memory on CPU, a copy on GPU (its bytes are read and written)."""
    products = {f"{n} square": square_rate(backend, n, dtype, samples) for n in squares}
    streams = read_rates(samples) if backend == "cpu" else {"copy": copy_rate(backend, samples)}
    product, stream = (max(rates, key=rates.__getitem__) for rates in (products, streams))
    return Ceilings(products[product], product, products, streams[stream], stream, streams)


def square_rate(backend: str, size: int, dtype: str, samples: int) -> float:
    """FLOP/s of the median sample of one n x n x n product."""
    a, b = (jax.random.normal(jax.random.key(seed), (size, size)).astype(dtype) for seed in (0, 1))
    return 2 * size**3 / median(sampled_seconds(backend, jax.jit(jnp.matmul), (a, b), samples))


def copy_rate(backend: str, samples: int) -> float:
    source = jnp.zeros(COPY_BYTES // 4, jnp.float32)
    return 2 * source.nbytes / median(sampled_seconds(backend, jax.jit(lambda a: a + 1), (source,), samples))


def read_rates(samples: int) -> dict[str, float]:
    meter = StreamMeter()
    for _ in range(samples):
        meter.probe()
    return meter.best


def sampled_seconds(backend: str, call: Callable[..., Any], args: Any, samples: int) -> list[float]:
    """Seconds of one call in each sample, after two that warm up."""
    jax.block_until_ready(call(*args))
    launches = launches_for(backend, seconds_of(lambda: call(*args)))
    return [seconds_per_call(call, args, launches) for _ in range(samples)]


def launches_for(backend: str, seconds: float) -> int:
    """How many calls of so many seconds are one sample."""
    return min(64, max(1, round(SAMPLE_SECONDS[backend] / seconds)))


def seconds_per_call(call: Callable[..., Any], args: Any, launches: int) -> float:
    """Of so many launches in a row, whose last result is waited for."""
    return seconds_of(lambda: [call(*args) for _ in range(launches)]) / launches


def difference(out: Any, wanted: Any) -> float:
    """The greatest difference of two results, relative to the greatest magnitude of its leaf."""
    leaves = zip(jax.tree.leaves(out), jax.tree.leaves(wanted), strict=True)
    return max(float(_difference(a, b)) for a, b in leaves)


@jax.jit
def _difference(a: Array, b: Array) -> Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))


def first_line(error: Exception) -> str:
    """Of a compiler's or a launch's error, which may be pages long."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
