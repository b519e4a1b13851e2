"""Arithmetic by hand, implementations against loops, the whole command on a tiny shape, and the tuner's choices."""

import json
import math
import time
from functools import partial
from io import StringIO
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.bench import kernel_forms, kernels, tune_tiles
from experiments.bench.kernel_forms import contestants, make_loads, make_operands, padding
from experiments.bench.kernels import Timing, compile_all, multiplying
from experiments.bench.roofline import (
    LOADS,
    PRODUCTS,
    Ceilings,
    KernelShape,
    flops,
    least_bytes,
    load_counts,
    load_indices,
    shapes,
)
from experiments.cli import main as command
from kernels.grouped_gpu import tiles
from kernels.tiles import TABLE, Tile, table, using

TINY = KernelShape(16, 2, 4, 8, 12)
HAND = KernelShape(5, 2, 4, 3, 7)  # ten rows by 3 x 7 matrices
HAND_COUNTS = np.array([6, 4, 0, 0])


def quiet() -> Console:
    return Console(record=True, width=120, file=StringIO())


# --- What it has to cost


def test_arithmetic_by_hand() -> None:
    product_flops = 2 * 10 * 3 * 7
    wanted = [product_flops, product_flops, product_flops, 3 * product_flops, 9 * product_flops]
    assert [flops(operation, HAND) for operation in PRODUCTS] == wanted


def test_bytes_by_hand() -> None:
    rows, used, every, tokens = 10 * 3 + 10 * 7, 2 * 21, 4 * 21, 5 * 3
    elements = {
        "forward": rows + used,
        "dlhs": rows + used,
        "drhs": rows + every,
        "ffn forward": 2 * tokens + 3 * used,
        "ffn forward+backward": 4 * tokens + 3 * used + 3 * every,
    }
    half = KernelShape(5, 2, 4, 3, 7, "bfloat16")
    for operation, number in elements.items():
        assert least_bytes(operation, HAND, HAND_COUNTS) == 4 * number, operation
        assert least_bytes(operation, half, HAND_COUNTS) == 2 * number, operation


def test_the_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    made = partial(Ceilings, product="", product_rates={}, stream="", stream_rates={})
    assert made(flops_per_second=10.0, bytes_per_second=1e9).floor("forward", HAND, HAND_COUNTS) == 42.0
    assert made(flops_per_second=1e9, bytes_per_second=71.0).floor("forward", HAND, HAND_COUNTS) == 8.0


def test_loads_by_hand() -> None:
    assert load_counts("balanced", 10, 4).tolist() == [3, 3, 2, 2]
    assert load_counts("zipf", 11, 3).tolist() == [6, 3, 2]
    assert load_counts("zipf", 12, 3).tolist() == [7, 3, 2]  # 6.5, 3.3, 2.2
    assert load_counts("one-hot", 10, 3).tolist() == [10, 0, 0]
    with pytest.raises(ValueError, match="load = 'even'"):
        load_counts("even", 10, 3)


@pytest.mark.parametrize("load", LOADS)
def test_loads_hold_all_rows(load) -> None:
    for tokens, top_k, experts in ((1, 1, 1), (5, 3, 7), (16, 2, 4), (33, 8, 128)):
        counts = load_counts(load, tokens * top_k, experts)
        assert counts.sum() == tokens * top_k
        indices = load_indices(counts, tokens)
        assert indices.shape == (tokens, top_k)
        np.testing.assert_array_equal(np.bincount(indices.reshape(-1), minlength=experts), counts)


def test_shapes_are_the_named_ones_and_leave_the_cache() -> None:
    for backend in ("cpu", "gpu"):
        assert [(shape.experts, shape.top_k) for shape in shapes(backend)] == [(8, 2), (64, 8), (128, 8)]
    for shape in shapes("gpu"):
        operands = shape.rows * shape.hidden, shape.rows * shape.width, shape.experts * shape.hidden * shape.width
        assert 2 * min(operands) > 50e6
        assert shape.rows // shape.experts >= 512


# --- Padding


