"""What a token must read, counted by hand; the pace of the memory; figures from fake sides."""

import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import generate
from experiments.bench.protocol import WorkerError
from experiments.bench.streaming import StreamMeter, cache_bytes, weight_bytes
from moe.config import LatentConfig, ModelConfig, MoEConfig
from moe.generate import unstacked
from moe.pretrained.model import convert, save
from moe.pretrained.ours import abstract_model

DENSE = ModelConfig(
    vocab_size=50, hidden=8, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, ffn_dim=10, moe=None, context=64
)


def drawn(config):
    """Parameters of zeros, and the router state."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_model(config))


def weights(config):
    return unstacked(config, *drawn(config))


def test_weights_of_a_token():
    attention = 8 * (4 + 2 + 2) * 6 + 4 * 6 * 8
    layer = attention + 8 * 20 + 10 * 8 + 2 * 8
    ends = 50 * 8 + 8 + 8  # the head, one row, the last norm
    assert weight_bytes(DENSE, weights(DENSE)) == 4 * (3 * layer + ends)
    tied = replace(DENSE, tie_embeddings=True)
    assert weight_bytes(tied, weights(tied)) == 4 * (3 * layer + ends)
    sparse = replace(DENSE, moe=MoEConfig(num_experts=6, top_k=2, expert_dim=5))
    routed = attention + 2 * 8 + 8 * 6 + 2 * (8 * 10 + 5 * 8)
    assert weight_bytes(sparse, weights(sparse)) == 4 * (3 * routed + ends)


def test_keys_and_values_of_a_token():
    position = 2 * 2 * 6 * 4
    assert cache_bytes(DENSE, 10) == 3 * 10 * position
    assert cache_bytes(replace(DENSE, windows=(4, 0, 20)), 10) == (4 + 10 + 10) * position
    latent = replace(DENSE, num_kv_heads=4, head_dim=10, latent=LatentConfig(0, 7, 6, 4, 5))
    assert cache_bytes(latent, 10) == 3 * 10 * (7 + 4) * 4


def test_the_memorys_pace_is_the_best_seen():
    meter = StreamMeter(4096 * 4096 * 4)
    first = dict(meter.probe())
    second = meter.probe()
    assert set(first) == set(meter.ways)
    assert all(second[name] >= first[name] > 1e6 for name in first)


def side(token_seconds, tokens, prefill=0.5):
    return {"prefill_seconds": prefill, "token_seconds": token_seconds, "tokens": tokens}


def test_figures_from_samples():
    facts = {
        "ours": {"weight_bytes": 900, "cache_bytes": 100, "parameters": 7, "versions": {}, "device": "cpu"},
        "peer": {"variant": "loop"},
    }
    answers = {
        "ours": [side([0.01, 0.02, 0.5], [1, 2, 3, 4]), side([0.04], [1, 2, 3, 4]), side([0.03], [1, 2, 3, 4])],
        "peer": [side([0.06], [1, 2, 3, 9]), side([0.02], [1]), side([0.09], [1])],
    }
    result = generate.summary(facts, answers, {"a": 1e5, "b": 5e4}, {"bytes accessed": 1200.0, "flops": 1.0})
    assert result["bytes_per_token"] == 1000
    assert result["floor_ms_per_token"] == pytest.approx(10)
    assert result["ours"]["ms_per_token"] == pytest.approx(30)
    assert result["ours"]["over_floor"] == pytest.approx(3)
    assert result["ours"]["prefill_ms"] == pytest.approx(500)
    assert result["peer"]["tokens_per_second"] == pytest.approx(1 / 0.06)
    assert result["peer"]["speed_of_ours"] == pytest.approx(3)  # the median of 3, 0.5, 3
    assert result["peer"]["equal_tokens"] == 0.75
    shown = {"model": "m", "prompt_tokens": 4, "new_tokens": 4} | result
    first, second = generate.tables(shown)
    assert first.row_count == 3
    assert second.row_count == 5
    json.dumps(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds = 0"),
        ({"prompt_tokens": 0}, "prompt_tokens = 0"),
        ({"new_tokens": 1}, "new_tokens = 1"),
        ({"peer_python": "nowhere"}, "peer_python = "),
        ({"json": "no/such/folder/result.json"}, "json = "),
    ],
)
def test_bad_input(tmp_path, options, message):
    asked = {"json": tmp_path / "result.json"} | options
    for name in asked.keys() & {"json", "peer_python"}:
        asked[name] = tmp_path / asked[name]
    with pytest.raises(ValueError, match=message):
        generate.main(**asked)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_there_ends_the_run(tmp_path):
    with pytest.raises(WorkerError, match="no-such-model"):
        generate.main(tmp_path / "result.json", model=str(tmp_path / "no-such-model"), rounds=1)
    assert not list(tmp_path.iterdir())


PEER = """
import json, sys
asked = json.loads(sys.argv[2])
config = json.load(open(asked["folder"] + "/config.json"))
print(json.dumps({"variant": config["model_type"]}), flush=True)
for _ in sys.stdin:
    steps = asked["new_tokens"]
    answer = {"tokens": [0] * steps, "token_seconds": [10.0] * (steps - 1), "prefill_seconds": len(asked["prompt"])}
    print(json.dumps(answer), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["llama", "switchyard"])
def test_whole_command_with_a_peer_that_reads_the_released_form(tmp_path, form):
    """A model of zeros says token 0, and so does the peer, in ten seconds a token."""
    (tmp_path / "peer.py").write_text(PEER)
    python = tmp_path / "python"
    run = f'exec "{sys.executable}" "{tmp_path}/peer.py" "$@"'
    python.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then exit 0; fi\n{run}\n')
    python.chmod(0o755)
    save(tmp_path / "llama", DENSE, *drawn(DENSE), family="llama")
    if form == "switchyard":
        convert(tmp_path / "llama", tmp_path / form)
    out = tmp_path / "result.json"
    ask = {"peer_python": python, "model": str(tmp_path / form), "prompt_tokens": 3, "new_tokens": 4, "rounds": 2}
    result = generate.main(out, **ask)
    assert json.loads(out.read_text()) == result
    assert result["peer"]["variant"] == "llama"
    assert result["peer"]["equal_tokens"] == 1.0
    assert result["peer"]["prefill_ms"] == 3000
    assert result["peer"]["speed_of_ours"] > 10
    assert result["program"]["bytes accessed"] > result["weight_bytes"]
    assert result["ours"]["over_floor"] > 1
    assert str(tmp_path) not in out.read_text()
