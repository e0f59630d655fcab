"""Shards: compressed `.npz` files of plain numbers, whose declared sizes are checked before anything is unpacked."""

import gzip
import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from policykd.io.files import BadFile

Arrays = dict[str, np.ndarray]
Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""dtype and shape of every array, by name"""

MAX_RATIO = 1032
"""maximum compression ratio of deflate: no file of n bytes holds more than n times as many zeros"""

LEVEL = 3
"""zlib level: 2.7 times as fast as zlib's default, for 1.75 times the bytes (2,000 states of Pong)"""

UNREADABLE = (ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)
"""exceptions that reading a damaged `.npz` raises"""

REQUIRED = ("frames", "num_past_frames")
"""arrays that every shard of states has"""


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
    for name in REQUIRED:
        if name not in declared:
            raise ValueError(f"array {name!r} not found")
    for name, (dtype, shape) in declared.items():
        if name not in layout:
            raise ValueError(f"unknown array {name!r}")
        expected_dtype, row_shape = layout[name]
        if (dtype, shape) != (expected_dtype, (num_rows, *row_shape)):
            raise ValueError(f"{name}: expected {expected_dtype} {(num_rows, *row_shape)}, found {dtype} {shape}")
