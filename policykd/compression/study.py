"""A whole comparison: states unless they are given, the rows that are not there, latencies, and what it all says."""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from policykd.agents.teacher import load_teacher
from policykd.compression.collection import Collection
from policykd.compression.comparison import Setting, results_of
from policykd.compression.compressors import Fit, teacher_as_student
from policykd.compression.findings import finished_rows, write_findings
from policykd.compression.pruning import Structured
from policykd.compression.row_latencies import latencies_known, measured_latencies
from policykd.compression.rows import TEACHER, Row, chosen, standard_rows
from policykd.compression.side_by_side import make_rows
from policykd.evaluation.results import about
from policykd.legacy.states import DatasetStates, MixedStates
from policykd.runs.folder import goes_on, start_run
from policykd.storage.manifest import open_dataset


def compare(
    run: Path,
    game: str,
    teacher: str,
    states: MixedStates | DatasetStates,
    *,
    collect: Collection,
    names: Iterable[str] = (),
    updates: int,
    batch_size: int,
    episodes: int,
    seed: int,
    jobs: int,
    latency_only: bool = False,
) -> None:
    """Makes the rows of these names (of none: all) unless they are there, and writes what all finished rows say.

    Args:
        run: the comparison's folder, which no other process writes to.
        game: its canonical name.
        teacher: a reference.
        states: those of a dataset, or how they are visited first.
        collect: how many, if they are.
        names: of rows to be made; those that they begin with are made too.
        updates: gradient steps of a row that is fitted.
        batch_size: states a step.
        episodes: games of each row under each protocol, at least.
        seed: of weights, batches, games and actions.
        jobs: rows at once.
        latency_only: make none; measure the latencies of the finished ones once more.

    Raises:
        ValueError: other settings than the folder's, no such row, a package is missing, or a row failed.
        BadFile: something in the folder is damaged.
        KeyboardInterrupt: a signal has come; what was finished is kept.
    """
    loaded = load_teacher(teacher, game=game)
    teacher_as_student(loaded)
    standard = standard_rows(loaded.num_actions, loaded.temperature)
    asked = chosen(standard, names)
    _check_packages(asked)
    Fit.check_updates(updates)
    given = isinstance(states, DatasetStates)
    stored = states if isinstance(states, DatasetStates) else DatasetStates(run / "states")
    settings: dict[str, Any] = {
        "game": game,
        "teacher": about(loaded),
        "states": open_dataset(stored.path).sha256 if given else repr((states, collect)),
        "held_out": stored.held_out,
        "updates": updates,
        "batch_size": batch_size,
        "seed": seed,
    }
    machine = {"threads": torch.get_num_threads()}
    if not goes_on(run, settings, resume=True, machine=machine):
        start_run(run, settings, machine=machine, states_argument=str(stored.path))
    if isinstance(states, MixedStates) and not latency_only:
        collect(stored.path, loaded, game, states, seed=seed, threads=jobs)
    setting = Setting(run, game, teacher, stored, updates, batch_size, episodes, seed)
    failed = [] if latency_only else make_rows(asked, setting, jobs=jobs)
    finished = finished_rows(setting, standard, [row.name for row in asked])
    if TEACHER not in finished:
        raise ValueError(f"{run}: the teacher's row is not finished; the lines above say why")
    if latency_only or not latencies_known(run, finished):
        measured_latencies(run, finished)
    missing = [row.name for row in asked if not results_of(row, setting)]
    write_findings(
        setting, finished, settings, num_actions=loaded.num_actions, missing=missing, collect=None if given else collect
    )
    if failed:
        raise ValueError(
            f"{', '.join(row.name for row in failed)}: failed, see above; the same command tries them again"
        )


def _check_packages(rows: Sequence[Row]) -> None:
    """Raises ValueError for a package that a row needs and that is not installed."""
    needed = {"onnxruntime": "onnx", "onnx": "onnx"}
    needed |= {"torch_pruning": "compress"} if any(isinstance(row.make, Structured) for row in rows) else {}
    for package, extra in needed.items():
        if not importlib.util.find_spec(package):
            raise ValueError(f"{package} is not installed; a comparison needs it: pip install 'policykd[{extra}]'")