def naive_padding(counts: np.ndarray, size: int) -> tuple[int, int]:
    """Rows of padding and all rows, tile by tile."""
    empty = whole = 0
    for count in counts.tolist():
        left = count
        while left > 0:
            empty, whole, left = empty + max(0, size - left), whole + size, left - size
    return empty, whole


@pytest.mark.parametrize("load", LOADS)
def test_padding_counts_the_rows_of_tiles_that_hold_nothing(load) -> None:
    shape = KernelShape(40, 2, 4, 8, 12)
    counts = load_counts(load, shape.rows, shape.experts)
    empty, whole = naive_padding(counts, 32)
    assert int(tiles(jnp.asarray(counts), shape.rows, 32).number[0]) * 32 == whole
    with using(Tile(32, 16, 16, 4, 2)):
        for operation in ("forward", "dlhs"):
            assert padding("triton", operation, shape, counts) == pytest.approx(empty / whole)
        # The weights' gradient takes BK = 16 rows at a time: a third of the FFN's nine products.
        few, fewer = naive_padding(counts, 16)
        assert padding("triton", "drhs", shape, counts) == pytest.approx(few / fewer)
        of_ffn = (6 * empty + 3 * few) / (6 * whole + 3 * fewer)
        assert padding("triton", "ffn forward+backward", shape, counts) == pytest.approx(of_ffn)
        assert padding("triton", "ffn forward", shape, counts) == pytest.approx(empty / whole)
    assert padding("blocks", "forward", shape, counts) == pytest.approx(few / fewer)  # any multiple of 16 rows
    assert padding("dense", "forward", shape, counts) == 0.0
    assert padding("ragged_dot", "forward", shape, counts) is None


def test_kernels_of_an_operation_do_its_products() -> None:
    for operation, launches in kernel_forms.LAUNCHES.items():
        assert sum(launches.values()) == PRODUCTS[operation]
        assert set(launches) <= set(table())


def test_capacity_by_hand() -> None:
    assert kernel_forms.capacity_of(HAND) == 4  # 1.25 x 10 / 4, rounded up
    assert padding("capacity", "forward", HAND, HAND_COUNTS) == pytest.approx(1 - 8 / 16)
    seconds = {"dense": [1.0], "capacity": [2.0]}
    ceilings = Ceilings(1.0, "", {}, 1.0, "", {})
    row = kernels.figures("capacity", seconds, ("forward", HAND, HAND_COUNTS), ceilings, 0.5)
    assert (row["dropped"], row["difference"]) == (2, None)
    assert (
        kernels.figures("capacity", seconds, ("forward", HAND, np.array([3, 3, 2, 2])), ceilings, 0.5)["dropped"] == 0
    )


# --- Implementations against loops


@pytest.fixture(scope="module")
def operands():
    return make_operands(TINY)


@pytest.fixture(scope="module")
def loads():
    return make_loads(TINY)


@pytest.fixture(scope="module")
def programs(operands, loads):
    """Every CPU implementation of every operation, compiled for TINY."""
    made = {}
    for operation in PRODUCTS:
        made[operation], failed = compile_all(contestants("cpu", operation, TINY), operands, loads["balanced"])
        assert not failed
    return made


def naive_products(of, counts: np.ndarray, kept: int) -> dict[str, np.ndarray]:
    """In float64, row by row; of each expert the first `kept` rows."""
    x, g, w = (np.asarray(a, np.float64) for a in (of.x, of.g, of.w))
    out = {"forward": np.zeros(g.shape), "dlhs": np.zeros(x.shape), "drhs": np.zeros(w.shape)}
    row = 0
    for expert, count in enumerate(counts):
        for place in range(count):
            if place < kept:
                out["forward"][row] = x[row] @ w[expert]
                out["dlhs"][row] = w[expert] @ g[row]
                out["drhs"][expert] += np.outer(x[row], g[row])
            row += 1
    return out


def first_met(indices: np.ndarray, kept: int) -> np.ndarray:
    """Which assignments [T, k] are among the first `kept` of their expert."""
    met: dict[int, int] = {}
    held = np.zeros(indices.shape, bool)
    for place, expert in np.ndenumerate(indices):
        held[place] = met.setdefault(int(expert), 0) < kept
        met[int(expert)] += 1
    return held


