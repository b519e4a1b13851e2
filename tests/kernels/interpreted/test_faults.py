"""Faults planted in the kernels themselves: each is caught, by numbers, by guards, or by what nothing wrote."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels.gpu.grouped as grouped
from kernels import _triton
from kernels.grouped_ffn import grouped_ffn
from kernels.tiles import Tile, using

T, K, E, D, F = 21, 2, 4, 24, 20  # nothing is a multiple of a tile
SOURCE = Path(grouped.__file__).read_text()


def problem():
    rng = np.random.default_rng(0)
    indices = np.stack([rng.permutation([0, 1, 3])[:K] for _ in range(T)])  # a group is empty; all rows are sent
    arrays = [rng.standard_normal(shape) for shape in ((T, D), (T, K), (E, D, 2 * F), (E, F, D), (T, D))]
    return jnp.asarray(indices), *(jnp.asarray(a, jnp.float32) for a in arrays)


INDICES, *ARRAYS, G = problem()
VALID = jnp.ones((T, K), bool)


def run(implementation):
    def call(*arrays):
        x, weights, gate_up, down = arrays
        return grouped_ffn(x, INDICES, weights, VALID, gate_up, down, implementation=implementation)

    with using(Tile(16, 16, 16, 4, 2)):
        out, vjp = jax.vjp(call, *ARRAYS)
        return jax.tree.map(np.asarray, [out, *vjp(G)])


def differs(got, want):
    equal = [np.allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max()) for a, b in zip(got, want, strict=True)]
    return [i for i, is_equal in enumerate(equal) if not is_equal]


WANT = run("reference")


def planted(old, new, count, tmp_path, monkeypatch):
    """The kernels with `old` replaced; it must stand there exactly so often."""
    assert SOURCE.count(old) == count, f"{old!r} stands there {SOURCE.count(old)} times"
    path = tmp_path / "planted.py"
    path.write_text(SOURCE.replace(old, new))
    spec = importlib.util.spec_from_file_location("planted", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "planted", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "kernels.gpu.grouped", module)


def test_without_a_fault_all_is_equal(tmp_path, monkeypatch):
    planted("PROGRAMS", "PROGRAMS", SOURCE.count("PROGRAMS"), tmp_path, monkeypatch)
    assert not differs(run("triton"), WANT)


ACCUMULATED = "total_MN = tl.dot(left, right, total_MN, input_precision=PRECISION)"
ROWS_MASK = "inside[:, None] & (k[None, :] < K - k0)"
NUMBERS = {
    "an offset that ignores the group": ("group * W_GROUP", "0 * W_GROUP", 1),
    "the next group's matrix": ("(2 * K * C) + k[:, None]", "(2 * K * C) + (k[:, None] + 1)", 1),
    "no accumulation": (ACCUMULATED, ACCUMULATED.replace(", total_MN,", ", tl.zeros((BM, BN), tl.float32),"), 1),
    "loads past the contracted side": (ROWS_MASK, "inside[:, None]", 3),
    "loads of the next group's rows": ("a = tl.load(left_at, mask=inside[:, None] & (i[None, :] < L), other=0)",
                                       "a = tl.load(left_at, mask=i[None, :] < L, other=0)", 1),
    "one tile too few": ("total = tl.load(num_tiles) * columns_of", "total = tl.load(num_tiles) * columns_of - 1", 3),
    "weights applied twice": ("if SCALED:", "if True:", 1),
    "the wrong half of the gate": ("tl.store(d_hidden + wide_at + C,", "tl.store(d_hidden + wide_at,", 1),
    "an empty group left as it was": ("tl.store(out_at, total, mask=(i[:, None] < L) & (j[None, :] < R))",
                                      "if stop > tl.load(starts + group):\n            "
                                      "tl.store(out_at, total, mask=(i[:, None] < L) & (j[None, :] < R))", 1),
    "a derivative of silu that forgets a term": ("(sigmoid + silu * (1 - sigmoid))", "sigmoid", 1),
    "rows that are not gathered": ("x_at = x + _rows(source, row, inside, True)", "x_at = x + row.to(tl.int64)", 1),
}  # fmt: skip


@pytest.mark.parametrize("fault", NUMBERS)
def test_numbers_show_it(fault, tmp_path, monkeypatch):
    planted(*NUMBERS[fault], tmp_path, monkeypatch)
    assert differs(run("triton"), WANT)


WRITES = {
    "rows past the last": ("made.to(activation.dtype.element_ty), mask=stored",
                           "made.to(activation.dtype.element_ty), mask=column[None, :] < C", 1),
    "rows of parameters past the end": ("tl.store(out_at, total, mask=(i[:, None] < L) & (j[None, :] < R))",
                                        "tl.store(out_at, total)", 1),
    "an input": ("tl.store(d_hidden + wide_at,", "tl.store(hidden + wide_at,", 1),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRITES)
def test_guards_show_a_write_that_is_not_ours(fault, tmp_path, monkeypatch):
    planted(*WRITES[fault], tmp_path, monkeypatch)
    with pytest.raises(Exception, match="was written at element"):
        run("triton")


def test_a_kernel_for_the_interpreter_is_not_compiled(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(_triton, "require_versions", lambda *_: None)
    with pytest.raises(ValueError, match=r"kernel = 'InterpretedFunction': expected a triton.JITFunction"):
        _triton.call(grouped.rows_kernel, jnp.ones(4), outputs=[jax.ShapeDtypeStruct((4,), jnp.float32)], grid=(1,))
