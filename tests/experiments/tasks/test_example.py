"""Splits, deduplication and checkers, by closed form."""

import hashlib

import pytest

from experiments.tasks.example import Example, deduplicated, digest, exact, last_number, of_split, split_of


def choice(prompt, answer=0, **options):
    return Example(prompt, ("no", "yes"), answer, **options)


def test_the_split_is_a_function_of_the_text_alone():
    value = hashlib.sha256(b"some text").digest()
    share = int.from_bytes(value[8:16], "big") / 2**64
    expected = "test" if share < 0.1 else "validation" if share < 0.2 else "train"
    assert split_of(choice("Some  TEXT")) == expected == split_of(choice("some text", 1))
    examples = [choice(f"prompt {i}") for i in range(2000)]
    sizes = [len(of_split(examples, split)) for split in ("train", "validation", "test")]
    assert sum(sizes) == 2000
    assert all(abs(size - 200) < 60 for size in sizes[1:])


def test_a_group_stays_in_one_split():
    groups = [f"passage {i}" for i in range(100)]
    examples = [choice(f"{group} question {j}", group=group) for group in groups for j in range(3)]
    of_group = {group: {split_of(e) for e in examples if e.group == group} for group in groups}
    assert all(len(splits) == 1 for splits in of_group.values())
    assert {next(iter(splits)) for splits in of_group.values()} == {"train", "validation", "test"}


def test_equal_prompts_count_once_and_contradictions_go():
    examples = [choice("a x"), choice("A  X"), choice("b"), choice("B", 1), choice("c", 1), choice("d")]
    kept = deduplicated(examples)
    assert {e.prompt for e in kept} == {"a x", "c", "d"}
    assert [digest(e.prompt) for e in kept] == sorted(digest(e.prompt) for e in kept)


@pytest.mark.parametrize(("written", "right"), [
    ("cat", True), (" 'Cat'.\nand more", True), ("the cat", False), ("cats", False), ("", False), ("\n\ncat", True)])
def test_exact(written, right):
    assert exact(written, "cat") is right


@pytest.mark.parametrize(("written", "right"), [
    ("1,234", True), ("it is 5, no: 1234.0", True), ("1234 and 5", False), ("-1234", False), ("none", False),
    ("3 + 4 = 1,234.", True)])
def test_last_number(written, right):
    assert last_number(written, "1234") is right


@pytest.mark.parametrize(("fields", "named"), [
    (("blank ", ("a", "b"), 0), "prompt"), (("p", ("a", "a"), 0), "options"), (("p", ("a",), 0), "options"),
    (("p", ("a", " "), 0), "options"), (("p", ("a", "b"), 2), "answer"), (("p", (), " "), "answer"),
    (("p", ("a", "b"), "a"), "answer")])
def test_an_example_that_cannot_be_scored_is_refused(fields, named):
    with pytest.raises(ValueError, match=f"^{named} = "):
        Example(*fields)


def test_unknown_split():
    with pytest.raises(ValueError, match="split = 'dev': expected one of train, validation, test"):
        of_split([choice("a")], "dev")
