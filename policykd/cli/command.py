"""What the commands share: one clear line for an error, exit codes, devices and threads."""

import ctypes
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Literal, NoReturn

import torch

from policykd.io.files import BadFile
from policykd.io.signals import noting_signals

DeviceName = Literal["auto", "cuda", "mps", "cpu"]

UNEXPECTED, USAGE, BAD_FILE, ENVIRONMENT, NUMERICS, INTERRUPTED = 1, 2, 3, 4, 5, 75
"""exit codes: a fault of ours; a flag, a name that leads nowhere, a package that is not installed; what a file holds;
disk, memory, permissions, network; numbers that are not finite; stopped by a signal: what was finished is saved, and
the same command (with --resume, where it has that) goes on"""


def exit_with_one_line(main: Callable[[], None]) -> NoReturn:
    """Runs a command; a failure becomes one line on standard error and an exit code, with --debug after its traceback.

    SIGINT and SIGTERM are noted for `check_interrupted` meanwhile.
    """
    if "--debug" not in sys.argv:
        threading.excepthook = lambda _: None  # a thread's error is ours once we ask for its result, TensorBoard's too
    try:
        with noting_signals():
            main()
            sys.stdout.flush()  # a full disk shows here, not after the exit code is decided
    except Exception as error:
        if "--debug" in sys.argv:  # not from the parsed arguments: parsing them may be what fails
            traceback.print_exc()
        _fail(*_explained(error))
    except KeyboardInterrupt as interrupt:
        saved = interrupt.args[0] if interrupt.args else "nothing is left half-written; run the same again"
        _fail(f"interrupted: {saved}", INTERRUPTED)
    sys.exit(0)


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Ends a command with one line where a package that it imports inside is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        _fail(f"{error}; this command needs another package: pip install 'policykd[{extra}]'", USAGE)


def prepare_device(name: DeviceName, threads: int) -> torch.device:
    """Returns the device to compute on, with `threads` CPU threads (0: as many as torch finds)."""
    if threads < 0:
        raise ValueError(f"--threads must not be negative, not {threads}; 0 takes all cores")
    if threads:
        torch.set_num_threads(threads)
    _keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # labels and Q-values keep float32's 24 bits
    available: dict[DeviceName, bool] = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise ValueError(f"--device {name}: torch {torch.__version__} finds none here; use --device cpu")
    return torch.device(name)


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    packages = ("policykd", "torch", "numpy", "ale-py", "opencv-python-headless", "gymnasium")
    return {"python": sys.version.split()[0]} | {package: version(package) for package in packages}


def _keep_freed_memory() -> None:
    """Stops glibc from handing every step's buffers back to the kernel and faulting them in again (docs/log.md)."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            m_trim_threshold, m_mmap_threshold = -1, -3
            libc.mallopt(m_trim_threshold, 2**31 - 1)
            libc.mallopt(m_mmap_threshold, 2**30)


def _explained(error: Exception) -> tuple[object, int]:
    """Returns what a user is told, and the exit code."""
    text = str(error).partition("\n")[0]
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at the exit
        return "nobody reads the output any more (broken pipe); send it to a file instead", ENVIRONMENT
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return (
            f"out of memory ({text[:200] or 'no more'}); free some, or play and learn in smaller batches",
            ENVIRONMENT,
        )
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else error, ENVIRONMENT
    for kind, code in ((BadFile, BAD_FILE), (ValueError, USAGE), (FloatingPointError, NUMERICS)):
        if isinstance(error, kind):
            return error, code
    advice = "run again with --debug for the traceback, and report it"
    return f"unexpected {type(error).__name__}: {text[:200]}; {advice}", UNEXPECTED


def _fail(reason: object, code: int) -> NoReturn:
    print(f"error: {' '.join(str(reason).split())}", file=sys.stderr)
    sys.exit(code)
