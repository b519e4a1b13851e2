"""Fine-tuning of adapters: against a loss written out by hand, on one device and eight, stopped and gone on with."""

import json
import math
import os
import re
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.config import OptimizerConfig
from experiments.finetune import (
    AdaptedScorer,
    AdapterState,
    Base,
    FinetuneConfig,
    adapter_step,
    answered,
    balanced,
    finetune,
    merged,
    no_penalty,
    routers_only,
    split,
    state_bytes,
)
from experiments.tasks import symbolic
from experiments.tasks.training import Batch
from experiments.train import NotFinite, read_lines
from moe.config import ModelConfig
from moe.lora import presets
from moe.lora.adapters import init_adapters, parameter_count
from moe.transformer import Transformer, init_params
from parallel.mesh import make_mesh
from parallel.sharding import tree_shardings

DIGITS = 4
MODEL = ModelConfig(
    vocab_size=symbolic.VOCAB, hidden=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, ffn_dim=24, moe=None,
    tie_embeddings=True, init_std=0.3,
)  # fmt: skip
LORA, MIXLORA = presets.lora(2, 4.0), presets.mixlora(2, 4.0, num_experts=4)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, final_fraction=1.0, weight_decay=0.0, b2=0.999)
CONFIG = FinetuneConfig(OPTIMIZER, steps=4, batch_size=8)
TASKS = list(symbolic.TASKS)


def batches(step):
    return symbolic.batch("train", 0, TASKS, 8 * step, 8, DIGITS)


@pytest.fixture(scope="module")
def base():
    return Base(MODEL, init_params(MODEL, jax.random.key(0)), {})


def moved(adapters, params, key, size=0.3):
    """Adapters with B away from zero."""
    tree = init_adapters(MODEL, adapters, params, key)
    noise = lambda path, leaf: leaf + size * jax.random.normal(  # noqa: E731
        jax.random.fold_in(key, len(str(path)) + leaf.size), leaf.shape
    )
    return jax.tree_util.tree_map_with_path(noise, tree)


def logits_of(params, adapters, tree, tokens, segments):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    out = Transformer(MODEL, adapters).apply(
        {"params": params, "adapters": tree}, tokens, segments, positions, {}, None
    )
    return jnp.einsum("bsd,vd->bsv", out.hidden, out.head)


def by_hand(params, adapters, tree, made):
    """Mean of -log p over answer tokens, row by row and token by token."""
    logits = logits_of(params, adapters, tree, jnp.asarray(made.tokens), jnp.asarray(made.segment_ids))
    total, count = 0.0, 0
    for row in range(len(made.tokens)):
        for where, target, weight in zip(made.where[row], made.targets[row], made.weights[row]):
            if weight:
                total -= jax.nn.log_softmax(logits[row, int(where)])[int(target)]
                count += 1
    return total / count


@pytest.mark.parametrize("adapters", [LORA, MIXLORA], ids=["lora", "mixlora"])
@pytest.mark.slow
def test_a_step_is_adamw_on_the_mean_over_answer_tokens(base, key, adapters):
    tree, made = moved(adapters, base.params, key), batches(0)
    loss, grads = jax.value_and_grad(lambda t: by_hand(base.params, adapters, t, made))(tree)
    tx = optax.adamw(1e-2, b1=0.9, b2=0.999, weight_decay=0.0)
    state = AdapterState(jnp.int32(0), tree, tx.init(tree))
    step = jax.jit(lambda *inputs: adapter_step(
        *inputs, config=MODEL, adapters=adapters, tx=tx, hard=False, penalty=no_penalty))  # fmt: skip
    frozen = split(tree, lambda name: True)[1]
    after, metrics = step(base.params, {}, frozen, key, state, Batch(*map(jnp.asarray, made)))
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["answer_tokens"] == made.weights.sum()
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)
    moments = after.opt_state[0].mu
    jax.tree.map(lambda m, g: np.testing.assert_allclose(m, 0.1 * g, rtol=2e-3, atol=2e-6), moments, grads)


