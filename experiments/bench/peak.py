"""The machine's own float32 matmul rate, measured in the process whose step is judged against it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

SQUARES = (512, 1024, 2048, 4096)
Product = tuple[int, int, int]  # rows, inner, columns


@jax.jit
def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def seconds_of(call: Callable[[], object]) -> float:
    """Wall seconds of one call whose result is waited for."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


@dataclass
class PeakMeter:
    """FLOP/s of square products and of named ones; `rates` holds every sample taken.

    The peak is the best shape's *median* rate, as the step is judged by its median too; `best_sample` is the
    fastest single product seen.
    """

    products: dict[str, Product]
    rates: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def for_shapes(cls, own: dict[str, Product], squares: tuple[int, ...] = SQUARES) -> PeakMeter:
        return cls({f"{n} square": (n, n, n) for n in squares} | own)

    def sweep(self, samples: int = 3) -> None:
        """Times every product `samples` times; small ones are repeated within a sample to last some milliseconds."""
        for name in self.products:
            self._measure(name, samples)

    def probe(self) -> None:
        """One more sample of the best shape so far."""
        self._measure(self.best_shape, 1)

    def _measure(self, name: str, samples: int) -> None:
        rows, inner, columns = self.products[name]
        rng = np.random.default_rng(0)
        a = jnp.asarray(rng.standard_normal((rows, inner), dtype=np.float32))
        b = jnp.asarray(rng.standard_normal((inner, columns), dtype=np.float32))
        flops = 2 * rows * inner * columns
        repeats = min(32, max(1, int(2e9 // flops)))
        jax.block_until_ready(_matmul(a, b))
        for _ in range(samples):
            seconds = seconds_of(lambda: [_matmul(a, b) for _ in range(repeats)])
            self.rates.setdefault(name, []).append(flops * repeats / seconds)

    @property
    def medians(self) -> dict[str, float]:
        return {name: median(rates) for name, rates in self.rates.items()}

    @property
    def best_shape(self) -> str:
        medians = self.medians
        return max(medians, key=medians.__getitem__)

    @property
    def peak(self) -> float:
        return self.medians[self.best_shape]

    @property
    def best_sample(self) -> float:
        return max(max(rates) for rates in self.rates.values())
