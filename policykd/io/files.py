"""Atomic files, complete under their final name or absent, and locks that keep other processes out of a folder."""

import contextlib
import errno
import hashlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

LOCK = ".lock"
"""file in a locked folder; it contains the process and host that hold the lock"""
_TEMP_NAME = re.compile(r"\..+\.(\d{1,9})\.policykd\.tmp")
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_open_temp_files: set[Path] = set()


class BadFile(ValueError):  # noqa: N818
    """A user's file, folder or archive is damaged, unsafe or of another kind; one line that begins with its name."""


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that survives a power cut once this returns; the previous content stays until then.

    Raises:
        OSError: no space left or no permission; no temporary file stays.
    """
    # First the content, then its name: the other order could leave a name without content.
    replace_file(path, content)
    sync_folder(path.parent)
    remove_stale_temp_files(path.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file atomically, but a power cut may undo it until `sync_folder` is called.

    Raises:
        OSError: no space left or no permission; no temporary file stays.
    """
    # The process's id in the name tells later processes whether the writer is still alive.
    temp = path.with_name(f".{path.name}.{os.getpid()}.policykd.tmp")
    _open_temp_files.add(temp)
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            sync_folder(path.parent.parent)
        with temp.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
    except OSError as error:
        needed = f"{len(content):,} bytes were needed, " if error.errno in _OUT_OF_SPACE else ""
        raise OSError(error.errno, f"{error.strerror}; {needed}nothing was overwritten", str(path)) from error
    finally:
        _open_temp_files.discard(temp)
        with contextlib.suppress(OSError):
            temp.unlink()  # absent after success


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        os.close(descriptor)


def remove_stale_temp_files(folder: Path) -> None:
    """Removes the temporary files that killed processes left in a folder."""
    for path in folder.iterdir():
        match = _TEMP_NAME.fullmatch(path.name)
        if match and path not in _open_temp_files and not _is_another_process(int(match[1])):
            with contextlib.suppress(OSError):
                path.unlink()


def read_verified(path: Path, sha256: str, next_step: str) -> bytes:
    """Returns the content of a file whose sha256 is known.

    Raises:
        BadFile: not found, or of another content; the line ends with `next_step`.
        PermissionError: not readable for this user.
    """
    # A missing file is damage here, because somebody has recorded that it was complete; a lack of rights is not.
    try:
        content = path.read_bytes()
    except PermissionError:
        raise
    except OSError as error:
        raise BadFile(f"{path}: damaged ({error.strerror}){next_step}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise BadFile(f"{path}: damaged (its sha256 differs from the recorded one){next_step}")
    return content


def _is_another_process(pid: int) -> bool:
    """Returns whether a process of that id is running that is not this one.

    In containers a killed process and its successor often have the same id, so this process's own is not another.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it belongs to another user
    return pid != os.getpid()


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
