"""`policykd resume`: continues an interrupted run, or lengthens it."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from policykd.cli.main import load_command
from policykd.io.machine import DeviceName
from policykd.runs.budget import BudgetName
from policykd.runs.config import DebugArgs, TrustArgs, from_settings
from policykd.runs.folder import load_run_config


@dataclass(frozen=True, kw_only=True)
class ResumeArgs(DebugArgs, TrustArgs):
    """Continues an interrupted run from its last checkpoint, with the flags that it was started with.

    More rounds or steps lengthen the run, a finished one of `policykd distill` too: its schedules follow the new
    number.

    Typical commands:
      policykd resume runs/Pong/NAME
      policykd resume runs/Pong/NAME --rounds 20 --eval-episodes 100
    """

    run: Annotated[Path, tyro.conf.Positional]
    """folder of the run, FOLDER/GAME/NAME"""
    rounds: int | None = None
    """rounds in total, at least as many as before (distill)"""
    budget: BudgetName | None = None
    """a larger budget than before (distill)"""
    steps: int | None = None
    """agent steps in total, at least as many as before (distill-rl, train-teacher)"""
    eval_episodes: int | None = None
    """full episodes per protocol in the final evaluation; a finished run plays it again if these are more
    (distill; distill-rl names the command for that)"""
    teacher: str | None = None
    """where the same teacher is now, if it was moved"""
    device: DeviceName | None = None
    """device to compute on; by default as before"""
    threads: int | None = None
    """CPU threads per batch and number of emulator processes; by default as before"""


def run(args: ResumeArgs) -> None:
    """Resumes the run with the command that started it."""
    # The run's own record has the command and all of its flags.
    folder = args.run.resolve()
    if not folder.is_dir():
        raise ValueError(f"{args.run}: folder not found; give the folder of a run, such as runs/Pong/pong")
    record = load_run_config(folder)
    kind, run_command = load_command(record.subcommand)
    config = from_settings(kind, record.settings, folder / "config.json")
    # The command finds the run by FOLDER/GAME/NAME, so it would start a new one from a folder named otherwise.
    if folder.parent.name != record.settings.get("game"):
        raise ValueError(f"{args.run}: move the folder of a run to FOLDER/{record.settings.get('game')}/NAME first")
    # Flags of several commands are offered here; each run has only those of its own.
    given = {
        field.name: getattr(args, field.name) for field in fields(args) if field.name not in ("run", "trust_pickle")
    }
    changes = {name: value for name, value in given.items() if value is not None}
    # Never taken from the file: a foreign folder could otherwise have pickles executed.
    if args.trust_pickle or "trust_pickle" in record.settings:
        changes["trust_pickle"] = args.trust_pickle
    if unknown := changes.keys() - record.settings.keys():
        flag = min(unknown).replace("_", "-")
        raise ValueError(f"--{flag}: not a flag of policykd {record.subcommand}, which started the run; leave it out")
    # The folder may have been moved or renamed since the start.
    place: dict[str, Any] = {"name": folder.name, "folder": folder.parent.parent, "resume": True}
    run_command(replace(config, **changes, **place))