@jax.jit
def naive_ffn(arrays, indices, held, d_out):
    """Every expert on every token; of each token the sum of its own, and the gradients."""

    def run(tokens, weights, gate_up, down):
        made = []
        for wide, narrow in zip(gate_up, down):
            gate, up = jnp.split(tokens @ wide, 2, axis=1)
            made.append((gate / (1 + jnp.exp(-gate)) * up) @ narrow)
        own = jnp.take_along_axis(jnp.stack(made, axis=1), indices[..., None], axis=1)
        return jnp.sum(own * (weights * held)[..., None], axis=1)

    out, pull = jax.vjp(run, *arrays)
    return out, pull(d_out)


def close(found, wanted) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(other).max())


@pytest.mark.parametrize("load", LOADS)
def test_products_are_those_of_loops(load, operands, loads, programs) -> None:
    counts = np.asarray(loads[load].counts)
    for operation in ("forward", "dlhs", "drhs"):
        for name, program in programs[operation].items():
            if name != "dense":
                kept = kernel_forms.capacity_of(TINY) if name == "capacity" else TINY.rows
                close(program(operands, loads[load]), naive_products(operands, counts, kept)[operation])


@pytest.mark.parametrize("load", LOADS)
def test_ffns_are_those_of_loops(load, operands, loads, programs) -> None:
    indices = np.asarray(loads[load].indices)
    arrays = operands.tokens, operands.weights, operands.gate_up, operands.down
    for kept, names in ((TINY.rows, ("blocks", "ragged_dot")), (kernel_forms.capacity_of(TINY), ("capacity",))):
        wanted = naive_ffn(arrays, indices, first_met(indices, kept), operands.d_out)
        for name in names:
            close(programs["ffn forward"][name](operands, loads[load]), wanted[0])
            close(programs["ffn forward+backward"][name](operands, loads[load]), wanted)


def test_dense_is_one_expert_on_all_rows(operands, loads, programs) -> None:
    """What `blocks` gives when all rows meet the first expert, whose matrices dense has."""
    for operation in ("forward", "dlhs"):
        dense, blocks = (programs[operation][name](operands, loads["one-hot"]) for name in ("dense", "blocks"))
        close(dense, blocks)
    close(programs["drhs"]["dense"](operands, loads["one-hot"]), jnp.dot(operands.x.T, operands.g))


def test_gpu_has_our_kernels_in_place_of_blocks() -> None:
    for operation in PRODUCTS:
        assert list(contestants("gpu", operation, TINY))[:4] == ["dense", "triton", "ragged_dot", "capacity"]
        assert list(contestants("cpu", operation, TINY))[:4] == ["dense", "blocks", "ragged_dot", "capacity"]


def test_tokamax_joins_the_products_where_it_is_installed(monkeypatch) -> None:
    monkeypatch.setattr(kernel_forms, "has_tokamax", lambda: True)
    assert list(contestants("gpu", "drhs", TINY))[-1] == "tokamax"
    assert "tokamax" not in contestants("gpu", "ffn forward", TINY)


# --- What is measured


def test_what_multiplies_is_read_from_the_compiled_text() -> None:
    text = """
  ROOT %dot.1 = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}
  %dot = f32[8,4]{1,0} dot(f32[8,3]{1,0} %a, f32[3,4]{1,0} %b)
  %r = bf16[8,4]{1,0} ragged-dot(%a, %b, %c)
  %dots.2 = f32[8]{0} add(%dot.1, %dot.2)
  %c = (bf16[8,4]{1,0}, s8[4]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm"
  ROOT %f = f32[8]{0} fusion(%a), kind=kCustom, backend_config={"fusion_config":{"kind":"__triton_gemm"}}
"""
    assert multiplying(text) == {"__cublas$gemm": 1, "__triton_gemm": 1, "dot": 2, "ragged-dot": 1}
    compiled = jax.jit(jnp.matmul).lower(jnp.ones((8, 8)), jnp.ones((8, 8))).compile()
    assert sum(multiplying(compiled.as_text()).values()) >= 1


