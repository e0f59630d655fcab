"""`policykd distill` in processes forked from one that has imported everything, each with a fault of its own.

A line of JSON on standard input starts one: `args` of the command, `output` (a file for what it prints), and `faults`.
It prints the process's id, and its exit code once it has ended. Everything is real but the games: those are `Flickers`,
which end after a dozen steps and need no emulator, so that a whole run takes a second.
"""

import errno
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.utils.tensorboard

import policykd.cli.distill
import policykd.envs.atari
import policykd.evaluation.results
import policykd.runs.distill_run
import policykd.runs.finish
import policykd.viewer.animation
from policykd.cli.main import run_command
from policykd.envs.vector import Episode, Step
from policykd.evaluation.costs import Costs
from policykd.io.files import write_atomically

PLAYING = (policykd.envs.atari, policykd.viewer.animation)
"""modules in which a run finds `make_atari`"""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Flickers:
    """`num_envs` games whose frames are noise: that of a step is drawn from the seed, the game's place and the step."""

    def __init__(self, num_envs: int, seed: int) -> None:
        self.num_envs, self.num_actions, self.stack, self.seed = num_envs, 6, 4, seed
        self.obs_shape: tuple[int, ...] = (4, 84, 84)
        self._steps, self._begun, self._returns = [0] * num_envs, [0] * num_envs, [0.0] * num_envs

    def reset(self) -> torch.Tensor:
        """Starts a new game everywhere."""
        self._begun, self._returns = list(self._steps), [0.0] * self.num_envs
        return self._obs()

    def step(self, actions_B: torch.Tensor) -> Step:
        """Takes one action in every game; where negative, it stands still."""
        rewards_B, starts_B, episodes = torch.zeros(self.num_envs), torch.zeros(self.num_envs, dtype=torch.bool), []
        for i, action in enumerate(actions_B.tolist()):
            if action < 0:
                continue
            self._steps[i] += 1
            rewards_B[i] = float(action == self._steps[i] % 3)
            self._returns[i] += float(rewards_B[i])
            if (length := self._steps[i] - self._begun[i]) == 9 + i % 5:
                episodes.append(Episode(i, self._returns[i], length))
                starts_B[i], self._begun[i], self._returns[i] = True, self._steps[i], 0.0
        return Step(self._obs(), rewards_B, starts_B, episodes)

    def state(self) -> dict[str, Any]:
        """Returns where the games stand."""
        return {"steps": list(self._steps), "begun": list(self._begun), "returns": list(self._returns)}

    def restore(self, state: dict[str, Any]) -> torch.Tensor:
        """Brings the games to where they stood."""
        self._steps, self._begun, self._returns = (list(state[key]) for key in ("steps", "begun", "returns"))
        return self._obs()

    def close(self) -> None:
        """Does nothing: there is no emulator."""

    def screens(self) -> np.ndarray:
        """Returns grey in three channels."""
        frames = [np.resize(self._frame(i, step), (210, 160)) for i, step in enumerate(self._steps)]
        return np.stack([np.stack([frame] * 3, axis=-1) for frame in frames])

    def _frame(self, i: int, step: int) -> np.ndarray:
        if step < self._begun[i]:
            return np.zeros((84, 84), np.uint8)
        return np.random.default_rng([self.seed, i, step]).integers(256, size=(84, 84), dtype=np.uint8)

    def _obs(self) -> torch.Tensor:
        stacks = [[self._frame(i, step - k) for k in (3, 2, 1, 0)] for i, step in enumerate(self._steps)]
        return torch.from_numpy(np.array(stacks))


def count_commits(folder: str, then: Callable[[int, str, str], None]) -> None:
    """Calls `then(number, event, path)` before every call that changes a folder or makes a change last."""
    num_calls = 0

    def called(event: str, path: Any) -> None:
        nonlocal num_calls
        name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fsdecode(path)
        if name.startswith(folder):
            num_calls += 1
            then(num_calls, event, name)

    def audited(event: str, args: tuple[Any, ...]) -> None:
        opened = event == "open" and not isinstance(args[0], int) and args[2] & WRITES
        if opened or event in ("os.remove", "os.mkdir", "os.rmdir"):
            called(event, args[0])
        elif event == "os.rename":
            called(event, args[1])

    fsync = os.fsync

    def fsync_too(file: int) -> None:
        called("fsync", file)
        fsync(file)

    sys.addaudithook(audited)
    setattr(os, "fsync", fsync_too)  # noqa: B010  # it has no audit event


