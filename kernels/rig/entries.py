"""The kernels of the rig: one entry each, and the configurations in which the gates compile them.

A kernel joins by one entry. Every tile of its table is compiled with the first of its launches, the other launches with
the tile of many rows; at float32, the wide tile. A kernel without a table is compiled in each of its launches.

Legend: d model width, f expert width, r rank of an adapter, E experts, N sorted rows. Launches are those of
`kernels.grouped_gpu`: of the fused FFN by the array they make, and of `grouped_matmul`; and of `kernels.routing_gpu`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from kernels import _triton
from kernels.tiles import WIDE, Tile, table

CAPABILITIES = (80, 90)
MOST_CONFIGURATIONS = 60  # CI compiles them all
D, F, R, E, N = 2048, 1024, 16, 8, 8192
ROUTED_TOKENS, ROUTED_EXPERTS, MANY_EXPERTS, TOP_K = 8192, 64, 256, 8

Constants = Mapping[str, int | bool | str | float]


@dataclass(frozen=True)
class Entry:
    """A kernel of the package `kernels.gpu`.

    Attributes:
      name: of the function, and of its table in `tiles.json`.
      module: where in `kernels.gpu`.
      pointers: each pointer parameter to the dtype of its elements in Triton's words; `data` is that of activations.
      launches: what the host calls it for, to its `tl.constexpr` parameters apart from those of a tile.
      products: whether it multiplies matrices, which tensor cores must do.
      fixed: of a kernel that has no table, each launch to its warps and stages.
    """

    name: str
    module: str
    pointers: Mapping[str, str]
    launches: Mapping[str, Constants]
    products: bool = True
    fixed: Mapping[str, tuple[int, int]] | None = None

    def load(self) -> Any:
        """The `triton.jit` function; imports triton."""
        return getattr(importlib.import_module(f"kernels.gpu.{self.module}"), self.name)


@dataclass(frozen=True)
class Configuration:
    """One compilation: an entry in one launch, at one capability, for one dtype, with a tile or in `entry.fixed`."""

    entry: Entry
    launch: str
    capability: int
    tile: Tile | None = None
    data: str = "bf16"

    @property
    def warps_stages(self) -> tuple[int, int]:
        if self.tile:
            return self.tile.warps, self.tile.stages
        assert self.entry.fixed, f"{self.entry.name} has neither a tile nor fixed warps"
        return self.entry.fixed[self.launch]

    @property
    def tile_text(self) -> str:
        return f"{self.tile.BM}x{self.tile.BN}x{self.tile.BK}" if self.tile else "fixed"

    @property
    def name(self) -> str:
        """Of words and numbers alone, the same in every process."""
        warps, stages = self.warps_stages
        parts = self.entry.name, self.launch, self.data, f"sm{self.capability}", self.tile_text, f"{warps}x{stages}"
        return "-".join(parts)

    @property
    def tensor_cores(self) -> bool:
        """Whether they multiply: not float32, whose products are exact."""
        return self.entry.products and self.data in ("bf16", "fp16")

    def pointers(self) -> dict[str, str]:
        """Parameter to dtype."""
        return {name: self.data if dtype == "data" else dtype for name, dtype in self.entry.pointers.items()}

    def constants(self) -> dict[str, int | bool | str | float]:
        """All `tl.constexpr` parameters, as `kernels.grouped_gpu.launch` gives them where there is a tile."""
        constants = dict(self.entry.launches[self.launch])
        if self.tile:
            tile, programs = self.tile, self.tile.programs(_triton.MULTIPROCESSORS[self.capability])
            constants |= {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "PRECISION": "ieee", "PROGRAMS": programs}
        return constants


def frozen(**items: Any) -> Mapping[str, Any]:
    return MappingProxyType(items)


def rows_launch(
    inner: int, columns: int, *, transposed: bool = False, scatter: bool = False, scaled: bool = False
) -> Constants:
    """Of `products`, [N, inner] times [E, inner, columns], or [E, columns, inner] if `transposed`."""
    return frozen(
        K=inner, C=columns, W_GROUP=inner * columns, W_ROW=1 if transposed else columns,
        W_COLUMN=inner if transposed else 1, SCATTER=scatter, SCALED=scaled,
    )  # fmt: skip


def assignments(*, masked: bool, **more: int) -> Constants:
    """Of kernels over assignments [T K], 16 tokens' a block; a mask is [T, K]."""
    rows = 16 * TOP_K
    strides = (TOP_K, 1) if masked else (1, 0)
    return frozen(
        N=ROUTED_TOKENS * TOP_K, E=ROUTED_EXPERTS, K=TOP_K, MASKED=masked, VALID_TOKEN=strides[0],
        VALID_SLOT=strides[1], ROWS=rows, RP=rows, **more,
    )  # fmt: skip


TILES = {name: "i32" for name in ("tile_group", "tile_first", "tile_stop", "num_tiles")}

