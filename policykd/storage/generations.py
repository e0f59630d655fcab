"""A folder of generations: files that belong together, and a manifest that lists them by their sha256.

`manifest-000012.json` is the manifest of generation 12. It is written last, so a generation is complete or absent
whenever the process is killed or the disk fills up. No file of a complete generation is overwritten, and the previous
generation is kept in case the newest is damaged. Nothing in the folder is a pickle: states are in shards, compressed
`.npz` files of plain numbers. Sizes are bounded: no file can ask for more memory than its bytes can hold.
"""

import hashlib
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field

from policykd.io.files import BadFile, remove_stale_temp_files, replace_file, sync_folder
from policykd.io.signals import deferred_signals
from policykd.io.typed import (
    MAX_JSON_BYTES,
    Arrays,
    Layout,
    pack_arrays,
    parse_json,
    read_bounded,
    to_json,
    unpack_arrays,
)
from policykd.replay import Replay

FORMAT = 3
MANIFEST = "manifest"

_NAME = re.compile(r"([a-z]+)-(\d{6,9})\.(json|npz|safetensors)")

# Far above what is plausible, far below what overflows or could not be allocated.
Count = Annotated[int, Field(ge=0, le=1 << 40)]
Size = Annotated[int, Field(ge=1, le=1 << 16)]
Text = Annotated[str, Field(max_length=2000)]
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
    """hash of its archive"""


@dataclass(frozen=True)
class Origin:
    """Where states came from."""

    source: Text
    """name of the recording or run"""
    preprocessing: Text = "policykd.envs"
    """how screens became frames"""
    game: Text | None = None
    teacher: TeacherRef | None = None
    """None: the shards hold no outputs, or those of an unknown teacher"""


@dataclass(frozen=True)
class StatesInfo:
    """Description of the states in a dataset or in a run's checkpoints."""

    obs_shape: Annotated[tuple[Size, ...], Field(min_length=1, max_length=4)]
    dtype: DType
    """type of a frame's numbers"""
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


class Damaged(BadFile):
    """One generation is damaged; the previous one may be intact."""


@dataclass(frozen=True)
class Generation:
    """A generation whose manifest has been read; its files are verified whenever they are read."""

    folder: Path
    manifest: Manifest

    def __str__(self) -> str:
        return f"{self.manifest.unit} {self.manifest.position:,}"

    @property
    def files(self) -> dict[str, FileEntry]:
        """All files, the shards included."""
        return {**self.manifest.files, **self.manifest.shards}

    def read(self, name: str) -> bytes:
        """Returns the content of one of the files.

        Raises:
            Damaged: missing, or not the content that was committed.
        """
        path = self.folder / name
        entry = self.files[name]
        # The size first: a file that grew, by damage or by intent, is never read into memory.
        content = _read(path, entry.num_bytes)
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise Damaged(f"{path}: damaged (its sha256 is not the one in the manifest)")
        return content

    def read_kind(self, kind: str) -> bytes:
        """Returns the content of the file of one kind, such as `model`."""
        return self.read(next(name for name in self.manifest.files if name.startswith(f"{kind}-")))

    def read_shards(self) -> Iterator[tuple[str, Arrays]]:
        """Yields name and arrays of every shard in order; states are checked against their description first."""
        layout = self.manifest.states.layout if self.manifest.states else None
        for name, shard in self.manifest.shards.items():
            yield name, unpack_arrays(self.read(name), self.folder / name, layout, shard.num_rows)


def has_generations(folder: Path) -> bool:
    """Returns whether a folder holds a generation, intact or damaged.

    Raises:
        BadFile: it holds files of generations without their manifests.
    """
    if _numbers(folder):
        return True
    # A first commit that was killed leaves files of number 1 behind; the next commit replaces them.
    if any(_number(path.name) > 1 for path in _files(folder)):
        raise BadFile(
            f"{folder}: holds files of checkpoints or datasets but no manifest; copy {MANIFEST}-*.json back, or use"
            " another folder or --name"
        )
    return False


def newest(folder: Path, unit: Unit | None = None) -> Generation:
    """Returns the newest intact generation, and prints a warning if a newer one is damaged; nothing is changed.

    Args:
        folder: may be written to at the same time.
        unit: what the generations must count. None: any, and of their files only the shards are verified, because
            only the states are wanted.

    Raises:
        BadFile: no generation, none that is intact, or one of another kind.
    """
    if not has_generations(folder):
        raise BadFile(f"{folder}: no checkpoint to resume from; start without --resume")
    numbers = _numbers(folder)
    problems = list[str]()
    # A manifest that somebody deleted leaves its files behind; so does a commit that was killed.
    lost = max((path for path in _files(folder) if _number(path.name) > numbers[0]), default=None)
    if unit and lost:
        problems.append(f"{lost}: belongs to a generation without a manifest")
    # From the newest to the oldest, until all files of one are what was committed.
    for number in numbers:
        try:
            generation = _read_generation(folder, number, unit)
            for name in generation.files if unit else generation.manifest.shards:
                generation.read(name)
        except Damaged as error:
            problems.append(str(error))
            continue
        if problems:
            print(f"warning: {'; '.join(problems)}; continuing from {generation}, the previous one", file=sys.stderr)
        return generation
    if _numbers(folder) != numbers:  # two commits were made meanwhile and removed what was being read
        return newest(folder, unit)
    raise BadFile(
        f"{folder}: no intact generation: {'; '.join(problems)}; copy the files back, or use another folder or --name"
    )


