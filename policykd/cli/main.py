"""The `policykd` command: finds the subcommand's module, imports it, parses its arguments, runs it.

A command is a module `policykd.cli.NAME` with a function `run(args)`; the type of `args` is a dataclass whose fields
are the flags and whose docstring is the help text, or a union of such dataclasses. A module may have a function
`parse(words, prog)` of its own.
"""

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_type_hints

from policykd.cli.errors import run_cli

COMMANDS = {
    "distill": "distil a trained agent into a compact student",
    "resume": "continue an interrupted run, or lengthen it",
    "evaluate": "play full episodes and print their statistics",
    "export": "write a policy as ONNX, int8, NumPy, C or SB3 files",
    "compress": "compare distillation with pruning, quantisation and low rank",
    "profile": "measure the latency of policies as each runtime executes them",
    "watch": "watch policies play, in a window or a film",
    "report": "write report.html for a finished run",
    "states": "import recorded states, or export them",
    "train-teacher": "train a teacher with Stable-Baselines3",
    "distill-rl": "distil inside reinforcement learning",
}
"""every subcommand and its line of help; importing their modules for it would take seconds"""


def main() -> NoReturn:
    """Runs the `policykd` command."""
    # Not a parser with subcommands: it would import every command to know its flags.
    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        run_command(words[0], words[1:])
    if not words or words[0] in ("-h", "--help"):
        run_cli(lambda: print(_help()))
    run_cli(lambda: _refuse(words[0]))


def run_command(name: str, words: Sequence[str] | None = None) -> NoReturn:
    """Runs one subcommand with these arguments, by default those of the process, and ends the process."""
    run_cli(lambda: execute(name, sys.argv[1:] if words is None else words))


def execute(name: str, words: Sequence[str]) -> None:
    """Parses the arguments of one subcommand and runs it, in this process; errors are left to the caller."""
    kind, run = load_command(name)
    # Only now, so that `policykd --help` takes no longer than Python's start.
    from policykd.cli.arguments import parse_args

    # A command whose defaults depend on its arguments, such as distill with --config, parses them itself.
    prog = f"policykd {name}"
    parse = getattr(sys.modules[run.__module__], "parse", None)
    run(parse(words, prog) if parse else parse_args(kind, words, prog=prog))


def load_command(name: str) -> tuple[Any, Callable[[Any], None]]:
    """Imports the module of a subcommand and returns the type of its arguments, and its function `run`."""
    if name not in COMMANDS:
        raise ValueError(f"{name}: not a command of policykd")
    # The annotation of run() is the only place that connects a command with its flags.
    module = importlib.import_module(f"policykd.cli.{name.replace('-', '_')}")
    return get_type_hints(module.run)["args"], module.run


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {help_}" for name, help_ in COMMANDS.items()]
    return "\n".join(["usage: policykd COMMAND ...", "", *lines, "", "policykd COMMAND --help lists the flags of one."])


def _refuse(word: str) -> None:
    """Raises ValueError for what is not a subcommand, with the nearest one."""
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"{word}: unknown command; {guess}policykd --help lists them")
