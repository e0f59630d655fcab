"""Command lines: a dataclass of arguments, with short forms for its strategies and schedules as numbers.

`--loss reverse-kl` and `--states dataset:PATH` mean tyro's subcommands `loss:reverse-kl` and `states:dataset-states`; a
quantity is a number, or a schedule such as `linear:1:0` (`policykd.schedules.parse`).
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from policykd.schedules import Quantity, Varying, parse, spelled

T = TypeVar("T")

STATES = {"teacher": False, "student": False, "mixed": False, "dataset": True, "blended": True}
"""kinds of states -> whether a path belongs to them"""


def parse_args(kind: type[T], arguments: Sequence[str]) -> T:
    """Returns the dataclass that a command line fills.

    Raises:
        ValueError: a short form that means nothing; tyro itself ends the process for what it does not understand.
    """
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_quantity_rule)
    with registry:
        return tyro.cli(kind, args=spelt_out(arguments), config=(tyro.conf.CascadeSubcommandArgs,))


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
            chosen["loss"] = [f"loss:{given if joined else next(words, '')}"]
        elif flag == "--states":
            chosen["states"] = _states(given if joined else next(words, ""))
        elif word.startswith(("loss:", "states:")):
            chosen[word.partition(":")[0]] = [word]
        else:
            kept.append(word)
    return [*kept, *chosen["loss"], *chosen["states"], *options]


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
