"""Kernels compiled for A100 and H100 pass their gates, planted faults do not; what is compiled is what is launched.

These run where TRITON_INTERPRET is unset: a kernel that was made for the interpreter cannot be compiled.
"""

import importlib
import json
import os
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from experiments.bench import kernel_gates
from kernels import _triton, routing_gpu
from kernels import gpu as device_code
from kernels.grouped_ffn import grouped_ffn
from kernels.grouped_matmul import grouped_matmul
from kernels.rig import entries as rig
from kernels.rig.compiled import Report, compile_configuration, failures, resources
from kernels.rig.entries import Configuration, Entry, configurations
from kernels.tiles import Tile, table

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

D, F, R, E, N = rig.D, rig.F, rig.R, rig.E, rig.N
ROWS = next(entry for entry in rig.ENTRIES if entry.name == "rows_kernel")
QUICK = [
    Configuration(ROWS, "down", 80, table()["rows_kernel"]["80"]["some"]),
    Configuration(ROWS, "d_x", 90, table()["rows_kernel"]["90"]["many"]),
]  # fmt: skip
QUICK += [each for each in configurations() if (each.entry.name, each.capability, each.data) == (
    "swiglu_backward_kernel", 90, "bf16")]  # fmt: skip


def marked(configuration):
    marks = () if configuration in QUICK else pytest.mark.slow
    return pytest.param(configuration, id=configuration.name, marks=marks)


@pytest.mark.parametrize("configuration", [marked(each) for each in configurations()])
def test_gates(configuration):
    report = compile_configuration(configuration)
    assert failures(report) == []
    assert report.registers >= 8
    assert report.shared >= 1024 or not configuration.entry.products


def test_what_is_compiled():
    every = configurations()
    assert len(every) <= rig.MOST_CONFIGURATIONS
    assert len({each.name for each in every}) == len(every)
    assert {each.data for each in every} == {"bf16", "fp16", "fp32"}
    of_table = {
        (kernel, int(capability), tile)
        for kernel, capabilities in table().items()
        for capability, tiles in capabilities.items()
        for tile in tiles.values()
    }
    assert of_table <= {(each.entry.name, each.capability, each.tile) for each in every}
    launches = {(entry.name, launch) for entry in rig.ENTRIES for launch in entry.launches}
    for capability in rig.CAPABILITIES:
        assert launches == {(each.entry.name, each.launch) for each in every if each.capability == capability}


def test_every_kernel_has_an_entry():
    modules = [path.stem for path in Path(device_code.__path__[0]).glob("*.py") if path.stem != "__init__"]
    kernels = {
        (module, name)
        for module in modules
        for name, value in vars(importlib.import_module(f"kernels.gpu.{module}")).items()
        if isinstance(value, triton.JITFunction) and not name.startswith("_")
    }
    assert kernels == {(entry.module, entry.name) for entry in rig.ENTRIES}


def recorded(monkeypatch, capability, function, *shapes):
    """(kernel, elements' dtypes in order, constants, warps, stages) of each launch in `function`."""
    made = []

    def record(kernel, *arrays, outputs, grid, num_warps=4, num_stages=3, **constants):
        dtypes = tuple(array.dtype.name for array in (*arrays, *outputs))
        made.append((kernel.__name__, dtypes, constants, num_warps, num_stages))
        return tuple(jnp.zeros(out.shape, out.dtype) for out in outputs)

    monkeypatch.setattr(_triton, "call", record)
    jax.clear_caches()  # traces know nothing of the capability
    with _triton.target(capability):
        jax.eval_shape(function, *shapes)
    return made


def gradient(function):
    """Of the first two arguments."""
    return jax.grad(lambda *args: jnp.sum(function(*args).astype(jnp.float32)), argnums=(0, 1))


def shapes_of(dtype):
    return lambda *shape: jax.ShapeDtypeStruct(shape, dtype)


NAMES = {"bf16": "bfloat16", "fp32": "float32", "i32": "int32", "i1": "bool"}


def expected(kernel, launch, capability):
    entry = next(entry for entry in rig.ENTRIES if entry.name == kernel)
    tile = None if entry.fixed else table()[kernel][str(capability)]["many"]
    of = Configuration(entry, launch, capability, tile)
    dtypes = tuple(NAMES[dtype] for dtype in of.pointers().values())
    return kernel, dtypes, of.constants(), *of.warps_stages