def recover(folder: Path, unit: Unit) -> Generation:
    """Returns the newest intact generation, and removes the manifests of newer ones, which are damaged.

    The next commit then continues from it.

    Raises:
        BadFile: see `newest`.
        OSError: no permission.
    """
    generation = newest(folder, unit)
    for number in _numbers(folder):
        if number > generation.manifest.number:
            (folder / _name(number=number)).unlink()
    return generation


def last(folder: Path, unit: Unit, *, max_position: int | None = None) -> Generation | None:
    """Returns the last generation that was committed; only its manifest is verified.

    Raises:
        BadFile: it is of another kind.
        ValueError: it is at a later position than the run that asks, so it belongs to another run.
    """
    for number in _numbers(folder):
        try:
            generation = _read_generation(folder, number, unit)
        except Damaged:
            continue
        if max_position is not None and generation.manifest.position > max_position:
            raise ValueError(f"{folder}: holds the checkpoints of another run; use another folder")
        return generation
    return None


def commit(
    folder: Path,
    previous: Generation | None,
    manifest: Manifest,
    files: Mapping[str, bytes] | None = None,
    new_rows: Arrays | None = None,
    first_row: int = 0,
) -> Generation:
    """Writes a generation, then removes all others except the previous one.

    Args:
        folder: created if missing.
        previous: the generation that this one continues from: the `last`.
        manifest: with those shards of the previous generation that belong to this one too; number, new files and new
            shard are filled in.
        files: kind and ending, such as `model.safetensors` -> content.
        new_rows: rows for one more shard, if any.
        first_row: number of the first new row.

    Raises:
        OSError: no space left or no permission; the previous generation stays intact.
    """
    # New names throughout, so that nothing of a complete generation is ever overwritten.
    number = 1 + max(_numbers(folder), default=0)
    contents = {_name(*name.split("."), number=number): content for name, content in (files or {}).items()}
    entries = {name: FileEntry(_sha256(content), len(content)) for name, content in contents.items()}
    shards = dict(manifest.shards)
    if new_rows:
        content = pack_arrays(new_rows)
        num_rows = len(next(iter(new_rows.values())))
        num_states = num_rows - int(new_rows["context_only"].sum()) if "context_only" in new_rows else num_rows
        name = _name("states", "npz", number=number)
        shards[name] = ShardEntry(_sha256(content), len(content), first_row, num_rows, num_states)
        contents[name] = content
    generation = Generation(folder, replace(manifest, number=number, files=entries, shards=shards))

    # The manifest is written last: without it the other files do not count.
    # Its first line is the sha256 of the other lines, so that every flipped bit is noticed.
    lines = to_json(generation.manifest)[1:]
    contents[_name(number=number)] = b'{"sha256": "%s",' % _sha256(lines).encode() + lines
    with deferred_signals():
        for name, content in contents.items():
            replace_file(folder / name, content)
        # One sync for all names: should a power cut keep the manifest's name only, its hashes tell.
        sync_folder(folder)
        # Only now that the new generation is safe are older ones removed.
        for path in _files(folder):
            if path.name not in _all_names(generation) | _all_names(previous):
                path.unlink()
        remove_stale_temp_files(folder)
    return generation


def _all_names(generation: Generation | None) -> set[str]:
    return {*generation.files, _name(number=generation.manifest.number)} if generation else set()


def _read_generation(folder: Path, number: int, unit: Unit | None) -> Generation:
    path = folder / _name(number=number)
    content = _read(path, MAX_JSON_BYTES)
    seal, _, lines = content.partition(b"\n")
    lines = b"\n" + lines
    if seal != b'{"sha256": "%s",' % _sha256(lines).encode():
        raise Damaged(f"{path}: damaged (its sha256 is not the one in its first line)")
    try:
        manifest = parse_json(Manifest, b"{" + lines, path)
    except BadFile as error:
        raise Damaged(str(error)) from error
    if manifest.number != number:
        raise Damaged(f"{path}: the manifest of generation {manifest.number}")
    if unit and manifest.unit != unit:
        raise BadFile(f"{path}: expected a count of {unit}s, found one of {manifest.unit}s; use another folder")
    return Generation(folder, manifest)


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        return read_bounded(path, max_bytes)
    except PermissionError:
        raise
    except (BadFile, OSError) as error:  # an unreadable sector counts as damage too
        raise Damaged(str(error) if isinstance(error, BadFile) else f"{path}: {error.strerror}") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []


def _numbers(folder: Path) -> list[int]:
    """Returns the numbers of all manifests, newest first."""
    return sorted((_number(path.name) for path in _files(folder) if path.name.startswith(MANIFEST)), reverse=True)


def _name(kind: str = MANIFEST, ending: str = "json", *, number: int) -> str:
    return f"{kind}-{number:06d}.{ending}"


def _number(name: str) -> int:
    return int(name.rpartition("-")[2].partition(".")[0])
