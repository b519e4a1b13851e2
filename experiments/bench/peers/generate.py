"""The peer of `bench generate`: the same weights in Hugging Face's own class, generated from by PyTorch on the CPU.

Stand-alone: it runs under another interpreter that has only torch and transformers, with a JSON argument (model folder,
prompt, new tokens), and speaks the line protocol of `protocol.py`. Only files of that folder are read. A loop of
forward passes over a growing cache and over a static one, and the library's own `generate`, are timed at warm-up, and
the fastest is used.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

channel = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what libraries print must not mix with answers
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402  # pyright: ignore[reportMissingImports]
import transformers  # noqa: E402  # pyright: ignore[reportMissingImports]

Answer = dict[str, Any]


def loop(model: Any, prompt: Any, steps: int, make_cache: Callable[[], Any]) -> Answer:
    """Greedy decoding by hand: one forward pass per token, logits of the last position only."""
    cache, ids, tokens, times = make_cache(), prompt, [], [time.perf_counter()]
    for _ in range(steps):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(ids))
        times.append(time.perf_counter())
    return {"tokens": tokens} | seconds(times)


class Clock:
    """A streamer: `generate` calls it with the prompt, then with every token."""

    def __init__(self) -> None:
        self.times: list[float] = [time.perf_counter()]

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def library(model: Any, prompt: Any, steps: int) -> Answer:
    """The library's `generate`, greedy, never stopping early."""
    clock = Clock()
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
        streamer=clock, pad_token_id=0,
    )  # fmt: skip
    clock.times.pop(1)  # the prompt, before anything is computed
    return {"tokens": out[0, prompt.shape[1] :].tolist()} | seconds(clock.times)


def seconds(times: list[float]) -> Answer:
    first, *rest = [b - a for a, b in itertools.pairwise(times)]
    return {"prefill_seconds": first, "token_seconds": rest}


def fastest(model: Any, prompt: Any, steps: int, samples: int = 2) -> tuple[Callable[[], Answer], Answer]:
    """Warms every variant up, times them in turns and keeps the one with the fastest pace."""
    length = prompt.shape[1] + steps
    variants: dict[str, Callable[[], Answer]] = {
        "loop, growing cache": lambda: loop(
            model, prompt, steps, lambda: transformers.DynamicCache(config=model.config)
        ),
        "loop, static cache": lambda: loop(
            model, prompt, steps, lambda: transformers.StaticCache(config=model.config, max_cache_len=length)
        ),
        "generate": lambda: library(model, prompt, steps),
    }
    refused, paces = {}, dict.fromkeys(variants, float("inf"))
    for _ in range(1 + samples):  # the first one warms up
        for name in variants.keys() - refused.keys():
            try:
                paces[name] = min(paces[name], sum(variants[name]()["token_seconds"]))
            except Exception as error:
                refused[name] = f"{type(error).__name__}: {error}"[:200]
    if len(refused) == len(variants):
        raise RuntimeError(f"no way to generate ran: {refused}")
    used = min(paces.keys() - refused.keys(), key=paces.__getitem__)
    kept = {name: pace for name, pace in paces.items() if name not in refused}
    return variants[used], {"variant": used, "variants_seconds": kept, "refused": refused}


@torch.inference_mode()
def main() -> None:
    asked = json.loads(sys.argv[1])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        asked["folder"], dtype=torch.float32, local_files_only=True
    ).eval()
    prompt = torch.tensor([asked["prompt"]])
    run, facts = fastest(model, prompt, asked["new_tokens"])
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    facts |= {"program": type(model).__name__, "versions": versions, "threads": torch.get_num_threads()}
    channel.write(json.dumps(facts) + "\n")
    for line in sys.stdin:
        try:
            answer = {"run": run}[line.strip()]()
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        channel.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