def test_ratios_are_of_rounds_that_both_took_part_in() -> None:
    seconds = {"dense": [1.0, 5.0, 9.0, 9.0, 9.0], "ragged_dot": [2.0, 2.0]}
    ceilings = Ceilings(1000.0, "", {}, 1e9, "", {})
    row = kernels.figures("ragged_dot", seconds, ("forward", HAND, HAND_COUNTS), ceilings, 1e-6)
    assert (row["of_dense"], row["ms"], row["samples"]) == (1.5, 2000.0, 2)
    assert row["share_of_peak"] == pytest.approx(420 / 2 / 1000)
    assert (row["low_ms"], row["high_ms"], row["difference"]) == (2000.0, 2000.0, 1e-6)


def test_slow_implementations_take_fewer_samples() -> None:
    def slow(*args):
        time.sleep(0.3)
        return jnp.ones(1)

    programs = {"dense": lambda *args: jnp.ones(1), "ragged_dot": slow}
    seconds, apart = kernels.timed(programs, None, None, Timing(0, 4, 2, 0.5, 1.0), "cpu")
    assert {name: len(of) for name, of in seconds.items()} == {"dense": 4, "ragged_dot": 2}
    assert min(seconds["ragged_dot"]) >= 0.3
    assert apart == {"dense": None, "ragged_dot": None}


def test_results_are_compared_with_ragged_dot() -> None:
    programs = {
        name: (lambda *args, v=v: jnp.array([1.0, v])) for name, v in {"ragged_dot": 4.0, "blocks": 5.0}.items()
    }
    _, apart = kernels.timed(programs, None, None, Timing(0, 1, 1, 0.5, 1.0), "cpu")
    assert apart == {"ragged_dot": None, "blocks": 0.25}


def test_a_failing_implementation_is_told_and_the_others_run(operands, loads) -> None:
    def broken(of, load):
        raise RuntimeError("no memory\nmany lines")

    forms = {"dense": lambda of, load: of.x, "triton": broken}
    programs, failed = compile_all(forms, operands, loads["balanced"])
    assert list(programs) == ["dense"]
    assert failed == {"triton": {"error": "RuntimeError: no memory"}}
    with pytest.raises(RuntimeError):
        compile_all({"dense": broken}, operands, loads["balanced"])


def test_verdict() -> None:
    def row(name, operation, load, ms, of_dense):
        case = {"implementation": name, "operation": operation, "shape": "s", "load": load}
        return case | {"ms": ms, "of_dense": of_dense}

    rows = [
        row("triton", "forward", "balanced", 1.0, 0.71), row("triton", "forward", "zipf", 1.0, 0.3),
        row("triton", "drhs", "balanced", 1.0, 0.9), row("triton", "ffn forward", "balanced", 1.0, 0.3),
        row("ragged_dot", "forward", "balanced", 2.0, 0.9),
    ]  # fmt: skip
    big = {"s": KernelShape(1024, 2, 4, 8, 12)}  # 512 rows per expert
    assert list(kernels.verdict(rows, big, "gpu").values()) == [True, True]
    assert len(kernels.verdict(rows, {"s": TINY}, "gpu")) == 1  # the goal says nothing about few rows
    rows[0]["of_dense"], rows[-1]["ms"] = 0.69, 0.9
    assert list(kernels.verdict(rows, big, "gpu").values()) == [False, False]


