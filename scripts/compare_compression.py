"""Compares ways to a small network: distillation, pruning, quantisation, low rank, and what they give together."""

import importlib.util
import json
import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from policykd.agents.files import BadFile, write_atomically
from policykd.agents.teacher import TEACHER_HELP, Teacher, load_teacher
from policykd.arguments import parse_args
from policykd.command import exit_with_one_line, prepare_device, versions
from policykd.compression.collection import Collection
from policykd.compression.comparison import Setting, results_of
from policykd.compression.compressors import Fit, teacher_as_student
from policykd.compression.latencies import LATENCIES, measured_latencies
from policykd.compression.pareto import draw_pareto
from policykd.compression.pruning import Structured
from policykd.compression.rows import Row, chosen, standard_rows
from policykd.compression.side_by_side import make_rows
from policykd.compression.table import compared, report
from policykd.envs.games import canonical_name
from policykd.evaluation import PROTOCOLS, RandomPolicy
from policykd.manifest import open_dataset
from policykd.results import FinishedGames, about, judgement
from policykd.runs import check_at_least, check_name, goes_on, lock, start_run
from policykd.states import DatasetStates, MixedStates


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
    """their names, and those that they begin with; all of them if left out"""
    updates: int = 3000
    """gradient steps of each row that is fitted"""
    batch_size: int = 256
    """states a gradient step"""
    episodes: int = 100
    """whole games of each row under each protocol; the teacher's come from its card, if it has one"""
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
    check_at_least(args, 0, "seed")
    check_name(args.name)
    prepare_device("cpu", 1)
    run = args.folder / canonical_name(args.game) / args.name
    with lock(run):
        try:
            make(run, args)
        except KeyboardInterrupt:
            again = shlex.join([sys.executable, *sys.argv])
            raise KeyboardInterrupt(f"what was finished is saved; go on with: {again}") from None


def make(run: Path, args: Args) -> None:
    """Visits states unless they are given, makes the rows that are not there, measures, and writes what it all says."""
    game = canonical_name(args.game)
    teacher = load_teacher(args.teacher, game=game)
    teacher_as_student(teacher)
    rows = chosen(standard_rows(teacher.num_actions), args.rows)
    check_packages(rows)
    Fit.check_updates(args.updates)
    given = isinstance(args.states, DatasetStates)
    states = args.states if isinstance(args.states, DatasetStates) else DatasetStates(run / "states")
    settings: dict[str, Any] = {
        "game": game,
        "teacher": about(teacher),
        "states": open_dataset(states.path).sha256 if given else repr((args.states, args.collect)),
        "held_out": states.held_out,
        **{name: getattr(args, name) for name in ("updates", "batch_size", "seed")},
    }
    machine = {"threads": torch.get_num_threads()}
    if not goes_on(run, settings, resume=True, machine=machine):
        start_run(run, settings, machine=machine, states_argument=str(states.path))
    if isinstance(args.states, MixedStates) and not args.latency_only:
        args.collect(states.path, teacher, game, args.states, seed=args.seed, threads=args.jobs)
    setting = Setting(run, game, args.teacher, states, args.updates, args.batch_size, args.episodes, args.seed)
    failed = [] if args.latency_only else make_rows(rows, setting, jobs=args.jobs)
    finished = {row.name: done for row in rows if (done := results_of(row, setting))}
    if not finished:
        raise ValueError(f"{run}: no row is finished; the lines above say why")
    if args.latency_only or not latencies_known(run, finished):
        measured_latencies(run, finished)
    write_report(run, finished, teacher, args, settings)
    if failed:
        raise ValueError(
            f"{', '.join(row.name for row in failed)}: failed, see above; the same command tries them again"
        )


def check_packages(rows: list[Row]) -> None:
    """Raises ValueError for a package that a row needs and that is not installed."""
    needed = {"onnxruntime": "onnx", "onnx": "onnx"}
    needed |= {"torch_pruning": "compress"} if any(isinstance(row.make, Structured) for row in rows) else {}
    for package, extra in needed.items():
        if not importlib.util.find_spec(package):
            raise ValueError(f"{package} is not installed; a comparison needs it: pip install 'policykd[{extra}]'")


def latencies_known(run: Path, finished: dict[str, dict[str, Any]]) -> bool:
    """Returns whether the latencies of exactly these files were measured in one go."""
    try:
        kept = json.loads((run / LATENCIES).read_text())["rows"]
        return {name: row["sha256"] for name, row in kept.items()} == {n: row["sha256"] for n, row in finished.items()}
    except FileNotFoundError:
        return False
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadFile(f"{run / LATENCIES}: damaged ({error!r}); remove it, they are measured anew") from error


def write_report(
    run: Path, finished: dict[str, dict[str, Any]], teacher: Teacher, args: Args, settings: dict[str, Any]
) -> None:
    """Writes compression.json, compression.md and pareto.svg, and prints the table."""
    kept = json.loads((run / LATENCIES).read_text())
    games = FinishedGames(run / "random.json")
    random = RandomPolicy(teacher.num_actions)
    how: dict[str, Any] = {"seed": args.seed}
    played = {
        p: judgement(games.play(random, "random", settings["game"], p, min(args.episodes, 32), **how))
        for p in PROTOCOLS
    }
    rows: dict[str, dict[str, Any]] = {
        name: row | {k: v for k, v in kept["rows"][name].items() if k != "sha256"} for name, row in finished.items()
    }
    rows["random"] = {"name": "random", "label": "random play", "family": "random", "protocols": played}
    against = compared(rows)
    content = {
        **{k: settings[k] for k in ("game", "teacher", "states", "updates", "batch_size", "seed")},
        "episodes": args.episodes,
        "collect": asdict(args.collect) if isinstance(args.states, MixedStates) else None,
        "rows": {name: row | {"comparison": against[name]} for name, row in rows.items()},
        "latency": {k: v for k, v in kept.items() if k != "rows"},
        "command": shlex.join(sys.argv),
        "versions": versions(),
    }
    text = report(rows)
    write_atomically(run / "compression.md", text.encode())
    draw_pareto(rows, run / "pareto.svg")
    write_atomically(run / "compression.json", (json.dumps(content, indent=1) + "\n").encode())
    print(f"\n{text}\n{run}/ holds compression.json, compression.md, pareto.svg")


if __name__ == "__main__":
    exit_with_one_line(lambda: main(parse_args(Args, sys.argv[1:])))
