"""The end of a run: student, final evaluation, table, film, report, results."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from policykd.agents.card import Provenance
from policykd.agents.student import Student, save_student
from policykd.agents.teacher import Teacher
from policykd.evaluation.results import FinalEvaluationOptions, final_evaluation
from policykd.io.files import write_atomically
from policykd.io.machine import versions
from policykd.io.typed import write_json
from policykd.report import ReportOptions, write_report
from policykd.runs.budget import Stop
from policykd.runs.folder import FINAL_EVALUATION, RESULTS, RunResult, ensure_run_dir_exists
from policykd.viewer.animation import play_to_gif


@dataclass(frozen=True)
class TrainingCost:
    """Cost of a training, in the units of `RunResult`."""

    num_states_labelled: int
    num_updates: int
    wall_seconds: dict[str, float]
    stop: Stop | None = None


def finish_run(
    run: Path, student: Student, teacher: Teacher, game: str, cost: TrainingCost, options: FinalEvaluationOptions
) -> RunResult:
    """Saves a run's student, plays the final games and writes the last files into the run's folder."""
    # Weights before games: they are what the run was for, and the games take minutes.
    ensure_run_dir_exists(run)
    command = shlex.join(sys.argv)
    save_student(student, run, Provenance(game=game, teacher=teacher.record, command=command))
    final = final_evaluation(student, teacher, game, run / FINAL_EVALUATION, options)
    result = RunResult(
        **vars(final),
        num_states_labelled=cost.num_states_labelled,
        num_updates=cost.num_updates,
        stop=cost.stop,
        wall_seconds=cost.wall_seconds | {"evaluate": final.evaluation_seconds},
        versions=versions(),
        command=command,
    )

    play_to_gif(student, game, run / "student.gif", seed=options.seed)
    # The film took a while: if the folder was moved meanwhile, no results are written where it used to be.
    ensure_run_dir_exists(run)
    write_atomically(run / "results.md", result.summary().encode())
    write_report(run, result, student, teacher, ReportOptions(seed=options.seed))
    # Last: once results.json is there, the run is finished.
    write_json(run / RESULTS, result)
    print(f"\n{result.summary()}\n{run}/ holds student.safetensors, results.json, report.html")
    return result
