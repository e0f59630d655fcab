"""What a dataset's manifest says, and what a run's checkpoints say when they are read as a dataset."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policykd.envs.games import canonical_name
from policykd.io.files import BadFile, read_verified
from policykd.storage.generations import has_generations, newest
from policykd.storage.shards import (
    MAX_RATIO,
    UNREADABLE,
    Arrays,
    Layout,
    declared_arrays,
    layout,
    read_shard,
    row_bytes,
)

FORMAT = 1
MANIFEST = "manifest.json"
DTYPES = ("uint8", "float32", "float64")

_SHARD = re.compile(r"(states|replay)-\d{4,}\.npz")


@dataclass(frozen=True)
class About:
    """What the states of a dataset are."""

    obs_shape: tuple[int, ...]
    stack: int
    """how many frames an observation holds along its first axis; 1 means that it stands alone"""
    dtype: str
    """of a frame: uint8, float32 or float64"""
    source: str
    """where the states came from"""
    preprocessing: str
    """how they became what the shards hold"""
    game: str | None = None
    num_actions: int | None = None
    num_envs: int = 1
    """row n belongs to the stream n mod `num_envs`"""
    teacher: Mapping[str, str] | None = None
    """`algorithm` and `sha256` of the archive whose raw scores the shards hold"""

    @property
    def layout(self) -> Layout:
        """What a shard of these states may hold."""
        frame_shape = self.obs_shape[1:] if self.stack > 1 else self.obs_shape
        return layout(self.dtype, frame_shape, self.num_actions if self.teacher else None)


@dataclass(frozen=True)
class Dataset:
    """A folder of states whose manifest was read; the shards are verified when they are."""

    folder: Path
    about: About
    num_rows: int
    """states, and the few frames that only stacks of later states hold"""
    num_states: int
    shards: Mapping[str, str]
    """file name -> sha256, in order"""
    is_complete: bool = True
    """false while an import goes on, or after it was cut: these are its first rows"""

    @property
    def sha256(self) -> str:
        """Returns one hash of all its shards."""
        return hashlib.sha256("\n".join(self.shards.values()).encode()).hexdigest()

    def read(self) -> Iterator[tuple[str, Arrays]]:
        """Yields name and arrays of every shard.

        Raises:
            BadFile: a shard is missing, damaged, or not what the manifest says.
        """
        left = self.num_rows
        for name, sha256 in self.shards.items():
            arrays = read_shard(self.folder / name, sha256, self.about.layout, left)
            left -= len(arrays["pasts"])
            yield name, arrays
        if left:
            raise BadFile(f"{self.folder}: {left:,} of {self.num_rows:,} rows are in no shard; import it again")


def open_dataset(path: str | Path) -> Dataset:
    """Returns the dataset in a folder, or the states that a run's checkpoints hold.

    Args:
        path: the folder of a dataset, of a run (`runs/Pong/pong`), or a run's `checkpoints/`.

    Raises:
        BadFile: no dataset, a damaged manifest, or one of a newer format.
        ValueError: no such folder.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return _bounded(read_manifest(path))
    for folder in (path, path / "checkpoints"):
        if has_generations(folder):
            return _of_checkpoints(folder)
    if not path.exists():
        raise ValueError(f"{path}: no such folder; give that of a dataset or of a run")
    raise BadFile(f"{path}: no dataset, it has neither {MANIFEST} nor a run's checkpoints; give another folder")


def read_manifest(folder: Path) -> Dataset:
    """Returns what a dataset's manifest says, whether the shards are there or not.

    Raises:
        BadFile: it cannot be read, cannot be, or is of a newer format.
    """
    path = folder / MANIFEST
    manifest = _json(path)
    if manifest.get("format") != FORMAT:
        raise BadFile(
            f"{path}: dataset of format {manifest.get('format')}, this policykd reads {FORMAT}; update policykd"
        )
    if wrong := [key for key, right in _CHECKS.items() if not right(manifest.get(key))]:
        raise BadFile(f"{path}: its {', '.join(wrong)} cannot be; import or copy the dataset again")
    fields: dict[str, Any] = {key: manifest[key] for key in About.__dataclass_fields__}
    about = About(**{**fields, "obs_shape": tuple(fields["obs_shape"])})
    if about.stack > 1 and (len(about.obs_shape) < 2 or about.obs_shape[0] != about.stack):
        raise BadFile(f"{path}: a stack of {about.stack} frames does not make {about.obs_shape}; import it again")
    if about.teacher and not about.num_actions:
        raise BadFile(f"{path}: a teacher's scores of an unknown number of actions; import the dataset again")
    counts = manifest["num_rows"], manifest["num_states"]
    return Dataset(folder, about, *counts, manifest["shards"], manifest.get("complete") is not False)


