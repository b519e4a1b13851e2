"""Other libraries' numbers (tests/goldens): balance and z losses, sparse blocks, whole decoders, gradients included.

Legend: B sequences, S positions, T tokens, E experts, k active, d hidden, f expert width, H heads, D head width.
"""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import ModelConfig, MoEConfig
from moe.layer import MoELayer
from moe.losses import RoutingStats, routing_stats, scoped_balance_loss, z_loss
from moe.routers.softmax_topk import SoftmaxTopK
from moe.routing import drop_padding
from moe.transformer import Transformer, init_router_state

GOLDENS = Path(__file__).parents[1] / "goldens"


def _load_inputs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_inputs", GOLDENS / "inputs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


inputs = _load_inputs()


@functools.cache
def golden(file: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / file) as archive:
        return dict(archive)


# Losses


def stats_of(logits: jax.Array, mask: np.ndarray, k: int) -> RoutingStats:
    """Statistics of one layer's logits [B, S, E], with a leading layer axis."""
    flat = logits.reshape(-1, logits.shape[-1])
    routing, losses = SoftmaxTopK(inputs.NUM_EXPERTS, k)(flat, flat, jnp.zeros(len(flat), int), {}, jax.random.key(0))
    token_valid = jnp.asarray(mask)
    routing = drop_padding(routing, token_valid.reshape(-1))
    stats = routing_stats(routing, token_valid, losses, kept=routing.valid)
    return jax.tree.map(lambda x: x[None], stats)


def our_balance(logits: jax.Array, mask: np.ndarray, k: int) -> jax.Array:
    """Global balance loss of stacked layers [L, B, S, E]."""
    layers = [stats_of(layer, mask, k) for layer in logits]
    stats = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *layers)
    return scoped_balance_loss(stats, "global_exact", top_k=k, total_tokens=float(mask.sum()))


@pytest.mark.parametrize("k", inputs.TOP_KS)
@pytest.mark.parametrize("library", ["hf", "hf_masked", "megatron", "megatron_masked"])
def test_balance_loss_of_one_layer(library: str, k: int) -> None:
    mask = inputs.balance_mask() if "masked" in library else np.ones((inputs.BATCH, inputs.SEQ), bool)
    logits = jnp.asarray(inputs.balance_logits(0))[None]
    value, gradient = jax.jit(jax.value_and_grad(lambda x: our_balance(x, mask, k)))(logits)
    scale = k if library.startswith("hf") else 1  # Hugging Face does not divide the frequency by k
    theirs = golden("balance_losses.npz")
    np.testing.assert_allclose(scale * value, theirs[f"{library}_k{k}"], rtol=1e-6)
    np.testing.assert_allclose(scale * gradient[0], theirs[f"{library}_k{k}_grad"], atol=3e-8 * scale)


@pytest.mark.parametrize("k", inputs.TOP_KS)
def test_balance_loss_of_two_layers_keeps_layers_apart_as_megablocks(k: int) -> None:
    logits = jnp.stack([jnp.asarray(inputs.balance_logits(layer)) for layer in range(inputs.LAYERS)])
    mask = np.ones((inputs.BATCH, inputs.SEQ), bool)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: our_balance(x, mask, k)))(logits)
    theirs = golden("balance_losses.npz")
    np.testing.assert_allclose(value, theirs[f"megablocks_k{k}"], rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs[f"megablocks_k{k}_grad"], atol=3e-8)


def test_z_loss_is_hugging_faces() -> None:
    mask = np.ones((inputs.BATCH, inputs.SEQ), bool)
    logits = jnp.asarray(inputs.balance_logits(0))
    value, gradient = jax.jit(jax.value_and_grad(lambda x: z_loss(stats_of(x, mask, 2), float(mask.sum()))))(logits)
    theirs = golden("balance_losses.npz")
    np.testing.assert_allclose(value, theirs["z_loss"], rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs["z_loss_grad"], atol=1e-7)


# Blocks

ROUTERS = {"olmoe": "softmax_topk(renormalize=False)", "mixtral": "softmax_topk", "qwen3_moe": "softmax_topk"}


@pytest.mark.parametrize("dispatcher", ["einsum", "auto"])
@pytest.mark.parametrize("name", ["olmoe", "mixtral"])
def test_sparse_block(name: str, dispatcher: str) -> None:
    shape = inputs.BLOCK
    d, f, e = shape["hidden"], shape["expert_dim"], shape["experts"]
    config = MoEConfig(e, shape["top_k"], f, router=ROUTERS[name], dispatcher=dispatcher)  # pyright: ignore[reportArgumentType]
    hf = {
        "router": inputs.weight(f"block/{name}/gate.weight", (e, d)),
        "gate_up": inputs.weight(f"block/{name}/experts.gate_up_proj", (e, 2 * f, d)),
        "down": inputs.weight(f"block/{name}/experts.down_proj", (e, d, f)),
    }
    experts = {key: jnp.asarray(hf[key].swapaxes(1, 2)) for key in ("gate_up", "down")}
    x = jnp.asarray(inputs.draw("block/x", (shape["batch"], shape["seq"], d)))
    tokens = jnp.zeros(x.shape[:2], jnp.int32)
    params = {"params": {"router": jnp.asarray(hf["router"].T), "experts": experts}}
    layer = MoELayer(config, init_std=0.02, out_std=0.02)
    out, stats = layer.apply(params, x, tokens == 0, tokens, {}, jax.random.key(0))
    theirs = golden("models.npz")
    np.testing.assert_array_equal(np.sort(stats.indices), np.sort(theirs[f"block/{name}/indices"]))
    np.testing.assert_allclose(out, theirs[f"block/{name}/output"], atol=2e-6)


# Whole decoders