ENTRIES = (
    Entry(
        "rows_kernel", "grouped",
        frozen(x="data", w="data", target="i32", scale="fp32", **TILES, out="data"),
        frozen(
            down=rows_launch(F, D, scatter=True, scaled=True),
            d_x=rows_launch(2 * F, D, transposed=True, scatter=True),
            grouped=rows_launch(D, F),
            grouped_d_x=rows_launch(F, D, transposed=True),
            lora_a=rows_launch(D, R),
        ),
    ),
    Entry(
        "swiglu_kernel", "grouped",
        frozen(x="data", w="data", source="i32", **TILES, hidden="data", activation="data"),
        frozen(gate_up=frozen(K=D, C=F)),
    ),
    Entry(
        "swiglu_backward_kernel", "grouped",
        frozen(g="data", w="data", source="i32", scale="fp32", hidden="data", **TILES, d_hidden="data", scaled="data",
               d_scale="fp32"),
        frozen(d_hidden=frozen(K=D, C=F, N=N)),
    ),
    Entry(
        "weights_kernel", "grouped",
        frozen(left="data", right="data", left_source="i32", right_source="i32", starts="i32", out="fp32"),
        frozen(
            d_gate_up=frozen(L=D, R=2 * F, E=E, GATHER_LEFT=True, GATHER_RIGHT=False),
            d_down=frozen(L=F, R=D, E=E, GATHER_LEFT=False, GATHER_RIGHT=True),
            grouped_d_w=frozen(L=D, R=F, E=E, GATHER_LEFT=False, GATHER_RIGHT=False),
        ),
    ),
    Entry(
        "route_kernel", "routing",
        frozen(logits="fp32", bias="fp32", valid="i1", indices="i32", weights="fp32", probs="fp32", counts="i32"),
        frozen(
            softmax=frozen(T=ROUTED_TOKENS, E=ROUTED_EXPERTS, K=TOP_K, SIGMOID=False, BIASED=False, MASKED=False,
                           RENORMALIZE=True, SCALING=1.0, PROBS=True, BT=16, EP=ROUTED_EXPERTS, KP=TOP_K),
            sigmoid=frozen(T=ROUTED_TOKENS, E=MANY_EXPERTS, K=TOP_K, SIGMOID=True, BIASED=True, MASKED=True,
                           RENORMALIZE=True, SCALING=2.5, PROBS=True, BT=16, EP=MANY_EXPERTS, KP=TOP_K),
        ),
        products=False, fixed=frozen(softmax=(4, 1), sigmoid=(8, 1)),
    ),
    Entry(
        "count_kernel", "routing", frozen(indices="i32", valid="i1", counts="i32"),
        frozen(edited=assignments(masked=True, EP=ROUTED_EXPERTS)), products=False, fixed=frozen(edited=(4, 1)),
    ),
    Entry(
        "place_kernel", "routing", frozen(indices="i32", valid="i1", first="i32", position="i32", order="i32"),
        frozen(routed=assignments(masked=False, CHUNK=32), edited=assignments(masked=True, CHUNK=32)),
        products=False, fixed=frozen(routed=(4, 1), edited=(4, 1)),
    ),
    Entry(
        "permute_kernel", "routing", frozen(x="data", order="i32", scale="fp32", kept="i32", out="data"),
        frozen(scaled=frozen(N=ROUTED_TOKENS * TOP_K, D=D, K=TOP_K, SCALED=True, BM=16, BD=128)),
        products=False, fixed=frozen(scaled=(4, 1)),
    ),
    Entry(
        "unpermute_kernel", "routing", frozen(rows="data", position="i32", weights="fp32", kept="i32", out="data"),
        frozen(weighted=frozen(T=ROUTED_TOKENS, D=D, K=TOP_K, WEIGHTED=True, BM=16, BD=128)),
        products=False, fixed=frozen(weighted=(4, 1)),
    ),
)  # fmt: skip


def configurations(entries: tuple[Entry, ...] = ENTRIES) -> tuple[Configuration, ...]:
    """What the gates compile, in bfloat16 but for one in float16 and the wide tiles of float32."""
    made = [configuration for entry in entries for configuration in of_entry(entry)]
    half = next(each for each in reversed(made) if each.data == "bf16" and each.tensor_cores)
    return (*made, replace(half, data="fp16"))


def of_entry(entry: Entry) -> Iterator[Configuration]:
    first, *others = entry.launches
    for capability in CAPABILITIES:
        if entry.fixed:
            yield from (Configuration(entry, launch, capability) for launch in entry.launches)
            continue
        tiles = table()[entry.name][str(capability)]
        for tile in dict.fromkeys(tiles.values()):  # classes may share one
            yield Configuration(entry, first, capability, tile)
        for launch in others:
            yield Configuration(entry, launch, capability, tiles["many"])
        yield Configuration(entry, first, capability, WIDE, "fp32")
