"""Feed-forwards of LoRA experts against those of TUDB-Labs/MoE-PEFT (values, gradients, losses); see the makers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.layer import DenseFFN
from moe.lora import presets
from moe.lora.config import FEED_FORWARD, AdapterConfig
from moe.lora.dense import Context
from moe.lora.losses import mixlora_balance
from moe.losses import routing_stats
from moe.routers import top_p
from moe.routing import token_choice, top_k_indices

GOLDEN = dict(np.load(Path(__file__).parents[2] / "goldens" / "mixlora.npz"))
SIZES = {"rank": 4, "alpha": 8.0, "num_experts": 4, "targets": FEED_FORWARD}
CASES = {
    "mixlora": presets.mixlora(**SIZES),
    "mixdora": presets.mixdora(**SIZES),
    "mixlora_dynamic": presets.mixlora_dynamic(**SIZES),
    "loramoe": presets.loramoe(4, 8.0, num_experts=4),
    "mola": presets.mola(4, 8.0, num_experts=4),
}
CASES["mola"] = replace(
    CASES["mola"], targets=FEED_FORWARD, experts=replace(CASES["mola"].experts, targets=FEED_FORWARD)
)


def leaves(config: AdapterConfig, prefix: str) -> dict[str, Any]:
    """Arrays under the golden file's names (`weights` or a case's `grads`) as our collection."""
    tree: dict[str, Any] = {}
    for target in FEED_FORWARD:
        name = f"{prefix}/{target}_proj"
        held = {"a": f"{name}/lora_A", "b": f"{name}/lora_B"}
        held |= {"magnitude": f"{name}/magnitude"} if config.dora else {}
        tree[f"lora_{target}"] = {
            leaf: GOLDEN[key] if leaf == "magnitude" else GOLDEN[key].swapaxes(1, 2) for leaf, key in held.items()
        }
        if config.experts is not None and config.experts.routing == "linear":
            tree[f"router_{target}"] = {"weight": GOLDEN[f"{name}/router"].T}
    if config.experts is not None and config.experts.routing == "ffn":
        tree["router_ffn"] = {"weight": GOLDEN[f"{prefix}/router"].T}
    return jax.tree.map(jnp.asarray, tree)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow_after(2)
def test_feed_forward(case: str):
    config, x = CASES[case], jnp.asarray(GOLDEN["input"])
    layer = DenseFFN(48, 0.02, 0.02, adapters=config)
    gate_up = np.concatenate([GOLDEN[f"weights/{name}_proj"].T for name in ("gate", "up")], axis=1)
    base = {"gate_up": jnp.asarray(gate_up), "down": jnp.asarray(GOLDEN["weights/down_proj"].T)}
    context = Context(jnp.ones(x.shape[:2], bool), jnp.zeros(x.shape[:2], jnp.int32), None, None)

    def forward(tree: Any, x: jax.Array) -> Any:
        out, _ = layer.apply({"params": base, "adapters": tree}, x, context)
        return jnp.sum(out * GOLDEN["direction"]), out

    tree = leaves(config, "weights")
    (_, out), (found, dx) = jax.value_and_grad(forward, argnums=(0, 1), has_aux=True)(tree, x)
    np.testing.assert_allclose(out, GOLDEN[f"{case}/output"], atol=1e-5)
    wanted = leaves(config, f"{case}/grads")
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, mine), theirs in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted)):
        atol = 1e-5 * max(1.0, float(np.abs(theirs).max()))
        np.testing.assert_allclose(mine, theirs, atol=atol, err_msg=jax.tree_util.keystr(path))
    np.testing.assert_allclose(dx, GOLDEN[f"{case}/grads/input"], atol=2e-5)


@pytest.mark.parametrize("name", ["top_k", "top_k_masked", "top_p"])
def test_balance_of_concatenated_layers(name: str):
    """Their top-p loss forgets the mask, so it is compared without one."""
    mask = jnp.asarray(GOLDEN["balance/mask"], bool) if name == "top_k_masked" else jnp.ones((2, 10), bool)

    def loss(logits: jax.Array) -> jax.Array:
        def of_layer(logits: jax.Array) -> Any:
            flat = logits.reshape(-1, 4)
            if name == "top_p":
                routing, _ = top_p.make(4, 2, p=0.8)(flat, flat, jnp.zeros(20, jnp.int32), {}, None)
            else:
                probs = jax.nn.softmax(flat)
                indices = top_k_indices(probs, 2)
                chosen = jnp.broadcast_to(mask.reshape(-1, 1), indices.shape)
                routing = token_choice(probs, flat, indices, jnp.take_along_axis(probs, indices, axis=1), chosen)
            return routing_stats(routing, mask, {}, routing.valid)

        return mixlora_balance(jax.vmap(of_layer)(logits), 4)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(GOLDEN["balance/logits"]))
    np.testing.assert_allclose(value, GOLDEN[f"balance/{name}"], rtol=1e-5)
    np.testing.assert_allclose(gradient, GOLDEN[f"balance/{name}_grad"], atol=1e-6)
