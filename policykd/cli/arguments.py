"""Command lines: dataclasses of flags, with short forms for losses and state sources, and schedules for numbers.

`--loss reverse-kl` and `--states dataset:PATH` mean tyro's subcommands `loss:reverse-kl` and `states:dataset-states`; a
quantity is a number, or a schedule such as `linear:1:0` (`policykd.schedules`).
"""

import io
import itertools
import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, cast, get_args, get_type_hints

import tyro

from policykd.runs.config import check_flags
from policykd.schedules import SCHEDULES, Quantity, Schedule, format_schedule, parse_schedule

T = TypeVar("T")


def parse_args(kind: type[T], words: Sequence[str], *, prog: str | None = None, default: T | None = None) -> T:
    """Returns the dataclass that a command line describes.

    Args:
        kind: a dataclass, or a union of dataclasses for subcommands.
        words: the arguments.
        prog: name of the command in its help text.
        default: values of the flags that are not given; those of the dataclass by default.

    Raises:
        SystemExit: with code 0, after --help.
        ValueError: an invalid argument; one line that names the flag.
    """
    # tyro prints errors as a box of many lines and exits with 2; here they become one line of a ValueError.
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_quantity_rule)
    complaint = io.StringIO()
    more: dict[str, Any] = {} if default is None else {"default": default}
    expanded: list[str] = []
    try:
        with registry, redirect_stderr(complaint):
            expanded = expand_shorthand(kind, words, default)
            config = (tyro.conf.CascadeSubcommandArgs,)
            args = cast(T, tyro.cli(kind, args=expanded, prog=prog, config=config, **more))
    except SystemExit as ended:
        if ended.code in (0, None):  # --help
            raise
        raise ValueError(_explained(_first_sentence(complaint.getvalue()), expanded)) from None
    check_flags(args)
    return args


def expand_shorthand(kind: Any, words: Sequence[str], default: object = None) -> list[str]:
    """Returns a command line with `--loss NAME` and `--states NAME[:PATH]` as tyro's subcommands, in tyro's order.

    Options such as `--loss.temperature 2` without `--loss` belong to the loss of `default`, or of the dataclass. A
    ValueError names what is unknown.
    """
    # 1. Sort the words by where tyro wants them: flags, the two subcommands, and options of those.
    choices = {field: members for field in ("loss", "states") if (members := _choices(kind, field))}
    expanded: list[str] = []
    given: dict[str, str] = {}
    options: dict[str, list[tuple[str, list[str]]]] = {field: [] for field in choices}
    remaining = iter(words)
    for word in remaining:
        flag, joined, value = word.partition("=")
        field = re.split("[.:]", flag.removeprefix("--"))[0]
        if field in choices and flag == f"--{field}":
            given[field] = value if joined else next(remaining, "")
        elif field in choices and flag.startswith(f"{field}:"):  # as --help spells it
            given[field] = flag.removeprefix(f"{field}:").removesuffix(f"-{field}")
        elif field in choices and flag.startswith(f"--{field}."):  # an option, which tyro reads after its subcommand
            flag = flag.replace("_", "-")
            options[field].append((flag, [word] if joined else [word, next(remaining, "")]))
        else:
            expanded.append(word)
    # 2. Subcommands, then their options; without a subcommand these belong to the default's.
    tail: list[str] = []
    for field, members in choices.items():
        member: Any
        if field in given:
            member, path = _member(field, given[field], members)
        elif options[field]:
            member, path = type(_default(default or kind, field)), ""
        else:
            continue
        expanded += [f"{field}:{_kebab(member)}", *([f"--{field}.path", path] if path else [])]
        names = {f"--{field}.{part.name.replace('_', '-')}" for part in fields(member)}
        for flag, option in options[field]:
            if flag not in names:
                name = _kebab(member).removesuffix(f"-{field}")
                raise ValueError(f"{flag}: unknown; --{field} {name} has {', '.join(sorted(names)) or 'no options'}")
            tail += option
    return [*expanded, *tail]


def _default(kind: Any, field: str) -> object:
    """Returns the value of a field in a dataclass's instance, or by default."""
    if not isinstance(kind, type):
        return getattr(kind, field)
    declared = kind.__dataclass_fields__[field]  # type: ignore[attr-defined]
    return declared.default if declared.default is not MISSING else declared.default_factory()


def _choices(kind: Any, field: str) -> dict[str, Any]:
    """Returns the dataclasses that a field may hold, by their short name; none if it is not a union of dataclasses."""
    if not is_dataclass(kind) or field not in [f.name for f in fields(kind)]:
        return {}
    members = [member for member in get_args(get_type_hints(kind)[field]) if is_dataclass(member)]
    return {_kebab(member).removesuffix(f"-{field}"): member for member in members}


def _kebab(kind: Any) -> str:
    """Returns the name of a class as tyro spells it: ForwardKL is forward-kl."""
    return re.sub("([a-z])(?=[A-Z])", r"\1-", kind.__name__).lower()


def _member(field: str, given: str, members: dict[str, Any]) -> tuple[Any, str]:
    """Returns the dataclass that NAME[:PATH] means, and the path."""
    # The path may contain colons itself; only the first one separates it from the name.
    name, has_path, path = given.partition(":")
    takes_path = {name: any(f.name == "path" for f in fields(member)) for name, member in members.items()}
    if takes_path.get(name) and not path:
        raise ValueError(f"--{field} {name}: no path; give --{field} {name}:PATH, the folder of a dataset or a run")
    if name not in members or takes_path[name] != bool(has_path):
        known = ", ".join(f"{name}:PATH" if takes_path[name] else name for name in members)
        raise ValueError(f"--{field} {given}: invalid; give one of {known}; --{field}.NAME sets its options")
    return members[name], path


def _first_sentence(complaint: str) -> str:
    """Returns the text of tyro's error box up to its first horizontal rule, on one line."""
    # The characters of the box itself: its sides, corners and horizontal rules.
    lines = [line.strip(" \u2502\u256d\u256e\u2570\u256f") for line in complaint.splitlines()[1:]]
    kept = itertools.takewhile(lambda line: not line.startswith("\u2500"), lines)
    return f"{' '.join(' '.join(kept).split())}; --help lists the flags"


def _explained(sentence: str, words: Sequence[str]) -> str:
    """Returns tyro's sentence, or a clearer one about a schedule where only a number is possible."""
    flag = re.search(r"Error parsing (--[\w.-]+)", sentence)
    schedules = [word for word in words if word.partition(":")[0] in SCHEDULES and f"'{word}'" in sentence]
    if flag and schedules and "could not convert string to float" in sentence:
        return f"{flag[1]} {schedules[0]}: give a number, not a schedule"
    return sentence


def _quantity_rule(info: Any) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Lets tyro read and print numbers that may be schedules."""
    if info.type not in (Quantity, Quantity | None):
        return None
    is_optional = info.type != Quantity

    def is_instance(x: object) -> bool:
        return isinstance(x, int | float | Schedule) or (is_optional and x is None)

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NUMBER|SCHEDULE",
        instance_from_str=lambda args: None if is_optional and args[0] == "None" else parse_schedule(args[0]),
        is_instance=is_instance,
        str_from_instance=lambda x: ["None" if x is None else format_schedule(x)],
    )
