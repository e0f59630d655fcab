"""`policykd export`: writes a policy as files that run without policykd."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from policykd.agents.student import Student, read_student_card
from policykd.agents.teacher import TEACHER_HELP
from policykd.envs.emulators import action_names
from policykd.evaluation.policies import find_run, infer_game, load_named_policy
from policykd.evaluation.real_states import on_policy_states
from policykd.export.artifacts import ExportManifest, export
from policykd.export.formats import FORMATS, ExportSource, FormatName, check_format
from policykd.io.machine import prepare_device
from policykd.runs.config import DebugArgs, Positive, SeedArgs

FEW_STATES = 1000


@dataclass(frozen=True, kw_only=True)
class ExportArgs(DebugArgs, SeedArgs):
    """Writes a policy as files that run without policykd, each validated on real states before it gets its name.

    onnx: float32 for ONNX Runtime; int8: the same in a quarter of the bytes; numpy: an .npz and a module that needs
    NumPy alone; c: a C99 header; sb3: an archive for PPO.load. docs/export.md shows how to run each.

    Examples:
      policykd export runs/Pong/pong
      policykd export runs/Pong/pong --formats numpy c --out folder
      policykd export bundled:ppo --game Pong --out folder
    """

    policy: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=f"folder of a run, or a teacher: {TEACHER_HELP}")]
    formats: tuple[FormatName, ...] = ()
    """formats to write; by default all that the policy can be exported in"""
    out: Path | None = None
    """folder for the files; by default `export` in the run's folder"""
    game: str = ""
    """game of a teacher; a run records its own"""
    states: Positive = 10_000
    """real states that each file is validated on"""
    calibration: Positive = 2_000
    """other real states, which int8 is calibrated on"""
    prefix: str = "policykd"
    """prefix of the names in the C header"""
    threads: int = 1
    """CPU threads; 0 takes as many as torch finds"""


def run(args: ExportArgs) -> None:
    """Collects states, then writes each format."""
    prepare_device("cpu", args.threads)
    source, folder = _load_source(args)
    is_student = isinstance(source.policy, Student)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: not a folder; give another")
    formats = tuple(dict.fromkeys(args.formats)) or tuple(f for f in FORMATS if f != "sb3" or is_student)
    # Before the games: a wrong flag or a missing compiler should not take a minute to be reported.
    for format_name in args.formats:
        check_format(source, format_name)
    if args.states < FEW_STATES:
        print(f"warning: --states {args.states} is few; 10,000 reach 1,250 steps into a game", file=sys.stderr)
    print(f"collecting {args.states:,} states of {source.game} to validate the files on ...", flush=True)
    # Seeds 2n and 2n + 1: int8 is calibrated on other games than those that it is validated on.
    states = on_policy_states(source.policy, source.game, args.states, seed=2 * args.seed)
    calibration = on_policy_states(source.policy, source.game, args.calibration, seed=2 * args.seed + 1)

    # One format that fails, such as for a missing package, does not keep the others from being written.
    failures: list[Exception] = []
    for format_name in formats:
        try:
            manifest = export(source, format_name, folder, states, calibration, shlex.join(sys.argv))
        except (FloatingPointError, ValueError) as error:
            failures.append(error)
            print(f"{format_name}: not written: {error}", file=sys.stderr, flush=True)
            continue
        print(_summary(folder / manifest.file, manifest), flush=True)
    if failures:
        # A failed validation decides the exit code: it is the news, a missing package is not.
        first = next((error for error in failures if isinstance(error, FloatingPointError)), failures[0])
        raise type(first)(f"{len(failures)} of {len(formats)} formats were not written; the first: {first}")


def _load_source(args: ExportArgs) -> tuple[ExportSource, Path]:
    """Returns the policy to export, and the folder for its files."""
    run_path = find_run(args.policy)
    teacher = None
    if run_path is None:
        if not args.game or args.out is None:
            raise ValueError(f"{args.policy}: not the folder of a run; a teacher needs --game and --out")
        folder = args.out
    else:
        card = read_student_card(run_path / "student.json")
        # Its class is not in the folder, so only the user's own program can load it.
        if card.shape.module:
            raise ValueError(f"{args.policy}: a student of your own module; export it from Python, see docs/export.md")
        folder = args.out or run_path / "export"
        teacher = card.teacher
    game = infer_game([args.policy], args.game)
    policy = load_named_policy(args.policy, game).policy
    source = ExportSource(policy, game, action_names(game), teacher, args.prefix)
    _ = source.net  # refuses ensembles and ONNX teachers, before any game is played
    return source, folder


def _summary(path: Path, manifest: ExportManifest) -> str:
    validation = manifest.validation
    return (
        f"{path}: {manifest.num_bytes:,} bytes; on {validation.num_states:,} real states outputs within"
        f" {validation.max_difference:.1e} of torch's, the same action in {validation.agreement:.2%}"
        f" ({validation.num_ties} ties)"
    )
