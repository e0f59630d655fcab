"""SIGINT and SIGTERM as a question that every loop asks, so that nothing is cut in the middle."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_signalled_at: float | None = None
_num_interruptible = 0


def check_interrupted() -> None:
    """Raises KeyboardInterrupt once SIGINT or SIGTERM has come; any thread may ask."""
    if _signalled_at is not None:
        raise KeyboardInterrupt


def seconds_since_signal() -> float:
    """Returns how long ago the first signal came, 0.0 if none has; for loops whose next safe point is far away."""
    return 0.0 if _signalled_at is None else max(1e-9, time.monotonic() - _signalled_at)


@contextmanager
def noting_signals() -> Iterator[None]:
    """Makes SIGINT and SIGTERM a note that `check_interrupted` reads; a second signal ends the process at once.

    For the main thread, around a whole command; the handlers before come back at the end.
    """
    global _signalled_at
    before = {number: signal.signal(number, _note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _signalled_at = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruptible() -> Iterator[None]:
    """Lets a signal stop what is inside at once, by KeyboardInterrupt: for calls that take long and do not ask.

    Only around what may be cut anywhere, such as a download. Python interrupts the main thread alone, so another one is
    not stopped in the middle.
    """
    global _num_interruptible
    is_main = threading.current_thread() is threading.main_thread()
    _num_interruptible += is_main
    try:
        check_interrupted()
        yield
    finally:
        _num_interruptible -= is_main


def _note(number: int, frame: FrameType | None) -> None:
    global _signalled_at
    if _signalled_at is not None:
        os._exit(128 + number)  # every file is under its name whole or not at all, so nothing needs to be tidied up
    _signalled_at = time.monotonic()
    os.write(2, b"\nstopping at the next safe point; again to stop at once\n")  # print may be what was interrupted
    if _num_interruptible:
        raise KeyboardInterrupt
