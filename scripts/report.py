"""Writes report.html for the folder of a finished run, or of a comparison of compressors."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from policykd.agents.student import load_student
from policykd.agents.teacher import TEACHER_HELP, Teacher
from policykd.cli.arguments import parse_args
from policykd.cli.command import exit_with_one_line, prepare_device
from policykd.evaluation.policies import load_run_teacher
from policykd.report import write_comparison_report, write_report
from policykd.report.data import COMPRESSION, read_run
from policykd.runs.folder import check_seed


@dataclass(frozen=True)
class Args:
    """Writes report.html into the folder of a finished run, or of a comparison of compressors: one file, no network.

    Teacher and student play a few seconds for it: states on which their actions are compared, and a film.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """runs/GAME/NAME, of scripts/distill_atari.py, scripts/distill_rl.py or scripts/compare_compression.py"""
    teacher: Annotated[str, tyro.conf.arg(help=f"where the run's own lies now, if it has moved; {TEACHER_HELP}")] = ""
    seed: int = 0
    """of the states and the film"""
    seconds: float = 16.0
    """of the film"""
    trust_pickle: bool = False
    """let SB3 itself load the teacher, which executes code in the file"""
    threads: int = 0
    """CPU threads; 0 takes what torch finds"""
    debug: bool = False
    """show the traceback of an error"""


def main(args: Args) -> None:
    """Loads, plays, writes."""
    check_seed(args.seed)
    if not 1.0 <= args.seconds <= 120.0:
        raise ValueError(f"--seconds must lie between 1 and 120, not {args.seconds}")
    if not args.run.is_dir():
        raise ValueError(f"{args.run}: no such folder; give the folder of a run, such as runs/Pong/pong")
    prepare_device("cpu", args.threads)
    if (args.run / COMPRESSION).is_file():
        path = write_comparison_report(args.run)
    else:
        report = read_run(args.run)
        instead = "say where it is: --teacher REF"
        teacher = load_run_teacher(
            args.run, ref=args.teacher, alternative=instead, trust_pickle=args.trust_pickle
        ).policy
        assert isinstance(teacher, Teacher)
        path = write_report(
            args.run,
            report.results,
            load_student(args.run),
            teacher,
            report.game,
            seed=args.seed,
            seconds=args.seconds,
        )
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    exit_with_one_line(lambda: main(parse_args(Args, sys.argv[1:])))
