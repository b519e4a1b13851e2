"""The model by behaviour: causality by gradients, packing, remat and scan, precision, conventions."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import LatentConfig, ModelConfig, MoEConfig, RopeScaling
from moe.transformer import Transformer, init_router_state, rms_norm

V, S = 31, 10
MOE = MoEConfig(num_experts=4, top_k=2, expert_dim=12, shared_dim=12)
BASE = ModelConfig(
    vocab_size=V, hidden=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=20, moe=MOE, init_std=0.3
)
CONFIGS = {
    "moe": BASE,
    "dense": replace(BASE, moe=None, qk_norm="head"),
    "mixed_tied": replace(BASE, first_dense=1, tie_embeddings=True),
    "alternating": replace(BASE, num_layers=4, moe_every=2),
    "top1": replace(BASE, moe=replace(MOE, top_k=1, router="softmax_topk(renormalize=False)", shared_dim=0)),
    "windows_sinks_biases": replace(BASE, windows=(4, 0, 6), sinks=True, attention_bias="all", dense_layers=(1,)),
    "width_norm_clip": replace(BASE, moe=None, qk_norm="width", clip_qkv=0.4, ffn_bias=True),
    "latent_yarn": replace(
        BASE,
        num_kv_heads=4,
        head_dim=10,
        latent=LatentConfig(q_rank=6, kv_rank=10, nope_dim=6, rope_dim=4, value_dim=5),
        rope_scaling=RopeScaling("yarn", 4.0, 8),
    ),
}


def inputs(b=2, s=S, seed=0):
    tokens = jax.random.randint(jax.random.key(seed), (b, s), 0, V)
    positions = jnp.broadcast_to(jnp.arange(s)[None], (b, s))
    return tokens, jnp.ones((b, s), jnp.int32), positions


def build(config, seed=0):
    model, state = Transformer(config), init_router_state(config)
    params = jax.jit(model.init)(jax.random.key(seed), *inputs(), state, jax.random.key(1))["params"]

    @jax.jit
    def run(params, tokens, segments, positions):
        out = model.apply({"params": params}, tokens, segments, positions, state, jax.random.key(1))
        return out.hidden @ out.head.T, out.stats

    return params, run


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.slow_after(1)
def test_causality_by_gradient_through_the_embedding_of_each_position(name):
    """d logits[t] / d position-specific input is zero for later positions and not for earlier ones."""
    config = CONFIGS[name]
    params, run = build(config)
    tokens = jnp.arange(S)[None] % V  # all different: the gradient of row v of the embedding is that of one position
    _, segments, positions = inputs(1)

    @jax.jit
    @jax.grad
    def gradient(embedding, t):
        return run({**params, "embedding": embedding}, tokens, segments, positions)[0][0, t].sum()

    for t in (0, S // 2):
        grad = gradient(params["embedding"], t)[:S]
        reach = np.abs(np.asarray(grad)).sum(axis=-1)
        if not config.tie_embeddings:
            assert (reach[t + 1 :] == 0).all()
        assert (reach[: t + 1] > 1e-7).all()


def test_packed_documents_equal_separate_ones():
    params, run = build(BASE)
    tokens, segments, _ = inputs(1)
    cut = 4
    packed = segments.at[:, cut:].set(2)
    positions = jnp.concatenate([jnp.arange(cut), jnp.arange(S - cut)])[None]
    together, _ = run(params, tokens, packed, positions)
    alone, _ = run(params, tokens[:, cut:], segments[:, cut:], jnp.arange(S - cut)[None])
    np.testing.assert_allclose(together[:, cut:], alone, rtol=2e-5, atol=2e-5)


def test_padding_reaches_neither_counts_nor_outputs():
    params, run = build(BASE)
    tokens, segments, positions = inputs(1)
    padded = segments.at[:, 7:].set(0)
    logits, stats = run(params, tokens, padded, positions)
    short, short_stats = run(params, tokens[:, :7], segments[:, :7], positions[:, :7])
    np.testing.assert_allclose(logits[:, :7], short, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(stats.counts, short_stats.counts)
    np.testing.assert_allclose(stats.prob_sums, short_stats.prob_sums, rtol=1e-5)
    assert float(stats.counts.sum()) == 7 * MOE.top_k * BASE.num_layers


@pytest.mark.parametrize(
    ("change", "trace"),
    [
        ({"remat": "full"}, "policy=None"),
        ({"remat": "dots"}, "remat2["),
        ({"unroll": 0}, "unroll=3"),  # all of the layers
        ({"unroll": 3}, "unroll=3"),
    ],
    ids=str,
)
@pytest.mark.slow
def test_remat_and_unrolling_change_the_program_but_not_its_results(change, trace):
    params, run = build(BASE)
    _, other = build(replace(BASE, **change))
    batch = inputs()

    def loss(fn):
        return jax.jit(jax.value_and_grad(lambda p: jnp.mean(jnp.square(fn(p, *batch)[0]))))(params)

    def program(fn):
        return str(jax.make_jaxpr(jax.grad(lambda p: jnp.sum(fn(p, *batch)[0])))(params))

    assert trace in program(other)
    assert trace not in program(run)
    (a, ga), (b, gb) = loss(run), loss(other)
    assert float(a) == pytest.approx(float(b), rel=1e-6)
    for x, y in zip(jax.tree.leaves(ga), jax.tree.leaves(gb)):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * float(jnp.abs(x).max()) + 1e-9)


def test_bfloat16_keeps_parameters_and_router_statistics_in_float32():
    params, run = build(replace(BASE, compute_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits, stats = run(params, *inputs())
    assert stats.prob_sums.dtype == stats.counts.dtype == stats.z_sums.dtype == jnp.float32
    exact, _ = build(BASE)[1](params, *inputs())
    difference = jnp.abs(logits - exact).max(axis=-1)  # per token; a few change expert where the margin is small
    assert 0 < float(jnp.median(difference)) < 0.1 * float(exact.std())


def test_tied_head_is_the_embedding():
    params, _ = build(CONFIGS["mixed_tied"])
    assert "head" not in params
    assert "head" in build(BASE)[0]


def test_equal_experts_with_weights_summing_to_one_are_a_dense_ffn():
    """Routing must not matter when experts are equal: renormalised top-k of clones = the dense model."""
    config = replace(BASE, moe=replace(MOE, shared_dim=0))
    params, run = build(config)
    dense_params, dense = build(replace(BASE, moe=None, ffn_dim=MOE.expert_dim))
    moe = params["runs_0"]["moe"]["experts"]
    clones = {name: jnp.broadcast_to(w[:, :1], w.shape) for name, w in moe.items()}
    cloned = {**params, "runs_0": {**params["runs_0"], "moe": {**params["runs_0"]["moe"], "experts": clones}}}
    shared = {k: v for k, v in params["runs_0"].items() if k != "moe"}
    dense_params = {**params, "runs_0": {**shared, "ffn": {name: w[:, 0] for name, w in moe.items()}}}
    np.testing.assert_allclose(run(cloned, *inputs())[0], dense(dense_params, *inputs())[0], rtol=3e-5, atol=3e-5)


def test_rms_norm_closed_form():
    x = jnp.array([[3.0, 4.0]])
    np.testing.assert_allclose(
        rms_norm(x, jnp.array([1.0, 2.0]), 0.0), x / np.sqrt(12.5) * np.array([[1.0, 2.0]]), rtol=1e-6
    )


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 4, 6)])
def test_rms_norm_gradient_is_that_of_the_plain_formula(shape):
    rng = np.random.default_rng(0)
    x, g, scale = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in (shape, shape, shape[-1:]))

    def plain(x, scale):
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 0.1) * jnp.expand_dims(scale, range(x.ndim - 1))

    out, pull = jax.vjp(lambda x, scale: rms_norm(x, scale, 0.1), x, scale)
    want, want_pull = jax.vjp(plain, x, scale)
    for got, exact in zip((out, *pull(g)), (want, *want_pull(g))):
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-6)
    bf16 = jax.vjp(lambda x, scale: rms_norm(x, scale, 0.1), x.astype(jnp.bfloat16), scale)
    assert [leaf.dtype for leaf in (bf16[0], *bf16[1](g.astype(jnp.bfloat16)))] == [jnp.bfloat16] * 2 + [jnp.float32]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MoEConfig(num_experts=4, top_k=5), ["moe.top_k = 5", "num_experts = 4"]),
        (lambda: MoEConfig(num_experts=4, top_k=0), ["moe.top_k = 0"]),
        (lambda: ModelConfig(num_heads=4, num_kv_heads=3), ["model.num_kv_heads = 3", "divisor"]),
        (lambda: ModelConfig(head_dim=7), ["model.head_dim = 7", "even"]),
        (lambda: build(replace(BASE, moe=replace(MOE, router="nowhere"))), ["moe.router", "nowhere"]),
        (lambda: build(replace(BASE, moe=replace(MOE, router="os:path"))), ["moe.router", "os:path"]),
    ],
)
def test_bad_input_names_field_value_and_expectation(make, words):
    with pytest.raises(ValueError) as error:
        make()
    for word in words:
        assert word in str(error.value)
