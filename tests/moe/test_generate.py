"""Prefill and decoding with a cache equal the full forward pass, for every form of attention and layer."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import attention_reference
from kernels.cached_attention import cached_attention, write_cache
from moe.config import LatentConfig, ModelConfig, MoEConfig, RopeScaling
from moe.generate import Generator, Sampling, cached_forward, empty_caches, generate, sample, unstacked
from moe.pretrained.ours import abstract_model
from moe.transformer import Transformer, init_router_state

V, S = 37, 14
MOE = MoEConfig(num_experts=4, top_k=2, expert_dim=12, shared_dim=12)
BASE = ModelConfig(
    vocab_size=V, hidden=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=20, moe=None, init_std=0.3
)
LATENT = LatentConfig(q_rank=6, kv_rank=10, nope_dim=6, rope_dim=4, value_dim=5)
YARN = RopeScaling("yarn", 4.0, original_context=8, mscale=1.0, mscale_all_dim=0.7)
CONFIGS = {
    "dense": replace(BASE, qk_norm="head", tie_embeddings=True),
    "windows_sinks_biases": replace(BASE, windows=(4, 0, 6), sinks=True, attention_bias="all", ffn_bias=True),
    "width_norm_clip": replace(BASE, qk_norm="width", clip_qkv=0.4, attention_bias="qkv"),
    "moe_mixed": replace(BASE, moe=MOE, dense_layers=(1,), rope_scaling=RopeScaling("llama3", 4.0, 8)),
    "latent": replace(BASE, num_kv_heads=4, head_dim=10, latent=LATENT, rope_scaling=YARN, attention_bias="all"),
    "latent_direct": replace(BASE, num_kv_heads=4, head_dim=10, latent=replace(LATENT, q_rank=0), windows=(0, 5, 5)),
}


class Random(NamedTuple):
    config: ModelConfig
    params: Any
    router_state: Any


def random_model(config, seed=0):
    """Every parameter random, also those that start at zero or one."""
    shapes, _ = abstract_model(config)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.standard_normal(leaf.shape), jnp.float32), shapes)
    return Random(config, params, init_router_state(config))


def full_logits(model, tokens):
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    ones = jnp.ones(tokens.shape, jnp.int32)
    forward = jax.jit(Transformer(model.config).apply)
    out = forward({"params": model.params}, tokens, ones, positions, model.router_state, None)
    return np.asarray(out.hidden @ out.head.T)


def draw(b, s, seed=3):
    return np.random.default_rng(seed).integers(0, V, (b, s)).astype(np.int32)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.slow_after(2)
def test_prefill_then_decode_equals_the_full_forward(name):
    """Two sequences of unequal prompts, the shorter one padded on the right; then one token at a time."""
    model, tokens = random_model(CONFIGS[name]), draw(2, S)
    want = full_logits(model, tokens)
    weights = unstacked(model.config, model.params, model.router_state)
    forward = jax.jit(lambda *a: cached_forward(model.config, weights, *a))
    lengths, caches = np.array([7, 4]), empty_caches(model.config, 2, 16)
    real = np.arange(7)[None] < lengths[:, None]
    prompt = np.where(real, tokens[:, :7], 0)
    positions = np.broadcast_to(np.arange(7), (2, 7))
    hidden, caches = forward(prompt, real.astype(np.int32), positions, caches)
    got = np.asarray(hidden @ weights.head)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(got[row, :length], want[row, :length], atol=2e-5)
    for i in range(7):
        at = (lengths + i)[:, None]
        hidden, caches = forward(np.take_along_axis(tokens, at, axis=1), np.ones((2, 1), np.int32), at, caches)
        got = np.asarray(hidden @ weights.head)[:, 0]
        np.testing.assert_allclose(got, want[np.arange(2), at[:, 0]], atol=2e-5, err_msg=f"token {i}")


@pytest.mark.slow
def test_greedy_generation_is_the_argmax_of_full_forwards_and_stops():
    model = random_model(CONFIGS["moe_mixed"])
    prompts = [list(draw(1, 5, 1)[0]), list(draw(1, 3, 2)[0])]
    made = np.stack(list(generate(model, prompts, max_new_tokens=6)), axis=1)
    for prompt, new in zip(prompts, made):
        logits = full_logits(model, [[*prompt, *new]])[0]
        np.testing.assert_array_equal(new, logits[len(prompt) - 1 : -1].argmax(-1))
    stop = int(made[0, 2])
    first = list(made[0]).index(stop)
    stopped = np.stack(list(generate(model, prompts, max_new_tokens=6, stop=[stop])), axis=1)
    np.testing.assert_array_equal(stopped[0], [*made[0, : first + 1], *[-1] * (stopped.shape[1] - first - 1)])
    if stop not in made[1]:
        np.testing.assert_array_equal(stopped[1], made[1])


def test_sampling_is_reproducible_and_keeps_to_the_nucleus():
    probs = np.array([[0.5, 0.3, 0.15, 0.05], [0.05, 0.05, 0.1, 0.8]])
    logits = jnp.log(jnp.asarray(probs, jnp.float32))
    keys = jax.random.split(jax.random.key(0), 2000)
    draws = np.asarray(jax.vmap(lambda key: sample(logits, Sampling(1.0, 0.75), key))(keys))
    kept = probs[0, :2] / probs[0, :2].sum()
    np.testing.assert_allclose(np.bincount(draws[:, 0], minlength=4) / 2000, [*kept, 0, 0], atol=0.04)
    assert (draws[:, 1] == 3).all()
    cool = np.asarray(jax.vmap(lambda key: sample(logits, Sampling(0.5, 1.0), key))(keys))
    np.testing.assert_allclose(np.bincount(cool[:, 0]) / 2000, probs[0] ** 2 / (probs[0] ** 2).sum(), atol=0.04)
    model = random_model(CONFIGS["dense"])
    a, b, c = (
        np.stack(list(generate(model, [[1, 2]], max_new_tokens=8, temperature=2.0, seed=seed))) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


@pytest.mark.parametrize(("window", "with_sinks"), [(None, False), (3, True), (0, True)])
def test_cached_attention_is_the_last_rows_of_attention(window, with_sinks):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 9, h, 4)), jnp.float32) for h in (6, 2, 2))
    sinks = jnp.asarray(rng.standard_normal(6), jnp.float32) if with_sinks else None
    ones, positions = jnp.ones((2, 9), jnp.int32), jnp.broadcast_to(jnp.arange(9), (2, 9))
    want = attention_reference(q, k, v, ones, window=window, sinks=sinks)
    keys, values = (write_cache(jnp.full((2, 12, 2, 4), 1e3), x, positions) for x in (k, v))
    got = cached_attention(q[:, 6:], keys, values, positions[:, 6:], window=window, sinks=sinks)
    np.testing.assert_allclose(got, want[:, 6:], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts = "),
        ({"prompts": [[1], []]}, r"prompts\[1\] = "),
        ({"prompts": [[1, V]]}, r"prompts\[0\] token = \[37\]: expected ids from 0 to 36"),
        ({"prompts": [[1] * 15]}, r"context of 16"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"top_p": 0.0}, "top_p = 0.0"),
    ],
)
def test_bad_input(change, message):
    generator = Generator(random_model(replace(BASE, context=16)))
    with pytest.raises(ValueError, match=message):
        generator(**({"prompts": [[1, 2]], "max_new_tokens": 2} | change))


def test_a_router_that_sees_the_future_is_refused():
    moe = replace(MOE, router="expert_choice", allow_noncausal=True)
    with pytest.raises(ValueError, match="causal router"):
        Generator(random_model(replace(BASE, moe=moe)))
