"""Adapters in place of models: rows in proportion, wrong answers, a search on a toy base that finds the right ones."""

import os
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.finetune import Base, FinetuneConfig
from experiments.scalebio.adapters import AdapterTrial, mislabelled, search, weighted
from experiments.tasks.example import Example
from experiments.tasks.training import Row, Tokenized
from moe.config import ModelConfig
from moe.lora.config import AdapterConfig
from moe.transformer import init_params

MODEL = ModelConfig(
    vocab_size=24, hidden=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, ffn_dim=24, moe=None, init_std=0.2
)  # fmt: skip
TRIAL = AdapterTrial(
    search_steps=4, levels=(0.0, 0.9), adapters=AdapterConfig(4, 8.0), tuning=FinetuneConfig(steps=2, batch_size=8)
)


def source(name, level, seed, count=64):
    """x y = x + 1: the answer follows the last token, or nothing."""
    rng = np.random.default_rng([seed, len(name)])
    first, wrong = rng.integers(2, 12, (count, 2)), rng.random(count) < level
    answers = np.where(wrong, rng.integers(12, 24, count), 12 + first[:, 1] - 2)
    rows = [Row((1, int(a), int(b), int(c)), 3) for (a, b), c in zip(first, answers, strict=True)]
    return Tokenized(name, tuple(rows), 0)


def base():
    return Base(MODEL, jax.jit(lambda: init_params(MODEL, jax.random.key(0)))(), {})


SOURCES = [source("clean", 0.0, 0), source("noise", 0.9, 0)]
VALIDATION = source("validation", 0.0, 1)


def test_rows_come_in_proportion_and_each_source_in_its_own_order():
    rows = weighted(SOURCES, np.array([0.75, 0.25]), 3, 8)
    seen = [rows(step) for step in range(8)]
    which = np.concatenate([batch.task for batch in seen])
    assert np.bincount(which).tolist() == [48, 16]
    alone = weighted(SOURCES, np.array([1.0, 0.0]), 3, 8)
    first = np.concatenate([batch.tokens[batch.task == 0] for batch in seen])
    np.testing.assert_array_equal(first, np.concatenate([alone(step).tokens for step in range(6)]))


def test_wrong_answers_are_other_options_at_the_level():
    examples = [Example(f"question {i}", ("a", "b", "c"), i % 3) for i in range(3000)]
    made = mislabelled(examples, 0.3, np.random.default_rng(0))
    wrong = np.array([one.answer != two.answer for one, two in zip(made, examples, strict=True)])
    assert abs(wrong.mean() - 0.3) < 0.03
    assert mislabelled(examples, 0.0, np.random.default_rng(0)) == examples
    every = mislabelled(examples, 1.0, np.random.default_rng(0))
    assert {(one.answer - two.answer) % 3 for one, two in zip(every, examples, strict=True)} == {1, 2}
    with pytest.raises(ValueError, match="expected a task with options"):
        mislabelled([Example("question", (), "free")], 0.5, np.random.default_rng(0))


@pytest.mark.slow
def test_a_search_goes_on_bit_by_bit_and_leaves_the_base_alone(tmp_path):
    frozen = base()
    before = jax.tree.map(np.asarray, frozen.params)
    whole = search(TRIAL, frozen, SOURCES, VALIDATION, 0, tmp_path / "whole")
    assert np.ptp(whole) > 0
    interrupt = lambda step, _: os.kill(os.getpid(), signal.SIGINT) if step == 2 else None  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        search(TRIAL, frozen, SOURCES, VALIDATION, 0, tmp_path / "cut", interrupt)
    np.testing.assert_array_equal(search(TRIAL, frozen, SOURCES, VALIDATION, 0, tmp_path / "cut"), whole)
    jax.tree.map(np.testing.assert_array_equal, frozen.params, before)


@pytest.mark.slow
def test_weight_goes_to_right_answers(tmp_path):
    tuning = replace(TRIAL.tuning, batch_size=16, optimizer=replace(TRIAL.tuning.optimizer, learning_rate=1e-2))
    trial = replace(TRIAL, search_steps=150, tuning=tuning)
    weights = search(trial, base(), SOURCES, VALIDATION, 0, tmp_path)
    assert weights[0] > 0.6, weights


@pytest.mark.parametrize(("change", "field"), [
    ({"levels": (0.5,)}, "levels"), ({"levels": (0.0, 1.5)}, "levels"), ({"search_steps": -1}, "search_steps"),
    ({"tuning": FinetuneConfig(batch_size=7)}, "tuning.batch_size"),
    ({"world": replace(TRIAL.world, tasks=("sarcasm", "quartz"))}, "world.tasks"),
])  # fmt: skip
def test_bad_settings_are_refused(change, field):
    with pytest.raises(ValueError, match=f"^{field} = "):
        replace(TRIAL, **change)
