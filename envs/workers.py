"""Emulators in this process or in others: an emulator holds Python's lock while it runs, so threads would not help.

A request to a worker is a line of JSON; its answer is one too, followed by outcomes and frames as bytes (7 kB per game,
1 % of the time that emulation takes). A worker imports no torch, and ends when its pipe does: with its parent, however
that ended.
"""

import functools
import io
import json
import os
import signal
import subprocess
import sys
import weakref
from dataclasses import asdict
from typing import Any, NoReturn

import numpy as np

from policykd.envs.emulators import OUTCOME, Emulators, Rules

# The parent decides about signals; when it has ended, its workers end silently.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
sys.path[:] = {path!r}
from policykd.envs.workers import serve
serve()
"""


class InProcessWorker:
    """Emulators of this process, with the interface of a worker."""

    def __init__(self, rules: Rules, envs: range, outcomes: np.ndarray, frames: np.ndarray) -> None:
        """Plays environments `envs`; the results of a step are written to rows of `outcomes` and `frames`."""
        self._emulators = Emulators(rules, envs, outcomes, frames)

    def send(self, method: str, *arguments: Any) -> None:
        """Takes a request: the name of a method of `Emulators`, and its arguments."""
        self._request = functools.partial(getattr(self._emulators, method), *arguments)

    def receive(self) -> Any:
        """Executes the request and returns the answer."""
        return self._request()

    def close(self) -> None:
        """Does nothing: emulators end with the process."""


class SubprocessWorker:
    """Emulators of a process of their own."""

    def __init__(self, rules: Rules, envs: range, outcomes: np.ndarray, frames: np.ndarray) -> None:
        """Starts a process that plays environments `envs`; results are written to `outcomes` and `frames`."""
        self._game = rules.game
        self._outcomes = outcomes
        self._frames = frames
        # Python itself ignores what is not a string in sys.path, such as the Path objects of notebooks.
        program = PROGRAM.format(path=[entry for entry in sys.path if isinstance(entry, str)])
        # A child inherits the mask: until it ignores these signals itself, Ctrl-C must not end it.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        assert isinstance(self._process.stdout, io.BufferedReader)
        self._answers = self._process.stdout
        self.pid = self._process.pid
        # Runs when this object is closed, forgotten, or when the interpreter exits.
        self._end = weakref.finalize(self, _end, self._process)
        self._is_waiting = False
        self._write([asdict(rules), list(envs)])

    def send(self, method: str, *arguments: Any) -> None:
        """Sends a request: the name of a method of `Emulators`, and its arguments.

        Raises:
            OSError: the worker has ended, or was interrupted in an answer.
        """
        # After an interrupted answer the next bytes in the pipe would belong to another request.
        if self._is_waiting or not self._end.alive:
            raise OSError(f"an emulator process of {self._game} was interrupted or closed: make new environments")
        self._is_waiting = True
        self._write([method, *arguments])

    def receive(self) -> Any:
        """Waits for the answer, and the outcomes and frames after it.

        Raises:
            OSError: the worker has ended.
            ValueError: an invalid request.
        """
        # The arrays are read in place: they are views of those of AtariEnvs.
        line = self._answers.readline()
        for array in (self._outcomes, self._frames):
            if self._answers.readinto(array.data) < array.nbytes:
                self._raise_ended()
        self._is_waiting = False
        error, answer = json.loads(line)
        if error:
            raise ValueError(error)
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._end()

    def _write(self, message: list[Any]) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._raise_ended()

    def _raise_ended(self) -> NoReturn:
        code = self._process.wait()
        # The kernel kills with SIGKILL when memory runs out; the worker itself prints anything else.
        reason = "its error is printed above"
        if code < 0:
            reason = "out of memory?" if code == -signal.SIGKILL else "killed"
        ending = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise OSError(
            f"an emulator process of {self._game} ended with {ending} ({reason}): resume from the last checkpoint"
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # it holds nothing that is still needed
    process.communicate()


def serve() -> None:
    """Answers requests on the standard streams until they end."""
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed must not get between the answers
    rules, envs = json.loads(requests.readline())
    outcomes = np.zeros(len(envs), OUTCOME)
    frames = np.zeros((len(envs), 84, 84), np.uint8)
    emulators = Emulators(Rules(**rules), envs, outcomes, frames)
    for line in requests:
        method, *arguments = json.loads(line)
        error = None
        answer = None
        try:
            answer = getattr(emulators, method)(*arguments)
        except ValueError as problem:
            error = str(problem)
        answers.write(json.dumps([error, answer]).encode() + b"\n")
        answers.write(outcomes.data)
        answers.write(frames.data)
        answers.flush()
