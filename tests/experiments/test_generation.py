"""The command `generate`: it prints what the generator says, stops where the model does, refuses what cannot be."""

import io
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.generation import generate_text, summary
from moe.config import ModelConfig
from moe.generate import generate
from moe.pretrained.ours import abstract_model

CONFIG = ModelConfig(
    vocab_size=256, hidden=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=20, moe=None, context=48
)


class Loaded(NamedTuple):
    config: ModelConfig
    params: Any
    router_state: Any


@pytest.fixture(scope="module")
def bytes_model() -> Loaded:
    """A random model of bytes, which needs no tokenizer."""
    shapes, state = abstract_model(CONFIG)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), "float32"), shapes)
    return Loaded(CONFIG, params, state)


def said(model: Loaded, prompt: str, **options: Any) -> tuple[str, str]:
    stream = io.StringIO()
    text = generate_text("bytes", prompt, stream=stream, loaded=model, **options)
    return text, stream.getvalue()


def test_prints_the_generators_tokens_and_the_pace(bytes_model: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [0, *"Über".encode()]
    made = [int(token[0]) for token in generate(bytes_model, [ids], max_new_tokens=20)]
    text, printed = said(bytes_model, "Über", max_new_tokens=20)
    whole = bytes(made[: made.index(0)] if 0 in made else made).decode(errors="replace")
    assert printed == text + "\n"
    assert text.replace("\ufffd", "") == whole.replace("\ufffd", "")
    assert len(text) > 0
    assert "[6 prompt tokens" in capsys.readouterr().err


def test_stops_at_the_end_of_a_document(bytes_model: Loaded) -> None:
    """With the embedding of a document's end made the likeliest, nothing is said."""
    head = bytes_model.params["head"]
    ends = bytes_model._replace(params=bytes_model.params | {"head": jnp.zeros_like(head)})  # all equal: token 0
    assert said(ends, "a") == ("", "\n")


def test_the_default_length_is_what_the_context_leaves(bytes_model: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    row = jnp.ones(CONFIG.hidden)
    head = jnp.zeros_like(bytes_model.params["head"]).at[65:67].set(jnp.stack([row, -row]))  # A or B, never the end
    text, _ = said(bytes_model._replace(params=bytes_model.params | {"head": head}), "abc")
    assert set(text) <= {"A", "B"}
    assert len(text) == 44
    assert "[4 prompt tokens, first of 44 after" in capsys.readouterr().err


def test_summary() -> None:
    assert summary(5, [0.0, 0.5]) == "[5 prompt tokens, first of 1 after 0.5 s]"
    said = "[5 prompt tokens, first of 4 after 0.5 s, then 2.0 tokens/s]"
    assert summary(5, [0.0, 0.5, 9.5, 10.0, 10.5]) == said  # the second token compiles


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "prompt = ''"),
        ({"prompt": "a" * 60}, "context of 48"),
        ({"max_new_tokens": 48}, "context of 48"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"loaded": Loaded(replace(CONFIG, vocab_size=300), None, None)}, "no tokenizer"),
    ],
)
def test_bad_input(bytes_model: Loaded, options: dict[str, Any], message: str) -> None:
    stream = io.StringIO()
    asked = {"prompt": "abc", "loaded": bytes_model, "stream": stream} | options
    with pytest.raises(ValueError, match=message):
        generate_text("bytes", **asked)
    assert stream.getvalue() == ""
