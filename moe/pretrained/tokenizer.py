"""Text to the token ids of a pretrained model and back, chat templates, and decoding for a terminal.

The `tokenizers` library does the work. A chat template is a Jinja program that came with the model: it runs in
Jinja's immutable sandbox, which this file closes further (reaching for an unsafe attribute is an error at once), and
nothing else of a checkpoint is ever executed.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from moe.config import require
from moe.pretrained.gguf import EXTRA, GGUFError, GGUFFile, end_tokens, read_gguf

Message = Mapping[str, Any]  # role and content
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
PATIENCE = 8  # tokens; a character has at most four bytes, hence four tokens
CONTROL, USER_DEFINED = 3, 4  # token types of GGUF
SPLIT_DIGITS = {"smollm": True, "gpt-2": False}  # GGUF's names of pre-tokenizers -> each digit stands alone


class TextTokenizer:
    """Token ids of text.

    Attributes:
      inner: the `tokenizers.Tokenizer`.
      vocab_size: every id is below it.
      bos: id put before a text, None for none.
      eos: ids at which generation stops.
      template: source of the chat template, None for none.
    """

    def __init__(self, inner: Any, *, bos: int | None = None, eos: Sequence[int] = (), template: str | None = None,
                 special: Mapping[str, str] | None = None, add_bos: bool | None = None):
        """Takes over `inner`.

        Args:
          special: texts of bos_token, eos_token ... for the template.
          add_bos: whether `encode` begins with `bos`; None leaves it to the tokenizer's own post-processor.
        """
        self.inner, self.bos, self.eos, self.template = inner, bos, tuple(eos), template
        self.special, self.add_bos = dict(special or {}), add_bos
        inner.no_truncation()
        inner.no_padding()
        self.vocab_size: int = 1 + max(inner.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str, *, bos: bool = True, special: bool = True) -> list[int]:
        """Token ids.

        Args:
          bos: add what the model expects around a text of its own (a rendered chat has it already).
          special: special tokens written out in the text are those tokens; False reads them as plain characters.
        """
        self.inner.encode_special_tokens = not special
        ids = self.inner.encode(text, add_special_tokens=bos and self.add_bos is None).ids
        if bos and self.add_bos and self.bos is not None and ids[:1] != [self.bos]:
            ids = [self.bos, *ids]
        return ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text; bytes that are no whole character become U+FFFD, ids of no token nothing.

        Args:
          special: write special tokens out.
        """
        ids = [int(i) for i in ids]
        require(min(ids, default=0) >= 0, "token", min(ids, default=0), "a token id, 0 or more")
        return self.inner.decode(ids, skip_special_tokens=not special)

    def chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str | None:
        """The conversation as the model was trained to see it; None when it has no chat template.

        Args:
          messages: dicts with `role` (system, user, assistant) and `content`.
          add_generation_prompt: end with the opening of the assistant's turn.
          variables: further ones that this template knows (enable_thinking, ...).

        Raises:
          ValueError: no messages, or a template that is wrong, unsafe, or itself refuses the conversation.
        """
        if self.template is None:
            return None
        require(len(messages) > 0, "messages", messages, "at least one")
        for message in messages:
            whole = isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message
            require(whole, "message", message, "a dict with `role` and `content`")
        known = {"tools": None, "documents": None, **self.special, **variables}
        return _render(self.template, messages=[dict(message) for message in messages],
                       add_generation_prompt=add_generation_prompt, **known)

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> list[int] | None:
        """Token ids of `chat`."""
        text = self.chat(messages, **variables)
        return None if text is None else self.encode(text, bos=False)

    def stream(self) -> StreamDecoder:
        """A decoder for one answer."""
        return StreamDecoder(self)


class Decodes(Protocol):
    """All that a stream needs of a tokenizer."""

    def decode(self, ids: Sequence[int], /) -> str: ...


class StreamDecoder:
    """Turns tokens into text as they come: never half a character, and in sum what `decode` says of all of them (bytes
    that are no UTF-8 may become another number of U+FFFD)."""

    def __init__(self, tokenizer: Decodes):
        self._tokenizer = tokenizer
        self._before: list[int] = []  # the last tokens that were printed whole: what follows may depend on them
        self._held: list[int] = []
        self._printed = ""  # the part of decode(before + held) that is out
        self._waited = 0

    def push(self, token: int) -> str:
        """What can be printed now that `token` has come; often nothing."""
        self._held.append(int(token))
        text = self._tokenizer.decode(self._before + self._held)
        settled = text.rstrip("\ufffd")  # may be the beginning of a character
        grown = settled.startswith(self._printed) and len(settled) > len(self._printed)
        self._waited = 0 if grown or text == self._printed else self._waited + 1
        if self._waited >= PATIENCE:
            return self.finish()  # broken bytes, not a beginning
        if not grown:
            return ""
        out, self._printed = settled[len(self._printed) :], settled
        if settled == text:
            self._restart()
        return out

    def finish(self) -> str:
        """What is still held back, broken characters as U+FFFD."""
        text = self._tokenizer.decode(self._before + self._held)
        out = text[len(self._printed) :] if text.startswith(self._printed) else self._tokenizer.decode(self._held)
        self._restart()
        return out

    def _restart(self) -> None:
        self._before, self._held, self._waited = self._held, [], 0
        self._printed = self._tokenizer.decode(self._before)


