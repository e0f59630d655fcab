"""Compares ways to a small network: distillation, pruning, quantisation, low rank, and what they give together."""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from policykd.agents.teacher import TEACHER_HELP
from policykd.cli.arguments import parse_args
from policykd.cli.command import exit_with_one_line, prepare_device
from policykd.compression.collection import Collection
from policykd.compression.study import compare
from policykd.envs.games import canonical_name
from policykd.legacy.states import DatasetStates, MixedStates
from policykd.runs.folder import check_at_least, check_name, check_seed, lock


@dataclass(frozen=True)
class Args:
    """Compares ways to a small network, all from one teacher, one set of states and one budget of gradient steps.

    Writes runs/GAME/NAME/ with compression.json, compression.md, pareto.svg, latencies.json, and a folder for each row
    with its network. The same command goes on where it was stopped: what is finished is never done again.
    """

    game: str
    """Pong, PongNoFrameskip-v4 and ALE/Pong-v5 all mean the same game"""
    teacher: Annotated[str, tyro.conf.arg(help=TEACHER_HELP)] = "auto"
    states: MixedStates | DatasetStates = MixedStates()  # noqa: RUF009
    """what all rows are fitted to: visited first, by the teacher and by a student (mixed; --collect says how many), or
    those of a dataset or a run, --states dataset:PATH"""
    collect: Collection = field(default_factory=Collection)
    rows: tuple[str, ...] = ()
    """to be made: their names, and those that they begin with; all of them if left out. The table has every row that is
    finished in the folder"""
    updates: int = 3000
    """gradient steps of each row that is fitted"""
    batch_size: int = 256
    """states a gradient step"""
    episodes: int = 100
    """whole games of each row and of random play under each protocol, at least: a row that has more keeps them; the
    teacher's come from its card, if it has one"""
    jobs: int = 2
    """rows at once, a process of one thread each"""
    latency_only: bool = False
    """measure the latencies of the rows that are finished once more, on a machine that does nothing else"""
    seed: int = 0
    """of weights, batches, games and actions"""
    name: str = "compression"
    """of the folder"""
    folder: Path = Path("runs")
    """where runs are kept"""
    debug: bool = False
    """show the traceback of an error"""


def main(args: Args) -> None:
    """Takes the comparison's folder for this process alone."""
    check_at_least(args, 1, "updates", "batch_size", "episodes", "jobs")
    check_seed(args.seed)
    check_name(args.name)
    prepare_device("cpu", 1)
    game = canonical_name(args.game)
    run = args.folder / game / args.name
    with lock(run):
        try:
            compare(
                run,
                game,
                args.teacher,
                args.states,
                collect=args.collect,
                names=args.rows,
                updates=args.updates,
                batch_size=args.batch_size,
                episodes=args.episodes,
                seed=args.seed,
                jobs=args.jobs,
                latency_only=args.latency_only,
            )
        except KeyboardInterrupt:
            again = shlex.join([sys.executable, *sys.argv])
            raise KeyboardInterrupt(f"what was finished is saved; go on with: {again}") from None


if __name__ == "__main__":
    exit_with_one_line(lambda: main(parse_args(Args, sys.argv[1:])))