def _of_checkpoints(folder: Path) -> Dataset:
    """Returns a run's states; its config.json says the game and the teacher, its shards the shapes."""
    generation = newest(folder, ("starts", "num_rows", "num_states"), only="replay")
    config = folder.parent / "config.json"
    checkpoint, settings = generation.about, _json(config).get("settings", {}) if config.is_file() else {}
    shards = generation.named("replay")
    if not shards:
        raise BadFile(f"{folder}: holds no states of its own, as an offline run; give another dataset")
    try:
        declared = declared_arrays((folder / next(iter(shards))).read_bytes())
        dtype, shape = declared["frames"]
        stack = 4 if len(shape) == 3 else 1  # images are Atari's
        about = About(
            obs_shape=(stack, *shape[1:]) if stack > 1 else shape[1:],
            stack=stack,
            dtype=dtype,
            source=f"the run {folder.parent.name}",
            preprocessing="policykd.envs",
            game=settings.get("game"),
            num_actions=declared["scores"][1][1],
            num_envs=len(checkpoint["starts"]),
            teacher={key: settings.get("teacher", {}).get(key, "unknown") for key in ("algorithm", "sha256")},
        )
        return _bounded(Dataset(folder, about, checkpoint["num_rows"], checkpoint["num_states"], shards))
    except BadFile:
        raise
    except OSError as error:
        raise BadFile(f"{error.filename}: {error.strerror}; the checkpoint is incomplete") from error
    except (*UNREADABLE, AttributeError, LookupError, TypeError) as error:
        raise BadFile(f"{folder}: not a run's checkpoints ({error}); give another dataset") from error


def _bounded(dataset: Dataset) -> Dataset:
    """Returns the dataset if its shards can hold as many rows as it claims, so that no memory is taken for a claim."""
    try:
        num_bytes = sum((dataset.folder / name).stat().st_size for name in dataset.shards)
    except OSError as error:
        raise BadFile(f"{error.filename}: {error.strerror}; the dataset is incomplete, copy it again") from error
    if dataset.num_rows * row_bytes(dataset.about.layout) > MAX_RATIO * num_bytes:
        for name, sha256 in dataset.shards.items():
            read_verified(dataset.folder / name, sha256, "; import or copy the dataset again")
        raise BadFile(
            f"{dataset.folder}: claims {dataset.num_rows:,} rows, its {num_bytes:,} bytes cannot hold them;"
            " import or copy the dataset again"
        )
    return dataset


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise BadFile(f"{path}: cannot be read ({error}); import or copy the dataset again") from error
    if not isinstance(content, dict):
        raise BadFile(f"{path}: not a JSON object; import or copy the dataset again")
    return content


def _is_count(value: Any, most: int = 1 << 40) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_game(value: Any) -> bool:
    try:
        return value is None or canonical_name(value) == value
    except (ValueError, AttributeError):
        return False


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "obs_shape": lambda v: isinstance(v, list) and 1 <= len(v) <= 4 and all(_is_count(n, 1 << 16) for n in v),
    "stack": lambda v: _is_count(v, 64),
    "dtype": lambda v: v in DTYPES,
    "source": lambda v: isinstance(v, str),
    "preprocessing": lambda v: isinstance(v, str),
    "game": _is_game,
    "num_actions": lambda v: v is None or _is_count(v, 1 << 16),
    "num_envs": lambda v: _is_count(v, 1 << 16),
    "teacher": lambda v: (
        v is None or (isinstance(v, dict) and all(isinstance(v.get(k), str) for k in ("algorithm", "sha256")))
    ),
    "num_rows": _is_count,
    "num_states": lambda v: v == 0 or _is_count(v),
    "complete": lambda v: v is None or type(v) is bool,
    "shards": lambda v: (
        isinstance(v, dict) and all(_SHARD.fullmatch(k) and isinstance(sha256, str) for k, sha256 in v.items())
    ),
}
"""of every field of a manifest: what it may be"""
