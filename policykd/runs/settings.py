"""Configs as JSON and back, with losses, state sources and schedules in the form in which a command line spells them.

A member of a union of dataclasses is written with its class name under `kind`, a schedule as `linear:4:1`.
"""

import json
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import JsonValue, TypeAdapter, ValidationError

from policykd.io.files import BadFile
from policykd.io.typed import one_line
from policykd.schedules import Quantity, format_schedule, parse_schedule

T = TypeVar("T")

Settings = dict[str, JsonValue]


def to_settings(config: object) -> Settings:
    """Returns a config dataclass as JSON.

    Raises:
        ValueError: a schedule that has no spelled form, such as a lambda.
    """
    hints = get_type_hints(type(config))
    return {name: _encode(hints[name], value) for name, value in vars(config).items() if name in hints}


def from_settings(kind: type[T], settings: Settings, name: str | Path) -> T:
    """Returns the config dataclass that `to_settings` wrote.

    Args:
        kind: the dataclass.
        settings: fields that are left out have their defaults.
        name: of the file that they come from, for errors.

    Raises:
        BadFile: an unknown field, or an invalid value.
    """
    try:
        config: T = _decode(kind, settings)
    except (ValueError, TypeError, KeyError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        step = "written by another version of policykd, or damaged; start a new run under another --name"
        raise BadFile(f"{name}: invalid settings ({one_line(reason)}); {step}") from error
    return config


def changed_settings(before: Settings, now: Settings) -> Iterator[tuple[str, JsonValue, JsonValue]]:
    """Yields each setting that differs as (dotted name, before, now)."""
    for key in now | before:
        old = before.get(key)
        new = now.get(key)
        if isinstance(old, dict) and isinstance(new, dict) and old.get("kind") == new.get("kind"):
            yield from ((f"{key}.{inner}", *values) for inner, *values in changed_settings(old, new))  # type: ignore[misc]
        elif old != new:
            yield key, old, new


def _encode(hint: Any, value: Any) -> JsonValue:
    if _is_quantity(hint):
        return value if value is None or isinstance(value, int | float) else format_schedule(value)
    if is_dataclass(value):
        kind = {"kind": type(value).__name__} if len(_members(hint)) > 1 else {}
        return {**kind, **to_settings(value)}
    return TypeAdapter(hint).dump_python(value, mode="json")  # type: ignore[no-any-return]


def _decode(hint: Any, value: Any) -> Any:
    if _is_quantity(hint):
        return parse_schedule(value) if isinstance(value, str) else TypeAdapter(float | None).validate_python(value)
    members = _members(hint)
    if not members:
        # As JSON, in which a tuple is a list and a path is text.
        return TypeAdapter(hint).validate_json(json.dumps(value))
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} instead of an object")
    kind = members[0]
    if len(members) > 1:
        by_name = {member.__name__: member for member in members}
        kind = by_name[value["kind"]]
    given = {key: part for key, part in value.items() if not (key == "kind" and len(members) > 1)}
    hints = get_type_hints(kind, include_extras=True)
    if unknown := given.keys() - {field.name for field in fields(kind)}:
        raise ValueError(f"{', '.join(sorted(unknown))}: unknown")
    return kind(**{key: _decode(hints[key], part) for key, part in given.items()})


def _is_quantity(hint: Any) -> bool:
    return hint in (Quantity, Quantity | None)


def _members(hint: Any) -> list[Any]:
    """Returns the dataclasses that a field of this type may hold."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    candidates = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [candidate for candidate in candidates if is_dataclass(candidate)]
