"""Files of a generation: its manifest, which describes the states, and shards, which hold their arrays.

The bounds make hostile sizes impossible: nothing that passes them can ask for more memory than its files can hold.
Shards are compressed `.npz` files of plain numbers; their declared sizes are checked before anything is unpacked.
"""

import gzip
import io
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field

from policykd.envs.games import canonical_name
from policykd.io.files import BadFile
from policykd.replay import Replay

FORMAT = 3
"""1 and 2 were the separate formats of datasets and checkpoints"""
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


def _canonical(game: str) -> str:
    if canonical_name(game) != game:
        raise ValueError(f"not the canonical name of {canonical_name(game)}")
    return game


# Far above what is plausible, far below what overflows or could not be allocated.
Count = Annotated[int, Field(ge=0, le=1 << 40)]
Size = Annotated[int, Field(ge=1, le=1 << 16)]
Text = Annotated[str, Field(max_length=2000)]
GameName = Annotated[str, AfterValidator(_canonical)]
FileName = Annotated[str, Field(pattern=r"^[a-z]{1,20}-[0-9]{6,9}\.(json|npz|safetensors)$")]
"""a name without folders, so that a manifest cannot refer to a file elsewhere"""
DType = Literal["uint8", "float32", "float64"]
_DTYPES: dict[torch.dtype, DType] = {torch.uint8: "uint8", torch.float32: "float32", torch.float64: "float64"}
Unit = Literal["round", "step", "row"]
"""what a generation counts: rounds of a distillation, steps of an SB3 training, or rows of an import"""


@dataclass(frozen=True)
class TeacherRef:
    """The teacher whose outputs a dataset holds."""

    algorithm: Text
    sha256: Text
    """of its archive"""


@dataclass(frozen=True)
class Origin:
    """Where states came from."""

    source: Text
    """name of the recording or run"""
    preprocessing: Text = "policykd.envs"
    """how screens became frames"""
    game: GameName | None = None
    teacher: TeacherRef | None = None
    """None: the shards hold no outputs, or those of an unknown teacher"""


@dataclass(frozen=True)
class StatesInfo:
    """Description of the states in a dataset or in a run's checkpoints."""

    obs_shape: Annotated[tuple[Size, ...], Field(min_length=1, max_length=4)]
    dtype: DType
    """of a frame"""
    origin: Origin
    stack: Annotated[int, Field(ge=1, le=64)] = 1
    """frames that an observation stacks along its first axis; 1: an observation is one frame"""
    num_actions: Size | None = None
    num_envs: Size = 1
    """row n belongs to environment n mod `num_envs`"""

    def __post_init__(self) -> None:
        """Raises ValueError where stack and observation disagree."""
        if self.stack > 1 and (len(self.obs_shape) < 2 or self.obs_shape[0] != self.stack):
            raise ValueError(f"a stack of {self.stack} frames does not make observations {self.obs_shape}")

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """Shape of the newest frame of an observation, the only one that a row stores."""
        return self.obs_shape[1:] if self.stack > 1 else self.obs_shape

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's frame in memory."""
        return np.dtype(self.dtype).itemsize * math.prod(self.frame_shape)

    @property
    def layout(self) -> Layout:
        """Arrays that a shard of these states may hold: dtype and shape without rows, by name."""
        arrays: dict[str, tuple[str, tuple[int, ...]]] = {
            "frames": (self.dtype, self.frame_shape),
            "num_past_frames": ("uint8", ()),
            "context_only": ("bool", ()),
            "actions": ("int32", ()),
            "rewards": ("float32", ()),
            "starts": ("bool", ()),
        }
        return arrays if self.num_actions is None else {**arrays, "teacher": ("float32", (self.num_actions,))}


def describe(replay: Replay, origin: Origin) -> StatesInfo:
    """Returns a description of the states in a replay."""
    return StatesInfo(
        obs_shape=tuple(replay.obs_shape),
        dtype=_DTYPES[replay.frames.dtype],
        origin=origin,
        stack=replay.stack,
        num_actions=replay.teacher_NA.shape[1],
        num_envs=replay.num_envs,
    )


@dataclass(frozen=True)
class FileEntry:
    """A file of a generation."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    num_bytes: Count


@dataclass(frozen=True)
class ShardEntry(FileEntry):
    """A file that holds rows of states."""

    first_row: Count
    """number of its first row among all rows that were ever added"""
    num_rows: Annotated[int, Field(ge=1, le=1 << 40)]
    num_states: Count
    """rows except those that only complete the stacks of later states"""


def _is_readable(version: int) -> int:
    if version != FORMAT:
        raise ValueError(f"of format {version}, this policykd reads {FORMAT}; update policykd")
    return version


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of `manifest-NNNNNN.json`: the files that make up one generation."""

    # The first field, so that its error is the one that is reported.
    format: Annotated[int, AfterValidator(_is_readable)] = FORMAT
    number: Annotated[int, Field(ge=1, lt=10**9)] = 1
    unit: Unit
    position: Count
    """progress in units, such as the number of completed rounds"""
    files: dict[FileName, FileEntry] = field(default_factory=dict)
    shards: dict[FileName, ShardEntry] = field(default_factory=dict)
    """in the order of their rows"""
    states: StatesInfo | None = None
    """None: the shards hold no states that a dataset could, such as SB3's replay buffer"""
    is_complete: bool = True
    """false until an import has reached the end of its source"""


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
