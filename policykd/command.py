"""What the commands share: one clear line for an error, exit codes, devices and threads."""

import ctypes
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Literal, NoReturn

import torch

DeviceName = Literal["auto", "cuda", "mps", "cpu"]

USAGE, ENVIRONMENT, NUMERICS, INTERRUPTED = 2, 4, 5, 75
"""exit codes: bad flag or file; disk, permissions, network; a loss that is not finite; stopped by a signal, saved"""


def exit_with_one_line(main: Callable[[], None]) -> NoReturn:
    """Runs a command; an expected failure becomes one line on standard error and an exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except ValueError as error:
        _fail(error, USAGE)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else error, ENVIRONMENT)
    except FloatingPointError as error:
        _fail(error, NUMERICS)
    except KeyboardInterrupt as interrupt:
        if not interrupt.args:
            _fail("interrupted before there was anything to save; start again", 128 + signal.SIGINT)
        _fail(f"interrupted: {interrupt.args[0]}", INTERRUPTED)
    sys.exit(0)


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


def _fail(error: object, code: int) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(code)
