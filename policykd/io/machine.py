"""The machine a result depends on: device, CPU threads, versions of packages."""

import ctypes
import sys
from importlib.metadata import version
from typing import Literal

import torch

DeviceName = Literal["auto", "cuda", "mps", "cpu"]
_PACKAGES = ("policykd", "torch", "numpy", "ale-py", "opencv-python-headless", "gymnasium")


def prepare_device(name: DeviceName, threads: int) -> torch.device:
    """Returns the device to compute on, and sets the number of CPU threads (0: as many as torch finds).

    Raises:
        ValueError: the device is not available, or a negative number of threads.
    """
    if threads < 0:
        raise ValueError(f"--threads must be at least 0, not {threads}; 0 takes all cores")
    if threads:
        torch.set_num_threads(threads)
    _keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # teacher outputs keep float32's 24 bits
    # In the order in which "auto" takes them.
    available: dict[DeviceName, bool] = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, is_available in available.items() if is_available)
    if not available.get(name):
        raise ValueError(f"--device {name}: not available in torch {torch.__version__}; use --device cpu")
    return torch.device(name)


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on, by package."""
    return {"python": sys.version.split()[0]} | {package: version(package) for package in _PACKAGES}


def _keep_freed_memory() -> None:
    """Keeps glibc from returning each step's buffers to the kernel, which costs page faults (docs/log.md)."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            m_trim_threshold = -1
            m_mmap_threshold = -3
            libc.mallopt(m_trim_threshold, 2**31 - 1)
            libc.mallopt(m_mmap_threshold, 2**30)
