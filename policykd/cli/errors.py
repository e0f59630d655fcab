"""Errors of commands: one line on standard error, and an exit code."""

import errno
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from policykd.io.files import BadFile
from policykd.io.signals import handle_signals, is_signalled

UNEXPECTED = 1
"""a bug in policykd"""
USAGE = 2
"""a flag, a reference that is not found, a package that is not installed"""
BAD_FILE = 3
"""the content of a file"""
ENVIRONMENT = 4
"""disk, memory, permissions, network, a locked folder"""
NUMERICS = 5
"""numbers that are not finite"""
INTERRUPTED = 75
"""a signal; what was finished is saved, and the same command (with --resume, where it has that) continues"""


def run_cli(command: Callable[[], None]) -> NoReturn:
    """Runs a command and ends the process; an error becomes one line and an exit code.

    With --debug its traceback is printed before that line. SIGINT and SIGTERM raise KeyboardInterrupt meanwhile.
    """
    if not _is_debugging():
        # The error of a background thread reaches the main thread with its result; TensorBoard's writer prints its own.
        threading.excepthook = lambda _: None
    try:
        with handle_signals():
            try:
                command()
                sys.stdout.flush()  # a full disk must show here, while the exit code can still change
            except Exception as error:
                # C extensions turn a KeyboardInterrupt inside them into errors of their own, such as ImportError.
                if is_signalled():
                    raise KeyboardInterrupt from error
                raise
    except Exception as error:
        if _is_debugging():
            traceback.print_exc()
        _fail(*_explained(error))
    except KeyboardInterrupt as interrupt:
        advice = interrupt.args[0] if interrupt.args else "no file is left incomplete; run the same command again"
        _fail(f"interrupted: {advice}", INTERRUPTED)
    sys.exit(0)


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Ends a command with one line if a package imported inside is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        _fail(f"{error}; this command needs another package: pip install 'policykd[{extra}]'", USAGE)


def _is_debugging() -> bool:
    """Returns whether --debug was given; not from the parsed arguments, because parsing them may be what fails."""
    return "--debug" in sys.argv


def _explained(error: Exception) -> tuple[object, int]:
    """Returns the line for the user, and the exit code."""
    text = str(error).partition("\n")[0]
    if isinstance(error, BrokenPipeError):
        # Python flushes standard output once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "broken pipe: standard output was closed; send it to a file instead", ENVIRONMENT
    if _is_out_of_memory(error, text):
        return f"out of memory ({text[:200] or 'no details'}); free some, or use smaller batches", ENVIRONMENT
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else error, ENVIRONMENT
    # BadFile is a ValueError, so it comes first.
    for kind, code in ((BadFile, BAD_FILE), (ValueError, USAGE), (FloatingPointError, NUMERICS)):
        if isinstance(error, kind):
            return error, code
    advice = "run again with --debug for the traceback, and report it"
    return f"unexpected {type(error).__name__}: {text[:200]}; {advice}", UNEXPECTED


def _is_out_of_memory(error: Exception, text: str) -> bool:
    # By its name, because importing torch only to look at an error takes seconds.
    is_torchs = type(error).__name__ == "OutOfMemoryError"
    is_os = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or is_torchs or is_os or "can't allocate memory" in text


def _fail(reason: object, code: int) -> NoReturn:
    print(f"error: {' '.join(str(reason).split())}", file=sys.stderr)
    sys.exit(code)
