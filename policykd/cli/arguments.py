"""Command lines: a dataclass of arguments, with short forms for its strategies and schedules as numbers.

`--loss reverse-kl` and `--states dataset:PATH` mean tyro's subcommands `loss:reverse-kl` and `states:dataset-states`; a
quantity is a number, or a schedule such as `linear:1:0` (`policykd.schedules.parse`).
"""

import io
import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import Any, TypeVar, get_args

import tyro

from policykd.losses import AnyLoss
from policykd.schedules import Quantity, Varying, parse, spelled

T = TypeVar("T")

STATES = {"teacher": False, "student": False, "mixed": False, "dataset": True, "blended": True}
"""kinds of states -> whether a path belongs to them"""


def parse_args(kind: type[T], arguments: Sequence[str]) -> T:
    """Returns the dataclass that a command line fills.

    Raises:
        ValueError: what it cannot be, with the flag.
    """
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_quantity_rule)
    has_strategies = kind.__annotations__.get("states") is not int  # of scripts/export.py: how many
    words, said = spelt_out(arguments) if has_strategies else list(arguments), io.StringIO()
    try:
        with registry, redirect_stderr(said):
            return tyro.cli(kind, args=words, config=(tyro.conf.CascadeSubcommandArgs,))
    except SystemExit as ended:
        if ended.code in (0, None):  # it was asked for help
            raise
        raise ValueError(_first_sentence(said.getvalue())) from None


def spelt_out(arguments: Sequence[str]) -> list[str]:
    """Returns a command line with `--loss NAME` and `--states NAME[:PATH]` as tyro's subcommands, in tyro's order."""
    kept: list[str] = []
    chosen: dict[str, list[str]] = {"loss": [], "states": []}
    options: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, joined, given = word.partition("=")
        if flag.startswith(("--states.", "--loss.")):  # belongs behind the subcommands
            options += [word] if joined else [word, next(words, "")]
        elif flag == "--loss":
            chosen["loss"] = [_loss(given if joined else next(words, ""))]
        elif flag == "--states":
            chosen["states"] = _states(given if joined else next(words, ""))
        elif word.startswith(("loss:", "states:")):
            chosen[word.partition(":")[0]] = [word]
        else:
            kept.append(word)
    return [*kept, *chosen["loss"], *chosen["states"], *options]


def _first_sentence(said: str) -> str:
    """Returns what tyro's frame says before its first rule, on one line."""
    lines = [line.strip(" \u2502\u256d\u256e\u2570\u256f") for line in said.splitlines()]
    body = [line for line in lines if line.strip("\u2500 ") and not line.startswith("\u2500")]
    ruled = next((i for i, line in enumerate(lines) if i and line and not line.strip("\u2500")), len(lines))
    kept = " ".join(line for line in lines[:ruled] if line in body)
    return f"{' '.join(kept.split())}; --help lists the flags"


def _loss(name: str) -> str:
    known = [re.sub("([a-z])(?=[A-Z])", r"\1-", kind.__name__).lower() for kind in get_args(AnyLoss)]
    if name not in known:
        raise ValueError(f"--loss {name}: give one of {', '.join(known)}")
    return f"loss:{name}"


def _states(given: str) -> list[str]:
    kind, _, path = given.partition(":")
    if kind not in STATES or STATES[kind] != bool(path):
        raise ValueError(
            f"--states {kind}: give mixed, student, teacher, dataset:PATH or blended:PATH; --states.NAME sets more"
        )
    return [f"states:{kind}-states", *(["--states.path", path] if path else [])]


def _quantity_rule(info: Any) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Reads and writes what is a number or a schedule, for tyro."""
    if info.type not in (Quantity, Quantity | None):
        return None
    optional = info.type != Quantity

    def is_instance(x: object) -> bool:
        return isinstance(x, int | float | Varying) or (optional and x is None)

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NUMBER|SCHEDULE",
        instance_from_str=lambda args: None if optional and args[0] == "None" else parse(args[0]),
        is_instance=is_instance,
        str_from_instance=lambda x: ["None" if x is None else spelled(x)],
    )
