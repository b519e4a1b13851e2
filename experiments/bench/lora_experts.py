"""`bench lora-experts`: MixLoRA's feed-forward (2404.15159) beside plain LoRA, and what n adapters of one base keep.

Time, forward and backward, with gradients of the adapters and of the input but not of the frozen base, in one process;
the order is drawn for each round and ratios are of one round:

    LoRA      one adapter of rank 80 at gate, up and down: about as many parameters
    naive     every slot through its expert's whole feed-forward: 3 k products with frozen weights
    shared    gate and up of the base once per token, as the released code does: 2 + k
    ours      and down once, of the slots' weighted sum: 3. What the model runs: `moe.lora.feed_forward`
    ours, X   the same with the adapters' products in the form X of `kernels.lora`

`naive` needs no gathering of rows by expert here, which flatters it. `of peak`: the multiply-adds a contestant needs,
of its frozen products and the chosen experts, by the fastest plain product of the same dtype in the same rounds.

Products: the two forms of `slot_lora` and `slot_lora_sum` by shape, from which `kernels.lora.choose` was made.

Memory: the compiler's bytes of arguments of a whole decoder's forward and backward with n adapters by `vmap`, which
must be those of one base and of n adapters, to the byte. Nothing is allocated.

Legend: T tokens, E experts, k active, r rank, d hidden, f feed-forward width.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from rich.console import Console

from experiments.bench import report
from experiments.bench.lora_forms import FeedForwardShape, Problem, contestants, forward_backward, sorted_form
from experiments.bench.parts import normal
from experiments.bench.peak import Product, seconds_of
from experiments.bench.routing_metrics import median_interval
from experiments.output import write_json
from experiments.provenance import provenance
from experiments.recipes import smollm2
from kernels.lora import Implementation, choose, slot_lora, slot_lora_sum
from moe.config import ModelConfig, require
from moe.lora.adapters import abstract_adapters
from moe.lora.config import FEED_FORWARD, AdapterConfig
from moe.lora.dense import COLLECTION
from moe.lora.presets import mixlora
from moe.transformer import Transformer, abstract_params

LEAST_SPEEDUP = 1.25  # of shared products over naive, at k = 2
ADAPTERS = (1, 2, 4)
MOST_OF_PRODUCTS = 9  # rounds of the adapters' products alone
BATCH, SEQ_LEN = 2, 32  # of the compiled decoder
MIB = 2**20


@dataclass(frozen=True)
class ProductShape:
    """One call of `slot_lora` (an input for all slots) from d to o and one of `slot_lora_sum` back."""

    tokens: int
    top_k: int
    experts: int
    rank: int
    narrow: int = 576
    wide: int = 1536


def shapes(backend: str) -> dict[str, FeedForwardShape]:
    """On CPU SmolLM2's and a smaller one; elsewhere LLaMA-7B's and TinyLlama's."""
    if backend == "cpu":
        return {"SmolLM2": FeedForwardShape(), "small": FeedForwardShape(256, 256, 688)}
    return {
        "LLaMA 7B": FeedForwardShape(4096, 4096, 11008, dtype="bfloat16"),
        "TinyLlama": FeedForwardShape(4096, 2048, 5632, dtype="bfloat16"),
    }


def product_shapes(backend: str) -> list[ProductShape]:
    if backend == "cpu":
        experts = (2, 64), (8, 4), (4, 16), (8, 8), (8, 16), (8, 24), (32, 16)
        few = [ProductShape(tokens, 2, *of) for of in experts for tokens in (256, 512, 2048)]
        return [*few, *(ProductShape(512, 2, *of, 64, 192) for of in experts)]
    experts = (8, 4), (8, 16), (8, 32), (8, 64), (32, 16), (64, 16)
    return [ProductShape(tokens, 2, *of, 4096, 11008) for of in experts for tokens in (512, 4096)]


