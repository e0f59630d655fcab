"""SIGINT and SIGTERM: both raise KeyboardInterrupt in the main thread, a second one ends the process.

A command runs inside `handle_signals`. What must not be cut, such as a commit of several files, runs inside
`deferred_signals`. Python delivers signals to the main thread only, so a loop in a background thread calls
`check_interrupted`.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_is_signalled = False
_num_deferring = 0


def check_interrupted() -> None:
    """Raises KeyboardInterrupt once a signal has arrived; for loops in background threads."""
    if _is_signalled:
        raise KeyboardInterrupt


def is_signalled() -> bool:
    """Returns whether a signal has arrived since `handle_signals` began."""
    return _is_signalled


@contextmanager
def handle_signals() -> Iterator[None]:
    """Turns SIGINT and SIGTERM into KeyboardInterrupt; the previous handlers are restored at the end.

    A second signal ends the process at once. That loses nothing: every file is complete under its name or absent.
    Only the main thread may call this.
    """
    global _is_signalled
    previous = {number: signal.signal(number, _on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _is_signalled = False
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Postpones the KeyboardInterrupt of a signal to the end of the block; no effect in background threads.

    Keep the block short: a second signal still ends the process.
    """
    global _num_deferring
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _num_deferring += 1
    try:
        yield
    finally:
        _num_deferring -= 1
    # Also where the KeyboardInterrupt of an earlier signal was swallowed, as Python does in destructors and callbacks.
    if not _num_deferring:
        check_interrupted()


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _is_signalled
    if _is_signalled:
        os._exit(128 + number)
    _is_signalled = True
    # Not print: the signal may have arrived in the middle of one, whose lock is then held.
    os.write(2, b"\nstopping; press Ctrl-C again to stop at once\n")
    if not _num_deferring:
        raise KeyboardInterrupt
