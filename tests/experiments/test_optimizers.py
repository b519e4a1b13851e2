"""The optimisers a run can name, on our own models: what each of them moves, what is whose, and what is refused."""

import functools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.config import MeshConfig
from experiments.data.corpus import open_corpus
from experiments.initial import fingerprint
from experiments.optimizers import matrix_axes, matrix_labels
from experiments.overrides import with_overrides
from experiments.recipes import cpu, smoke
from experiments.step import init_state, make_optimizer, pass_loss
from experiments.train import fit, restore_or_init
from moe.config import LatentConfig, ModelConfig, MoEConfig
from moe.transformer import abstract_params, init_params
from optim.sharding import bytes_per_device, opt_state_shardings
from optim.subspaces import matrices
from parallel.checkpoint import Checkpoints
from parallel.mesh import make_mesh
from parallel.sharding import tree_shardings

RUN = with_overrides(
    smoke(), ["steps=2", "eval_tokens_per_domain=64", "model.moe.dispatcher=einsum", "model.moe.num_experts=4"]
)
MODELS = {
    "moe": RUN.model,
    "dense": replace(RUN.model, moe=None, ffn_dim=64),
}
NAMES = [
    "adamw",
    "frugal",
    "frugal(subspace='rows(density=0.25)', at_refresh='move')",
    "frugal(subspace='randk(density=0.25)', rule='sgd', update_gap=1)",
    "frugal(subspace='svd(rank=4)', at_refresh='keep')",
    "frugal(subspace='random(density=0.25)', inner='momentum')",
    "frugal(subspace='block(density=0.5)', inner='lion')",
    "frugal(subspace='none')",
    "galore(rank=4)",
    "fira(rank=4)",
    "apollo(rank=4)",
    "apollo_mini",
    "ldadam(rank=4)",
    "badam(update_gap=1)",
    "badam(others='adam')",
    "lisa(active=1)",
]
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def gradient(kind):
    """(parameters) -> (loss, gradient) of one pass over a batch, and parameters: one program for all optimisers."""
    config = replace(RUN, model=MODELS[kind])
    state = jit(functools.partial(init_state, config, optax.sgd(1.0)))()
    shape = (config.batch_size, config.data.seq_len + 1)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.model.vocab_size, shape), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": positions}
    total = jnp.float32(config.batch_size * config.data.seq_len)
    loss = functools.partial(pass_loss, config=config, router_state=state.router_state, total_targets=total,
                             total_tokens=total, step_key=state.key)  # fmt: skip
    of = jit(jax.value_and_grad(lambda params: loss(params, batch, None, None, state.key)[0]))
    return of, state.params