@pytest.mark.parametrize("capability", rig.CAPABILITIES)
def test_fused_ffn_launches_what_is_compiled(monkeypatch, capability):
    """K = 2 experts of each of N / 2 tokens."""
    half = shapes_of(jnp.bfloat16)
    indices, valid = jax.ShapeDtypeStruct((N // 2, 2), jnp.int32), jax.ShapeDtypeStruct((N // 2, 2), jnp.bool)
    weights = jax.ShapeDtypeStruct((N // 2, 2), jnp.float32)

    def ffn(x, gate_up, down, weights, indices, valid):
        return grouped_ffn(x, indices, weights, valid, gate_up, down, implementation="triton")

    arrays = half(N // 2, D), half(E, D, 2 * F), half(E, F, D), weights, indices, valid
    made = recorded(monkeypatch, capability, gradient(ffn), *arrays)
    assert [kernel for kernel, *_ in made[:2]] == ["count_kernel", "place_kernel"]  # compiled for many experts
    assert made[2:] == [
        expected(kernel, launch, capability)
        for kernel, launch in (
            ("swiglu_kernel", "gate_up"), ("rows_kernel", "down"), ("swiglu_backward_kernel", "d_hidden"),
            ("rows_kernel", "d_x"), ("weights_kernel", "d_gate_up"), ("weights_kernel", "d_down"),
        )
    ]  # fmt: skip


@pytest.mark.parametrize("capability", rig.CAPABILITIES)
def test_grouped_matmul_launches_what_is_compiled(monkeypatch, capability):
    half, sizes = shapes_of(jnp.bfloat16), jax.ShapeDtypeStruct((E,), jnp.int32)

    def matmul(x, w, sizes):
        return grouped_matmul(x, w, sizes, implementation="triton")

    made = recorded(monkeypatch, capability, gradient(matmul), half(N, D), half(E, D, F), sizes)
    assert made[0] == expected("rows_kernel", "grouped", capability)
    assert made[1] == expected("rows_kernel", "grouped_d_x", capability)
    assert made[2] == expected("weights_kernel", "grouped_d_w", capability)
    made = recorded(monkeypatch, capability, gradient(matmul), half(N, D), half(E, D, R), sizes)
    assert made[0] == expected("rows_kernel", "lora_a", capability)


def test_the_router_launches_what_is_compiled(monkeypatch):
    tokens, experts, many, top_k = rig.ROUTED_TOKENS, rig.ROUTED_EXPERTS, rig.MANY_EXPERTS, rig.TOP_K
    f32, half, flags = (shapes_of(dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.bool))

    def everything(logits, many_logits, bias, token_valid, valid, x, scale):
        routing_gpu.route(many_logits, top_k, score="sigmoid", bias=bias, valid=token_valid, scaling=2.5)
        routed = routing_gpu.route(logits, top_k)
        routing_gpu.sort_assignments(routed.indices, experts, block_counts=routed.block_counts)
        rows = routing_gpu.sort_assignments(routed.indices, experts, valid=valid)
        return routing_gpu.unpermute(routing_gpu.permute(x, rows, top_k, scale), rows, top_k, routed.weights)

    made = recorded(
        monkeypatch, 90, everything, f32(tokens, experts), f32(tokens, many), f32(many), flags(tokens),
        flags(tokens, top_k), half(tokens, D), f32(tokens * top_k),
    )  # fmt: skip
    assert made == [
        expected(kernel, launch, 90)
        for kernel, launch in (
            ("route_kernel", "sigmoid"), ("route_kernel", "softmax"), ("place_kernel", "routed"),
            ("count_kernel", "edited"), ("place_kernel", "edited"), ("permute_kernel", "scaled"),
            ("unpermute_kernel", "weighted"),
        )
    ]  # fmt: skip


# Planted faults.


def gates(found):
    return {failure.split(":")[0] for failure in found}


@pytest.mark.parametrize(
    ("capability", "tile"),
    [
        (80, Tile(64, 128, 16, 1, 2)),
        pytest.param(80, Tile(256, 256, 16, 4, 2), marks=pytest.mark.slow),
        pytest.param(90, Tile(256, 256, 16, 4, 2), marks=pytest.mark.slow),
    ],
)
def test_tile_too_large_for_its_warps(monkeypatch, tmp_path, capability, tile):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compiled here and now
    report = compile_configuration(Configuration(ROWS, "grouped", capability, tile))
    assert report.spill_stores > 1000
    assert gates(failures(report)) == {"stack", "spill stores", "spill loads", *["wgmma"] * (capability == 90)}
    assert ("serialized" in report.serialized) == (capability == 90)
    assert any(tmp_path.rglob("*.cubin"))


@pytest.mark.parametrize(("capability", "stages"), [(80, 10), (90, 13)])
def test_tile_too_large_for_shared_memory(capability, stages):
    report = compile_configuration(Configuration(ROWS, "grouped", capability, Tile(16, 64, 128, 4, stages)))
    assert report.shared == (stages - 1) * (16 + 64) * 128 * 2
    (failure,) = failures(report)
    assert failure.startswith(f"shared bytes: {report.shared}, at most ")


@triton.jit
def product_kernel(x, w, out, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
                   PROGRAMS: tl.constexpr):  # fmt: skip
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    left = tl.load(x + m[:, None] * BK + k[None, :])
    right = tl.load(w + k[:, None] * BN + n[None, :])
    made = tl.dot(left, right, input_precision=PRECISION)
    tl.store(out + m[:, None] * BN + n[None, :], made)


@triton.jit
def slow_product_kernel(x, w, out, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
                        PROGRAMS: tl.constexpr):  # fmt: skip
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    made = tl.zeros((BM, BN), tl.float32)
    for k in range(BK):
        left, right = tl.load(x + m * BK + k), tl.load(w + k * BN + n)
        made += left[:, None].to(tl.float32) * right[None, :].to(tl.float32)
    tl.store(out + m[:, None] * BN + n[None, :], made)


@triton.jit
def broken_kernel(x, w, out, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
                  PROGRAMS: tl.constexpr):  # fmt: skip
    tl.store(out + tl.arange(0, BM + 1), 0.0)


PRODUCT = Entry(
    "product_kernel", "none", MappingProxyType({"x": "data", "w": "data", "out": "fp32"}),
    MappingProxyType({"plain": MappingProxyType({})}),
)  # fmt: skip
SMALL, LOW = Tile(64, 64, 32, 4, 1), Tile(16, 64, 32, 4, 1)


@pytest.mark.parametrize(
    ("capability", "tile", "gate"), [(80, SMALL, "mma.sync"), (90, SMALL, "wgmma"), (90, LOW, "mma.sync")]
)
def test_product_without_tensor_cores(capability, tile, gate):
    configuration = Configuration(PRODUCT, "plain", capability, tile)
    assert failures(compile_configuration(configuration, product_kernel)) == []
    assert failures(compile_configuration(configuration, slow_product_kernel)) == [f"{gate}: 0, at least 1"]
    assert failures(compile_configuration(replace(configuration, data="fp32"), slow_product_kernel)) == []


def test_product_that_the_entry_does_not_tell():
    entry = replace(PRODUCT, products=False)
    assert gates(failures(compile_configuration(Configuration(entry, "plain", 90, SMALL), product_kernel))) == {"wgmma"}
    assert failures(compile_configuration(Configuration(entry, "plain", 90, SMALL), slow_product_kernel)) == []


def test_old_product_on_hopper():
    """`mma.sync` where `wgmma` should be: two failures, the one that is missing and the one that is there."""
    report = Report(Configuration(PRODUCT, "plain", 90, SMALL), registers=64, mma=8)
    assert failures(report) == ["wgmma: 0, at least 1", "mma.sync: 8, none"]


def test_error_of_the_compiler_is_reported():
    (failure,) = failures(compile_configuration(Configuration(PRODUCT, "plain", 90, SMALL), broken_kernel))
    assert failure.startswith("compiler: CompilationError")
    assert "power of 2" in failure


def test_registers_beyond_the_card():
    many = Configuration(PRODUCT, "plain", 80, Tile(64, 64, 32, 16, 1))
    assert failures(Report(many, registers=129, mma=1)) == ["registers of a program: 66048, at most 65536"]
    assert failures(Report(many, registers=128, mma=1)) == []
    assert gates(failures(Report(many, registers=256, mma=1))) == {"registers", "registers of a program"}


def test_what_the_assembler_says():
    said = "1 bytes stack frame, 2 bytes spill stores, 3 bytes spill loads\nptxas info : Used 40 registers, used 1 barr"
    assert resources(said) == {"stack": 1, "spill_stores": 2, "spill_loads": 3, "registers": 40, "serialized": ""}
    with pytest.raises(RuntimeError, match="does not tell"):
        resources("ptxas info : nothing")


# Bad input, and the command.


def test_wrong_entry():
    configuration = Configuration(replace(PRODUCT, pointers={"x": "data"}), "plain", 80, SMALL)
    with pytest.raises(ValueError, match=r"parameters of product_kernel = .*expected the kernel's"):
        compile_configuration(configuration, product_kernel)


def test_interpreted_process(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        compile_configuration(QUICK[0])


def test_no_triton(monkeypatch, tmp_path):
    monkeypatch.setattr(_triton, "installed", lambda name: "")
    with pytest.raises(ValueError, match=r"triton = None: expected an installed package; pip install"):
        kernel_gates.main(tmp_path / "gates.json")
    assert not list(tmp_path.iterdir())


def test_whole_command(tmp_path):
    out, console = tmp_path / "gates.json", Console(record=True, width=80, file=open(os.devnull, "w"))  # noqa: SIM115
    result = kernel_gates.main(out, chosen=QUICK[:1], console=console)
    assert json.loads(out.read_text()) == result
    (row,) = result["reports"]
    assert (row["kernel"], row["launch"], row["capability"], row["failures"]) == ("rows_kernel", "down", 80, [])
    assert row["mma"] > 0
    assert "rows down" in console.export_text()


def test_command_fails_after_writing(tmp_path):
    out, console = tmp_path / "gates.json", Console(record=True, width=80, file=open(os.devnull, "w"))  # noqa: SIM115
    bad = Configuration(ROWS, "grouped", 80, Tile(16, 64, 128, 4, 10))
    with pytest.raises(ValueError, match=r"a gate = 1: expected 0\nrows_kernel-grouped-bf16-sm80-16x64x128.*shared"):
        kernel_gates.main(out, chosen=[QUICK[0], bad], console=console)
    assert [bool(row["failures"]) for row in json.loads(out.read_text())["reports"]] == [False, True]
    assert "FAIL" in console.export_text()
