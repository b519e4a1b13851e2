"""Quantised checkpoints, read as plain bfloat16 tensors.

fp8 with block scales (DeepSeek-V3, arXiv:2412.19437 section 3.3): `X` [n, m] float8_e4m3fn and `X_scale_inv`
  [ceil(n/128), ceil(m/128)] float32; a number is q times the scale of its block. The product is taken in float32.
MXFP4 (OCP Microscaling Formats v1.0; gpt-oss): `X_blocks` [..., rows, groups, 16] and `X_scales` [..., rows, groups],
  both uint8. 32 numbers share a scale 2^(s - 127), s = 255 being NaN; a byte holds two E2M1 numbers, the first in its
  low half. A row is one output of the matrix: as `X`, in the layout of the unquantised checkpoints, the matrix is
  [..., 32 groups, rows]. Every such number is exact in bfloat16, but for scales above 2^125, where it can overflow.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from moe.pretrained.safetensors import Source, TensorInfo, check, listed

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FP8_BLOCK = (128, 128)
FP8_SCALE, MX_BLOCKS, MX_SCALES = "_scale_inv", "_blocks", "_scales"
MX_BYTES = 16  # a group of 32 numbers
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # 1 sign bit, 2 bits of exponent, 1 of mantissa
PIECE = 1 << 20  # numbers decoded at once


class Dequantized:
    """A `Source` that hides the quantised tensors of another; made by `dequantized`."""

    def __init__(
        self,
        source: Source,
        fp8: Mapping[str, str],
        mxfp4: Mapping[str, tuple[str, str]],
        block: tuple[int, int],
    ):
        """Takes `fp8`, weight -> scales, and `mxfp4`, plain name -> blocks and scales, out of `source`."""
        self._source, self._fp8, self._mxfp4, self._block = source, fp8, mxfp4, block
        plain = {blocks: name for name, (blocks, _) in mxfp4.items()}
        hidden = {*fp8.values(), *(scales for _, scales in mxfp4.values())}
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in source.tensors.items():
            if name in fp8:
                self.tensors[name] = TensorInfo(BFLOAT16, info.shape)
            elif name in plain:
                *lead, rows, groups, _ = info.shape
                self.tensors[plain[name]] = TensorInfo(BFLOAT16, (*lead, 2 * MX_BYTES * groups, rows))
            elif name not in hidden:
                self.tensors[name] = info
        kinds = {
            f"fp8 (float8_e4m3fn, a scale for every {block[0]} x {block[1]} block)": len(fp8),
            "MXFP4 (E2M1, a scale for every 32 numbers)": len(mxfp4),
        }
        self.notes = source.notes + tuple(
            f"tensors read as bfloat16 because they are {kind}: {count}" for kind, count in kinds.items() if count
        )

    def read(self, name: str) -> np.ndarray:
        """The tensor in fresh memory; a quantised one needs its packed form and one piece besides."""
        if name in self._fp8:
            return dequantize_fp8(self._source.read(name), self._source.read(self._fp8[name]), self._block)
        if name in self._mxfp4:
            blocks, scales = self._mxfp4[name]
            return dequantize_mxfp4(self._source.read(blocks), self._source.read(scales))
        check(name in self.tensors, "tensor", name, "a name of the checkpoint")  # scales are hidden
        return self._source.read(name)


def dequantized(source: Source, *, weight_block_size: Sequence[int] | None = None) -> Source:
    """The source with plain bfloat16 tensors in place of quantised ones; `source` itself if it has none.

    Args:
      weight_block_size: rows and columns that share an fp8 scale, `quantization_config.weight_block_size` of a model's
        config; None for 128 x 128.

    Raises:
      SafetensorsError: a quantised tensor without its scales or the reverse, dtypes or shapes that do not fit together.
    """
    block = tuple(FP8_BLOCK if weight_block_size is None else weight_block_size)
    ok = len(block) == 2 and all(type(size) is int and size >= 1 for size in block)
    check(ok, "weight_block_size", weight_block_size, "rows and columns of a block, two whole numbers above 0")
    rows, columns = block
    fp8 = _fp8_pairs(source.tensors, (rows, columns))
    mxfp4 = _mxfp4_pairs(source.tensors)
    return Dequantized(source, fp8, mxfp4, (rows, columns)) if fp8 or mxfp4 else source


def _fp8_pairs(tensors: Mapping[str, TensorInfo], block: tuple[int, int]) -> dict[str, str]:
    """Names of fp8 weights -> names of their scales."""
    pairs = {name.removesuffix(FP8_SCALE): name for name in tensors if name.endswith(FP8_SCALE)}
    alone = [scale for name, scale in pairs.items() if name not in tensors]
    check(not alone, "scales of no tensor", listed(alone), f"X beside every X{FP8_SCALE}")
    bare = [name for name, info in tensors.items() if info.dtype.name.startswith("float8") and name not in pairs]
    check(not bare, "fp8 tensors without scales", listed(bare), f"X{FP8_SCALE} beside every float8 X")
    for name, scale in pairs.items():
        info, scales = tensors[name], tensors[scale]
        check(info.dtype == FP8, f"{name}: dtype", str(info.dtype), f"{FP8}, as {scale} says")
        check(len(info.shape) == 2, f"{name}: shape", info.shape, "a matrix, as for every fp8 weight")
        expected = tuple(-(-size // part) for size, part in zip(info.shape, block))
        check(scales.dtype == np.float32, f"{scale}: dtype", str(scales.dtype), "float32")
        check(scales.shape == expected, f"{scale}: shape", scales.shape,
              f"{expected}, one for every {block[0]} x {block[1]} block of {info.shape} (weight_block_size)")
    return pairs


def _mxfp4_pairs(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[str, str]]:
    """Plain names -> names of the blocks and of the scales."""
    names = {
        name[: -len(suffix)]: (name[: -len(suffix)] + MX_BLOCKS, name[: -len(suffix)] + MX_SCALES)
        for suffix in (MX_BLOCKS, MX_SCALES)
        for name, info in tensors.items()
        if name.endswith(suffix) and info.dtype == np.uint8
    }
    missing = [name for pair in names.values() for name in pair if name not in tensors]
    check(not missing, "missing", listed(missing), f"both X{MX_BLOCKS} and X{MX_SCALES} of every MXFP4 tensor")
    both = [name for name in names if name in tensors]
    check(not both, "tensors there twice", listed(both), f"either X or X{MX_BLOCKS} and X{MX_SCALES}")
    for blocks, scales in names.values():
        for name in (blocks, scales):
            check(tensors[name].dtype == np.uint8, f"{name}: dtype", str(tensors[name].dtype), "uint8")
        shape = tensors[blocks].shape
        check(len(shape) >= 3 and shape[-1] == MX_BYTES, f"{blocks}: shape", shape, f"[..., rows, groups, {MX_BYTES}]")
        check(tensors[scales].shape == shape[:-1], f"{scales}: shape", tensors[scales].shape, f"{shape[:-1]}")
    return names


def dequantize_fp8(weight: np.ndarray, scales: np.ndarray, block: tuple[int, int] = FP8_BLOCK) -> np.ndarray:
    """bfloat16 [n, m] of float8_e4m3fn [n, m] and float32 scales [ceil(n / rows), ceil(m / columns)] of blocks."""
    rows, columns = block
    values = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)  # a table is faster than astype
    out = np.empty(weight.shape, BFLOAT16)
    for i, scale in enumerate(scales):
        part = slice(i * rows, (i + 1) * rows)
        out[part] = values[weight[part].view(np.uint8)] * np.repeat(scale, columns)[: weight.shape[1]]
    return out


def dequantize_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """bfloat16 [..., 32 groups, rows] of uint8 blocks [..., rows, groups, 16] and scales [..., rows, groups]."""
    *lead, rows, groups, _ = blocks.shape
    columns = 2 * MX_BYTES * groups
    out = np.empty((*lead, columns, rows), np.uint16)
    step = max(1, PIECE // max(1, columns))
    for i in np.ndindex(*lead):
        for begin in range(0, rows, step):
            part = slice(begin, begin + step)
            # The scale and the byte together are the place in the table: no arithmetic, hence no rounding.
            place = (scales[i][part, :, None].astype(np.uint16) << 8) | blocks[i][part]
            out[i][:, part] = _number_pairs()[place].view(np.uint16).reshape(-1, columns).T
    return out.view(BFLOAT16)


@functools.cache
def _number_pairs() -> np.ndarray:
    """uint32 [65536]: for scale * 256 + byte the two bfloat16 numbers, the first in the lower half."""
    numbers = np.array([*E2M1, *(-value for value in E2M1)])
    scales = np.ldexp(1.0, np.arange(256) - 127)
    scales[255] = np.nan
    with np.errstate(over="ignore"):  # float32 and bfloat16 end below 2^128
        table = (scales[:, None] * numbers).astype(np.float32).astype(BFLOAT16).view(np.uint16).astype(np.uint32)
    low, high = table[:, None, :], table[:, :, None]  # the byte's index is high * 16 + low
    return (high << 16 | low).reshape(-1)