def test_whole_command(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("experiments.bench.roofline.read_rates", lambda samples: {"read": 1e10})
    out, console = tmp_path / "result.json", quiet()
    timing = Timing(0, 3, 3, 0.1, 600.0)
    result = kernels.main(out, "cpu", sizes=[TINY], timing=timing, squares=(32,), console=console)
    assert json.loads(out.read_text()) == result
    assert str(tmp_path) not in out.read_text()
    rows = {(row["operation"], row["load"], row["implementation"]): row for row in result["rows"]}
    names = "dense", "blocks", "ragged_dot", "capacity"
    assert set(product(PRODUCTS, LOADS, names)) <= set(rows)
    assert len(rows) == len(result["rows"])
    for row in rows.values():
        assert 0 < row["low_ms"] <= row["ms"] <= row["high_ms"]
        assert row["share_of_peak"] == pytest.approx(
            row["flops"] / row["ms"] * 1e3 / result["ceilings"]["flops_per_second"]
        )
        exact = row["implementation"] == "blocks" or (row["implementation"] == "capacity" and not row["dropped"])
        assert (row["difference"] is not None and row["difference"] < 1e-5) == exact
    assert rows["forward", "one-hot", "capacity"]["dropped"] == 32 - 10
    assert {row["of_dense"] for row in result["rows"] if row["implementation"] == "dense"} == {1.0}
    assert set(result["compiled"]) == {f"E=4 k=2 {operation}" for operation in PRODUCTS}
    assert result["not_run"] == 0
    # E masked copies and one contraction: XLA's rewrite on CPU
    assert result["compiled"]["E=4 k=2 forward"]["ragged_dot"]["flops_over_ideal"] >= TINY.experts
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    text = console.export_text()
    assert "of dense" in text
    assert "ragged_dot, compiled" in text
    assert all(f"{operation}, E=4 k=2" in text for operation in PRODUCTS)


def test_what_is_late_is_not_run_and_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("experiments.bench.roofline.read_rates", lambda samples: {"read": 1e10})
    console = quiet()
    timing = Timing(0, 1, 1, 0.1, 0.0)
    result = kernels.main(tmp_path / "r.json", "cpu", sizes=[TINY], timing=timing, squares=(32,), console=console)
    assert (result["not_run"], result["rows"]) == (len(PRODUCTS), [])
    assert "5 operations of a shape were not run" in console.export_text()


def test_bad_arguments(tmp_path: Path, capsys) -> None:
    out = tmp_path / "result.json"
    with pytest.raises(ValueError, match="device = 'gpu': expected a GPU that JAX sees; it has cpu"):
        kernels.main(out, "gpu")
    with pytest.raises(ValueError, match="device = 'tpu': expected cpu or gpu"):
        kernels.main(out, "tpu")
    with pytest.raises(ValueError, match="json = "):
        kernels.main(tmp_path / "missing" / "result.json", "cpu")
    with pytest.raises(ValueError, match="not the figure's own name"):
        kernels.main(tmp_path / "result.png", "cpu")
    with pytest.raises(ValueError, match="fewest, samples"):
        Timing(1, 2, 3, 1.0, 1.0)
    with pytest.raises(ValueError, match="shape.top_k = 9"):
        KernelShape(4, 9, 8, 2, 2)
    with pytest.raises(ValueError, match="shape.width = 0"):
        KernelShape(4, 2, 8, 2, 0)
    with pytest.raises(ValueError, match="shape.dtype = 'int8'"):
        KernelShape(4, 2, 8, 2, 2, "int8")
    assert command(["bench", "kernels", "--json", str(out), "--device", "gpu"]) == 2
    assert command(["bench", "tune-tiles", "--out", str(out)]) == 2
    assert capsys.readouterr().err.count("GPU") == 2
    assert list(tmp_path.iterdir()) == []


# --- The tuner


PRESENT = json.loads(TABLE.read_text())


def test_the_table_is_written_as_it_is_kept() -> None:
    assert tune_tiles.formatted(PRESENT) == TABLE.read_text()


def test_every_entry_of_the_table_has_candidates() -> None:
    cases = {(kernel, name) for kernel, of in PRESENT.items() for classes in of.values() for name in classes}
    assert set(tune_tiles.CANDIDATES) == cases
    assert set(tune_tiles.LAUNCHES) == set(PRESENT)
    assert {name for _, name in cases} == set(tune_tiles.ROWS_PER_GROUP)


@pytest.mark.parametrize("capability", ["80", "90"])
def test_candidates_begin_with_the_present_tile(capability) -> None:
    """And none comes twice; that they are tiles at all is what `Tile` checks."""
    for kernel, name in tune_tiles.CANDIDATES:
        tried = tune_tiles.candidates(PRESENT, capability, (kernel, name))
        assert list(tune_tiles.sizes_of(tried[0])) == PRESENT[kernel][capability][name]["tile"]
        assert len(set(tried)) == len(tried) >= 4
    turns = list(tune_tiles.turns(PRESENT, capability))
    number = len(tune_tiles.CANDIDATES)
    assert [case for case, _ in turns[:number]] == list(tune_tiles.CANDIDATES)
    assert len(turns) == sum(len(tune_tiles.candidates(PRESENT, capability, case)) for case in tune_tiles.CANDIDATES)


def test_the_fastest_tile_is_taken_and_of_equals_the_first() -> None:
    one, two, three = Tile(16, 16, 16, 4, 2), Tile(32, 16, 16, 4, 2), Tile(64, 16, 16, 4, 2)
    assert tune_tiles.fastest({one: 2.0, two: 1.0, three: 1.5}) == two
    assert tune_tiles.fastest({one: 1.0, two: 1.0}) == one


def test_merging_changes_the_found_entries_alone() -> None:
    before = json.dumps(PRESENT)
    found = {("rows_kernel", "many"): Tile(256, 16, 32, 8, 5)}
    made = tune_tiles.merged(PRESENT, "90", found, "measured on a card")
    assert json.dumps(PRESENT) == before
    assert made["rows_kernel"]["90"].pop("many") == {"tile": [256, 16, 32, 8, 5], "source": "measured on a card"}
    wanted = json.loads(before)
    del wanted["rows_kernel"]["90"]["many"]
    assert made == wanted


def test_tuning_skips_what_fails_and_keeps_what_was_not_timed(tmp_path: Path, monkeypatch) -> None:
    """The whole command, but for the GPU: a tile's time is the product of its sizes, some fail."""
    tried = []

    def timed(kernel, tile, of, case, results):
        tried.append((case, tile))
        if case == ("weights_kernel", "few") or tile.BM == 256:
            raise RuntimeError("out of resource: shared memory\nmore")
        return 1e-9 * math.prod(tune_tiles.sizes_of(tile))

    monkeypatch.setattr(tune_tiles, "timed", timed)
    monkeypatch.setattr(tune_tiles, "make_problem", lambda tokens: tokens)
    monkeypatch.setattr(tune_tiles.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(tune_tiles._triton, "available", lambda: True)
    monkeypatch.setattr(tune_tiles._triton, "capability", lambda: 90)
    out, console = tmp_path / "tiles.json", quiet()
    made = tune_tiles.main(out, console)
    assert out.read_text() == tune_tiles.formatted(made)
    assert tried == list(tune_tiles.turns(PRESENT, "90"))
    for (kernel, name), entry in ((case, made[case[0]]["90"][case[1]]) for case in tune_tiles.CANDIDATES):
        if (kernel, name) == ("weights_kernel", "few"):
            assert entry == PRESENT[kernel]["90"][name]
            continue
        own = [tune_tiles.sizes_of(tile) for case, tile in tried if case == (kernel, name) and tile.BM != 256]
        assert entry["tile"] == list(min(own, key=math.prod))
        assert entry["source"] == f"measured on {jax.devices()[0].device_kind}"
    assert all(made[kernel]["80"] == PRESENT[kernel]["80"] for kernel in PRESENT)
    assert "shared memory" in console.export_text()


def test_a_tile_with_another_result_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(tune_tiles, "sampled_seconds", lambda *args: [3.0, 1.0, 2.0])
    monkeypatch.setitem(tune_tiles.LAUNCHES, "rows_kernel", lambda of: of)
    case, tile, results = ("rows_kernel", "few"), Tile(16, 16, 16, 4, 2), {}
    assert tune_tiles.timed("rows_kernel", tile, jnp.ones(3), case, results) == 2.0
    assert tune_tiles.timed("rows_kernel", tile, jnp.full(3, 1.01), case, results) == 2.0
    with pytest.raises(ValueError, match="difference from another tile"):
        tune_tiles.timed("rows_kernel", tile, jnp.full(3, 1.1), case, results)
    with pytest.raises(ValueError, match="difference from another tile = nan"):
        tune_tiles.timed("rows_kernel", tile, jnp.full(3, jnp.nan), case, results)
