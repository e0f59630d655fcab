"""One shard of states: an `.npz` of numbers, read only if it is the file that the manifest means.

Suffixes name dimensions: N rows, A actions.
"""

import gzip
import io
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from policykd.io.files import BadFile, read_verified

Arrays = dict[str, np.ndarray]
Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""of each array that a shard may hold: its dtype, and its shape after the rows"""

MAX_RATIO = 1032
"""how many zeros a byte of deflate can stand for at most"""

LEVEL = 3
"""of compression: 2.7 times as fast as zlib's own choice, for 1.75 times the bytes (2,000 states of Pong)"""

UNREADABLE = (ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)
"""what reading an `.npz` raises that is none, or is damaged"""


def layout(dtype: str, frame_shape: tuple[int, ...], num_actions: int | None) -> Layout:
    """Returns what a shard may hold; `frames` and `pasts` it must."""
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {
        "frames": (dtype, frame_shape),
        "pasts": ("uint8", ()),
        "history": ("bool", ()),
        "actions": ("int32", ()),
        "rewards": ("float32", ()),
        "starts": ("bool", ()),
    }
    return arrays if num_actions is None else {**arrays, "scores": ("float32", (num_actions,))}


def compressed(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Returns arrays as the content of a compressed `.npz` file, always the same bytes for the same numbers."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=LEVEL) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return content.getvalue()


def unpacked(content: bytes, path: Path) -> Arrays:
    """Returns the arrays of the `.npz` file `path`.

    Raises:
        BadFile: it is none.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except UNREADABLE as error:
        raise BadFile(f"{path}: not a shard of numbers ({error}); import or copy it again") from error


def read_shard(path: Path, sha256: str, expected: Layout, max_rows: int) -> Arrays:
    """Returns the arrays of a shard; nothing is unpacked before its hash and every declared size are right.

    Raises:
        BadFile: missing, other content than the manifest's, or arrays of another layout.
    """
    content = read_verified(path, sha256, "; import or copy the dataset again")
    try:
        if wrong := _differences(declared_arrays(content), expected, max_rows):
            raise ValueError("; ".join(wrong))
    except UNREADABLE as error:
        raise BadFile(f"{path}: not a shard of this dataset ({error}); import or copy the dataset again") from error
    return unpacked(content, path)


def declared_arrays(content: bytes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns name, dtype and shape of every array in an `.npz`, from its headers alone.

    Raises:
        ValueError, zipfile.BadZipFile, zlib.error, EOFError: not an `.npz`, or one that holds objects.
    """
    declared = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if len(members := archive.namelist()) != len(set(members)):
            raise ValueError("two members of one name")
        for member in members:
            with archive.open(member) as stream:
                declared[member.removesuffix(".npy")] = npy_header(stream)
    return declared


def npy_header(stream: IO[bytes] | gzip.GzipFile) -> tuple[str, tuple[int, ...]]:
    """Returns dtype and shape that a `.npy` declares, leaving the stream where its numbers begin.

    Raises:
        ValueError: not a `.npy`, or not one of plain numbers.
    """
    read_header = np.lib.format.read_array_header_1_0
    if np.lib.format.read_magic(stream) != (1, 0):
        read_header = np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(stream)
    if dtype.kind not in "buif" or fortran_order:
        raise ValueError(f"it holds {dtype}{' in Fortran order' if fortran_order else ''}, not plain numbers")
    return str(dtype), tuple(shape)


def _differences(declared: Layout, expected: Layout, max_rows: int) -> list[str]:
    if missing := sorted({"frames", "pasts"} - declared.keys()):
        return [f"no {' and no '.join(missing)}"]
    num_rows = declared["pasts"][1][0] if declared["pasts"][1] else 0
    if not 1 <= num_rows <= max_rows:
        return [f"declares {num_rows:,} rows, the manifest leaves {max_rows:,} for it"]
    wrong = []
    for name, found in declared.items():
        if name not in expected:
            wrong.append(f"unknown array {name!r}")
        elif found != (wanted := (expected[name][0], (num_rows, *expected[name][1]))):
            wrong.append(f"{name}: expected {wanted[0]} {wanted[1]}, found {found[0]} {found[1]}")
    return wrong


def row_bytes(expected: Layout) -> int:
    """Returns the bytes of a row's frame in memory."""
    dtype, shape = expected["frames"]
    return np.dtype(dtype).itemsize * math.prod(shape)
