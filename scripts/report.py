"""Writes report.html for the folder of a finished run, or of a comparison of compressors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from policykd.agents.ensemble import load_teachers
from policykd.agents.files import BadFile
from policykd.agents.student import load_student
from policykd.agents.teacher import TEACHER_HELP, Teacher
from policykd.command import exit_with_one_line, prepare_device
from policykd.report import write_comparison_report, write_report
from policykd.report.data import COMPRESSION, read_run
from policykd.runs import pinned


@dataclass(frozen=True)
class Args:
    """Writes report.html into the folder of a finished run, or of a comparison of compressors: one file, no network.

    Teacher and student play a few seconds for it: states on which their actions are compared, and a film.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """runs/GAME/NAME, of scripts/distill_atari.py or scripts/compare_compression.py"""
    teacher: Annotated[str, tyro.conf.arg(help=f"the run's own unless you say another; {TEACHER_HELP}")] = ""
    seed: int = 0
    """of the states and the film"""
    seconds: float = 16.0
    """of the film"""
    threads: int = 0
    """CPU threads; 0 takes what torch finds"""
    debug: bool = False
    """show the traceback of an error"""


def main(args: Args) -> None:
    """Loads, plays, writes."""
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {args.seed}")
    if not 1.0 <= args.seconds <= 120.0:
        raise ValueError(f"--seconds must lie between 1 and 120, not {args.seconds}")
    if not args.run.is_dir():
        raise ValueError(f"{args.run}: no such folder; give the folder of a run, such as runs/Pong/pong")
    prepare_device("cpu", args.threads)
    if (args.run / COMPRESSION).is_file():
        path = write_comparison_report(args.run)
    else:
        report = read_run(args.run)
        teacher, student = teacher_of(args, report.config, report.game), load_student(args.run)
        path = write_report(
            args.run, report.results, student, teacher, report.game, seed=args.seed, seconds=args.seconds
        )
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


def teacher_of(args: Args, config: Mapping[str, Any], game: str) -> Teacher:
    """Returns the teacher that a run was made with.

    Raises:
        BadFile: it is another now.
    """
    settings = config.get("settings", {})
    ref = args.teacher or pinned(str(config.get("teacher_argument", "auto")), args.run)
    teacher = load_teachers(ref, str(settings.get("teacher_weights", "equal")), game=game)
    learned_from = settings.get("teacher", {}).get("sha256", teacher.sha256)
    if teacher.sha256 != learned_from:
        raise BadFile(
            f"{ref}: not the teacher of {args.run}, whose sha256 is {learned_from[:12]}...; say where it is: --teacher"
        )
    return teacher


if __name__ == "__main__":
    exit_with_one_line(lambda: main(tyro.cli(Args)))
