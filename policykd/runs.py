"""A run's folder: what it was started with, and whether it may go on."""

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from policykd.agents.files import write_atomically
from policykd.command import versions

CONFIG = "config.json"


def goes_on(run: Path, settings: Mapping[str, Any], *, resume: bool, machine: Mapping[str, Any]) -> bool:
    """Returns whether a run's folder is there already, started with the same settings and to be resumed.

    On another `machine` (device, threads) or with other versions it goes on with a warning: not bit for bit the same.

    Raises:
        ValueError: a run of that name exists and is not to be resumed, or was started with other settings.
    """
    config = run / CONFIG
    if not config.is_file():
        if (run / "checkpoints").exists():
            raise ValueError(f"{run}: holds checkpoints but no {CONFIG} to tell whose; give another --name")
        return False
    if not resume:
        raise ValueError(f"{run}: holds a run already; go on with it by --resume, or give another --name")
    try:
        started = json.loads(config.read_text())
        before, elsewhere = started["settings"], (started["versions"], started["machine"]) != (versions(), machine)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{config}: not what a run writes ({error!r}); give another --name") from error
    changed = [f"{k} was {before.get(k)!r}, is {v!r}" for k, v in settings.items() if before.get(k) != v]
    if changed:
        raise ValueError(f"{run}: cannot resume with other settings ({'; '.join(changed)}); give another --name")
    if elsewhere:
        print(f"warning: {config} was written with other versions, threads or device: not bit for bit the same run")
    return True


def start_run(run: Path, settings: Mapping[str, Any], *, machine: Mapping[str, Any], **notes: Any) -> None:
    """Makes a run's folder with its config.json: settings, command, versions, machine and notes."""
    content = {"settings": settings, "command": shlex.join(sys.argv), "versions": versions(), "machine": machine}
    write_atomically(run / CONFIG, (json.dumps(content | notes, indent=1) + "\n").encode())


def again(args: Any, run: Path) -> str:
    """Returns the command that goes on with an interrupted run of `args` (`name`, `resume`)."""
    more = [*([] if args.name else ["--name", run.name]), *([] if args.resume else ["--resume"])]
    return shlex.join([sys.executable, *sys.argv, *more])


def check_at_least(args: Any, least: int, *flags: str) -> None:
    """Raises ValueError for the first of the fields `flags` that is smaller than `least`."""
    for flag in flags:
        if getattr(args, flag) < least:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least {least}, not {getattr(args, flag)}")


def check_name(name: str) -> None:
    """Raises ValueError for the name of a run that would lead out of its folder."""
    if name != Path(name).name or name in {".", ".."}:
        raise ValueError(f"--name must be the name of a folder, not {name!r}; --folder says where it lies")


def pinned(argument: str, run: Path) -> str:
    """Returns a `--teacher` argument as the commit that a run was started with, if it means one on the Hub."""
    try:
        config = json.loads((run / CONFIG).read_text())
        teacher, before = config["settings"]["teacher"], config["teacher_argument"]
        is_same = before == argument and teacher["revision"]
        return f"{teacher['ref']}@{teacher['revision']}" if is_same else argument
    except (OSError, ValueError, LookupError, TypeError):
        return argument  # no such run yet, or one that `goes_on` will refuse
