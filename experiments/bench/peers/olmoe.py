"""The peer: Hugging Face's OLMoE of the benchmark's shape, trained by PyTorch on the CPU.

Stand-alone: it runs under another interpreter that has only torch and transformers, with the shape as a JSON argument,
and speaks the line protocol of `protocol.py` (one command per line in, one JSON object per line out). Nothing is
downloaded: the weights are random. Every experts implementation this transformers offers on a CPU and both forms of
AdamW are timed at warm-up, and the fastest pair is used.
"""

from __future__ import annotations

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

EXPERTS = ("eager", "batched_mm", "grouped_mm")
OPTIMISERS = {"foreach": {"foreach": True}, "fused": {"fused": True}}


def make_model(shape: dict[str, int], experts: str) -> Any:
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=shape["vocab"], hidden_size=shape["hidden"], intermediate_size=shape["expert_dim"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["heads"],
        num_experts=shape["experts"], num_experts_per_tok=shape["top_k"], max_position_embeddings=shape["seq"],
        pad_token_id=None, eos_token_id=0, bos_token_id=0, use_cache=False, tie_word_embeddings=False,
        experts_implementation=experts,
    )  # fmt: skip
    config.head_dim = shape["head_dim"]
    return transformers.OlmoeForCausalLM(config).float().train()


def make_step(shape: dict[str, int], experts: str, optimiser: str) -> Callable[[], dict[str, float]]:
    """One forward, backward and AdamW update on fixed random tokens; returns its seconds and loss."""
    model = make_model(shape, experts)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, **OPTIMISERS[optimiser])
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(shape["vocab"], (shape["batch"], shape["seq"] + 1), generator=generator)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> dict[str, float]:
        start = time.perf_counter()
        logits = model(input_ids=inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, shape["vocab"]), targets.reshape(-1))
        loss.backward()
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return {"seconds": time.perf_counter() - start, "loss": loss.item()}

    return step


def refuse_if_too_big(shape: dict[str, int], experts: str) -> None:
    """`batched_mm` copies the experts' weights once per token and choice and keeps them for the backward pass."""
    if experts != "batched_mm":
        return
    copies = shape["batch"] * shape["seq"] * shape["top_k"] * shape["layers"]
    needed = copies * 3 * shape["hidden"] * shape["expert_dim"] * 4
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available / 4:
        raise MemoryError(f"needs {needed / 2**30:.1f} GiB of gathered weights")


def fastest_step(shape: dict[str, int], samples: int = 4) -> tuple[Callable[[], dict[str, float]], dict[str, Any]]:
    """Builds and warms every variant, then times them in turns and keeps the one with the fastest single step."""
    steps: dict[str, Callable[[], dict[str, float]]] = {}
    refused: dict[str, str] = {}
    for experts in EXPERTS:
        for optimiser in OPTIMISERS:
            name = f"{experts}, AdamW {optimiser}"
            try:
                refuse_if_too_big(shape, experts)
                step = make_step(shape, experts, optimiser)
                step()
                steps[name] = step
            except Exception as error:
                refused[name] = f"{type(error).__name__}: {error}"[:200]
    if not steps:
        raise RuntimeError(f"no experts implementation ran: {refused}")
    rounds = [{name: step()["seconds"] for name, step in steps.items()} for _ in range(samples)]
    seconds = {name: min(times[name] for times in rounds) for name in steps}
    used = min(seconds, key=seconds.__getitem__)
    return steps[used], {"variant": used, "variants_seconds": seconds, "refused": refused}


def matmul_rate(rows: int, inner: int, columns: int) -> float:
    """Best FLOP/s of three samples, small products repeated within a sample."""
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    flops = 2 * rows * inner * columns
    repeats = min(32, max(1, int(2e9 // flops)))
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b)
        best = max(best, flops * repeats / (time.perf_counter() - start))
    return best


def main() -> None:
    shape = json.loads(sys.argv[1])
    step, facts = fastest_step(shape)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    facts |= {"program": "transformers OlmoeForCausalLM", "versions": versions, "threads": torch.get_num_threads()}
    channel.write(json.dumps(facts) + "\n")
    commands = {
        "run": step,
        "peak": lambda: {"rates": {f"{n} square": matmul_rate(n, n, n) for n in (512, 1024, 2048, 4096)}},
    }
    for line in sys.stdin:
        try:
            answer = commands[line.strip()]()
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        channel.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