def by_path(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "moe") for name in NAMES), ("adamw", "dense"), ("frugal", "dense"), ("lisa(active=1)", "dense")],
)
@pytest.mark.slow_after(4)
def test_two_steps_move_every_leaf_that_is_trained(name, kind):
    value_and_grad, start = gradient(kind)
    tx = make_optimizer(replace(RUN.optimizer, name=name), 10)
    state, params, update = tx.init(start), start, jit(tx.update)
    for _ in range(2):
        loss, grads = value_and_grad(params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert np.isfinite(loss)
    assert np.isfinite(value_and_grad(params)[0])
    before = by_path(start)
    for leaf, after in by_path(params).items():
        moved = np.asarray(after != before[leaf])
        frozen = name == "badam(update_gap=1)" and not leaf.startswith("runs_")
        assert moved.any() != frozen, leaf
        if name in ("badam(others='adam')", "lisa(active=1)") and leaf.startswith("runs_"):
            assert moved.any(axis=tuple(range(1, moved.ndim))).sum() == 1, leaf  # of two layers
        elif name.startswith("frugal") and "rule" not in name and moved.ndim > 2:
            assert moved.mean() > 0.5, leaf  # by the sign, outside of the subspace


SIZES = {"vocab_size": 32, "hidden": 8, "num_layers": 2, "num_heads": 2, "head_dim": 6, "ffn_dim": 10}
EXPERTS = MoEConfig(4, 2, 5, shared_dim=9, shared_gate=True, expert_bias=True, router="noisy_topk")
LATENT = LatentConfig(q_rank=5, kv_rank=7, nope_dim=2, rope_dim=4, value_dim=3)
KINDS = {
    "biased": ModelConfig(
        **SIZES, num_kv_heads=1, moe=None, attention_bias="all", ffn_bias=True, sinks=True, qk_norm="head"
    ),
    "experts": ModelConfig(**SIZES, num_kv_heads=2, moe=EXPERTS),
    "learned_bias": ModelConfig(**SIZES, num_kv_heads=2, moe=replace(EXPERTS, router="learned_bias"), first_dense=1),
    "latent": ModelConfig(**SIZES, num_kv_heads=2, moe=None, attention_bias="all", latent=LATENT),
    "latent_direct": ModelConfig(**SIZES, num_kv_heads=2, moe=None, latent=replace(LATENT, q_rank=0)),
    "tied": ModelConfig(**SIZES, num_kv_heads=2, moe=None, tie_embeddings=True, qk_norm="width"),
}
# Shapes [N, a, b] of matrices, input first, with hidden 8, 2 layers, 2 heads of 6 and feed-forward 10.
PLAIN = {"attention/wq": (2, 8, 12), "attention/wk": (2, 8, 12), "attention/wv": (2, 8, 12), "attention/wo": (2, 12, 8)}
FFN = {"ffn/gate_up": (2, 8, 20), "ffn/down": (2, 10, 8)}
SPARSE = {"moe/experts/gate_up": (8, 8, 10), "moe/experts/down": (8, 5, 8), "moe/shared/ffn/gate_up": (2, 8, 18),
          "moe/shared/ffn/down": (2, 9, 8)}  # fmt: skip
UP = {"attention/wk_up": (2, 7, 4), "attention/wv_up": (2, 7, 6), "attention/wkv_down": (2, 8, 11),
      "attention/wo": (2, 6, 8)}  # fmt: skip
halved = lambda shapes: {name: (n // 2, a, b) for name, (n, a, b) in shapes.items()}  # noqa: E731
OF_METHODS = {
    "biased": PLAIN | FFN | {"attention/wk": (2, 8, 6), "attention/wv": (2, 8, 6)},
    "experts": PLAIN | SPARSE,
    "learned_bias": halved(PLAIN | SPARSE | FFN),
    "latent": UP | FFN | {"attention/wq_down": (2, 8, 5), "attention/wq_up": (2, 5, 12)},
    "latent_direct": UP | FFN | {"attention/wq": (2, 8, 12)},
    "tied": PLAIN | FFN,
}
NORMS = {"attention_norm/scale", "ffn_norm/scale", "final_norm/scale"}
EXPERT_ADAM = {"moe/experts/gate_up_bias", "moe/experts/down_bias", "moe/shared/gate", "moe/router"}
OF_ADAM = {
    "biased": {"embedding", "head", *NORMS, "ffn/gate_up_bias", "ffn/down_bias", *(f"attention/{n}" for n in
               ("bq", "bk", "bv", "bo", "sinks", "q_norm/scale", "k_norm/scale"))},
    "experts": {"embedding", "head", *NORMS, *EXPERT_ADAM, "moe/gate/noise"},
    "learned_bias": {"embedding", "head", *NORMS, *EXPERT_ADAM, "moe/gate/bias"},
    "latent": {"embedding", "head", *NORMS, *(f"attention/{n}" for n in
               ("bq_down", "bkv_down", "bo", "q_norm/scale", "kv_norm/scale"))},
    "latent_direct": {"embedding", "head", *NORMS, "attention/kv_norm/scale"},
    "tied": {"embedding", *NORMS, "attention/q_norm/scale", "attention/k_norm/scale"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_leaf_is_a_matrix_of_the_right_way_round_or_adams(kind):
    params = jax.eval_shape(lambda: init_params(KINDS[kind], jax.random.key(0)))
    mine = by_path(matrix_labels("mine")(params))
    found, others = {}, set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        full = jax.tree_util.keystr(path, simple=True, separator="/")
        name = full.split("/", 1)[1] if full.startswith("runs_") else full
        if mine[full] == "adam":
            others.add(name)
            with pytest.raises(ValueError, match="expected the path of a weight matrix"):
                matrix_axes(jax.tree_util.keystr(path), leaf)
            continue
        seen = functools.partial(matrices, axes=matrix_axes(jax.tree_util.keystr(path), leaf))
        found[name] = jax.eval_shape(seen, leaf).shape
    assert found == OF_METHODS[kind]
    assert others == OF_ADAM[kind]


def named(name, **options):
    """A dense run, which compiles in less time."""
    return replace(RUN, model=MODELS["dense"], optimizer=replace(RUN.optimizer, name=name, **options))


def files(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_subspace_alone(tmp_path):
    """Another density, projection or gap is refused by name, and what was saved is still there and whole."""
    config = named("frugal(subspace='columns(density=0.25)', update_gap=3)")
    fit(config, tmp_path)
    before = files(tmp_path)
    for other in (
        "frugal(subspace='columns(density=0.5)', update_gap=3)",
        "frugal(subspace='rows(density=0.25)', update_gap=3)",
        "frugal(subspace='columns(density=0.25)', update_gap=4)",
        "adamw",
    ):
        with pytest.raises(ValueError, match=r"optimizer\.name: .*update_gap=3\)\" stored, .* now"):
            fit(named(other), tmp_path)
        assert files(tmp_path) == before
    tx, mesh = make_optimizer(config.optimizer, config.steps), make_mesh()
    made = fingerprint(config, open_corpus(config.data))
    with jax.set_mesh(mesh), Checkpoints(tmp_path / "checkpoints", fingerprint=made) as saved:
        assert int(restore_or_init(config, tx, mesh, saved).step) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("frugle", "optimizer.name = .*no attribute 'frugle'"),
        ("frugal(density=0.25)", r"optimizer.name = 'frugal\(density=0.25\)': expected options that frugal takes"),
        ("frugal(subspace='diagonals(density=0.5)')", "optimizer.name: subspace = .*no attribute 'diagonals'"),
        ("frugal(subspace='columns(rank=2)')", r"optimizer.name: subspace = 'columns\(rank=2\)': expected options"),
        ("frugal(subspace='columns(density=1.5)')", "density = 1.5: expected above 0, at most 1"),
        ("frugal(subspace='columns(density=0)')", "density = 0: expected above 0"),
        ("frugal(inner='sgd')", "optimizer.name: inner = 'sgd': expected one of adam, lion, momentum"),
        ("frugal(update_gap=0)", "update_gap = 0: expected a whole number, at least 1"),
        ("galore", r"optimizer.name = 'galore': expected options that galore takes"),
        ("galore(rank=0)", "rank = 0: expected at least 1"),
        ("badam(others='sgd')", "optimizer.name: others = 'sgd'"),
        ("adamw(b3=0.1)", "expected options that adamw takes"),
    ],
)
def test_a_bad_name_is_refused_before_anything_is_written(name, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        fit(named(name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


TOO_LARGE = [
    ("galore(rank=33)", r"\['attention'\]\['w[a-z]'\]: rank = 33: expected a rank of 1 to 32"),
    ("frugal(subspace='columns(density=0.01)')", r"\['attention'\]\['w[a-z]'\]: density = 0.01: expected enough for"),
    ("lisa(active=3)", r"\]: active = 3: expected 1 to 2 layers"),
]


@pytest.mark.parametrize(("name", "words"), TOO_LARGE)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_written(name, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        fit(named(name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_columns_that_lie_on_several_devices_need_parts(tmp_path):
    config = replace(named("frugal(subspace='columns(density=0.25)')"), mesh=MeshConfig(fsdp=2))
    with pytest.raises(ValueError, match=r"\['wo'\]: devices along columns = .*shards a multiple of 2"):
        fit(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


KEEPING_LITTLE = [
    "frugal(subspace='columns(density=0.25, shards=8)')",
    "frugal(subspace='rows(density=0.25, shards=8)')",
    "frugal(subspace='randk(density=0.25)')",
    "frugal(subspace='svd(density=0.25)')",
    "frugal(subspace='block(density=0.34)')",
    "galore(rank=24)",
    "fira(rank=24)",
    "apollo(rank=24)",
    "badam(others='adam')",
    "lisa(active=1)",
]


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "expert": 2}], ids=str)
@pytest.mark.parametrize("name", KEEPING_LITTLE)
def test_what_a_device_holds_is_little_too(name, sizes):
    """The share of its state that one device holds is at most 1.25 times AdamW's share."""
    mesh, params = make_mesh(**sizes), abstract_params(cpu().model)
    on = tree_shardings(params, mesh)

    def held(name):
        tx = make_optimizer(replace(cpu().optimizer, name=name), 100)
        state = jax.eval_shape(tx.init, params)
        whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        return bytes_per_device(state, opt_state_shardings(tx, params, on)) / whole

    assert held(name) <= 1.25 * held("adamw")


def test_gradients_that_are_no_numbers_end_the_run(tmp_path):
    """A rate that leaves float32 behind: the sign of a NaN does not hide it, and its step is not saved."""
    config = named("frugal(subspace='none')", learning_rate=1e38)
    with pytest.raises(ValueError, match=r"^(loss|grad_norm) = \S+ at step 2: expected a finite number"):
        fit(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [np.isfinite(row["grad_norm"]) for row in rows] == [True, False]
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal()]