@pytest.mark.slow
def test_the_base_is_no_part_of_the_state_and_stays_as_it_was(base, key, tmp_path):
    before = jax.device_get(base.params)
    tree = finetune(base, MIXLORA, batches, CONFIG, key, tmp_path, penalty=balanced(0.01, 2))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(base.params))
    count = parameter_count(MODEL, MIXLORA)
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == count
    sizes = state_bytes(MODEL, MIXLORA, OPTIMIZER)
    assert sizes["adapter_bytes"] == 4 * count
    assert 8 * count <= sizes["moment_bytes"] <= 8 * count + 16  # two moments and counters
    leaves = json.loads((tmp_path / "checkpoints/4/_CHECKPOINT_METADATA").read_text())["custom_metadata"]["leaves"]
    stored = [math.prod(json.loads(re.sub(r"^[^\[]*", "", spec))) for spec, _ in leaves.values()]
    assert 3 * count <= sum(stored) <= 3 * count + 4
    assert not {id(leaf) for leaf in jax.tree.leaves(tree)} & {id(leaf) for leaf in jax.tree.leaves(base.params)}


@pytest.mark.slow
def test_one_device_and_eight_train_the_same(base, key, tmp_path):
    penalty = balanced(0.01, 2)
    one, eight = (
        finetune(base, MIXLORA, batches, CONFIG, key, tmp_path / str(mesh.size), penalty=penalty, mesh=mesh)
        for mesh in (make_mesh(), make_mesh(data=4, fsdp=2))
    )
    lines = [read_lines(tmp_path / name / "metrics.jsonl") for name in ("1", "8")]
    for a, b in zip(*lines, strict=True):
        for name in ("loss", "penalty", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=2e-4)
    first = init_adapters(MODEL, MIXLORA, base.params, jax.random.fold_in(key, 0))
    change = optax.tree.norm(jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), one, first))
    apart = optax.tree.norm(jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), one, eight))
    assert apart < 0.02 * change  # AdamW's first steps are signs: an entry near zero may flip


@pytest.mark.parametrize("where", [None, make_mesh(), make_mesh(fsdp=2)], ids=["one", "mesh of one", "sharded"])
@pytest.mark.slow
def test_adapters_come_back_to_where_the_base_lies_and_are_scored_there(base, key, tmp_path, where):
    params = base.params if where is None else jax.device_put(base.params, tree_shardings(base.params, where))
    lies = base._replace(params=params)
    tree = finetune(lies, MIXLORA, batches, CONFIG, key, tmp_path, mesh=make_mesh(data=2))
    devices = jax.tree.leaves(params)[0].sharding.device_set
    assert all(leaf.sharding.device_set == devices for leaf in jax.tree.leaves(tree))
    made = symbolic.batch("test", 0, ["copy"], 0, 8, DIGITS)
    here = answered(base, MIXLORA, jax.device_get(tree), made, size=8)
    np.testing.assert_allclose(answered(lies, MIXLORA, tree, made, size=8).nats, here.nats, rtol=1e-4)
    tokens = np.asarray(made.tokens)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32)[None], tokens.shape)
    scorer = AdaptedScorer(lies, MIXLORA, tree, 8)
    assert np.isfinite(scorer.hidden(tokens, np.asarray(made.segment_ids), positions)).all()


def test_stopped_and_called_again_it_ends_where_it_would_have(base, key, tmp_path):
    whole = finetune(base, LORA, batches, CONFIG, key, tmp_path / "whole")
    stop = lambda step, metrics: os.kill(os.getpid(), signal.SIGINT) if step == 1 else None  # noqa: E731
    with pytest.raises(KeyboardInterrupt, match="the state is saved"):
        finetune(base, LORA, batches, CONFIG, key, tmp_path / "parts", progress=stop)
    told = []
    parts = finetune(base, LORA, batches, CONFIG, key, tmp_path / "parts", progress=lambda n, m: told.append(n))
    assert told == [3, 4]  # stopped after the second: the first is told once the second is on its way
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    steps = [row["step"] for row in read_lines(tmp_path / "parts/metrics.jsonl")]
    assert steps == [1, 2, 3, 4]
    again = finetune(base, LORA, batches, CONFIG, key, tmp_path / "parts", progress=told.append)  # type: ignore[arg-type]
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    assert told == [3, 4]


