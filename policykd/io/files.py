"""Files that are there whole or not at all."""

import contextlib
import errno
import hashlib
import os
import re
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.(\d{1,9})\.policykd\.tmp")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_being_written: set[Path] = set()


class BadFile(ValueError):  # noqa: N818
    """A user's file, folder or archive holds what is damaged, unsafe or not what it should be: one line, its name."""


def write_atomically(path: Path, content: bytes) -> None:
    """Puts a file under its final name only once all of it is on the disk; the one before stays until then.

    Raises:
        OSError: no room or no permission; nothing is left behind.
    """
    replace_file(path, content)
    sync_folder(path.parent)
    sweep(path.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Does as `write_atomically`, but the name may not outlive a power cut before `sync_folder`.

    Raises:
        OSError: no room or no permission; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.policykd.tmp")
    _being_written.add(temporary)
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            sync_folder(path.parent.parent)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        needed = f"{len(content):,} bytes were needed, " if error.errno in _NO_ROOM else ""
        raise OSError(error.errno, f"{error.strerror}; {needed}nothing was overwritten", str(path)) from error
    finally:
        _being_written.discard(temporary)
        with contextlib.suppress(OSError):
            temporary.unlink()  # which is gone where it took its final name


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder outlive a power cut."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        os.close(directory)


def sweep(folder: Path) -> None:
    """Removes the temporary files that killed processes left in a folder."""
    for path in folder.iterdir():
        if (match := _TEMPORARY.fullmatch(path.name)) and path not in _being_written and not _is_another(int(match[1])):
            with contextlib.suppress(OSError):
                path.unlink()


def read_verified(path: Path, sha256: str, next_step: str) -> bytes:
    """Returns the content of a file whose sha256 is known.

    Raises:
        BadFile: missing, not readable or another content; it ends with `next_step`.
    """
    try:
        content = path.read_bytes()
    except PermissionError:
        raise
    except OSError as error:
        raise BadFile(f"{path}: damaged ({error.strerror}){next_step}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise BadFile(f"{path}: damaged (its sha256 is not the one that was written down){next_step}")
    return content


def _is_another(pid: int) -> bool:
    """Returns whether another process of that number lives."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # of another user
    return pid != os.getpid()
