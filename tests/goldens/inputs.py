"""Inputs of the golden files, drawn the same way by the makers (PyTorch side) and by the tests (NumPy only).

Values come from the raw bits of a PCG64 stream seeded by a name: NumPy keeps that stream fixed for ever, which it does
not promise for its normal samples.
"""

import numpy as np

NUM_EXPERTS = 6
BATCH, SEQ = 3, 8
TOP_KS = (1, 2, 4)
LAYERS = 2

BLOCK = {"hidden": 12, "expert_dim": 10, "experts": 5, "top_k": 2, "batch": 2, "seq": 7}

# What `moe_blocks.npz` holds, on BLOCK's input and width. `shared` is the shared expert's width, `keep` the number of
# groups whose experts stay in the choice, `capacity` the tokens an expert takes from one sequence.
MOE_BLOCKS = {
    "qwen2_moe": {"experts": 6, "top_k": 2, "expert_dim": 10, "shared": 14, "normalize": False},
    "qwen3_moe": {"experts": 6, "top_k": 3, "expert_dim": 10, "normalize": True},
    "qwen3_moe_raw": {"experts": 6, "top_k": 3, "expert_dim": 10, "normalize": False},
    "deepseek_v2_greedy": {"experts": 8, "top_k": 3, "expert_dim": 10, "shared": 20, "scale": 1.7},
    "deepseek_v2_grouped": {
        "experts": 8, "top_k": 3, "expert_dim": 10, "shared": 20, "scale": 1.7, "groups": 4, "keep": 2,
    },
    "deepseek_v3": {
        "experts": 8, "top_k": 3, "expert_dim": 10, "shared": 10, "scale": 2.5, "groups": 4, "keep": 2,
        "normalize": True,
    },
    "deepseek_v3_wide": {
        "experts": 12, "top_k": 4, "expert_dim": 10, "shared": 10, "scale": 2.5, "groups": 3, "keep": 2,
        "normalize": True,
    },
    "gpt_oss": {"experts": 5, "top_k": 2, "expert_dim": 10, "alpha": 1.702, "limit": 7.0},
    "gpt_oss_large": {"experts": 5, "top_k": 2, "expert_dim": 10, "alpha": 1.702, "limit": 7.0},
    "switch": {"experts": 4, "top_k": 1, "expert_dim": 10, "capacity": 7},
    "switch_capacity": {"experts": 4, "top_k": 1, "expert_dim": 10, "capacity": 2},
    "llama4": {"experts": 5, "top_k": 1, "expert_dim": 10, "shared": 10},
}  # fmt: skip
WIDE = ("gate.weight", "router.weight", "classifier.weight")  # ends of the routers' names

MODEL = {"vocab": 40, "hidden": 32, "expert_dim": 12, "experts": 6, "top_k": 2, "layers": 2, "batch": 2, "seq": 12}
# OLMoE normalises the whole projected query width, we normalise per head: the same thing with one head.
HEADS = {
    "olmoe": {"heads": 1, "kv_heads": 1, "head_dim": 32},
    "qwen3_moe": {"heads": 4, "kv_heads": 2, "head_dim": 16},
    "mixtral": {"heads": 4, "kv_heads": 2, "head_dim": 8},
}
NORM_EPS, ROPE_THETA = 1e-5, 10_000.0

# Adam's eps is so small that where it stands, inside of the correction for bias or outside, makes no difference.
OPTIMIZER = {"lr": 0.05, "eps": 1e-12, "rank": 3, "gap": 4, "steps": 10, "shapes": [(8, 12), (12, 8)],
             "layers": (3, 4, 5)}  # fmt: skip


def draw(name: str, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    """Uniform in [-scale, scale), float32, a function of the name alone."""
    bits = np.random.PCG64(list(name.encode())).random_raw(int(np.prod(shape)))
    unit = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0
    return (scale * unit).reshape(shape).astype(np.float32)


def draw_integers(name: str, shape: tuple[int, ...], below: int) -> np.ndarray:
    bits = np.random.PCG64(list(name.encode())).random_raw(int(np.prod(shape)))
    return (bits % np.uint64(below)).astype(np.int64).reshape(shape)


def balance_logits(layer: int) -> np.ndarray:
    """Router logits [BATCH, SEQ, NUM_EXPERTS] of one layer."""
    return draw(f"balance/logits/{layer}", (BATCH, SEQ, NUM_EXPERTS), 2.0)


def balance_mask() -> np.ndarray:
    """[BATCH, SEQ] bool: sequences of 8, 5 and 3 valid tokens, so means of means would be wrong."""
    return np.arange(SEQ) < np.array([8, 5, 3])[:, None]


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter by its Hugging Face name: norm scales near 1, routers wide (clear margins), others 1/sqrt(d)."""
    if "norm" in name:
        return 1.0 + draw(name, shape, 0.3)
    return draw(name, shape, 1.0 if name.endswith(WIDE) else 0.25)


def block_input(name: str) -> np.ndarray:
    """Input of a block of MOE_BLOCKS: `block/x`, but sixteen times wider values where the clamp has to bite."""
    shape = (BLOCK["batch"], BLOCK["seq"], BLOCK["hidden"])
    return draw("block/x_large", shape, 16.0) if name.endswith("_large") else draw("block/x", shape)


def direction(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A fixed direction; a gradient's product with it is the gradient's fingerprint."""
    return draw(f"direction/{name}", shape)
