"""`--set model.hidden=96`: one field of a config by its dotted name, parsed by the field's type."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any

from moe.config import require


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field names to JSON-able values; tuples become lists, a dataclass that is None stays None."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def with_overrides(config: Any, settings: Sequence[str]) -> Any:
    """`config` with `name=value` settings applied together, so that fields that depend on each other may change.

    Raises:
      ValueError: an unknown name (it lists the possible ones), a value of another type, or values that do not fit.
    """
    wanted: dict[str, str] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        require(bool(equals) and bool(name), "--set", setting, "name=value, such as model.hidden=96")
        wanted[name] = text
    return _replace(config, wanted, "")


def _replace(config: Any, wanted: dict[str, str], prefix: str) -> Any:
    hints = typing.get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for head in dict.fromkeys(name.partition(".")[0] for name in wanted):
        possible = ", ".join(prefix + name for name in flatten(config))
        require(head in hints, "--set", prefix + head, f"one of {possible}")
        inner = {name.partition(".")[2]: text for name, text in wanted.items() if name.partition(".")[0] == head}
        value = getattr(config, head)
        if "" in inner:
            require(not dataclasses.is_dataclass(value), "--set", prefix + head, f"one of its fields: {possible}")
            changes[head] = _parse(inner[""], hints[head], prefix + head)
        else:
            require(dataclasses.is_dataclass(value), "--set", prefix + next(iter(wanted)), f"one of {possible}")
            changes[head] = _replace(value, inner, f"{prefix}{head}.")
    return dataclasses.replace(config, **changes)


def _parse(text: str, kind: Any, name: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        require(text in args, name, text, f"one of {', '.join(map(str, args))}")
        return text
    if origin is tuple:
        return tuple(_parse(part, args[0], name) for part in text.split(",") if part)
    if origin in (typing.Union, types.UnionType):
        return None if text.lower() == "none" else _parse(text, next(a for a in args if a is not type(None)), name)
    if kind is bool:
        require(text.lower() in ("true", "false"), name, text, "true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} = {text!r}: expected {getattr(kind, '__name__', kind)}") from error
