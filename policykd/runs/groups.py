"""Flags that several commands share, their bounds, and their form in the `config.json` of a run.

A command's arguments are a frozen, keyword-only dataclass that inherits the groups it needs. Bounds are annotations
(`pydantic.Field`), which `check_flags` enforces. `config.json` spells flags as a command line does: a schedule as
`linear:4:1`, and a member of a union of dataclasses by its class name under `kind`.
"""

import json
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import annotated_types
import tyro
from pydantic import Field as Bounds
from pydantic import JsonValue, TypeAdapter, ValidationError

from policykd.agents.teacher import TEACHER_HELP, WEIGHTS_HELP
from policykd.io.files import BadFile
from policykd.io.machine import DeviceName as DeviceName
from policykd.io.typed import one_line
from policykd.schedules import Quantity, format_schedule, parse_schedule

T = TypeVar("T")

Positive = Annotated[int, Bounds(ge=1)]
NotNegative = Annotated[int, Bounds(ge=0)]
Probability = Annotated[float, Bounds(ge=0, le=1)]
Seed = Annotated[int, Bounds(ge=0, le=2**32 - 1)]
"""what NumPy, torch and the emulators all accept"""
Settings = dict[str, JsonValue]
"""flags of a command by name, as JSON"""


@dataclass(frozen=True, kw_only=True)
class DebugArgs:
    """How much is printed about an error."""

    debug: bool = False
    """print the traceback of an error"""


@dataclass(frozen=True, kw_only=True)
class TrustArgs:
    """Whether code in the user's own files may be executed."""

    trust_pickle: bool = False
    """let SB3 itself load a teacher, which executes code in the file: only for your own archives"""


@dataclass(frozen=True, kw_only=True)
class TeacherArgs:
    """The teacher to learn from."""

    teacher: Annotated[str, tyro.conf.arg(help=f"teacher: {TEACHER_HELP}")] = "auto"
    teacher_weights: Annotated[str, tyro.conf.arg(help=WEIGHTS_HELP)] = "equal"
    trust_pickle: bool = False
    """let SB3 itself load the teacher, which executes code in the file: only for your own archives"""
    allow_weak_teacher: bool = False
    """accept a teacher that may play no better than a random policy"""


@dataclass(frozen=True, kw_only=True)
class RunArgs:
    """The folder of a run."""

    name: str = ""
    """name of the run's folder; by default made of the student's size, the seed and the time"""
    folder: Path = Path("runs")
    """folder that holds all runs"""
    resume: bool = False
    """resume the run of this --name from its last checkpoint, or start it if there is none"""
    debug: bool = False
    """print the traceback of an error"""


@dataclass(frozen=True, kw_only=True)
class MachineArgs:
    """The hardware to compute on."""

    device: DeviceName = "auto"
    """device to compute on; auto takes cuda if available, else mps, else cpu"""
    threads: NotNegative = 0
    """CPU threads per batch and number of emulator processes; 0 takes as many as torch finds"""


@dataclass(frozen=True, kw_only=True)
class EvaluationArgs:
    """Evaluations during and after a run."""

    eval_every: NotNegative = 5
    """rounds between periodic evaluations (16 episodes, no-op starts, sampled actions); 0 for none"""
    eval_episodes: Positive = 50
    """full episodes per protocol in the final evaluation, for the student and for a teacher whose card has none"""


@dataclass(frozen=True, kw_only=True)
class SeedArgs:
    """The source of randomness."""

    seed: Seed = 0
    """random seed"""


def check_flags(args: Any) -> None:
    """Checks every number of a dataclass against the bounds in its annotation.

    Raises:
        ValueError: a number outside its bounds; the line names the flag.
    """
    hints = get_type_hints(type(args), include_extras=True)
    for field in fields(args):
        value = getattr(args, field.name)
        minimum, maximum = _bounds(hints[field.name])
        # Written so that NaN, which compares false with everything, is out of bounds.
        is_below = minimum is not None and value is not None and not value >= minimum
        is_above = maximum is not None and value is not None and not value <= maximum
        if is_below or is_above:
            limits = f"at least {minimum}" if maximum is None else f"at least {minimum} and at most {maximum}"
            raise ValueError(f"--{field.name.replace('_', '-')} must be {limits}, not {value}")


@contextmanager
def flag_errors(args: Any) -> Iterator[None]:
    """Spells the setting that a ValueError begins with as the flag that the user gave: batch_size is --batch-size."""
    try:
        yield
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        if name not in {field.name for field in fields(args)}:
            raise
        raise ValueError(f"--{name.replace('_', '-')} {rest}") from error


def _bounds(hint: Any) -> tuple[Any, Any]:
    """Returns the inclusive bounds in an annotation, None where there is none."""
    constraints = [c for extra in getattr(hint, "__metadata__", ()) for c in getattr(extra, "metadata", ())]
    minimum = next((c.ge for c in constraints if isinstance(c, annotated_types.Ge)), None)
    maximum = next((c.le for c in constraints if isinstance(c, annotated_types.Le)), None)
    return minimum, maximum


def check_name(name: str) -> None:
    """Raises ValueError for a run's name that would lead out of its folder."""
    if name != Path(name).name or name in {".", ".."}:
        raise ValueError(f"--name must be the name of a folder, not {name!r}; --folder sets the folder that holds it")


def to_settings(config: object) -> Settings:
    """Returns a config dataclass as JSON.

    Raises:
        ValueError: a schedule, a loss or a state source that has no spelled form, such as a lambda.
    """
    hints = get_type_hints(type(config))
    return {name: _encode(hints[name], value) for name, value in vars(config).items() if name in hints}


def from_settings(kind: type[T], settings: Settings, name: str | Path) -> T:
    """Returns the config that `to_settings` wrote; `name` is the file of the settings, for errors.

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
    # Options of one loss are compared one by one; another loss is one change.
    for key in now | before:
        old = before.get(key)
        new = now.get(key)
        if isinstance(old, dict) and isinstance(new, dict) and old.get("kind") == new.get("kind"):
            yield from ((f"{key}.{inner}", *values) for inner, *values in changed_settings(old, new))  # type: ignore[misc]
        elif old != new:
            yield key, old, new


def _encode(hint: Any, value: Any) -> JsonValue:
    # A number stays a number, a schedule becomes the text that the command line takes.
    if _is_quantity(hint):
        return value if value is None or isinstance(value, int | float) else format_schedule(value)
    members = _members(hint)
    # The exact class: a subclass of the user's has another name, and may compute something else.
    if members and type(value) not in members:
        known = ", ".join(member.__name__ for member in members)
        raise ValueError(f"{value!r} is not one of those that can be written as text: {known}; pass it to distill()")
    # The class is only named where there is a choice.
    if is_dataclass(value):
        kind = {"kind": type(value).__name__} if len(members) > 1 else {}
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
    # Nested dataclasses field by field, because they may hold schedules too.
    kind = members[0]
    if len(members) > 1:
        by_name = {member.__name__: member for member in members}
        kind = by_name[value["kind"]]
    given = {key: part for key, part in value.items() if not (key == "kind" and len(members) > 1)}
    hints = get_type_hints(kind, include_extras=True)
    # Checked for a message that names the setting; Python's KeyError would not explain itself.
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
