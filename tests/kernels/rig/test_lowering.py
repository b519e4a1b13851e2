"""Programs with Triton kernels, lowered for CUDA on this machine: values, gradients, and a whole training step."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from experiments import recipes
from experiments.dry_run import abstract_state
from experiments.step import train_step
from kernels import _triton
from kernels.grouped_ffn import grouped_ffn
from kernels.grouped_matmul import grouped_matmul
from kernels.lora import slot_lora
from kernels.routing_gpu import permute, route, sort_assignments, unpermute
from parallel.mesh import make_mesh

T, K, E, D, F = 64, 2, 4, 64, 32


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def lowered(function, *arrays, capability=90):
    with _triton.target(capability):
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def calls(text):
    """Of the kernels, by the target of either jax-triton."""
    return text.count("custom_call @triton_kernel_call")


def gradients(function, *which):
    """The output too, so that no part of the forward is dropped."""

    def both(*arrays):
        def call(*some):
            whole = list(arrays)
            for place, value in zip(which, some):
                whole[place] = value
            return function(*whole)

        out, vjp = jax.vjp(call, *(arrays[i] for i in which))
        return out, vjp(jnp.sin(out))

    return both


FFN = array(T, D), array(E, D, 2 * F), array(E, F, D), array(T, K, dtype=jnp.int32), array(T, K, dtype=jnp.bool_)


def ffn(implementation, x, weights, gate_up, down, indices, valid):
    return grouped_ffn(x, indices, weights, valid, gate_up, down, implementation=implementation)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_ffn_is_two_kernels_to_sort_two_forward_and_four_back(capability):
    x, gate_up, down, *routing = FFN
    arrays = x, array(T, K, dtype=jnp.float32), gate_up, down, *routing
    run = functools.partial(ffn, "triton")
    text = lowered(run, *arrays, capability=capability)
    assert calls(text) == 2 + 2
    assert "stablehlo.sort" not in text
    text = lowered(gradients(run, 0, 1, 2, 3), *arrays, capability=capability)
    assert calls(text) == 2 + 2 + 4
    assert "ragged_dot" not in text
    assert "while" not in text.split("func.func private")[0], "a loop over blocks: the path of CPUs"


def test_a_grouped_product_is_one_kernel_and_two_back():
    arrays = array(T, D, dtype=jnp.float16), array(E, D, F, dtype=jnp.float16), array(E, dtype=jnp.int32)
    run = functools.partial(grouped_matmul, implementation="triton")
    assert calls(lowered(run, *arrays)) == 1
    assert calls(lowered(gradients(run, 0, 1), *arrays)) == 3


def test_experts_of_low_rank_are_two_products():
    arrays = array(T, 1, D), array(E, D, 8), array(E, 8, F), *FFN[3:]
    run = functools.partial(slot_lora, implementation="triton")
    text = lowered(gradients(run, 0, 1, 2), *arrays)
    assert calls(text) == 2 + 4 + 2  # the last two are the forward again, whose results nothing takes: XLA drops them


@pytest.mark.parametrize("capability", [80, 90])
def test_the_router_is_two_kernels_and_moving_rows_one_each_way(capability):
    def routed(x, logits):
        made = route(logits, K, valid=jnp.ones(T, bool))
        rows = sort_assignments(made.indices, E, valid=jnp.ones(T, bool), block_counts=made.block_counts)
        return unpermute(permute(x, rows, K), rows, K, made.weights)

    arrays = array(T, D), array(T, E, dtype=jnp.float32)
    assert calls(lowered(routed, *arrays, capability=capability)) == 4
    text = lowered(gradients(routed, 0, 1), *arrays, capability=capability)
    assert calls(text) == 6
    assert "stablehlo.sort" not in text
    assert "stablehlo.scatter" not in text


def test_on_cpu_the_same_program_has_no_kernel():
    arrays = array(T, D), array(E, D, F), array(E, dtype=jnp.int32)
    text = jax.jit(functools.partial(grouped_matmul, implementation="triton")).lower(*arrays).as_text()
    assert calls(text) == 0
    assert "stablehlo.while" in text


def training_step(dispatcher, router, mesh=(1, 1, 1)):
    """The smoke recipe's step with this MoE, lowered for CUDA."""
    made = recipes.smoke()
    moe = replace(made.model.moe, dispatcher=dispatcher, router=router)
    config = replace(made, model=replace(made.model, moe=moe, compute_dtype="bfloat16"), batch_size=8)
    state, tx = abstract_state(config)
    shape = config.accumulation, config.batch_size // config.accumulation, config.data.seq_len + 1
    batch = dict.fromkeys(("tokens", "segment_ids", "positions"), array(*shape, dtype=jnp.int32))
    with jax.set_mesh(make_mesh(*mesh)):
        return lowered(functools.partial(train_step, config=config, tx=tx), state, batch)


@pytest.mark.parametrize(
    ("dispatcher", "router", "wanted"),
    [
        ("triton", "softmax_topk", 2 + 2 + 4),
        ("triton", "softmax_topk(fused=True)", 1 + 2 + 2 + 4),
        ("triton", "loss_free(fused=True)", 2 + 2 + 2 + 4),  # the second choice is the one the balance loss counts
        ("auto", "softmax_topk", 0),
    ],
)
def test_a_training_step_has_the_kernels_in_forward_and_backward(dispatcher, router, wanted):
    text = training_step(dispatcher, router)
    assert calls(text) == wanted
    assert ("ragged_dot" in text) == (dispatcher == "auto")


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)])
def test_so_it_has_on_a_mesh(mesh):
    """A kernel's call cannot be cut by the compiler: each device calls its own, on its own rows."""
    text = training_step("triton", "softmax_topk(fused=True)", mesh)
    assert calls(text) == 1 + 2 + 2 + 4
    assert "ragged_dot" not in text
