"""Locks on folders: one process at a time writes into one."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

LOCK = ".lock"
"""file in a locked folder; it contains the process and host that hold the lock"""


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder, which is created if necessary; the lock of a killed process is void.

    Raises:
        OSError: another process holds the lock, or the folder is not writable.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / LOCK
    lock = FileLock(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not a single attempt, which fails in the instant in which the previous holder removes the file.
        lock.acquire(timeout=0.1, poll_interval=0.02)
        # Without flock (some network file systems) filelock keeps a record of its own in the file.
        is_soft = isinstance(lock, SoftFileLock)
        if not is_soft:
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    except Timeout:
        reason = f"locked by {_holder(path)}; wait for it or give another --name"
        raise OSError(errno.EAGAIN, reason, str(path)) from None
    except OSError as error:
        reason = f"{error.strerror}; the folder must be writable, give another one"
        raise OSError(error.errno, reason, error.filename or str(path)) from error
    try:
        yield
    finally:
        # Unlinked while it is still locked, so that a process which already opened the file notices and starts over.
        if not is_soft:
            with contextlib.suppress(OSError):
                path.unlink()
        lock.release()
        with contextlib.suppress(OSError):
            for path in created:  # innermost first; fails where something was written
                path.rmdir()


def _holder(path: Path) -> str:
    """Returns who holds a lock, from the lock file's text."""
    with contextlib.suppress(OSError):
        return " ".join(path.read_text(errors="replace")[:200].split()) or "another process"
    return "another process"
