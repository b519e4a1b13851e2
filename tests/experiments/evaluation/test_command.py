"""The command on a tiny byte model: results, resume, and what it refuses before it computes."""

import io
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from experiments.data import DataError, fetch
from experiments.data.corpus import load_directory
from experiments.evaluation import command, units
from experiments.evaluation.render import verdict
from experiments.evaluation.text import ByteWords
from experiments.tasks.example import Example
from moe.config import ModelConfig

CONFIG = ModelConfig(vocab_size=256, hidden=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=16,
                     moe=None, init_std=0.4, context=96)
EXAMPLES = {
    "sarcasm": [Example(f"Headline: {i}\nSarcastic:", ("no", "yes"), int(i % 4 == 0)) for i in range(8)]
    + [Example("long " * 20 + "?", ("no", "yes"), 0)],
    "decrypt-caesar": [Example(f"shift 1: bcd{i}\nPlain text:", (), f"abc{i}") for i in range(3)],
}


@pytest.fixture
def made(tmp_path, monkeypatch, drawn):
    """A corpus of two domains, two tasks, and a model with random weights."""
    writer = tmp_path / "packaged"
    writer.mkdir()
    entries = []
    for name in ("prose", "code"):
        documents = fetch.cap([f"{name} number {i}: ".encode() * 4 for i in range(60)], 10**6)
        entries.append({"name": name, "licence": "MIT", "rights": "clear", "source": "made",
                        "splits": fetch.write_domain(writer, name, documents)})
    fetch.write_index(writer, name="packaged", tokenizer="byte", vocab_size=256, domains=entries, recipe="made")
    corpus = load_directory(writer)
    monkeypatch.setattr(command, "open_corpus", lambda config: corpus)
    monkeypatch.setattr(command, "missing", lambda names: "")
    monkeypatch.setattr(command, "load_examples", lambda name, split: EXAMPLES[name])
    params, state = drawn(CONFIG)
    return SimpleNamespace(config=CONFIG, params=params, router_state=state, family="made")


def evaluate(made, out, *tasks, **options):
    printed = io.StringIO()
    options = {"limit": 8, "window": 16, "loaded": made, "out": out} | options
    command.evaluate_model("models/tiny", tasks, console=Console(file=printed, width=160), **options)
    return printed.getvalue()


def test_results_a_table_a_figure_and_what_the_model_said(made, tmp_path):
    out = tmp_path / "out"
    printed = evaluate(made, out, "bpb", "sarcasm", "decrypt-caesar", limit=9)
    result = json.loads((out / "result.json").read_text())
    assert list(result["results"]) == ["bpb/code", "bpb/prose", "sarcasm", "decrypt-caesar"]
    assert result["model"] == "tiny"
    assert str(tmp_path) not in (out / "result.json").read_text()
    prose = result["results"]["bpb/prose"]
    assert prose["bits_per_byte"] == pytest.approx(prose["nats"] / 0.6931471805599453 / prose["bytes"], rel=1e-4)
    assert prose["bytes"] == prose["tokens"] <= 9 * 16
    sarcasm = result["results"]["sarcasm"]
    assert (sarcasm["examples"], sarcasm["too_long"]) == (8, 1)
    assert sarcasm["majority"]["share"] == 0.75
    rows = [json.loads(line) for line in (out / "answers" / "sarcasm.jsonl").read_text().splitlines()]
    assert sarcasm["accuracy"]["share"] == sum(r["chosen"] == r["answer"] for r in rows) / 8
    assert all(r["chosen"] == min(range(2), key=r["nats"].__getitem__) for r in rows)
    sizes = (len("no"), len("yes"))
    assert all(r["chosen_per_byte"] == min(range(2), key=lambda j: r["nats"][j] / sizes[j]) for r in rows)
    assert result["results"]["decrypt-caesar"]["accuracy"]["share"] == 0.0
    assert (out / "eval.png").read_bytes()[:4] == b"\x89PNG"
    assert "bits/byte" in printed
    assert "majority" in printed


