"""Starts, stops and resumes small runs in one process for a while: what grows, leaks.

Two runs take turns, each stopped by SIGTERM at random times until it is finished, then started again; one of them plays
Pong and has no final evaluation. One line of JSON per cycle lists what the process holds.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
import warm

from policykd.envs import atari
from policykd.io.signals import is_signalled
from policykd.runs import finish

ARGS = (
    "--game Pong --threads 1 --student 1% --rounds 6 --states-per-round 64 --updates-per-round 4 --batch-size 32"
    " --num-envs 4 --eval-every 3 --eval-episodes 2 --name r --resume"
)

MIN_CYCLES = 2
"""one cycle of each of the two runs, however slow the machine is"""


def held(folder: Path) -> dict[str, int]:
    """Returns what the process holds: kB of memory, files, threads, children, and temporary files on the disk."""
    status = Path("/proc/self/status").read_text()
    return {
        "rss": int(status.partition("VmRSS:")[2].split()[0]),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "children": len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
        "temporary": sum(path.name.endswith((".tmp", ".lock")) for path in folder.rglob(".*")),
    }


def cycle(folder: Path, seconds: float, plays_pong: bool) -> int:
    """Resumes a run for that long and returns the command's exit code."""
    more = ["--eval-every", "0"] if plays_pong else []
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warm.run([*ARGS.split(), "--folder", str(folder), *more], {})
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    raise AssertionError("the command returned")


def stop_in_time(*args: object) -> None:
    """Sends SIGTERM when the alarm rings, unless the command has ended meanwhile."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        os.kill(os.getpid(), signal.SIGTERM)


def stop(*args: object, **how: object) -> NoReturn:
    """Stands in for `final_evaluation`, whose games of Pong would take minutes."""
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    if not is_signalled():  # a second one would end the process at once
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    raise AssertionError("not interrupted")


def main() -> None:
    """Loops until the time is up, and at least `MIN_CYCLES` times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    make_pong = atari.make_atari
    warm.play_flickers()
    chance = random.Random(0)
    began = time.monotonic()
    num_finished = 0
    flickers = (atari.make_atari, getattr(finish, "final_evaluation"))  # noqa: B009
    signal.signal(signal.SIGALRM, stop_in_time)
    for num_cycles, pong in enumerate(itertools.cycle([True, False]), start=1):
        runs = args.folder / str(pong)
        make_atari, final_evaluation = (make_pong, stop) if pong else flickers
        setattr(atari, "make_atari", make_atari)  # noqa: B010  # other rules than the module's, for this cycle
        setattr(finish, "final_evaluation", final_evaluation)  # noqa: B010
        code = cycle(runs, chance.uniform(0.1, 12.0 if pong else 3.0), pong)
        if code not in (0, 75):
            sys.exit(f"exit {code}; look at {runs}")
        line = {"seconds": round(time.monotonic() - began, 1), "code": code, "pong": pong, **held(runs)}
        if code == 0 or (pong and (runs / "Pong/r/student.json").exists()):
            shutil.rmtree(runs)
            num_finished += 1
        print(json.dumps({**line, "finished": num_finished}), flush=True)
        if num_cycles >= MIN_CYCLES and time.monotonic() - began > args.seconds:
            break


if __name__ == "__main__":
    main()
