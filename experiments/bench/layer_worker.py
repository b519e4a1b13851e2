"""One side of `bench moe-layer`: builds MoE layers and answers commands.

Arguments: the shapes as a JSON object by name, and the sides of the square products of the peak. Commands: `moe NAME`
times the model's layer at that shape forward and backward (the first call compiles); `dense NAME` the dense FFN of
equal active FLOPs, `share NAME` says how much of the layer's rows is padding, `peak` sweeps the matmul rates and
`probe` adds a sample of the best. Run with another tree on its path, it times that tree's layer.
"""

from __future__ import annotations

import sys

from experiments.bench.protocol import open_channel, serve
from experiments.memory import keep_memory

keep_memory()
channel = open_channel()

from collections.abc import Callable  # noqa: E402
from functools import cache, partial  # noqa: E402
from json import dumps, loads  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import experiments  # noqa: E402
from experiments.bench.parts import moe_layer  # noqa: E402
from experiments.bench.peak import PeakMeter, seconds_of  # noqa: E402
from experiments.bench.shape import StepShape  # noqa: E402


@cache
def layer(shape: StepShape) -> Callable[[], Any]:
    return warmed(moe_layer(shape).call)


@cache
def dense(shape: StepShape) -> Callable[[], Any]:
    from experiments.bench.moe_layer import dense_ffn

    return warmed(dense_ffn(shape))


def warmed(call: Callable[[], Any]) -> Callable[[], Any]:
    seconds_of(call)
    return call


def timed(of: Callable[[StepShape], Callable[[], Any]], shape: StepShape) -> dict[str, float]:
    return {"seconds": seconds_of(of(shape))}


def share(shape: StepShape) -> dict[str, float]:
    from experiments.bench.moe_layer import padding_share_of

    return {"share": padding_share_of(layer(shape)(), shape)}


def main() -> None:
    shapes = {name: StepShape.from_json(dumps(of)) for name, of in loads(sys.argv[1]).items()}
    meter = PeakMeter.for_shapes(next(iter(shapes.values())).matmul_shapes(), tuple(loads(sys.argv[2])))

    def rates(measure: Callable[[], None]) -> dict[str, Any]:
        measure()
        return {"shape": meter.best_shape, "peak": meter.peak, "rates": meter.medians}

    commands: dict[str, Callable[[], dict[str, Any]]] = {
        "peak": partial(rates, meter.sweep), "probe": partial(rates, meter.probe)
    }  # fmt: skip
    for name, shape in shapes.items():
        commands[f"moe {name}"] = partial(timed, layer, shape)
        commands[f"dense {name}"] = partial(timed, dense, shape)
        commands[f"share {name}"] = partial(share, shape)
    serve(channel, {"source": str(Path(experiments.__file__).resolve().parents[1])}, commands)


if __name__ == "__main__":
    main()