def test_an_interrupted_evaluation_keeps_finished_parts_and_goes_on(made, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    evaluate(made, whole, "bpb", "sarcasm")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(units.Choice, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(made, out, "bpb", "sarcasm")
    assert sorted(path.name for path in (out / "parts").iterdir()) == ["bpb-code.json", "bpb-prose.json"]
    assert not (out / "result.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(units.DomainText, "run", lambda *_: pytest.fail("done before"))
        evaluate(made, out, "bpb", "sarcasm")
    first, second = (json.loads((folder / "result.json").read_text())["results"] for folder in (whole, out))
    for results in (first, second):
        for row in results.values():
            del row["seconds"]
    assert first == second


def test_a_written_answer_is_checked(made, tmp_path, monkeypatch):
    def generator(model):
        def answers(prompts, *, max_new_tokens, stop):
            assert len(prompts) == 4  # padded to the batch
            texts = [f" abc{bytes(prompt).decode().split('bcd')[1][0]}\nmore" for prompt in prompts]
            texts[0] = "wrong"
            for tokens in zip(*(text.encode().ljust(max_new_tokens) for text in texts)):
                yield jnp.array(tokens)
        return answers

    monkeypatch.setattr(command, "Generator", generator)
    evaluate(made, tmp_path / "out", "decrypt-caesar", batch_size=4)
    rows = [json.loads(line) for line in (tmp_path / "out/answers/decrypt-caesar.jsonl").read_text().splitlines()]
    assert [row["right"] for row in rows] == [False, True, True]
    assert rows[1]["written"] == "abc1"


@pytest.mark.parametrize(("tasks", "options", "said"), [
    (("nope",), {}, "task = 'nope': expected one of bpb, sarcasm"),
    ((), {}, "tasks = \\(\\)"),
    (("bpb",), {"limit": 0}, "limit = 0: expected at least 1"),
    (("bpb",), {"batch_size": 0}, "batch_size = 0"),
    (("bpb",), {"split": "dev"}, "split = 'dev'"),
    (("bpb",), {"window": 97}, "window = 97: expected at most the context of 96"),
    (("sarcasm",), {"chat": True}, "--chat = True: expected a model with a chat template"),
])
def test_bad_input_is_refused_and_nothing_written(made, tmp_path, tasks, options, said):
    with pytest.raises(ValueError, match=said):
        evaluate(made, tmp_path / "out", *tasks, **options)
    assert not (tmp_path / "out").exists()


def test_directories_of_others_are_refused(made, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"--out = .*: expected an empty directory, or one with the eval.json"):
        evaluate(made, out, "sarcasm")
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    mine = tmp_path / "mine"
    evaluate(made, mine, "sarcasm")
    with pytest.raises(ValueError, match="limit of the evaluation there = 8: expected 7, or another directory"):
        evaluate(made, mine, "sarcasm", limit=7)
    other = SimpleNamespace(**vars(made) | {"params": jax.tree.map(lambda x: x + 1, made.params)})
    with pytest.raises(ValueError, match="fingerprint of the evaluation there"):
        evaluate(other, mine, "sarcasm")


def test_missing_data_names_the_command(made, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "missing", lambda names: f"run x {','.join(names)}")
    with pytest.raises(DataError, match="run x sarcasm"):
        evaluate(made, tmp_path / "out", "bpb", "sarcasm")
    with pytest.raises(ValueError, match="at least one that fits"):
        units.task_unit("sarcasm", EXAMPLES["sarcasm"][-1:], ByteWords(), False, 96, lambda: pytest.fail("no answers"))


@pytest.mark.parametrize(("interval", "said"), [((0.6, 0.9), "above"), ((0.1, 0.4), "below"), ((0.4, 0.6), "unclear")])
def test_verdict(interval, said):
    assert verdict({"accuracy": {"interval": interval}, "majority": {"share": 0.5}}) == said