TOP = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight", "final_norm/scale": "model.norm.weight"}
LAYER = {
    "attention/wq": "self_attn.q_proj.weight",
    "attention/wk": "self_attn.k_proj.weight",
    "attention/wv": "self_attn.v_proj.weight",
    "attention/wo": "self_attn.o_proj.weight",
    "attention/q_norm/scale": "self_attn.q_norm.weight",
    "attention/k_norm/scale": "self_attn.k_norm.weight",
    "attention_norm/scale": "input_layernorm.weight",
    "ffn_norm/scale": "post_attention_layernorm.weight",
    "moe/router": "mlp.gate.weight",
    "moe/experts/gate_up": "mlp.experts.gate_up_proj",
    "moe/experts/down": "mlp.experts.down_proj",
}


def config_of(name: str) -> ModelConfig:
    shape, heads = inputs.MODEL, inputs.HEADS[name]
    moe = MoEConfig(shape["experts"], shape["top_k"], shape["expert_dim"], router=ROUTERS[name])
    return ModelConfig(
        vocab_size=shape["vocab"], hidden=shape["hidden"], num_layers=shape["layers"], num_heads=heads["heads"],
        num_kv_heads=heads["kv_heads"], head_dim=heads["head_dim"], moe=moe,
        qk_norm="none" if name == "mixtral" else "head",
        rope_theta=inputs.ROPE_THETA, norm_eps=inputs.NORM_EPS,
    )  # fmt: skip


def by_their_names(params: dict) -> dict[str, tuple[str, int | None]]:
    """Their parameter name -> our path and, for a stacked leaf, the layer."""
    names: dict[str, tuple[str, int | None]] = {TOP[path]: (path, None) for path in TOP}
    for layer in range(inputs.MODEL["layers"]):
        for path, leaf in LAYER.items():
            if not ("q_norm" in path or "k_norm" in path) or "q_norm" in params["runs_0"]["attention"]:
                names[f"model.layers.{layer}.{leaf}"] = (f"runs_0/{path}", layer)
    return names


def leaf_at(params: dict, place: tuple[str, int | None]) -> jax.Array:
    path, layer = place
    leaf = functools.reduce(lambda node, key: node[key], path.split("/"), params)
    return leaf if layer is None else leaf[layer]


def their_shape(name: str, ours: tuple[int, ...]) -> tuple[int, ...]:
    """PyTorch keeps a linear weight as [out, in] with heads flattened into one axis; experts as [E, out, in]."""
    if name.endswith("o_proj.weight"):
        return (ours[2], ours[0] * ours[1])
    if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
        return (ours[1] * ours[2], ours[0])
    if "experts" in name:
        return (ours[0], ours[2], ours[1])
    return ours[::-1] if name.endswith("gate.weight") else ours


def in_our_layout(name: str, theirs: np.ndarray, ours: tuple[int, ...]) -> np.ndarray:
    if name.endswith(("embed_tokens.weight", "lm_head.weight")) or theirs.ndim == 1:
        return theirs
    return theirs.swapaxes(-1, -2).reshape(ours)


def filled(params: dict, source: Callable[[str, tuple[int, ...]], np.ndarray]) -> dict:
    """A tree like `params`: every leaf is `source(their name, their shape)` in our layout, each used exactly once."""
    leaves = {}
    for name, place in by_their_names(params).items():
        shape = leaf_at(params, place).shape
        leaves.setdefault(place[0], []).append(in_our_layout(name, source(name, their_shape(name, shape)), shape))

    def pick(path: tuple, leaf: jax.Array) -> jax.Array:
        parts = leaves.pop("/".join(key.key for key in path))
        value = jnp.asarray(parts[0] if len(parts) == 1 else np.stack(parts))
        assert value.shape == leaf.shape
        return value

    tree = jax.tree_util.tree_map_with_path(pick, params)
    assert not leaves
    return tree


@pytest.mark.parametrize("name", list(inputs.HEADS))
@pytest.mark.slow_after(1)
def test_language_model_logits_and_gradients(name: str) -> None:
    config, shape = config_of(name), inputs.MODEL
    tokens = inputs.draw_integers("model/tokens", (shape["batch"], shape["seq"] + 1), shape["vocab"]).astype(np.int32)
    x, targets = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape)
    net = Transformer(config)
    rest = (jnp.ones_like(x), positions, init_router_state(config), jax.random.key(0))
    like = jax.jit(net.init)(jax.random.key(0), x, *rest)["params"]
    params = filled(like, inputs.weight)

    @jax.jit
    def loss(params: dict) -> tuple[jax.Array, jax.Array]:
        out = net.apply({"params": params}, x, *rest)
        logits = out.hidden @ out.head.T
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
        return -jnp.mean(chosen), logits

    (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    theirs = golden("models.npz")
    np.testing.assert_allclose(logits, theirs[f"model/{name}/logits"], atol=2e-5)
    np.testing.assert_allclose(value, theirs[f"model/{name}/loss"], atol=2e-6)

    expected = {key: value for key, value in theirs.items() if key.startswith(f"model/{name}/grad/")}
    directions = filled(like, inputs.direction)
    for their_name, place in by_their_names(like).items():
        gradient = np.asarray(leaf_at(gradients, place), np.float64)
        norm, projected = expected.pop(f"model/{name}/grad/{their_name}")
        direction = np.asarray(leaf_at(directions, place), np.float64)
        assert np.linalg.norm(gradient) == pytest.approx(norm, rel=2e-5), their_name
        # The product is exact only relative to the lengths it was made from.
        tolerance = 2e-5 * norm * np.linalg.norm(direction)
        assert np.sum(gradient * direction) == pytest.approx(projected, abs=tolerance), their_name
    assert not expected, "parameters of theirs that have no place in ours"
