"""`policykd report`: writes report.html for a finished run or a comparison of compression methods."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field

from policykd.agents.student import load_student
from policykd.agents.teacher import TEACHER_HELP, Teacher
from policykd.compression.comparison import COMPARISON_FILE
from policykd.evaluation.policies import load_run_teacher
from policykd.io.machine import prepare_device
from policykd.report import ReportOptions, write_report
from policykd.report.compressors import write_comparison_report
from policykd.report.page import read_run
from policykd.runs.config import DebugArgs, SeedArgs, ThreadArgs, TrustArgs


@dataclass(frozen=True, kw_only=True)
class ReportArgs(DebugArgs, TrustArgs, SeedArgs, ThreadArgs):
    """Writes report.html into the folder of a finished run, or of a comparison of compression methods.

    Teacher and student play a few seconds for it: states on which their actions are compared, and a film.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """folder of a run, such as runs/Pong/pong, or of a comparison by policykd compress"""
    teacher: Annotated[
        str, tyro.conf.arg(help=f"location of the run's own teacher, if it has moved: {TEACHER_HELP}")
    ] = ""
    seconds: Annotated[float, Field(ge=1.0, le=120.0)] = 16.0
    """length of the film"""


def run(args: ReportArgs) -> None:
    """Loads the run, lets both policies play and writes the page."""
    options = ReportOptions(seed=args.seed, seconds=args.seconds)
    if not args.run.is_dir():
        raise ValueError(f"{args.run}: folder not found; give the folder of a run, such as runs/Pong/pong")
    prepare_device("cpu", args.threads)
    # A comparison holds no student of its own, so nothing is played for its page.
    if (args.run / COMPARISON_FILE).is_file():
        path = write_comparison_report(args.run)
    else:
        # A run records where its teacher was; the hash is compared, so a teacher given by hand is the same one.
        results = read_run(args.run).results
        next_step = "give its location with --teacher REF"
        teacher = load_run_teacher(
            args.run, ref=args.teacher, alternative=next_step, trust_pickle=args.trust_pickle
        ).policy
        assert isinstance(teacher, Teacher)
        path = write_report(args.run, results, load_student(args.run), teacher, options)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
