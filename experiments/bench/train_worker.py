"""Our side of `bench train-step`: builds the real train step and answers commands.

Arguments: the shape and the sides of the square products of the peak, both as JSON.

`warm` compiles and runs three steps, `run` times one, `peak` sweeps the matmul rates, `probe` adds one sample of the
best of them, `parts` times every part of the step once (the first call compiles). Run as a module from a source tree,
it measures that tree.
"""

from __future__ import annotations

import sys

from experiments.bench.protocol import open_channel, serve
from experiments.memory import keep_memory

keep_memory()
channel = open_channel()

import functools  # noqa: E402
import platform  # noqa: E402
import time  # noqa: E402
from importlib.metadata import version  # noqa: E402
from json import loads  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402

import experiments  # noqa: E402
from experiments.bench.batch import random_batch  # noqa: E402
from experiments.bench.parts import Part, all_parts, sample  # noqa: E402
from experiments.bench.peak import PeakMeter  # noqa: E402
from experiments.bench.shape import StepShape  # noqa: E402
from experiments.step import compile_step, init_state, make_optimizer  # noqa: E402
from parallel.mesh import make_mesh  # noqa: E402


class Bench:
    """Holds the state between commands; every method answers one command."""

    def __init__(self, shape: StepShape, squares: tuple[int, ...]) -> None:
        config = shape.run_config()
        self.shape, self.mesh = shape, make_mesh()
        self.tx = make_optimizer(config.optimizer, config.steps)
        self.meter = PeakMeter.for_shapes(shape.matmul_shapes(), squares)
        with jax.set_mesh(self.mesh):
            self.state = jax.jit(functools.partial(init_state, config, self.tx))()
            self.step = compile_step(config, self.tx, self.mesh)
        self.batch = random_batch(shape)
        self.in_parts: list[Part] = []

    def run(self) -> dict[str, float]:
        with jax.set_mesh(self.mesh):
            start = time.perf_counter()
            self.state, metrics = self.step(self.state, self.batch)
            jax.block_until_ready((self.state, metrics))
            return {"seconds": time.perf_counter() - start, "loss": float(metrics["loss"])}

    def warm(self) -> dict[str, float]:
        for _ in range(2):
            self.run()
        return self.run()

    def peak(self) -> dict[str, Any]:
        self.meter.sweep()
        return self._rates()

    def probe(self) -> dict[str, Any]:
        self.meter.probe()
        return self._rates()

    def parts(self) -> dict[str, float]:
        with jax.set_mesh(self.mesh):
            self.in_parts = self.in_parts or all_parts(self.shape, self.tx, self.state)
            return sample(self.in_parts)

    def _rates(self) -> dict[str, Any]:
        meter = self.meter
        return {"shape": meter.best_shape, "peak": meter.peak, "best_sample": meter.best_sample, "rates": meter.medians}


def main() -> None:
    bench = Bench(StepShape.from_json(sys.argv[1]), tuple(loads(sys.argv[2])))
    versions = {"python": platform.python_version()} | {n: version(n) for n in ("jax", "jaxlib", "flax", "optax")}
    device = jax.devices()[0]
    hello = {
        "program": "switchyard", "versions": versions, "device": f"{device.platform} {device.device_kind}",
        "source": str(Path(experiments.__file__).resolve().parents[1]),
    }  # fmt: skip
    commands = {name: getattr(bench, name) for name in ("warm", "run", "peak", "probe", "parts")}
    serve(channel, hello, commands)


if __name__ == "__main__":
    main()
