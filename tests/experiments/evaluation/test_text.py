"""Windows: every byte and token counts exactly once, whatever the tokenizer."""

import hashlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from experiments.evaluation.text import ByteWords, LibraryWords, held_out, open_words, windows
from experiments.evaluation.units import Choice, Writing, task_unit
from experiments.tasks.example import Example
from moe.config import ModelConfig
from moe.pretrained.tokenizer import TextTokenizer

TEXTS = ["It is a caf\u00e9, it is.", "", "\u4f60\u597d, \U0001f600!", "x", "it is it is it is " * 5]


def library(*, separator=True, **options):
    """A byte-level BPE of 256 bytes, one merge, and perhaps a separator."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "it"])}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [("i", "t")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if separator:
        inner.add_special_tokens(["<|endoftext|>"])
    return TextTokenizer(inner, **options)


def segments(text):
    """(inputs, targets) of each segment, in order."""
    found = []
    for tokens, targets, ids, positions in zip(*text[:4]):
        for i in range(1, ids.max() + 1):
            where = np.flatnonzero(ids == i)
            assert np.array_equal(where, np.arange(where[0], where[0] + len(where)))
            assert np.array_equal(positions[where], np.arange(len(where)))
            assert np.array_equal(tokens[where][1:], targets[where][:-1])
            found.append((tokens[where].tolist(), targets[where].tolist()))
    return found


@pytest.mark.parametrize("words", [ByteWords(), LibraryWords(library())], ids=["byte", "bpe"])
@pytest.mark.parametrize("length", [2, 7, 64])
def test_every_token_is_scored_once(words, length):
    text = windows(words, TEXTS, length)
    targets = [t for _, part in segments(text) for t in part]
    assert targets == [t for one in TEXTS for t in words.pieces(one)[0]]
    assert (text.num_tokens, text.num_bytes) == (len(targets), sum(len(t.encode()) for t in TEXTS))
    assert text.num_tokens == np.count_nonzero(text.segment_ids)
    assert text.tokens.shape == (-(-len(targets) // length), length)
    starts = [inputs[0] for inputs, _ in segments(text)]
    assert starts.count(words.start) >= sum(map(bool, TEXTS))
    assert words.decode(targets) == "".join(TEXTS)


def test_a_limit_cuts_at_whole_characters_and_counts_their_bytes():
    text = windows(ByteWords(), ["ab\u4f60\u597d"], 4, limit=1)
    assert (text.num_tokens, text.num_bytes) == (2, 2)
    assert text.tokens.shape == (1, 4)
    text = windows(LibraryWords(library()), ["it it\u4f60"], 5, limit=1)
    assert (text.num_tokens, text.num_bytes) == (3, 5)
    assert windows(ByteWords(), ["abc", "defg", "h"], 3, limit=2).num_bytes == 6


def test_without_a_start_token_the_first_character_is_context():
    words = LibraryWords(library(separator=False))
    assert words.start is None
    text = windows(words, ["\u4f60it", "itx"], 8)
    assert text.num_bytes == len("it") + len("x")
    assert [words.decode(targets) for _, targets in segments(text)] == ["it", "x"]


def test_the_start_token_is_what_the_model_expects():
    assert LibraryWords(library()).start == 257
    assert LibraryWords(library(bos=5, add_bos=True)).start == 5
    assert LibraryWords(library(separator=False, eos=(9,))).start == 9
    assert ByteWords().encode("a") == [0, 97]


def test_special_tokens_written_out_in_a_text_are_characters():
    words = LibraryWords(library())
    assert 257 not in words.pieces("a<|endoftext|>b")[0]
    assert 257 not in words.encode("a<|endoftext|>b")


def test_held_out_documents_come_in_an_order_of_their_own():
    texts = [f"document {i}" for i in range(50)]
    tokens = np.frombuffer("\0".join([*texts, ""]).encode(), np.uint8)
    offsets = np.append(0, np.flatnonzero(tokens == 0) + 1)
    corpus: Any = SimpleNamespace(tokenizer="byte", stream=lambda domain, split: (tokens, offsets))
    found = held_out(corpus, "prose", "test")
    assert sorted(found) == sorted(texts)
    assert found == sorted(texts, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    with pytest.raises(ValueError, match="corpus.tokenizer = 'bpe': expected byte"):
        held_out(SimpleNamespace(tokenizer="bpe"), "prose", "test")  # pyright: ignore[reportArgumentType]


def test_no_text():
    with pytest.raises(ValueError, match="at least one token"):
        windows(ByteWords(), ["", ""], 4)


def test_the_tokenizer_of_a_directory(tmp_path):
    folder = str(tmp_path)

    def opened(vocab_size):
        return open_words(folder, ModelConfig(vocab_size=vocab_size, moe=None))

    assert isinstance(opened(256), ByteWords)
    with pytest.raises(ValueError, match=r"model '.*': no tokenizer; vocab_size = 300: expected a tokenizer.json"):
        opened(300)
    library().inner.save(str(tmp_path / "tokenizer.json"))
    assert opened(300).start == 257
    with pytest.raises(ValueError, match=r"model '.*': tokens = 258: expected at most vocab_size = 200"):
        opened(200)


TEMPLATE = ("{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}it:{% endif %}")


def test_a_chat_is_rendered_and_the_option_follows_it_without_a_blank():
    words = LibraryWords(library(template=TEMPLATE))
    unit = task_unit("sarcasm", [Example("hi <|endoftext|>\n?", ("no", "yes"), 0)], words, True, 0, no_generator)
    assert isinstance(unit, Choice)
    whole = [[*r.inputs, r.targets[-1]] for r in unit.requests]
    asked = "<|endoftext|>user: hi <|endoftext|>\n?\nit:"
    assert [words.tokenizer.decode(ids, special=True) for ids in whole] == [f"{asked}no", f"{asked}yes"]
    assert all(ids[0] == 257 for ids in whole)
    scored = [words.decode(r.targets) for r in unit.requests]
    assert scored == ["no", "yes"]
    writing = task_unit("chain-sum", [Example("1 + 1 =", (), "2")], words, True, 0, no_generator)
    assert isinstance(writing, Writing)
    assert not writing.one_line
    assert words.tokenizer.decode(writing.prompts[0], special=True) == "<|endoftext|>user: 1 + 1 =\nit:"


def no_generator():
    pytest.fail("nothing is written yet")
