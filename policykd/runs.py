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


def open_run(
    run: Path,
    settings: Mapping[str, Any],
    *,
    resume: bool,
    machine: Mapping[str, Any],
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Makes the run's folder, or makes sure that it is to go on and was started with the same settings.

    On another machine or with other versions it goes on with a warning: not bit for bit the same.

    Args:
        run: the folder.
        settings: what decides the outcome.
        resume: whether a run that is there may go on.
        machine: device, threads.
        notes: what else config.json says; not compared.

    Raises:
        ValueError: a run of that name exists and is not to be resumed, or was started with other settings.
    """
    config = run / CONFIG
    content = {"settings": settings, "command": shlex.join(sys.argv), "versions": versions(), "machine": machine}
    content |= notes or {}
    if not config.is_file():
        if (run / "checkpoints").exists():
            raise ValueError(f"{run}: holds checkpoints but no config.json to tell whose; give another --name")
        write_atomically(config, (json.dumps(content, indent=1) + "\n").encode())
        return
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


def again(args: Any, run: Path) -> str:
    """Returns the command that goes on with an interrupted run of `args` (`name`, `resume`)."""
    more = [*([] if args.name else ["--name", run.name]), *([] if args.resume else ["--resume"])]
    return shlex.join([sys.executable, *sys.argv, *more])


def check_at_least(args: Any, least: int, *flags: str) -> None:
    """Raises ValueError for the first of the fields `flags` that is smaller than `least`."""
    for flag in flags:
        if getattr(args, flag) < least:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least {least}, not {getattr(args, flag)}")


def pinned(ref: str, run: Path) -> str:
    """Returns a Hub reference at the commit that a run was started with, any other as it is."""
    try:
        teacher = json.loads((run / CONFIG).read_text())["settings"]["teacher"]
    except (OSError, ValueError, LookupError, TypeError):
        return ref  # no such run yet, or one that `open_run` will refuse
    is_same = ref.startswith("hub:") and "@" not in ref and isinstance(teacher, dict) and teacher.get("revision")
    return f"{ref}@{teacher['revision']}" if is_same else ref