def note_commits(folder: str, notes: str) -> None:
    """Writes a line for every commit."""
    file = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def then(number: int, event: str, path: str) -> None:
        os.write(file, f"{event} {path}\n".encode())

    count_commits(folder, then)


def kill_at_commit(folder: str, number: int) -> None:
    """Kills the process before one commit."""

    def then(found: int, event: str, path: str) -> None:
        if found == number:
            os.kill(os.getpid(), signal.SIGKILL)

    count_commits(folder, then)


def fail_at_commit(folder: str, number: int, code: int) -> None:
    """Lets a commit fail; where the disk is full, also every later one that needs room."""

    def then(found: int, event: str, path: str) -> None:
        again = code == errno.ENOSPC and found > number and event in ("open", "fsync", "os.mkdir")
        if found == number or again:
            raise OSError(code, os.strerror(code), path)

    count_commits(folder, then)


def replace_function(where: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces `module:function` or `module:Class.method` by what `make` returns for it."""
    module, _, path = where.partition(":")
    *owners, name = path.split(".")
    owner: Any = sys.modules[module]
    for part in owners:
        owner = getattr(owner, part)
    setattr(owner, name, make(getattr(owner, name)))


def signal_in(where: str, call: int, numbers: list[int], at: str) -> None:
    """Sends itself signals when a function is entered for the n-th time, and records the time in the file `at`."""
    num_calls = 0

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def entered(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls == call:
                Path(at).write_text(repr(time.monotonic()))
                # Blocked, so that all of them have arrived before the first is handled.
                signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
                for number in numbers:
                    signal.raise_signal(number)  # to this thread; os.kill would choose one that does not block it
                signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
            return function(*args, **kwargs)

        return entered

    replace_function(where, make)


def limit_file_size(num_bytes: int) -> None:
    """Lets no file grow larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def turn_back_clock(seconds: float) -> None:
    """Lets the time of day go backwards at every look."""
    now = time.time()

    def earlier() -> float:
        nonlocal now
        now -= seconds
        return now

    time.time = earlier


def sleep_in(where: str, seconds: float) -> None:
    """Makes a function take longer."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def slower(*args: Any, **kwargs: Any) -> Any:
            time.sleep(seconds)
            return function(*args, **kwargs)

        return slower

    replace_function(where, make)


FAULTS = (note_commits, kill_at_commit, fail_at_commit, signal_in, limit_file_size, turn_back_clock, sleep_in)


def play_flickers(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Puts `Flickers` in place of every game, and fixed content in place of the networks' costs and the report."""
    for module in PLAYING:
        replace(module, "make_atari", lambda game, num_envs, seed, **how: Flickers(num_envs, seed))
    costs = Costs(num_parameters=1, num_macs=1, num_bytes=1, latency_microseconds=1.0)
    replace(policykd.evaluation.results, "measure_costs", lambda nets, obs: dict.fromkeys(nets, costs))
    replace(policykd.runs.finish, "write_report", lambda run, *how: write_atomically(run / "report.html", b"a page"))
    torch.optim.Adam([torch.zeros(1)])  # imports for seconds


def run(args: list[str], faults: dict[str, dict[str, Any]]) -> NoReturn:
    """Runs the command as `policykd` does."""
    sys.argv = ["policykd", "distill", *args]
    for fault in FAULTS:
        if fault.__name__ in faults:
            fault(**faults[fault.__name__])
    run_command("distill", args)


def serve() -> None:
    """Starts a process for every line."""
    torch.set_num_threads(1)
    play_flickers()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            run(request["args"], request["faults"])
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
