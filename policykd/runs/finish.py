"""The last files of a run: table, film, report, results."""

from pathlib import Path

from policykd.agents.student import Student
from policykd.agents.teacher import Teacher
from policykd.io.files import write_atomically
from policykd.io.typed import write_json
from policykd.report import ReportOptions, write_report
from policykd.runs.folder import ensure_run_dir_exists
from policykd.runs.results import RESULTS, RunResult
from policykd.viewer.animation import play_to_gif


def finish_run(run: Path, result: RunResult, student: Student, teacher: Teacher, *, game: str, seed: int) -> None:
    """Writes student.gif, results.md, report.html and results.json into a run's folder, and prints the table.

    Raises:
        OSError: no space left or no permission; the run can be resumed.
    """
    play_to_gif(student, game, run / "student.gif", seed=seed)
    # The film took a while: if the folder was moved meanwhile, no results are written where it used to be.
    ensure_run_dir_exists(run)
    write_atomically(run / "results.md", result.summary().encode())
    write_report(run, result, student, teacher, ReportOptions(seed=seed))
    # Last: once results.json is there, the run is finished.
    write_json(run / RESULTS, result)
    print(f"\n{result.summary()}\n{run}/ holds student.safetensors, results.json, report.html")
