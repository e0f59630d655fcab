"""Files that are there whole or not at all."""

import os
from pathlib import Path


class BadFile(ValueError):
    """What a user's file, folder or archive holds is damaged, unsafe or not what it should be: one line with its name."""


def write_atomically(path: Path, content: bytes) -> None:
    """Puts a file under its final name only once all of it is on the disk; the one before stays until then.

    Raises:
        OSError: no room or no permission; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except KeyboardInterrupt:
        temporary.unlink(missing_ok=True)
        raise
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror}; nothing was overwritten", str(path)) from error
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