def load_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer of a model's folder: tokenizer.json, with what tokenizer_config.json, chat_template.jinja,
    generation_config.json and config.json say about special tokens and chats, as far as these are there.

    Raises:
      ValueError: no tokenizer.json, or a file that cannot be read; names it.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        found = sorted(p.name for p in folder.glob("*")) if folder.is_dir() else "no folder"
        raise ValueError(f"no tokenizer in {folder}: expected tokenizer.json (and tokenizer_config.json, if the model "
                         f"has one), found {found}")
    library = _tokenizers()
    try:
        inner = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: cannot be read as a tokenizer ({error})") from error
    settings = _json(folder / "tokenizer_config.json")
    special = {name: text for name in SPECIAL if (text := _token_text(settings.get(name))) is not None}
    add_bos = settings.get("add_bos_token")
    return TextTokenizer(
        inner, bos=inner.token_to_id(special["bos_token"]) if "bos_token" in special else None,
        eos=_eos(folder, inner, special), template=_template(folder, settings), special=special,
        add_bos=add_bos if isinstance(add_bos, bool) else None)


def gguf_tokenizer(path: Path) -> TextTokenizer:
    """The byte-level BPE inside a GGUF file.

    Raises:
      GGUFError: another kind of tokenizer, missing metadata, or a vocabulary that contradicts itself.
    """
    file = read_gguf(path)
    kind, split = file.get("tokenizer.ggml.model", str), file.get("tokenizer.ggml.pre", str)
    if kind != "gpt2" or split not in SPLIT_DIGITS:
        raise GGUFError(f"{path}: tokenizer.ggml.model = {kind!r}, tokenizer.ggml.pre = {split!r}: expected gpt2 "
                        f"(byte-level BPE) and one of {', '.join(SPLIT_DIGITS)}")
    tokens, types = file.get("tokenizer.ggml.tokens", list), file.get("tokenizer.ggml.token_type", list)
    merges = [tuple(merge.split(" ", 1)) for merge in file.get("tokenizer.ggml.merges", list)]
    if len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise GGUFError(f"{path}: {len(tokens)} tokens, {len(set(tokens))} distinct, {len(types)} types: expected "
                        "as many of each")
    library = _tokenizers()
    try:
        inner = library.Tokenizer(library.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    except Exception as error:  # the library raises bare Exception
        raise GGUFError(f"{path}: tokenizer.ggml.merges is no list of merges of its tokens ({error})") from error
    whole = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = library.pre_tokenizers.Digits(individual_digits=True)
    inner.pre_tokenizer = library.pre_tokenizers.Sequence([digits, whole]) if SPLIT_DIGITS[split] else whole
    inner.decoder = library.decoders.ByteLevel()
    for number in (CONTROL, USER_DEFINED):
        added = [library.AddedToken(token, special=number == CONTROL, normalized=False)
                 for token, found in zip(tokens, types) if found == number]
        (inner.add_special_tokens if number == CONTROL else inner.add_tokens)(added)
    ids = {f"{name}_token": _special_id(file, key, len(tokens)) for name, key in (
        ("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))}
    template = file.get("tokenizer.chat_template", str, "")
    return TextTokenizer(
        inner, bos=ids["bos_token"], eos=end_tokens(file), template=template or None,
        special={name: tokens[i] for name, i in ids.items() if i is not None},
        add_bos=file.get("tokenizer.ggml.add_bos_token", bool, False))


def _special_id(file: GGUFFile, name: str, count: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in file.metadata:
        return None
    token = file.get(key, int)
    if not 0 <= token < count:
        raise GGUFError(f"{file.path}: the metadata {key} = {token}: expected one of {count} tokens")
    return token


def _json(path: Path) -> dict[str, Any]:
    """An object, empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    require(isinstance(value, dict), str(path), value, "a JSON object")
    return value


def _token_text(value: Any) -> str | None:
    """A token is written as a string or as an object with its `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _eos(folder: Path, inner: Any, special: Mapping[str, str]) -> tuple[int, ...]:
    ids = [inner.token_to_id(special["eos_token"])] if "eos_token" in special else []
    for name in ("generation_config.json", "config.json"):
        listed = _json(folder / name).get("eos_token_id")
        ids += listed if isinstance(listed, list) else [listed]
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int)))


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """A file of its own wins; among several named ones the default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    require(template is None or isinstance(template, str), "chat_template", template, "the text of a template")
    return template


def _render(template: str, **variables: Any) -> str:
    compiled, errors = _compile(template)
    try:
        return compiled.render(**variables)
    except (errors, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"chat template: {type(error).__name__}: {error}") from error


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> tuple[Any, type[Exception]]:
    """(the compiled template, the class of Jinja's errors), with the settings and functions that templates expect."""
    try:
        import jinja2
        from jinja2.exceptions import SecurityError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ValueError(f"chat templates need the package `jinja2`: {EXTRA}") from error

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not allowed")

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(layout: str) -> str:
        return datetime.datetime.now().strftime(layout)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    sandbox.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    sandbox.filters["tojson"] = to_json
    try:
        return sandbox.from_string(template), jinja2.TemplateError
    except jinja2.TemplateError as error:
        raise ValueError(f"chat template: {type(error).__name__}: {error}") from error


def _tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
    except ImportError as error:
        raise ValueError(f"tokenizers of pretrained models need the package `tokenizers`: {EXTRA}") from error
    return tokenizers
