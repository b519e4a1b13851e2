"""Our side of `bench generate`: loads a model, generates greedily from a random prompt and answers commands.

Arguments: the model, a path for a copy of it, the number of prompt tokens and of new ones, as JSON.

`warm` compiles, `run` times the prompt and every further token, `release` makes the weights readable for the peer,
`probe` adds samples of the memory's pace, `program` says what XLA counts for one token. Run as a module from a source
tree, it measures that tree.
"""

from __future__ import annotations

import sys

from experiments.bench.protocol import open_channel, serve
from experiments.memory import keep_memory

keep_memory()
channel = open_channel()

import platform  # noqa: E402
import time  # noqa: E402
from importlib.metadata import version  # noqa: E402
from json import loads  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from experiments.bench.streaming import StreamMeter, cache_bytes, weight_bytes  # noqa: E402
from moe.generate import Generator, Sampling, advance, check_prompts, empty_caches, padded_length  # noqa: E402
from moe.pretrained.model import convert, load  # noqa: E402
from moe.pretrained.ours import SWITCHYARD  # noqa: E402


def random_prompt(vocab_size: int, length: int) -> list[int]:
    """The prompt of both sides."""
    return np.random.default_rng(0).integers(0, vocab_size, length).tolist()


class Bench:
    """Holds the model between commands; every method answers one command."""

    def __init__(self, model: str, scratch: str, prompt_tokens: int, new_tokens: int) -> None:
        loaded = load(model)
        self.model, self.family, self.scratch = model, loaded.family, Path(scratch)
        self.config, self.new_tokens = loaded.config, new_tokens
        self.prompt = random_prompt(self.config.vocab_size, prompt_tokens)
        check_prompts(self.config, [self.prompt], new_tokens)
        self.generator = Generator(loaded)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
        self.meter: StreamMeter | None = None

    def facts(self) -> dict[str, Any]:
        weights, positions = self.generator.weights, len(self.prompt) + (self.new_tokens + 1) / 2
        return {
            "parameters": self.parameters,
            "weight_bytes": weight_bytes(self.config, weights),
            "cache_bytes": cache_bytes(self.config, positions),
            "versions": {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": version("jaxlib")},
            "device": jax.devices()[0].device_kind,
        }

    def run(self) -> dict[str, Any]:
        tokens, times = [], [time.perf_counter()]
        for new in self.generator([self.prompt], max_new_tokens=self.new_tokens):
            tokens.append(int(new[0]))
            times.append(time.perf_counter())
        first, *rest = np.diff(times).tolist()
        return {"prefill_seconds": first, "token_seconds": rest, "tokens": tokens}

    def warm(self) -> dict[str, Any]:
        self.run()
        return self.run()

    def probe(self) -> dict[str, float]:
        self.meter = self.meter or StreamMeter()
        return self.meter.probe()

    def release(self) -> dict[str, Any]:
        """The prompt, and a folder that Hugging Face's classes read: the model's own or a copy under `scratch`."""
        theirs = Path(self.model).is_dir() and self.family != SWITCHYARD
        if not theirs:
            convert(self.model, self.scratch, to=None if self.family == SWITCHYARD else self.family)
        return {"folder": str(Path(self.model).resolve() if theirs else self.scratch), "prompt": self.prompt}

    def program(self) -> dict[str, float]:
        """What XLA counts for the compiled step of one token at this cache's size."""
        slots = padded_length(len(self.prompt) + self.new_tokens)
        one = jnp.ones((1,), jnp.int32)
        lowered = advance.lower(self.config, None, Sampling(), self.generator.weights, one[:, None], one, one,
                                empty_caches(self.config, 1, slots), jax.random.key(0))  # fmt: skip
        costs = lowered.compile().cost_analysis() or {}
        return {name: float(costs.get(name, float("nan"))) for name in ("bytes accessed", "flops")}


def main() -> None:
    bench = Bench(**loads(sys.argv[1]))
    names = ("warm", "run", "release", "probe", "program")
    serve(channel, bench.facts(), {name: getattr(bench, name) for name in names})


if __name__ == "__main__":
    main()
