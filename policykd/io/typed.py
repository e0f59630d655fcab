"""The one reader of JSON files that somebody else may have written: bounded in size, checked against a type.

A type is a frozen dataclass (nested ones, tuples, dicts, unions and `Literal` are fine); its bounds are
`Annotated[int, Field(ge=1)]`. Whatever is wrong with a file becomes one `BadFile` with one line of text.
"""

import math
import os
import stat
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from policykd.io.files import BadFile, write_atomically

T = TypeVar("T")

MAX_JSON_BYTES = 64 * 2**20
"""size cap of a JSON file; the largest that policykd writes (every episode of a study) has a few megabytes"""
_MAX_MESSAGE = 200


def read_json(kind: type[T], path: Path, *, next_step: str = "", max_bytes: int = MAX_JSON_BYTES) -> T:
    """Returns the content of a JSON file as a dataclass.

    Args:
        kind: the dataclass that the file holds.
        path: a regular file.
        next_step: what the user can do about an invalid file, such as "copy the folder again".
        max_bytes: size above which the file is refused unread.

    Raises:
        BadFile: not found, not a regular file, too large, not JSON, or not of this type.
        PermissionError: not readable.
    """
    return parse_json(kind, read_bounded(path, max_bytes, next_step=next_step), path, next_step=next_step)


def parse_json(kind: type[T], content: bytes | str, name: str | Path, *, next_step: str = "") -> T:
    """Returns JSON text as a dataclass; `name` is the file that errors refer to.

    Raises:
        BadFile: not JSON, or not of this type.
    """
    adapter: TypeAdapter[T] = _adapter(kind)  # type: ignore[arg-type]  # every class is hashable
    try:
        # Pydantic cannot forbid infinite numbers in dataclasses, so the plain JSON is looked at first.
        _check_finite(from_json(content, allow_inf_nan=False))
        return adapter.validate_json(content)
    except ValidationError as error:
        # Only the first error: the others often follow from it.
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        reason = f"{field}: {first['msg']}" if field else first["msg"]
        raise BadFile(_with_next_step(f"{name}: invalid ({one_line(reason)})", next_step)) from error
    except ValueError as error:
        raise BadFile(_with_next_step(f"{name}: invalid ({one_line(str(error))})", next_step)) from error


def to_json(value: object, *, indent: int | None = 1) -> bytes:
    """Returns a dataclass as JSON, with a newline at the end; what `parse_json` reads back."""
    kind: Any = type(value)
    return _adapter(kind).dump_json(value, indent=indent) + b"\n"


def write_json(path: Path, value: object) -> None:
    """Writes a dataclass as JSON, atomically.

    Raises:
        OSError: no space left or no permission; the previous file stays.
    """
    write_atomically(path, to_json(value))


def read_bounded(path: Path, max_bytes: int, *, next_step: str = "") -> bytes:
    """Returns the content of a regular file of at most `max_bytes`.

    Raises:
        BadFile: not found, a FIFO, device or folder, or too large.
        PermissionError: not readable.
    """
    try:
        # O_NONBLOCK: opening a FIFO that nobody writes to would otherwise wait forever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadFile(_with_next_step(f"{one_line(str(path))}: {reason}", next_step)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadFile(_with_next_step(f"{path}: not a regular file", next_step))
    # One byte more than allowed is enough to know, whatever size the file claims to have.
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise BadFile(_with_next_step(f"{path}: larger than {max_bytes:,} bytes", next_step))
    return content


def one_line(text: str) -> str:
    """Returns text from a foreign file for an error message: one line, control characters escaped, shortened."""
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
    return escaped if len(escaped) <= _MAX_MESSAGE else f"{escaped[:_MAX_MESSAGE]}..."


def _with_next_step(message: str, next_step: str) -> str:
    return f"{message}; {next_step}" if next_step else message


def _check_finite(value: object) -> None:
    """Raises ValueError for an infinite number, which is what JSON such as 1e999 becomes."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number that is not finite")
    if isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            _check_finite(part)


@lru_cache(maxsize=256)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
