"""Layouts against their definition, written with index loops; the maps from names to names."""

import ml_dtypes
import numpy as np
import pytest

from moe.pretrained.layouts import (
    Flat,
    GateUp,
    Interleaved,
    KeyValueUp,
    Linear,
    Rotary,
    Same,
    entry,
    expand,
    in_layers,
)
from moe.pretrained.safetensors import TensorInfo

D, F, H, DIM, R, NOPE, VALUE, E = 5, 3, 2, 4, 7, 3, 2, 2
# layout, shapes of ours, shapes of theirs, (which of ours, index in it) -> (which of theirs, index in it)
LAYOUTS = {
    "same": (Same(), [(D, F)], [(D, F)], lambda n, i: (n, i)),
    "flat": (Flat(), [(H, DIM)], [(H * DIM,)], lambda n, i: (n, (i[0] * DIM + i[1],))),
    "linear": (Linear(), [(D, F)], [(F, D)], lambda n, i: (n, (i[1], i[0]))),
    "linear to heads": (Linear(), [(D, H, DIM)], [(H * DIM, D)], lambda n, i: (n, (i[1] * DIM + i[2], i[0]))),
    "linear from heads": (
        Linear(inputs=2), [(H, DIM, D)], [(D, H * DIM)], lambda n, i: (n, (i[2], i[0] * DIM + i[1])),
    ),
    "gate and up": (GateUp(), [(D, 2 * F)], [(F, D), (F, D)], lambda n, i: (i[1] // F, (i[1] % F, i[0]))),
    "gate and up of biases": (GateUp(), [(2 * F,)], [(F,), (F,)], lambda n, i: (i[0] // F, (i[0] % F,))),
    "interleaved": (
        Interleaved(), [(E, D, 2 * F)], [(E, D, 2 * F)], lambda n, i: (n, (i[0], i[1], 2 * (i[2] % F) + i[2] // F)),
    ),
    "key and value": (
        KeyValueUp(), [(R, H, NOPE), (R, H, VALUE)], [(H * (NOPE + VALUE), R)],
        lambda n, i: (0, (i[1] * (NOPE + VALUE) + n * NOPE + i[2], i[0])),
    ),
    "rotary": (
        Rotary(Linear(), DIM), [(D, H, NOPE + DIM)], [(H * (NOPE + DIM), D)],
        lambda n, i: (n, (i[1] * (NOPE + DIM) + turned(i[2]), i[0])),
    ),
    "rotary of a bias": (Rotary(Same(), DIM), [(NOPE + DIM,)], [(NOPE + DIM,)], lambda n, i: (n, (turned(i[0]),))),
    "rotary of all": (Rotary(Same(), DIM), [(DIM,)], [(DIM,)], lambda n, i: (n, (turned(i[0] + NOPE) - NOPE,))),
}  # fmt: skip


def turned(i):
    """Place in their head of place i in ours: pair j of the last DIM is (j, j + DIM/2) in ours, (2j, 2j + 1) there."""
    j = i - NOPE
    return i if j < 0 else NOPE + (2 * j if j < DIM // 2 else 2 * (j - DIM // 2) + 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.uint8])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_number_is_where_the_definition_says(name, dtype):
    layout, ours, theirs, place = LAYOUTS[name]
    assert layout.their_shapes(ours) == theirs
    rng = np.random.default_rng(0)
    arrays = [rng.permutation(int(np.prod(shape))).reshape(shape).astype(dtype) for shape in theirs]
    made = layout.to_ours(arrays, ours)
    assert [array.shape for array in made] == ours
    for n, array in enumerate(made):
        assert array.dtype == dtype
        for i in np.ndindex(array.shape):
            which, where = place(n, i)
            assert array[i] == arrays[which][where], (n, i)
    back = layout.to_theirs(made)
    assert [array.tobytes() for array in back] == [array.tobytes() for array in arrays]


ENTRIES = (
    entry("embedding", "wte", Same()),
    entry("head", "lm_head", Same()),
    *in_layers([
        entry("ffn.down", "mlp.down", Linear()),
        entry("experts.down", "experts.{e}.w2", Linear()),
        entry("experts.up", ("experts.{e}.w1", "experts.{e}.w3"), GateUp()),
    ], "h.{i}."),
)  # fmt: skip


def infos(**shapes):
    return {name.replace("__", "."): TensorInfo(np.dtype(np.float32), shape) for name, shape in shapes.items()}


def test_entries_are_used_where_the_model_has_their_tensors():
    model = infos(embedding=(9, 4), layers__0__ffn__down=(5, 4), layers__1__experts__down=(2, 5, 4),
                  layers__1__experts__up=(2, 4, 10), head=(9, 4))  # fmt: skip
    steps = expand("test", ENTRIES, model, 2)
    assert [step.ours for step in steps] == [
        ("embedding",), ("layers.0.ffn.down",), ("layers.1.experts.down",), ("layers.1.experts.up",), ("head",),
    ]  # fmt: skip
    shapes = {name: shape for step in steps for name, shape in step.their_shapes().items()}
    assert shapes == {
        "wte": (9, 4), "h.0.mlp.down": (4, 5), "h.1.experts.0.w2": (4, 5), "h.1.experts.1.w2": (4, 5),
        "h.1.experts.0.w1": (5, 4), "h.1.experts.0.w3": (5, 4), "h.1.experts.1.w1": (5, 4), "h.1.experts.1.w3": (5, 4),
        "lm_head": (9, 4),
    }  # fmt: skip


def test_a_tensor_without_a_place_is_named():
    with pytest.raises(ValueError, match=r"test cannot hold.* layers\.0\.attention\.sinks"):
        expand("test", ENTRIES, infos(embedding=(9, 4), layers__0__attention__sinks=(2,)), 1)
