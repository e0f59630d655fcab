"""Emulators in this process or in others: an emulator never lets go of Python's lock, so threads would not help.

A worker is asked by a line of JSON and answers with one, then its outcomes and frames as bytes (7 kB a game, 1 % of
the time that playing it takes). It imports no torch, and ends when its pipe does: with its parent, however that ended.
"""

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

START = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
sys.path[:] = {path!r}
from policykd.envs.workers import serve
serve()
"""
"""what a worker runs; its parent decides about signals, and when its parent has gone it ends silently"""


class Here:
    """Emulators of this process, asked like a worker."""

    def __init__(self, rules: Rules, envs: range, outcomes: np.ndarray, frames: np.ndarray) -> None:
        """Plays environments `envs`; a step's results go into `outcomes` and `frames`, a row each."""
        self._emulators = Emulators(rules, envs, outcomes, frames)
        self._question: tuple[str, tuple[Any, ...]] = "", ()

    def ask(self, question: str, *arguments: Any) -> None:
        """Takes a question: the name of a method of `Emulators`."""
        self._question = question, arguments

    def answer(self) -> Any:
        """Does what was asked for and returns the answer."""
        question, arguments = self._question
        return getattr(self._emulators, question)(*arguments)

    def close(self) -> None:
        """Does nothing: emulators end with the process."""


class Worker:
    """Emulators of a process of their own."""

    def __init__(self, rules: Rules, envs: range, outcomes: np.ndarray, frames: np.ndarray) -> None:
        """Starts a process that plays environments `envs`; what it sends goes into `outcomes` and `frames`."""
        self._game, self._outcomes, self._frames = rules.game, outcomes, frames
        command = [sys.executable, "-c", START.format(path=sys.path)]
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # which a child inherits
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        assert isinstance(self._process.stdout, io.BufferedReader)
        self._answers = self._process.stdout
        self.pid = self._process.pid
        self._end = weakref.finalize(self, _end, self._process)
        self._asked = False
        self._send([asdict(rules), list(envs)])

    def ask(self, question: str, *arguments: Any) -> None:
        """Sends a question: the name of a method of `Emulators`.

        Raises:
            OSError: the worker has ended, or was interrupted in an answer.
        """
        if self._asked or not self._end.alive:
            raise OSError(f"an emulator process of {self._game} was interrupted or closed: make the environments anew")
        self._asked = True
        self._send([question, *arguments])

    def answer(self) -> Any:
        """Waits for the answer, and the outcomes and frames after it.

        Raises:
            OSError: the worker has ended.
            ValueError: it could not do what was asked for.
        """
        line = self._answers.readline()
        for array in (self._outcomes, self._frames):
            if self._answers.readinto(array.data) < array.nbytes:
                self._lost()
        self._asked = False
        error, answer = json.loads(line)
        if error:
            raise ValueError(error)
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._end()

    def _send(self, message: list[Any]) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._lost()

    def _lost(self) -> NoReturn:
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise OSError(
            f"an emulator process of {self._game} ended with {how} (out of memory?): go on from the last checkpoint"
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # it holds nothing that is not asked for
    process.communicate()


def serve() -> None:
    """Answers on the standard streams until they end."""
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that nothing else is written among the answers
    rules, envs = json.loads(questions.readline())
    outcomes, frames = np.zeros(len(envs), OUTCOME), np.zeros((len(envs), 84, 84), np.uint8)
    emulators = Emulators(Rules(**rules), envs, outcomes, frames)
    for line in questions:
        question, *arguments = json.loads(line)
        error = answer = None
        try:
            answer = getattr(emulators, question)(*arguments)
        except ValueError as complaint:
            error = str(complaint)
        answers.write(json.dumps([error, answer]).encode() + b"\n")
        answers.write(outcomes.data)
        answers.write(frames.data)
        answers.flush()
