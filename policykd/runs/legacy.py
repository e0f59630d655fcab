"""A run's folder: what it was started with, whether it may go on, and that one process alone writes there."""

import errno
import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from policykd.io.files import BadFile, write_atomically
from policykd.io.locks import LOCK as LOCK
from policykd.io.locks import lock_folder as lock
from policykd.io.machine import versions

__all__ = ["LOCK", "lock"]

CONFIG, NOTES = "config.json", "notes.log"


def goes_on(run: Path, settings: Mapping[str, Any], *, resume: bool, machine: Mapping[str, Any]) -> bool:
    """Returns whether a run's folder is there already, started with the same settings and to be resumed.

    On another `machine` (device, threads) or with other versions it goes on with a warning, which is kept in notes.log:
    not bit for bit the same.

    Raises:
        ValueError: a run of that name exists and is not to be resumed, or was started with other settings.
        BadFile: its config.json is missing or damaged.
    """
    config = run / CONFIG
    if not config.is_file():
        if (run / "checkpoints").exists():
            raise BadFile(f"{run}: holds checkpoints but no {CONFIG} to tell whose; give another --name")
        return False
    if not resume:
        raise ValueError(f"{run}: holds a run already; go on with it by --resume, or give another --name")
    try:
        started = json.loads(config.read_text())
        changed = _changes(started["settings"], settings)
        elsewhere = _changes(started["versions"], versions()) + _changes(started["machine"], machine)
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise BadFile(f"{config}: damaged, or not what a run writes ({error!r}); give another --name") from error
    if changed:
        raise ValueError(f"{run}: cannot resume with other settings ({'; '.join(changed)}); give another --name")
    if elsewhere:
        warning = f"goes on elsewhere than it was started, so not bit for bit the same run ({'; '.join(elsewhere)})"
        print(f"warning: {run}: {warning}", file=sys.stderr)
        _note(run, warning)
    return True


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [f"{key} was {before.get(key)!r}, is {value!r}" for key, value in now.items() if before.get(key) != value]


def _note(run: Path, line: str) -> None:
    """Appends a line with the time to the run's notes."""
    notes = run / NOTES
    before = notes.read_bytes() if notes.is_file() else b""
    write_atomically(notes, before + f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n".encode())


def start_run(run: Path, settings: Mapping[str, Any], *, machine: Mapping[str, Any], **notes: Any) -> None:
    """Makes a run's folder with its config.json: settings, command, versions, machine and notes."""
    content = {"settings": settings, "command": shlex.join(sys.argv), "versions": versions(), "machine": machine}
    write_atomically(run / CONFIG, (json.dumps(content | notes, indent=1) + "\n").encode())


def started_with(run: Path) -> dict[str, Any]:
    """Returns what `start_run` wrote: settings, command, versions, machine and notes.

    Raises:
        BadFile: damaged.
    """
    try:
        content: dict[str, Any] = json.loads((run / CONFIG).read_text())
        return {"teacher_check": content["teacher_check"], **content}
    except (ValueError, LookupError, TypeError) as error:
        raise BadFile(f"{run / CONFIG}: damaged ({error!r}); give another --name") from error


def check_there(run: Path) -> None:
    """Raises OSError if a run's folder has been moved away from under the process."""
    if not (run / CONFIG).is_file():
        raise FileNotFoundError(
            errno.ENOENT, "moved or removed; go on with --resume where it is now", str(run / CONFIG)
        )


def again(args: Any, run: Path) -> str:
    """Returns the command that goes on with an interrupted run of `args` (`name`, `resume`)."""
    more = [*([] if args.name else ["--name", run.name]), *([] if args.resume else ["--resume"])]
    return shlex.join([sys.executable, *sys.argv, *more])


def check_at_least(args: Any, least: int, *flags: str) -> None:
    """Raises ValueError for the first of the fields `flags` that is smaller than `least`."""
    for flag in flags:
        if getattr(args, flag) < least:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least {least}, not {getattr(args, flag)}")


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that not every source of chance takes."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be at least 0 and at most {2**32 - 1}, not {seed}")


def check_name(name: str) -> None:
    """Raises ValueError for the name of a run that would lead out of its folder."""
    if name != Path(name).name or name in {".", ".."}:
        raise ValueError(f"--name must be the name of a folder, not {name!r}; --folder says where it lies")


def pinned(argument: str, run: Path) -> str:
    """Returns a `--teacher` argument as the commit that a run was started with, if it means one on the Hub."""
    try:
        config = json.loads((run / CONFIG).read_text())
        teacher, before = config["settings"]["teacher"], config["teacher_argument"]
        if before != argument:
            return argument
        if teacher.get("algorithm") == "ENSEMBLE":  # each member's commit is in it
            return str(teacher["ref"])
        return f"{teacher['ref']}@{teacher['revision']}" if teacher["revision"] else argument
    except (OSError, ValueError, LookupError, TypeError):
        return argument  # no such run yet, or one that `goes_on` will refuse
