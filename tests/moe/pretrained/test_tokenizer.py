"""Tokenizers of pretrained models on tiny vocabularies: ids, half characters, chat templates and their sandbox."""

import datetime
import json

import gguf
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from moe.pretrained.gguf import GGUFError
from moe.pretrained.tokenizer import PATIENCE, TextTokenizer, gguf_tokenizer, load_tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "1 2", "Ġ he"]
TOKENS = [*SPECIAL, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TEXT = "Zürich 东京 🤗 naïve hello 12\n\n  x"


def write_gguf(path, **changes):
    """A GGUF file with a byte-level BPE and no tensors."""
    values = {"model": "gpt2", "pre": "smollm", "tokens": TOKENS, "merges": MERGES, "eos_token_id": 2,
              "bos_token_id": 1, "token_type": [3] * 3 + [1] * (len(TOKENS) - 3)} | changes
    writer = gguf.GGUFWriter(path, "llama")
    if "chat_template" in values:
        writer.add_string("tokenizer.chat_template", values.pop("chat_template"))
    for key, value in values.items():
        if value is None:
            continue
        add = {list: writer.add_array, int: writer.add_uint32, str: writer.add_string, bool: writer.add_bool}
        add[type(value)](f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level():
    merges = [(a, b) for a, b in map(str.split, MERGES)]
    inner = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(TOKENS)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    return inner


def byte_fallback():
    """As of sentencepiece: a space is written as U+2581, and a character without a token as its bytes <0xNN>."""
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    inner = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [("▁", "a")], unk_token="<unk>",
                                            byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    inner.add_special_tokens(["<s>"])
    return inner


def save(folder, inner, config=None, **files):
    """A model's folder; values of `files` that are dicts become JSON."""
    inner.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, value in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    parts = [stream.push(i) for i in ids]
    return [*parts, stream.finish()]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_text_comes_back_whole_and_in_whole_characters(make):
    tokenizer = TextTokenizer(make())
    text = TEXT if make is byte_level else "a b 东京 🤗 a"
    ids = tokenizer.encode(text)
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.decode(ids) == text
    parts = streamed(tokenizer, ids)
    assert "".join(parts) == text
    assert parts[-1] == ""
    assert "\ufffd" not in "".join(parts)
    assert {"东", "京", "🤗"} <= {part.strip() for part in parts}
    assert len(ids) > len(text)  # characters did come in pieces


def test_a_stream_keeps_the_spaces_that_a_decoder_strips_at_the_start():
    tokenizer = TextTokenizer(byte_fallback())
    ids = [tokenizer.inner.token_to_id(t) for t in ("▁a", "▁a", "<s>", "▁a", "▁", "▁a", "b")]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == "a a a  ab"


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_broken_bytes_do_not_silence_a_stream(make):
    tokenizer = TextTokenizer(make())
    lead = "å" if make is byte_level else "<0xE5>"  # byte 0xE5 opens a character of three bytes
    first, a = tokenizer.inner.token_to_id(lead), tokenizer.inner.token_to_id("a")
    stream = tokenizer.stream()
    out = [stream.push(first) for _ in range(2 * PATIENCE)] + [stream.push(a)]
    assert all(part == "" for part in out[: PATIENCE - 1])
    assert "\ufffd" in out[PATIENCE - 1]
    assert out[-1].endswith("a")
    stream = tokenizer.stream()
    assert (stream.push(first), stream.finish()) == ("", "\ufffd")


def test_special_tokens_in_text_are_tokens_or_characters():
    tokenizer = TextTokenizer(byte_level())
    text = "he<|im_end|>"
    assert tokenizer.encode(text) == [TOKENS.index("he"), 2]
    plain = tokenizer.encode(text, special=False)
    assert min(plain) > 2
    assert tokenizer.encode(text)[-1] == 2  # the choice is one call's, not the tokenizer's
    assert tokenizer.decode(plain) == text
    assert tokenizer.decode([5, 2]) == ALPHABET[2]
    assert tokenizer.decode([5, 2], special=True) == f"{ALPHABET[2]}<|im_end|>"
    with pytest.raises(ValueError, match=r"token = -1: expected a token id"):
        tokenizer.decode([3, -1])


def test_a_folder_says_what_begins_and_ends_a_text(tmp_path):
    inner = byte_level()
    inner.enable_truncation(2)
    inner.post_processor = processors.TemplateProcessing("<|im_start|> $0", None, [("<|im_start|>", 1)])
    save(tmp_path, inner, {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>"},
         generation_config__json={"eos_token_id": [2, 0]}, config__json={"eos_token_id": 2})
    tokenizer = load_tokenizer(tmp_path)
    he = TOKENS.index("he")
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (1, (2, 0), len(TOKENS))
    assert tokenizer.encode("hehehe") == [1, he, he, he]  # nothing is cut off
    assert tokenizer.encode("he", bos=False) == [he]
    for add, expected in ((True, [1, he]), (False, [he])):
        save(tmp_path, inner, {"bos_token": "<|im_start|>", "add_bos_token": add})
        assert load_tokenizer(tmp_path).encode("he") == expected
    save(tmp_path, byte_level(), {"bos_token": "<|im_start|>", "add_bos_token": True})
    assert load_tokenizer(tmp_path).encode("he") == [1, he]
    assert load_tokenizer(tmp_path).encode("<|im_start|>he") == [1, he]


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(ValueError, match=rf"no tokenizer in {tmp_path}: expected tokenizer.json .*'tokenizer.model'"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer in .*absent: .*found no folder"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)
    save(tmp_path, byte_level(), tokenizer_config__json="{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: cannot be read as JSON"):
        load_tokenizer(tmp_path)
    save(tmp_path, byte_level(), {"chat_template": 3})
    with pytest.raises(ValueError, match=r"chat_template = 3: expected the text of a template"):
        load_tokenizer(tmp_path)


def test_chat_templates_are_found_where_checkpoints_keep_them(tmp_path):
    turn = [{"role": "user", "content": "he"}]
    assert load_tokenizer(save(tmp_path, byte_level())).chat(turn) is None
    assert load_tokenizer(tmp_path).encode_chat(turn) is None
    save(tmp_path, byte_level(), {"chat_template": CHATML, "add_bos_token": True, "bos_token": "<|im_start|>"})
    tokenizer = load_tokenizer(tmp_path)
    expected = "<|im_start|>user\nhe<|im_end|>\n"
    assert tokenizer.chat(turn) == f"{expected}<|im_start|>assistant\n"
    assert tokenizer.chat(turn, add_generation_prompt=False) == expected
    ids = tokenizer.encode_chat(turn)
    assert ids is not None
    assert (ids.count(1), ids.count(2)) == (2, 1)  # the template's own, and no other
    save(tmp_path, byte_level(), {"chat_template": [{"name": "tool", "template": "no"},
                                                    {"name": "default", "template": "yes"}]})
    assert load_tokenizer(tmp_path).chat(turn) == "yes"
    save(tmp_path, byte_level(), chat_template__jinja="from a file {{ eos_token }}")
    assert load_tokenizer(tmp_path).chat(turn) == "from a file "


def test_templates_have_the_functions_and_white_space_they_expect():
    def chat(template, **variables):
        tokenizer = TextTokenizer(byte_level(), template=template, special={"bos_token": "<s>"})
        return tokenizer.chat([{"role": "user", "content": "é<"}], **variables)

    assert chat("  {% if true %}\n{{ bos_token }}\n  {% endif %}\nx") == "<s>\nx"
    assert chat("{{ messages | tojson }}") == '[{"role": "user", "content": "é<"}]'
    assert chat("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)
    assert chat("{% for m in [1, 2] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}") == "1"
    assert chat("{{ tools is none }} {{ thinking }}", thinking=True) == "True True"
    with pytest.raises(ValueError, match="chat template: TemplateError: roles must alternate"):
        chat("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="chat template: TemplateSyntaxError"):
        chat("{% if %}")
    with pytest.raises(ValueError, match="chat template: UndefinedError"):
        chat("{{ nothing.at.all }}")
    with pytest.raises(ValueError, match="chat template: TypeError"):
        chat("{{ 'a' + 1 }}")


@pytest.mark.parametrize("template", [
    "{{ messages.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages | attr('__class__') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ messages.append(1) }}",
    "{{ range(1000000) | length }}",
    "{% include '/etc/passwd' %}",
])
def test_a_template_cannot_reach_out_of_the_sandbox(template):
    tokenizer = TextTokenizer(byte_level(), template=template)
    with pytest.raises(ValueError, match="chat template: "):
        tokenizer.chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize(("messages", "message"), [
    ([], r"messages = \[\]: expected at least one"),
    ([{"role": "user"}], r"message = {'role': 'user'}: expected a dict with `role` and `content`"),
    (["hello"], r"message = 'hello': expected a dict"),
])
def test_what_is_no_conversation_is_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        TextTokenizer(byte_level(), template=CHATML).chat(messages)


def test_gguf_has_the_whole_tokenizer(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", chat_template=CHATML)
    tokenizer = gguf_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (len(TOKENS), 1, (2, 0))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode("hello") == [TOKENS.index("hell"), TOKENS.index("o")]
    assert tokenizer.encode("12") == [TOKENS.index("1"), TOKENS.index("2")]  # digits stand alone
    assert tokenizer.encode("<|im_start|>he<|im_end|>") == [1, TOKENS.index("he"), 2]
    assert tokenizer.chat([{"role": "user", "content": "he"}], add_generation_prompt=False) == (
        "<|im_start|>user\nhe<|im_end|>\n")
    other = gguf_tokenizer(write_gguf(tmp_path / "n.gguf", pre="gpt-2", add_bos_token=True))
    assert other.encode("12") == [1, TOKENS.index("12")]
    assert other.template is None


@pytest.mark.parametrize(("changes", "message"), [
    ({"model": "llama"}, r"tokenizer.ggml.model = 'llama', tokenizer.ggml.pre = 'smollm': expected gpt2"),
    ({"pre": "llama-bpe"}, r"tokenizer.ggml.pre = 'llama-bpe': expected gpt2 .* and one of smollm, gpt-2"),
    ({"merges": None}, r"metadata tokenizer.ggml.merges is missing: expected list"),
    ({"tokens": [*TOKENS[:-1], "h"]}, r"\d+ tokens, \d+ distinct, \d+ types: expected as many of each"),
    ({"token_type": [3] * 4}, r"4 types: expected as many of each"),
    ({"merges": ["h zz"]}, r"tokenizer.ggml.merges is no list of merges of its tokens"),
    ({"bos_token_id": 100_000}, r"tokenizer.ggml.bos_token_id = 100000: expected one of \d+ tokens"),
])
def test_gguf_tokenizers_that_are_not_read_are_named(tmp_path, changes, message):
    with pytest.raises(GGUFError, match=message):
        gguf_tokenizer(write_gguf(tmp_path / "m.gguf", **changes))


@pytest.mark.parametrize(("package", "act"), [
    ("tokenizers", lambda folder, tokenizer: load_tokenizer(folder)),
    ("jinja2", lambda folder, tokenizer: tokenizer.chat([{"role": "user", "content": "he"}])),
])
def test_without_a_package_the_extra_is_named(tmp_path, monkeypatch, package, act):
    save(tmp_path, byte_level())
    tokenizer = TextTokenizer(byte_level(), template="{{ 'not compiled before' }}")
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ValueError, match=rf"need the package `{package}`: pip install -e '.\[hf\]'"):
        act(tmp_path, tokenizer)
