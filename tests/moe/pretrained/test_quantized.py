"""fp8 and MXFP4 tensors against loops written from the formats' definitions."""

import math

import ml_dtypes
import numpy as np
import pytest

from moe.pretrained import quantized
from moe.pretrained.quantized import dequantized
from moe.pretrained.safetensors import SafetensorsError, TensorInfo, open_safetensors, write_safetensors

BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)


class Memory:
    """A Source of arrays."""

    notes = ("from memory",)

    def __init__(self, **arrays):
        self.arrays = {name.replace("__", "."): array for name, array in arrays.items()}
        self.tensors = {name: TensorInfo(array.dtype, array.shape) for name, array in self.arrays.items()}

    def read(self, name):
        return self.arrays[name].copy()


def e4m3(byte):
    """One sign bit, four bits of exponent with bias 7, three of mantissa; no infinities, one NaN a sign."""
    sign, exponent, mantissa = -1.0 if byte >> 7 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def e2m1(nibble):
    """One sign bit, two bits of exponent with bias 1, one of mantissa."""
    sign, exponent, mantissa = -1.0 if nibble >> 3 else 1.0, nibble >> 1 & 3, nibble & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def test_e2m1_is_the_table_of_the_standard():
    assert [e2m1(n) for n in range(16)] == [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def fp8_pair(rng, shape, block):
    weight = rng.integers(0, 256, shape, dtype=np.uint8)
    scales = rng.uniform(1e-5, 1e-3, [math.ceil(n / b) for n, b in zip(shape, block)]).astype(np.float32)
    return weight.view(FP8), scales


def equal_bits(a, b):
    nan = np.isnan(a)
    np.testing.assert_array_equal(nan, np.isnan(b))
    np.testing.assert_array_equal(a.view(np.uint16)[~nan], b.view(np.uint16)[~nan])


@pytest.mark.parametrize(
    ("shape", "block"), [((256, 128), None), ((131, 260), None), ((1, 3), None), ((9, 17), [4, 8]), ((0, 8), [4, 8])]
)
def test_fp8_against_a_loop(shape, block):
    rows, columns = block or (128, 128)
    weight, scales = fp8_pair(np.random.default_rng(0), shape, (rows, columns))
    source = dequantized(Memory(x__weight=weight, x__weight_scale_inv=scales), weight_block_size=block)
    values = np.zeros(shape, np.float32)
    for i in range(shape[0]):
        for j in range(shape[1]):
            byte = int(weight.view(np.uint8)[i, j])
            values[i, j] = np.float32(e4m3(byte)) * scales[i // rows, j // columns]
    assert source.tensors == {"x.weight": (BF16, shape)}
    read = source.read("x.weight")
    assert read.dtype == BF16
    equal_bits(read, values.astype(BF16))


@pytest.mark.parametrize("piece", [1, 200, 1 << 20])
@pytest.mark.parametrize("shape", [(3, 6, 2, 16), (6, 1, 16), (2, 2, 5, 1, 16), (0, 4, 2, 16), (2, 0, 2, 16)])
def test_mxfp4_against_a_loop(monkeypatch, shape, piece):
    monkeypatch.setattr(quantized, "PIECE", piece)
    rng = np.random.default_rng(1)
    blocks, scales = rng.integers(0, 256, shape, np.uint8), rng.integers(90, 160, shape[:-1], np.uint8)
    *lead, rows, groups, _ = shape
    values = np.zeros((*lead, groups * 32, rows), np.float32)
    for place in np.ndindex(*shape):
        *index, row, group, i = place
        scale = 2.0 ** (int(scales[place[:-1]]) - 127)
        byte = int(blocks[place])
        values[(*index, group * 32 + 2 * i, row)] = e2m1(byte & 15) * scale
        values[(*index, group * 32 + 2 * i + 1, row)] = e2m1(byte >> 4) * scale
    source = dequantized(Memory(gate_up_proj_blocks=blocks, gate_up_proj_scales=scales))
    assert source.tensors == {"gate_up_proj": (BF16, values.shape)}
    read = source.read("gate_up_proj")
    assert read.flags.c_contiguous
    assert read.dtype == BF16
    np.testing.assert_array_equal(read.astype(np.float32), values)
    equal_bits(read, values.astype(BF16))  # the sign of -0 too


def test_mxfp4_with_every_scale_and_every_byte():
    scales = np.arange(256, dtype=np.uint8)[:, None, None]
    for first in range(0, 256, 16):
        blocks = np.broadcast_to(np.arange(first, first + 16, dtype=np.uint8), (256, 1, 1, 16))
        read = quantized.dequantize_mxfp4(blocks, scales)[:, :, 0]
        numbers = np.array([e2m1(n) for byte in range(first, first + 16) for n in (byte & 15, byte >> 4)])
        exact = np.ldexp(numbers, np.arange(255)[:, None] - 127)  # float64: all exact
        fits = np.abs(exact) < 2.0**128
        np.testing.assert_array_equal(read[:255].astype(np.float64)[fits], exact[fits])
        assert np.isinf(read[:255][~fits].astype(np.float32)).all()
        assert np.isnan(read[255].astype(np.float32)).all()


def test_a_checkpoint_on_disk(tmp_path):
    rng = np.random.default_rng(2)
    weight, scales = fp8_pair(rng, (130, 5), (128, 128))
    arrays = {
        "norm": np.ones(3, BF16),
        "a.weight": weight,
        "a.weight_scale_inv": scales,
        "b.weight": weight,
        "b.weight_scale_inv": scales,
        "down_proj_bias": np.ones(2, BF16),
        "down_proj_scales": rng.integers(120, 130, (1, 2, 1), np.uint8),
        "down_proj_blocks": rng.integers(0, 256, (1, 2, 1, 16), np.uint8),
    }
    write_safetensors(tmp_path, {n: TensorInfo(a.dtype, a.shape) for n, a in arrays.items()}, iter(arrays.values()))
    source = dequantized(open_safetensors(tmp_path))
    shapes = {"norm": (3,), "a.weight": (130, 5), "b.weight": (130, 5), "down_proj_bias": (2,), "down_proj": (1, 32, 2)}
    assert dict(source.tensors) == {name: (BF16, shape) for name, shape in shapes.items()}
    for name, info in source.tensors.items():
        assert (source.read(name).dtype, source.read(name).shape) == info
    assert source.notes == (
        "tensors read as bfloat16 because they are fp8 (float8_e4m3fn, a scale for every 128 x 128 block): 2",
        "tensors read as bfloat16 because they are MXFP4 (E2M1, a scale for every 32 numbers): 1",
    )
    for hidden in ("a.weight_scale_inv", "down_proj_blocks", "down_proj_scales"):
        with pytest.raises(SafetensorsError, match=f"tensor = '{hidden}'"):
            source.read(hidden)


def test_a_plain_checkpoint_is_left_alone():
    source = Memory(a=np.ones(3, np.float32), mask_blocks=np.ones(3, np.float32))
    assert dequantized(source) is source


def test_notes_of_the_source_stay():
    weight, scales = fp8_pair(np.random.default_rng(3), (4, 4), (128, 128))
    assert dequantized(Memory(w=weight, w_scale_inv=scales)).notes[0] == "from memory"


ONE = np.ones((1, 1), np.float32)
W = np.zeros((256, 130), FP8)
SCALES = np.ones((2, 2), np.float32)
B, S = np.zeros((2, 3, 1, 16), np.uint8), np.zeros((2, 3, 1), np.uint8)
BAD = {
    "scales alone": ({"a_scale_inv": ONE}, "scales of no tensor = 'a_scale_inv'"),
    "fp8 alone": ({"w": W}, "fp8 tensors without scales = 'w'"),
    "other fp8": ({"w": W.view(ml_dtypes.float8_e5m2), "w_scale_inv": SCALES}, "w: dtype = 'float8_e5m2'"),
    "scaled floats": ({"w": SCALES, "w_scale_inv": ONE}, "w: dtype = 'float32'"),
    "no matrix": ({"w": W[None], "w_scale_inv": SCALES}, "w: shape"),
    "scales of bytes": ({"w": W, "w_scale_inv": SCALES.astype(np.uint8)}, "w_scale_inv: dtype = 'uint8'"),
    "few scales": ({"w": W, "w_scale_inv": ONE}, r"w_scale_inv: shape = \(1, 1\): expected \(2, 2\), one for every"),
    "scales turned": ({"w": W[:128], "w_scale_inv": SCALES[:, :1]}, r"expected \(1, 2\)"),
    "scales too wide": ({"w": W, "w_scale_inv": np.ones((2, 3), np.float32)}, r"w_scale_inv: shape = \(2, 3\)"),
    "blocks alone": ({"x_blocks": B}, "missing = 'x_scales'"),
    "mx scales alone": ({"x_scales": S}, "missing = 'x_blocks'"),
    "plain too": ({"x_blocks": B, "x_scales": S, "x": ONE}, "tensors there twice = 'x'"),
    "blocks of floats": ({"x_blocks": B.astype(np.float32), "x_scales": S}, "x_blocks: dtype = 'float32'"),
    "scales of floats": ({"x_blocks": B, "x_scales": S.astype(np.float32)}, "x_scales: dtype = 'float32'"),
    "half a block": ({"x_blocks": B[..., :8], "x_scales": S}, r"x_blocks: shape = \(2, 3, 1, 8\)"),
    "flat blocks": ({"x_blocks": B[0, 0], "x_scales": S[0, 0]}, "x_blocks: shape"),
    "few mx scales": ({"x_blocks": B, "x_scales": S[:1]}, r"x_scales: shape = \(1, 3, 1\): expected \(2, 3, 1\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    arrays, message = BAD[case]
    with pytest.raises(SafetensorsError, match=message):
        dequantized(Memory(**arrays))


@pytest.mark.parametrize("block", [[128], [0, 128], [128.0, 128.0], [64, 64], []])
def test_refuses_block_sizes(block):
    with pytest.raises(SafetensorsError, match="weight_block_size"):
        dequantized(Memory(w=W, w_scale_inv=SCALES), weight_block_size=block)