def main(
    json: Path,
    rounds: int = 30,
    *,
    sizes: dict[str, FeedForwardShape] | None = None,
    products: Sequence[ProductShape] | None = None,
    squares: Sequence[int] | None = None,
    model: ModelConfig | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures, prints tables, writes the result to `json` and returns it.

    Args:
      json: result file, written whole at the end.
      rounds: interleaved samples of each contestant; six are the fewest that bound a ratio at 95%. Of the adapters'
        products alone nine are enough.
      sizes, products, squares, model: what is timed, the products that the peak is the best of, and the decoder whose
        adapters are accounted for; None for those of the backend. Smaller ones for tests.

    Raises:
      ValueError: bad arguments, before anything is measured or written.
    """
    require(rounds >= 1, "rounds", rounds, "at least 1")
    report.check_output(json)
    backend, console = jax.default_backend(), console or Console()
    sizes = shapes(backend) if sizes is None else sizes
    products = product_shapes(backend) if products is None else products
    squares = squares or ((512, 1024, 2048) if backend == "cpu" else (4096, 8192))
    load = report.load_before(console)
    time, forms = {}, []
    with report.progress_bar(console) as bar:
        for name, shape in sizes.items():
            task = bar.add_task(f"feed-forward of {name}", total=rounds)
            time[name] = timed(shape, rounds, squares, functools.partial(bar.advance, task))
        task = bar.add_task("adapters' products", total=len(products))
        for of in products:
            forms.append(timed_products(of, min(rounds, MOST_OF_PRODUCTS)))
            bar.advance(task)
        task = bar.add_task("compiling a decoder", total=len(ADAPTERS))
        memory = compiled_memory(model or smollm2(), functools.partial(bar.advance, task))
    result = {
        "benchmark": "lora-experts", "backend": backend, "rounds": rounds, "time": time, "products": forms,
        "memory": memory, "verdict": verdict(time, memory), "load_average_before": load, "provenance": provenance(),
    }  # fmt: skip
    write_json(json, result)
    for shown in [*(time_table(name, of) for name, of in time.items()), product_table(forms), memory_table(memory)]:
        console.print(shown)
    for words, met in result["verdict"].items():
        console.print(f"{words}: {'yes' if met else 'no'}")
    console.print(f"written to {json}")
    return result


def plain_products(shape: FeedForwardShape, squares: Sequence[int]) -> dict[str, Product]:
    """Rows, inner, columns of the products the peak is the best of."""
    own = {"base product": (shape.tokens, shape.hidden, 2 * shape.ffn_dim)}
    return own | {f"{n} square": (n, n, n) for n in squares}


def product_call(product: Product, dtype: str) -> Callable[[], Any]:
    rows, inner, columns = product
    a, b = normal(0, rows, inner).astype(dtype), normal(1, inner, columns).astype(dtype)
    matmul = jax.jit(jnp.matmul)
    return lambda: matmul(a, b)


def timed(
    shape: FeedForwardShape, rounds: int, squares: Sequence[int], done: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Figures of every contestant on one shape and of the plain products, all sampled in every round."""
    of, known = Problem.of(shape), contestants(shape)
    flops = {name: count for name, (_, count) in known.items()}
    calls = {
        name: forward_backward(fn, of, of.plain if name == "LoRA" else of.experts)
        for name, (fn, _) in known.items()
    }  # fmt: skip
    products = plain_products(shape, squares)
    probes = {name: product_call(product, shape.dtype) for name, product in products.items()}
    seconds = sampled(calls | probes, rounds, done)
    rates = {name: 2 * math.prod(products[name]) / median(seconds[name]) for name in products}
    best = max(rates, key=rates.__getitem__)
    return {
        "shape": asdict(shape), "peak": {"flops_per_second": rates[best], "product": best, "rates": rates},
        "contestants": figures({name: seconds[name] for name in calls}, flops, rates[best]),
        "samples": seconds,
    }  # fmt: skip


def sampled(
    calls: dict[str, Callable[[], Any]], rounds: int, done: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each call in every round, in an order drawn for each, after one call of each that is not timed."""
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    rng = random.Random(0)
    for _ in range(rounds):
        for name in rng.sample(list(calls), len(calls)):
            seconds[name].append(seconds_of(calls[name]))
        done()
    return seconds


def figures(seconds: dict[str, list[float]], flops: dict[str, int], peak: float) -> dict[str, dict[str, Any]]:
    """Of each contestant milliseconds, ratios to two others, how many times as fast as naive, the share of peak."""
    found = {}
    for name, of in seconds.items():
        faster = [other / own for own, other in zip(of, seconds["naive"], strict=True)]
        interval = median_interval(faster)
        found[name] = {
            "ms": 1e3 * median(of), "gflops": flops[name] / 1e9, "share_of_peak": flops[name] / median(of) / peak,
            "to_naive": median(1 / ratio for ratio in faster),
            "to_lora": median(own / other for own, other in zip(of, seconds["LoRA"], strict=True)),
            "speedup": median(faster),
            "speedup_interval_95": None if any(map(math.isnan, interval)) else list(interval),
        }  # fmt: skip
    return found


def timed_products(of: ProductShape, rounds: int) -> dict[str, Any]:
    """Milliseconds of the wide product and of sorted groups, forward and backward, and what `auto` takes."""
    backend, form = jax.default_backend(), sorted_form()
    dtype = "float32" if backend == "cpu" else "bfloat16"
    row: dict[str, Any] = asdict(of) | {"dtype": dtype}
    for name in ("slots", "sum"):
        wide, groups = (product_forward_backward(of, name, how, dtype) for how in ("concat", form))
        seconds = sampled({"concat": wide, form: groups}, rounds)
        ratio = median(own / other for own, other in zip(seconds[form], seconds["concat"], strict=True))
        auto = choose(of.experts, of.rank, backend)
        row[name] = {which: 1e3 * median(samples) for which, samples in seconds.items()} | {
            "to_concat": ratio, "auto": auto, "auto_is_faster": (auto == "concat") == (ratio >= 1),
        }  # fmt: skip
    return row


def product_forward_backward(of: ProductShape, name: str, how: Implementation, dtype: str) -> Callable[[], Any]:
    """A compiled call of `slot_lora` (`slots`) or `slot_lora_sum` (`sum`) and of its transpose."""
    slots = name == "slots"
    inputs, inner, out = (1, of.narrow, of.wide) if slots else (of.top_k, of.wide, of.narrow)
    sizes = (of.tokens, inputs, inner), (of.experts, inner, of.rank), (of.experts, of.rank, out)
    arrays = [normal(i, *size).astype(dtype) for i, size in enumerate(sizes)]
    _, indices = jax.lax.top_k(normal(3, of.tokens, of.experts), of.top_k)
    weights, valid = normal(4, *indices.shape), jnp.ones(indices.shape, bool)
    cotangent = normal(9, of.tokens, *([of.top_k] if slots else []), out).astype(dtype)

    @jax.jit
    def run(arrays: Sequence[Array], indices: Array, weights: Array, valid: Array, cotangent: Array) -> Any:
        def fn(x: Array, a: Array, b: Array) -> Array:
            if slots:
                return slot_lora(x, a, b, indices, valid, implementation=how)
            return slot_lora_sum(x, a, b, indices, weights, implementation=how)

        out, pull = jax.vjp(fn, *arrays)
        return out, pull(cotangent)

    return lambda: run(arrays, indices, weights, valid, cotangent)


def compiled_memory(model: ModelConfig, done: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Bytes of arguments of a decoder with several MixLoRA adapters of its feed-forwards, beside their closed form."""
    config = mixlora(targets=FEED_FORWARD, rank=min(16, model.hidden // 4))
    base, one = abstract_params(model), abstract_adapters(model, config)
    batch = (jax.ShapeDtypeStruct((BATCH, SEQ_LEN), jnp.int32),) * 3
    of_base, of_one, of_batch = size_of(base), size_of(one), size_of(batch)
    rows = {}
    for number in ADAPTERS:
        several = jax.tree.map(lambda leaf, n=number: jax.ShapeDtypeStruct((n, *leaf.shape), leaf.dtype), one)
        call = jax.vmap(functools.partial(decoder_gradients, model, config), in_axes=(None, 0, None))
        compiled: Any = jax.jit(call).lower(base, several, batch).compile()
        analysis = compiled.memory_analysis()
        rows[str(number)] = {
            "argument_bytes": analysis.argument_size_in_bytes, "temporary_bytes": analysis.temp_size_in_bytes,
            "beyond_base": analysis.argument_size_in_bytes - of_base - of_batch, "expected": number * of_one,
        }  # fmt: skip
        done()
    return {
        "model": asdict(model), "adapters": asdict(config), "base_bytes": of_base, "adapter_bytes": of_one,
        "batch_bytes": of_batch, "by_number": rows,
    }  # fmt: skip


def size_of(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def decoder_gradients(
    model: ModelConfig, config: AdapterConfig, params: Any, adapters: Any, batch: tuple[Array, Array, Array]
) -> tuple[Array, Any]:
    """The loss of one adapter on its base at tokens, segment ids and positions [B, S], and its gradient."""
    tokens = batch[0]

    def loss(adapters: Any) -> Array:
        out: Any = Transformer(model, config).apply({"params": params, COLLECTION: adapters}, *batch, {}, None)
        logits = (out.hidden @ out.head.T.astype(out.hidden.dtype)).astype(jnp.float32)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1))

    return jax.value_and_grad(loss)(adapters)


def verdict(time: dict[str, Any], memory: dict[str, Any]) -> dict[str, bool]:
    """The lower end of a speedup's interval is at least LEAST_SPEEDUP; arguments grow by exactly the adapters."""
    said = {}
    for shape, of in time.items():
        for name in ("shared", "ours"):
            interval = of["contestants"][name]["speedup_interval_95"]
            words = f"{shape}: {name} at least {LEAST_SPEEDUP} times as fast as naive"
            said[words] = interval is not None and interval[0] >= LEAST_SPEEDUP
    exact = all(row["beyond_base"] == row["expected"] for row in memory["by_number"].values())
    return said | {"n adapters of one base are n times the bytes of one": exact}


def time_table(name: str, of: dict[str, Any]) -> Any:
    shape, peak = FeedForwardShape(**of["shape"]), of["peak"]
    columns = ["", "ms", "/ naive", "/ LoRA", "naive / it", "95%", "of peak"]
    rows = [
        [who, f"{row['ms']:.1f}", f"{row['to_naive']:.2f}", f"{row['to_lora']:.2f}", f"{row['speedup']:.2f}",
         interval(row), f"{row['share_of_peak']:.0%}"]
        for who, row in of["contestants"].items()
    ]  # fmt: skip
    title = (
        f"feed-forward of {name}, {shape.words}, k={shape.top_k} of E={shape.experts}, r={shape.rank}; "
        f"peak {peak['flops_per_second'] / 1e9:.0f} GFLOP/s ({peak['product']})"
    )
    return report.table(title, columns, rows)


def interval(row: dict[str, Any]) -> str:
    found = row["speedup_interval_95"]
    return f"{found[0]:.2f} to {found[1]:.2f}" if found else ""


def product_table(forms: Sequence[dict[str, Any]]) -> Any:
    form = sorted_form()
    columns = ["", "T", "k", "E", "r", "d, o", "concat", form, "auto"]
    rows = [
        [side, str(of["tokens"]), str(of["top_k"]), str(of["experts"]), str(of["rank"]), f"{of['narrow']} {of['wide']}",
         f"{of[side]['concat']:.2f}", f"{of[side][form]:.2f}",
         of[side]["auto"] if of[side]["auto_is_faster"] else f"[yellow]{of[side]['auto']}[/yellow]"]
        for side in ("slots", "sum")
        for of in forms
    ]  # fmt: skip
    return report.table("adapters' products, ms; yellow: the other form was faster", columns, rows)


def memory_table(memory: dict[str, Any]) -> Any:
    columns = ["adapters", "args MiB", "beyond base, B", "n x adapter, B", "temp MiB"]
    rows = [
        [number, f"{row['argument_bytes'] / MIB:.1f}", f"{row['beyond_base']:,}", f"{row['expected']:,}",
         f"{row['temporary_bytes'] / MIB:.1f}"]
        for number, row in memory["by_number"].items()
    ]  # fmt: skip
    title = f"one base of {memory['base_bytes'] / MIB:.1f} MiB, adapters of {memory['adapter_bytes'] / MIB:.1f} MiB"
    return report.table(title, columns, rows)
