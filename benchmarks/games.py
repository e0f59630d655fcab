"""The table of many games: what students of five sizes keep of their teachers' scores, with the default settings.

`python benchmarks/games.py --teacher Breakout=breakout.zip -- --threads 1`

Teachers are the bundled ones, one per game, and public agents given by `--teacher`. A cell is a teacher, a size and a
seed: one `policykd distill` with its default settings, 100 games per protocol and the flags after `--`, in a folder of
its own. Finished cells are skipped and interrupted ones resumed; a failed one does not stop the others. FOLDER/games.md
and FOLDER/games.svg are written at the end, or from what is finished by `--table`. docs/runs.md explains the numbers.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from games_table import Row, draw, table

from policykd.agents.references import ALGORITHMS, PRETRAINED
from policykd.cli.arguments import parse_args
from policykd.cli.errors import run_cli
from policykd.envs.games import canonical_name
from policykd.io.files import write_atomically
from policykd.io.signals import check_interrupted
from policykd.runs.config import RESUMABLE_CHANGES, DistillRunConfig, changed_settings, to_settings
from policykd.runs.distill_run import distill_run, run_folder
from policykd.runs.folder import RunResult, load_results, load_run_config

TableSize = Literal["25%", "7%", "4%", "1%", "0.3%"]
SEEDS: dict[TableSize, tuple[int, ...]] = {"25%": (0,), "7%": (0, 1, 2), "4%": (0,), "1%": (0, 1, 2), "0.3%": (0,)}
"""size -> seeds, largest size first"""
MAY_DIFFER = RESUMABLE_CHANGES - {"teacher", "rounds", "budget", "eval_episodes"}
"""settings in which a finished cell may differ"""


@dataclass(frozen=True)
class Task:
    """A game and its teacher."""

    game: str
    teacher: str
    """reference"""

    @property
    def label(self) -> str:
        """Name in the table."""
        kind = "" if self.teacher.startswith("bundled:") else ", public"
        return f"{self.game}{kind} ({Path(self.teacher).name})"


@dataclass(frozen=True)
class Cell:
    """One run of a task."""

    task: Task
    size: TableSize
    seed: int
    config: DistillRunConfig

    @property
    def run(self) -> Path:
        """Folder of the run."""
        return run_folder(self.config)

    @property
    def error_file(self) -> Path:
        """File with the error that ended the cell last, next to its folder."""
        return self.run.with_name(f"{self.run.name}.error.txt")

    def results(self) -> RunResult | None:
        """Returns the results of a finished cell, or None.

        Raises:
            ValueError: the run was made with other settings.
        """
        results = load_results(self.run)
        if results is None:
            return None
        made = load_run_config(self.run).settings
        # Flags that `made` lacks were added to policykd since.
        comparable = made.keys() - MAY_DIFFER
        changed = [name for name, *_ in changed_settings(made, to_settings(self.config))]
        if names := ", ".join(name for name in changed if name.partition(".")[0] in comparable):
            raise ValueError(f"made with other settings ({names}); remove the run, or restore them")
        return results

    def outcome(self) -> RunResult | str:
        """Returns the results, or why there are none: the error that ended the cell last, if one did."""
        try:
            results = self.results()
        except ValueError as error:
            return str(error)
        if results is None:
            return self.error_file.read_text().strip() if self.error_file.is_file() else "not finished"
        return results


def tasks(public: Sequence[str]) -> list[Task]:
    """Returns the bundled teachers, one per game, and then public agents given as GAME=REFERENCE.

    Raises:
        ValueError: a malformed public agent.
    """
    bundled: dict[str, Task] = {}
    for algorithm in ALGORITHMS:  # in the order in which `--teacher auto` tries them
        for path in PRETRAINED.glob(f"{algorithm}-*.zip"):
            game = path.stem.partition("-")[2]
            bundled.setdefault(game, Task(game, f"bundled:{algorithm}"))
    found = [bundled[game] for game in sorted(bundled)]
    for given in public:
        game, _, reference = given.partition("=")
        if not reference:
            raise ValueError(f"--teacher {given}: give GAME=FILE.zip")
        found.append(Task(canonical_name(game), reference))
    return found


def cells(args: "Args", flags: Sequence[str]) -> list[Cell]:
    """Returns the chosen cells, seed 0 of every size and game first, so that a table can be made early.

    Raises:
        ValueError: invalid flags, or two teachers whose runs would have the same folder.
    """
    chosen = [task for task in tasks(args.teacher) if not args.only or task.game == canonical_name(args.only)]
    found = []
    for seed in sorted({seed for seeds in SEEDS.values() for seed in seeds}):
        for size, seeds in SEEDS.items():
            if seed in seeds and args.seed in (None, seed) and args.size in (None, size):
                found += [Cell(task, size, seed, _config(task, size, seed, args.folder, flags)) for task in chosen]
    if len({cell.run for cell in found}) < len(found):
        raise ValueError("--teacher: two teachers of a game with the same file name; rename one")
    return found


def _config(task: Task, size: TableSize, seed: int, folder: Path, flags: Sequence[str]) -> DistillRunConfig:
    """Returns the settings of a cell; a later flag overrides an earlier one."""
    name = f"games-{re.sub('[^0-9A-Za-z.]+', '-', Path(task.teacher).stem)}-{size.replace('%', 'pct')}-seed{seed}"
    what = ["--game", task.game, "--teacher", task.teacher, "--student", size, "--seed", str(seed)]
    where = ["--name", name, "--folder", str(folder), "--resume"]
    return parse_args(DistillRunConfig, [*what, *where, "--eval-episodes", "100", *flags])


def run_cells(todo: Sequence[Cell]) -> list[Cell]:
    """Runs or resumes the cells that are not finished, one after the other, and returns those that failed."""
    failed = []
    for number, cell in enumerate(todo, start=1):
        try:
            if cell.results() is None:
                print(f"cell {number} of {len(todo)}: {cell.run}", flush=True)
                distill_run(cell.config)
            cell.error_file.unlink(missing_ok=True)
        except Exception as error:
            check_interrupted()  # C extensions turn a KeyboardInterrupt inside them into errors of their own
            line = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"{cell.run}: failed: {line}", file=sys.stderr, flush=True)
            write_atomically(cell.error_file, f"{line}\n".encode())
            failed.append(cell)
    return failed


def read_rows(chosen: Sequence[Cell]) -> tuple[list[Row], list[str]]:
    """Returns the rows of the table, and a line for each cell without results."""
    outcomes = {cell.run: cell.outcome() for cell in chosen}
    rows = []
    for task in dict.fromkeys(cell.task for cell in chosen):
        for size in SEEDS:
            group = [outcomes[cell.run] for cell in chosen if (cell.task, cell.size) == (task, size)]
            if group:
                rows.append(Row(task.label, size, [None if isinstance(found, str) else found for found in group]))
    return rows, [f"- {run}: {found}" for run, found in outcomes.items() if isinstance(found, str)]


@dataclass(frozen=True)
class Args:
    """Distils every teacher into students of five sizes and tabulates their scores; flags after -- are every cell's."""

    teacher: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """public agent as GAME=FILE.zip, or another reference; may be repeated"""
    only: str = ""
    """game to run and tabulate; all by default"""
    size: TableSize | None = None
    """student's size to run and tabulate"""
    seed: int | None = None
    """seed to run and tabulate"""
    table: bool = False
    """only write the table of what is finished"""
    folder: Path = Path("runs")
    """folder that holds all runs"""


def main(words: Sequence[str]) -> None:
    """Runs the cells and writes the table.

    Raises:
        ValueError: invalid arguments, no cell is chosen, or cells that failed.
    """
    end = words.index("--") if "--" in words else len(words)
    args = parse_args(Args, words[:end], prog="benchmarks/games.py")
    chosen = cells(args, words[end + 1 :])
    if not chosen:
        raise ValueError("no cell of that game, size and seed")
    failed = [] if args.table else run_cells(chosen)
    rows, unfinished = read_rows(chosen)
    text = "\n".join([table(rows), "", *unfinished])
    print(text)
    write_atomically(args.folder / "games.md", f"{text}\n".encode())
    draw(rows, args.folder / "games.svg")
    if failed:
        raise ValueError(f"{len(failed)} of {len(chosen)} cells failed; {args.folder}/games.md has their errors")


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
