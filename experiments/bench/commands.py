"""The commands `bench NAME` of `experiments.cli`: plain functions whose heavy imports stay inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from experiments.start import start


def train_step(json: Path, peer_python: Path | None = None, against: str | None = None, rounds: int = 9) -> None:
    """Time the training step against the machine's matmul peak, a peer and another commit, interleaved.

    Args:
      json: result file.
      peer_python: interpreter with torch and transformers, to time Hugging Face's OLMoE of the same shape beside ours.
      against: a git revision to time beside this tree.
      rounds: interleaved rounds; medians are reported.
    """
    from experiments.bench.train_step import main

    main(json, peer_python, against, rounds)


def moe_layer(json: Path, rounds: int = 15, against: str | None = None) -> None:
    """Time the dropless MoE layer against a dense FFN of equal active FLOPs, and against another commit's layer.

    Args:
      json: result file.
      rounds: interleaved rounds; medians are reported.
      against: a git revision to time beside this tree.
    """
    from experiments.bench.moe_layer import main

    main(json, rounds, against)


def routing_metrics(json: Path, pairs: int = 60) -> None:
    """Time the training step with its routing metrics against the same step without them.

    Args:
      json: result file.
      pairs: interleaved pairs of steps, at least 50; the median ratio and its 95% interval are reported.
    """
    start(None)
    from experiments.bench.routing_metrics import main

    main(json, pairs)


def optimizers(json: Path, rounds: int = 12) -> None:
    """Bytes of state of every optimiser beside their closed forms, and the time of a train step beside AdamW's.

    Args:
      json: result file.
      rounds: interleaved windows of five steps, one of them a refresh; median ratios with 95% intervals are reported.
    """
    start(None)
    from experiments.bench.optimizers import main

    main(json, rounds)


def bilevel(json: Path, rounds: int = 20) -> None:
    """Time a step of ScaleBiO beside plain fine-tuning; the bytes of its two models and their moments.

    Args:
      json: result file.
      rounds: interleaved rounds; medians are reported, of ratios with 95% intervals.
    """
    start(None)
    from experiments.bench.bilevel import main

    main(json, rounds)


def lora_experts(json: Path, rounds: int = 30) -> None:
    """Time MixLoRA's feed-forward against its naive form and plain LoRA; the bytes of several adapters of one base.

    Args:
      json: result file.
      rounds: interleaved rounds; medians are reported, of ratios with 95% intervals.
    """
    start(None)
    from experiments.bench.lora_experts import main

    main(json, rounds)


def kernel_gates(json: Path) -> None:
    """Compile every Triton kernel for A100 and H100, which need not be here; fails where one spills or does not fit.

    Args:
      json: result file.
    """
    start(None)
    from experiments.bench.kernel_gates import main

    main(json)


def kernels(json: Path, device: Literal["cpu", "gpu"] | None = None) -> None:
    """Time grouped products and the expert FFN against one dense product, ragged_dot and capacity; a figure beside.

    Args:
      json: result file; the figure has its name with .png.
      device: by default what JAX has.
    """
    start(None)
    from experiments.bench.kernels import main

    main(json, device)


def tune_tiles(out: Path) -> None:
    """Time tiles of every grouped kernel on the GPU here, and write kernels/tiles.json anew with the fastest.

    Args:
      out: the new table; entries for other GPUs stay as they are.
    """
    start(None)
    from experiments.bench.tune_tiles import main

    main(out)


def generate(
    json: Path,
    peer_python: Path | None = None,
    model: str = "smollm2",
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    rounds: int = 7,
) -> None:
    """Time greedy decoding against PyTorch on the same weights and against the memory it must read, interleaved.

    Args:
      json: result file.
      peer_python: interpreter with torch and transformers, to generate from the same weights beside ours.
      model: smollm2, or a directory of `convert` or of Hugging Face's form.
      prompt_tokens: length of the random prompt.
      new_tokens: tokens of one generation.
      rounds: interleaved generations; medians are reported.
    """
    from experiments.bench.generate import main

    main(json, peer_python, model, prompt_tokens, new_tokens, rounds)


COMMANDS: dict[str, Callable[..., Any]] = {
    "bench train-step": train_step,
    "bench moe-layer": moe_layer,
    "bench routing-metrics": routing_metrics,
    "bench optimizers": optimizers,
    "bench lora-experts": lora_experts,
    "bench bilevel": bilevel,
    "bench generate": generate,
    "bench kernels": kernels,
    "bench tune-tiles": tune_tiles,
    "bench kernel-gates": kernel_gates,
}
