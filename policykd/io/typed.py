"""The one reader of JSON and array files that somebody else may have written: bounded in size, checked against a type.

A type is a frozen dataclass (nested ones, tuples, dicts, unions and `Literal` are fine); its bounds are
`Annotated[int, Field(ge=1)]`. Whatever is wrong with a file becomes one `BadFile` with one line of text.
"""

import gzip
import io
import math
import os
import stat
import zipfile
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from policykd.io.files import BadFile, write_atomically

T = TypeVar("T")

MAX_JSON_BYTES = 64 * 2**20
"""size cap of a JSON file; the largest that policykd writes (every episode of a study) has a few megabytes"""
_MAX_MESSAGE = 200

Arrays = dict[str, np.ndarray]
Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""dtype and shape of every array, by name"""

MAX_RATIO = 1032
"""maximum compression ratio of deflate: no file of n bytes holds more than n times as many zeros"""

LEVEL = 3
"""zlib level: 2.7 times as fast as zlib's default, for 1.75 times the bytes (2,000 states of Pong)"""

UNREADABLE = (ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)
"""exceptions that reading a damaged `.npz` raises"""


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


def pack_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Returns arrays as a compressed `.npz` file: always the same bytes for the same numbers."""
    content = io.BytesIO()
    # Not np.savez_compressed, which stores the current time and knows no compression level.
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=LEVEL) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return content.getvalue()


def unpack_arrays(content: bytes, path: Path, layout: Layout | None = None, num_rows: int = 0) -> Arrays:
    """Returns the arrays of an `.npz` file.

    Args:
        content: of the file.
        path: its name in error messages.
        layout: dtypes and shapes (without rows) that the arrays may have; checked before memory is allocated for them.
        num_rows: rows that every array must have, given a layout.

    Raises:
        BadFile: not an `.npz` of plain numbers, or arrays of another layout.
    """
    try:
        if layout is not None:
            _check_layout(_declared_arrays(content), layout, num_rows)
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except UNREADABLE as error:
        raise BadFile(f"{path}: not a shard of this dataset ({error}); import or copy the dataset again") from error


def _declared_arrays(content: bytes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns name, dtype and shape of every array in an `.npz`, from the headers alone."""
    declared = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.namelist()
        if len(members) != len(set(members)):
            raise ValueError("two members have the same name")
        # Only the headers are decompressed here, so a bomb costs nothing.
        for member in members:
            with archive.open(member) as stream:
                declared[member.removesuffix(".npy")] = npy_header(stream)
    return declared


def npy_header(stream: IO[bytes] | gzip.GzipFile) -> tuple[str, tuple[int, ...]]:
    """Returns dtype and shape of a `.npy`, and leaves the stream at its first number.

    Raises:
        ValueError: not a `.npy` of plain numbers.
    """
    read_header = np.lib.format.read_array_header_1_0
    if np.lib.format.read_magic(stream) != (1, 0):
        read_header = np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(stream)
    # Objects would be unpickled; Fortran order would need the array twice.
    if dtype.kind not in "buif" or fortran_order:
        raise ValueError(f"it holds {dtype}{' in Fortran order' if fortran_order else ''}, not plain numbers")
    return str(dtype), tuple(shape)


def _check_layout(declared: Layout, layout: Layout, num_rows: int) -> None:
    if missing := {"frames", "num_past_frames"} - declared.keys():
        raise ValueError(f"array {min(missing)!r} not found")
    for name, (dtype, shape) in declared.items():
        if name not in layout:
            raise ValueError(f"unknown array {name!r}")
        expected_dtype, row_shape = layout[name]
        if (dtype, shape) != (expected_dtype, (num_rows, *row_shape)):
            raise ValueError(f"{name}: expected {expected_dtype} {(num_rows, *row_shape)}, found {dtype} {shape}")
