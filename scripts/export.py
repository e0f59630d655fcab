"""Writes a policy as files that run without policykd, each tried on real states before it is there."""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from policykd.agents.networks import MLP, ConvNet
from policykd.agents.student import load_student
from policykd.agents.teacher import TEACHER_HELP, load_teacher
from policykd.cli.arguments import parse_args
from policykd.cli.command import exit_with_one_line, needs_extra, prepare_device, versions
from policykd.envs.actions import action_names
from policykd.envs.games import canonical_name
from policykd.evaluation.evaluate import TemperedPolicy
from policykd.evaluation.real_states import on_policy_states
from policykd.export import FORMATS, Format, Subject, check_format, export
from policykd.export.c99 import check_prefix
from policykd.io.files import BadFile
from policykd.runs.folder import check_at_least, check_seed

FEW_STATES = 1000
"""fewer are said to be few"""


@dataclass(frozen=True)
class Args:
    """Writes a policy as files that run without policykd, each tried on real states before it is there.

    onnx: float32 for ONNX Runtime; int8: the same in a quarter of the bytes; numpy: an .npz and a module that needs
    NumPy alone; c: a C99 header; sb3: an archive for PPO.load. docs/export.md shows how each is run.
    """

    policy: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=f"folder of a run, or a teacher: {TEACHER_HELP}")]
    formats: tuple[Format, ...] = ()
    """which files; by default all that the policy can have."""
    out: Path | None = None
    """folder for the files; by default `export` in the run's folder."""
    game: str = ""
    """of a teacher; a run knows its own."""
    states: int = 10_000
    """real states that each file is tried on."""
    calibration: int = 2_000
    """other real states, which int8 is fitted to."""
    prefix: str = "policykd"
    """of the names in the C header."""
    seed: int = 0
    """of the games that the states come from."""
    threads: int = 1
    """CPU threads; 0 takes what torch finds."""
    debug: bool = False
    """show the traceback of an error"""


def main(args: Args) -> None:
    """Loads, plays, writes."""
    check_at_least(args, 1, "states", "calibration")
    check_seed(args.seed)
    prepare_device("cpu", args.threads)
    subject, folder, temperature = load_subject(args)
    check_prefix(args.prefix)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: not a folder; give another")
    for kind in args.formats:
        check_format(subject, kind)
    if args.states < FEW_STATES:
        print(
            f"warning: --states {args.states} is few to try a file on; 10,000 reach 1,250 steps into a game",
            file=sys.stderr,
        )
    print(f"visiting {args.states:,} states of {subject.game} to try the files on ...", flush=True)
    states, calibration = (
        on_policy_states(TemperedPolicy(subject.net, temperature), subject.game, num, seed=seed)
        for num, seed in ((args.states, 2 * args.seed), (args.calibration, 2 * args.seed + 1))
    )
    written = {"command": shlex.join(sys.argv), "versions": versions()}
    failures: list[Exception] = []
    formats = tuple(dict.fromkeys(args.formats)) or tuple(kind for kind in FORMATS if kind != "sb3" or subject.student)
    for kind in formats:
        try:
            with needs_extra("sb3" if kind == "sb3" else "onnx"):
                done = export(subject, kind, folder, states, calibration, written=written)
        except (FloatingPointError, ValueError) as error:
            failures.append(error)
            print(f"{kind}: not written: {error}", file=sys.stderr, flush=True)
            continue
        tried = done.validation
        print(
            f"{done.path}: {done.num_bytes:,} bytes; on {tried.num_states:,} real states scores within"
            f" {tried.max_difference:.1e} of torch's, the same action in {tried.agreement:.2%} ({tried.num_ties} ties)",
            flush=True,
        )
    if failures:
        kinds = [error for error in failures if isinstance(error, FloatingPointError)] or failures
        raise type(kinds[0])(f"{len(failures)} of {len(formats)} formats were not written; the first: {kinds[0]}")


def load_subject(args: Args) -> tuple[Subject, Path, float]:
    """Returns what to export, the folder for it, and the temperature that it plays with."""
    run = Path(args.policy).parent if args.policy.endswith("student.json") else Path(args.policy)
    if (run / "student.json").is_file():
        try:
            student = load_student(run)
        except BadFile:
            raise
        except ValueError as error:  # of the user's own module
            raise ValueError(f"{error} in Python, then export(Subject(...)); docs/export.md has the lines") from error
        card = json.loads((run / "student.json").read_text())
        game = canonical_name(args.game or card.get("game", ""))
        about = {"student": card["sha256"], "shape": card["shape"], "teacher": card.get("teacher")}
        subject = Subject(student.folded_net(), game, about, action_names(game), student, prefix=args.prefix)
        return _checked(subject, args), args.out or run / "export", 1.0
    if not args.game or args.out is None:
        raise ValueError(f"{args.policy}: not the folder of a run; a teacher needs --game and --out")
    game = canonical_name(args.game)
    teacher = load_teacher(args.policy, game=game)
    if not isinstance(teacher.net, ConvNet | MLP):
        raise BadFile(f"{teacher.path}: only a teacher that is read from an SB3 archive is exported; give one")
    about = {"teacher": {"ref": teacher.ref, "algorithm": teacher.algorithm, "sha256": teacher.sha256}}
    subject = Subject(teacher.net, game, about, action_names(game), stem="teacher", prefix=args.prefix)
    return _checked(subject, args), args.out, teacher.temperature


def _checked(subject: Subject, args: Args) -> Subject:
    if len(subject.actions) != subject.net.num_actions:
        raise BadFile(
            f"{args.policy}: {subject.net.num_actions} actions, {subject.game} has {len(subject.actions)}; give --game"
        )
    return subject


if __name__ == "__main__":
    exit_with_one_line(lambda: main(parse_args(Args, sys.argv[1:])))
