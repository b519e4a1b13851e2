"""Depth routers: one small network per layer that reads the prompt and decides skip, execute or repeat.

    windows: W = min(num_windows, T), of floor(T / W) tokens each, what is left over at the end is dropped
    z_l = mean over windows of r_l(mean of the window of H^(l-1)),   r = Linear(d, h) - GELU(tanh) - Linear(h, 3)

(Dr.LLM, 2510.12773.) H^(l-1) is the residual stream that enters block l, T the prompt's length. Parameters of all
layers are stacked, L (h d + 4h + 3) numbers; they and all that is computed from them are float32.

Legend: B sequences, S positions (padded), W windows, d hidden, h router width, L layers.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe.config import require
from moe.pretrained.safetensors import TensorInfo, open_safetensors, write_safetensors

CONFIG = "depth_config.json"
Reads = Literal["residual", "embedding"]


@dataclass(frozen=True)
class DepthConfig:
    """What routers are made of; kept with their parameters, because pooling is a part of what was trained.

    Attributes:
      hidden: h, width of the hidden layer.
      num_windows: most windows a prompt is pooled to.
      reads: the residual stream entering the block, or (ablation, below the unrouted model in the paper) the embedding.
    """

    hidden: int = 128
    num_windows: int = 8
    reads: Reads = "residual"

    def __post_init__(self) -> None:
        require(self.hidden >= 1, "depth.hidden", self.hidden, "at least 1")
        require(self.num_windows >= 1, "depth.num_windows", self.num_windows, "at least 1")
        require(self.reads in get_args(Reads), "depth.reads", self.reads, f"one of {', '.join(get_args(Reads))}")


class LayerRouter(nn.Module):
    """r: [..., d] -> [..., 3] logits of one layer, float32."""

    config: DepthConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        xavier = nn.initializers.xavier_uniform()
        inner = nn.Dense(self.config.hidden, kernel_init=xavier, name="inner")(x.astype(jnp.float32))
        return nn.Dense(3, kernel_init=xavier, name="outer")(nn.gelu(inner, approximate=True))


def init_routers(config: DepthConfig, hidden: int, num_layers: int, key: Array) -> Any:
    """Parameters of `num_layers` routers over a residual stream of width `hidden`, leaves [L, ...]."""
    init = lambda key: LayerRouter(config).init(key, jnp.zeros((1, hidden)))["params"]  # noqa: E731
    return jax.vmap(init)(jax.random.split(key, num_layers))


def window_pool(h: Array, mask: Array, num_windows: int) -> tuple[Array, Array]:
    """Means over windows of each prompt.

    Args:
      h: [B, S, d].
      mask: [B, S] bool, the prompt's tokens, on either side of padding; its row sums are the lengths T.
      num_windows: the most windows.

    Returns:
      pooled [B, W, d] float32 and valid [B, W] bool with W = num_windows: row b has min(num_windows, T_b) windows, the
      others are zero, as are all of a row without tokens. What stands in padding has no influence.
    """
    require(num_windows >= 1, "num_windows", num_windows, "at least 1")
    lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)
    counts = jnp.minimum(lengths, num_windows)
    sizes = lengths // jnp.maximum(counts, 1)
    index = (jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1) // jnp.maximum(sizes, 1)[:, None]
    windows = jnp.arange(num_windows)[None]
    valid = windows < counts[:, None]
    member = (index[:, None] == windows[:, :, None]) & mask[:, None] & valid[:, :, None]  # [B, W, S]
    clean = jnp.where(mask[:, :, None], h.astype(jnp.float32), 0.0)  # padding may hold anything, NaN too
    sums = jnp.einsum("bws,bsd->bwd", member.astype(jnp.float32), clean, precision=jax.lax.Precision.HIGHEST)
    return sums / jnp.maximum(sizes, 1)[:, None, None], valid


def pooled_logits(config: DepthConfig, router: Any, pooled: Array, valid: Array) -> Array:
    """Logits [B, 3] of one layer's router: the mean over a prompt's windows, pooled [B, W, d] and valid [B, W]."""
    logits: Any = LayerRouter(config).apply({"params": router}, pooled)
    count = jnp.maximum(jnp.sum(valid, axis=1), 1)
    return jnp.sum(jnp.where(valid[:, :, None], logits, 0.0), axis=1) / count[:, None]


def stacked_logits(config: DepthConfig, routers: Any, pooled: Array, valid: Array) -> Array:
    """Logits [B, L, 3] of all routers, from what entered each layer, pooled [B, L, W, d] and valid [B, W]."""
    of_layer = jax.vmap(lambda router, x: pooled_logits(config, router, x, valid), in_axes=(0, 1), out_axes=1)
    return of_layer(routers, pooled)


def route(config: DepthConfig, router: Any, h: Array, mask: Array) -> Array:
    """Logits [B, 3] of one layer's router from h [B, S, d] and the prompt's mask [B, S]."""
    return pooled_logits(config, router, *window_pool(h, mask, config.num_windows))


# --- files ---


def save_routers(folder: str | FilePath, config: DepthConfig, routers: Any) -> None:
    """Writes routers as model.safetensors, and their config beside them."""
    leaves = jax.tree_util.tree_leaves_with_path(routers)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}
    infos = {name: TensorInfo(array.dtype, array.shape) for name, array in arrays.items()}
    write_safetensors(FilePath(folder), infos, arrays.values())
    (FilePath(folder) / CONFIG).write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", "utf-8")


def load_routers(
    folder: str | FilePath, *, hidden: int, num_layers: int, num_windows: int | None = None
) -> tuple[DepthConfig, Any]:
    """Reads what `save_routers` wrote, for a model of width `hidden` and L = `num_layers`.

    Raises:
      ValueError: no config, or a wrong one; routers of another model; `num_windows`, where given, other than trained.
    """
    file = FilePath(folder) / CONFIG
    require(file.is_file(), "folder", str(folder), f"a folder with {CONFIG}")
    raw = json.loads(file.read_text("utf-8"))
    fields = {field.name for field in dataclasses.fields(DepthConfig)}
    require(isinstance(raw, dict) and set(raw) == fields, str(file), raw, f"an object with {', '.join(sorted(fields))}")
    config = DepthConfig(**raw)
    trained = config.num_windows
    require(num_windows in (None, trained), "num_windows", num_windows, f"{trained}, as the routers were trained")
    shapes = jax.eval_shape(lambda key: init_routers(config, hidden, num_layers, key), jax.random.key(0))
    files = open_safetensors(FilePath(folder))
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    found = {name: info.shape for name, info in files.tensors.items()}
    wanted = {name: leaf.shape for name, leaf in named.items()}
    require(found == wanted, "routers", found, f"{wanted}, those of the model")
    return config, jax.tree_util.tree_unflatten(tree, [jnp.asarray(files.read(name)) for name in named])