def test_a_folder_of_another_base_start_or_setting_is_refused(base, key, tmp_path):
    finetune(base, LORA, batches, CONFIG, key, tmp_path)
    other = base._replace(params=jax.tree.map(lambda leaf: leaf * 1.01, base.params))
    for changes, named in (
        ({"base": other}, "base: "), ({"key": jax.random.key(1)}, "key: "),
        ({"config": replace(CONFIG, batch_size=16)}, "batch_size: 8 stored, 16 now"),
        ({"start": moved(LORA, base.params, key)}, "start: "),
        ({"adapters": replace(LORA, alpha=8.0)}, "adapters.alpha"),
    ):  # fmt: skip
        given = {"base": base, "adapters": LORA, "config": CONFIG, "key": key, "start": None} | changes
        start = given.pop("start")
        with pytest.raises(ValueError, match=named):
            finetune(given["base"], given["adapters"], batches, given["config"], given["key"], tmp_path, start=start)


def test_routers_alone_leave_the_experts_as_they_are(base, key, tmp_path):
    start = moved(MIXLORA, base.params, key)
    tree = finetune(base, MIXLORA, batches, CONFIG, key, tmp_path, start=start, trainable=routers_only)
    (routers, experts), (routers_before, before) = split(tree, routers_only), split(start, routers_only)
    jax.tree.map(np.testing.assert_array_equal, experts, before)
    assert jax.tree.leaves(routers)
    assert all(np.any(np.asarray(a) != b) for a, b in zip(*map(jax.tree.leaves, (routers, routers_before))))
    jax.tree.map(np.testing.assert_array_equal, merged(routers, experts), tree)
    with pytest.raises(ValueError, match="trainable = 'nothing'"):
        finetune(base, LORA, batches, CONFIG, key, tmp_path / "none", trainable=routers_only)


def test_hard_routing_moves_the_experts_of_the_tasks_alone(base, key, tmp_path):
    only = lambda step: symbolic.batch("train", 0, ["copy", "sort"], 8 * step, 8, DIGITS)  # noqa: E731
    config = replace(CONFIG, hard=True)
    start = moved(MIXLORA, base.params, key)
    tree = finetune(base, MIXLORA, only, config, key, tmp_path, start=start)
    changed = jax.tree.map(lambda a, b: np.asarray(a) != np.asarray(b), tree, start)
    experts = jax.tree.leaves(split(changed, lambda name: "/ffn/" in name and "router" not in name)[0])
    assert len(experts) == 6
    for leaf in experts:  # [L, E, ., .]: tasks 0 and 1
        assert leaf[:, :2].any(axis=(0, 2, 3)).all()
        assert not leaf[:, 2:].any()


def test_a_loss_that_is_not_finite_stops_it_unsaved(base, key, tmp_path):
    broken = lambda adapters, sites: jnp.float32(jnp.inf)  # noqa: E731
    with pytest.raises(NotFinite, match="penalty = inf at step 1: expected a finite number"):
        finetune(base, LORA, batches, CONFIG, key, tmp_path, penalty=broken)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


@pytest.mark.slow
def test_one_pass_tells_what_greedy_writing_would(base, key):
    """Half of the rows ask for what the model itself writes, token by token; the others differ in one token."""
    tree, rows = moved(MIXLORA, base.params, key), 12
    made = symbolic.batch("test", 0, ["copy"], 0, rows, DIGITS)
    text = np.concatenate([made.tokens, made.targets[:, -1:]], axis=1)
    for place in range(DIGITS + 2, text.shape[1]):
        whole = jnp.asarray(text[:, :-1])
        logits = logits_of(base.params, MIXLORA, tree, whole, jnp.ones_like(whole))
        text[:, place] = np.argmax(np.asarray(logits[:, place - 1]), axis=-1)
    wanted = np.arange(rows) % 2 == 0
    for row in np.flatnonzero(~wanted):
        place = DIGITS + 2 + row % (DIGITS + 1)
        text[row, place] = (text[row, place] + 1) % MODEL.vocab_size
    asked = made._replace(tokens=text[:, :-1], targets=text[:, DIGITS + 2 :])
    found = answered(base, MIXLORA, tree, asked, size=5)
    assert found.right.tolist() == wanted.tolist()
    mean = found.nats.sum() / asked.weights.sum()
    assert mean == pytest.approx(float(by_hand(base.params, MIXLORA, tree, asked)), rel=1e-4)
    (counts,) = found.counts.values()
    assert counts.shape == (rows, MODEL.num_layers, 4)
    assert (counts.sum(axis=(1, 2)) == MODEL.num_layers * 2 * (asked.segment_ids > 0).sum(axis=1)).all()
    pooled = counts.sum(axis=0)
    assert found.max_violation == pytest.approx(np.mean(pooled.max(axis=1) / pooled.mean(axis=1) - 1), rel=1e-5)
