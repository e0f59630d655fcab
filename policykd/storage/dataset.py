"""Datasets: states on disk to distil from, each frame stored once.

A dataset is a folder of generations (`policykd.storage.generations`) whose shards hold states. An import commits a
generation after each shard, so it can be resumed, and others can read its first rows meanwhile. A run's `checkpoints/`
are such generations as well, so any run can be read as a dataset. docs/states.md describes the format.
"""

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from policykd.agents.policy import Policy, check_outputs
from policykd.agents.teacher import Teacher
from policykd.envs.games import canonical_name
from policykd.io.files import BadFile, lock_folder
from policykd.io.typed import MAX_RATIO, Arrays
from policykd.replay import Replay
from policykd.states import BlendedStates, DatasetStates
from policykd.storage.generations import (
    Generation,
    Manifest,
    Origin,
    ShardEntry,
    StatesInfo,
    commit,
    describe,
    has_generations,
    last,
    newest,
)

ROWS_PER_SHARD = 16_384


@dataclass(frozen=True)
class Dataset:
    """A folder of states whose manifest has been read."""

    generation: Generation
    info: StatesInfo
    num_rows: int
    """states, and the few frames that only complete the stacks of later states"""
    num_states: int
    sha256: str
    """one hash of all shards"""

    @property
    def shards(self) -> dict[str, ShardEntry]:
        """The shards by file name, in order."""
        return self.generation.manifest.shards


def open_dataset(path: str | Path) -> Dataset:
    """Returns the dataset in a folder, or the states that a run has collected.

    Args:
        path: folder of a dataset, of a run (`runs/Pong/pong`), or a run's `checkpoints/`.

    Raises:
        BadFile: no dataset, a damaged one, or one of another format.
        ValueError: folder not found.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: folder not found; give that of a dataset or of a run")
    folder = next((folder for folder in (path, path / "checkpoints") if has_generations(folder)), None)
    if not folder:
        raise BadFile(f"{path}: not a dataset, and not a run with checkpoints; use another folder")
    dataset = _as_dataset(newest(folder))
    # No memory is allocated for more rows than the shards can hold.
    num_bytes = sum(shard.num_bytes for shard in dataset.shards.values())
    if dataset.num_rows * dataset.info.row_bytes > MAX_RATIO * num_bytes:
        raise BadFile(
            f"{folder}: {dataset.num_rows:,} rows do not fit into {num_bytes:,} bytes; copy the dataset again"
        )
    return dataset


def _as_dataset(generation: Generation) -> Dataset:
    info = generation.manifest.states
    shards = generation.manifest.shards.values()
    if not info or not shards:
        raise BadFile(
            f"{generation.folder}: holds no states of its own, as the checkpoints of an offline run or of SB3; use"
            " another dataset"
        )
    sha256 = hashlib.sha256("\n".join(shard.sha256 for shard in shards).encode()).hexdigest()
    num_rows = sum(shard.num_rows for shard in shards)
    return Dataset(generation, info, num_rows, sum(shard.num_states for shard in shards), sha256)


def load_dataset(
    path: str | Path, teacher: Teacher | None = None, *, game: str | None = None, num_held_out: int = 0, room: int = 0
) -> Replay:
    """Returns a replay with all states of a dataset.

    Args:
        path: see `open_dataset`.
        teacher: outputs of another teacher are left out, see `label`; None keeps those of any.
        game: the game that the student will play.
        num_held_out: rows at the end that are never sampled.
        room: capacity for so many more states.

    Raises:
        BadFile: damaged, incomplete, or states of another game, shape or number of actions.
        ValueError: larger than the machine's memory, or no states to train on or to hold out.
    """
    dataset = open_dataset(path)
    info = dataset.info
    keep_outputs = teacher is None or (info.origin.teacher is not None and info.origin.teacher.sha256 == teacher.sha256)
    num_actions = teacher.num_actions if teacher else info.num_actions or 1
    if not dataset.generation.manifest.is_complete:
        raise BadFile(
            f"{path}: an import that is still running or was interrupted after {dataset.num_states:,} states; run the"
            " same import again to continue it"
        )
    if game and info.origin.game not in (None, canonical_name(game)):
        raise BadFile(f"{path}: expected game {canonical_name(game)}, found {info.origin.game}; use another dataset")
    if teacher and info.obs_shape != teacher.obs_shape:
        raise BadFile(f"{path}: expected observations {teacher.obs_shape}, found {info.obs_shape}; use another dataset")
    if info.num_actions not in (None, num_actions):
        raise BadFile(f"{path}: expected {num_actions} actions, found {info.num_actions}; use another dataset")
    if not 0 <= num_held_out < dataset.num_rows:
        raise ValueError(f"{path}: cannot hold out {num_held_out:,} of {dataset.num_rows:,} rows; hold out fewer")
    num_bytes = (dataset.num_rows + room) * (info.row_bytes + 1 + 4 * num_actions)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if num_bytes > memory:
        raise ValueError(
            f"{path}: {dataset.num_rows:,} rows take {num_bytes / 1e9:,.1f} GB of memory, this machine has"
            f" {memory / 1e9:,.1f}; import fewer with --num-states"
        )

    # Everything is allocated once; the shards are then read one at a time.
    shape = (dataset.num_rows + room, info.num_envs, num_actions, info.obs_shape)
    replay = Replay(*shape, stack=info.stack, dtype=getattr(torch, info.dtype))
    replay.num_held_out = num_held_out
    for name, arrays in dataset.generation.read_shards():
        if not keep_outputs:
            arrays.pop("teacher", None)
        replay.extend(arrays)
        _check_rows(replay, arrays, dataset.generation.folder / name)

    # Rows that only complete stacks are not states: neither part may consist of them alone.
    num_training = dataset.num_rows - num_held_out
    num_training -= int((replay.context_only_rows < num_training).sum())
    if not num_training or (num_held_out and num_training == replay.num_states):
        raise ValueError(
            f"{path}: {num_training:,} states to train on and {replay.num_states - num_training:,} held out, the other"
            " rows only complete stacks; import more states, or hold out another share"
        )
    return replay


def _check_rows(replay: Replay, arrays: Arrays, path: Path) -> None:
    """Raises BadFile for impossible numbers in the rows that were appended last."""
    # A stack grows by at most one frame per step of its environment, so it never reaches another's frames.
    before_first = torch.full((replay.num_envs,), -1, dtype=torch.int16)
    previous_N = torch.cat([before_first, replay.num_past_frames_N.short()])
    previous_N = previous_N[len(replay) - len(arrays["frames"]) : len(replay)]
    if (arrays["num_past_frames"] > (previous_N + 1).clamp(max=replay.stack - 1).numpy()).any():
        raise BadFile(f"{path}: a stack reaches back before its stream; import it again")
    outputs = arrays.get("teacher", np.zeros(0))
    if "teacher" in arrays and "context_only" in arrays:
        outputs = outputs[~arrays["context_only"]]  # rows that are not states are never labelled
    if not (np.isfinite(arrays["frames"]).all() and np.isfinite(outputs).all()):
        raise BadFile(f"{path}: holds NaN or infinite numbers; import it again")


@torch.inference_mode()
def label(replay: Replay, teacher: Policy) -> int:
    """Labels the states of a replay that have no teacher outputs yet, and returns how many those were.

    Args:
        replay: on the teacher's device.
        teacher: its raw outputs are stored.

    Raises:
        ValueError: the outputs are not one number per state and action.
        FloatingPointError: an output is not finite.
    """
    is_missing_N = replay.teacher_NA[: len(replay)].isnan().any(dim=1)
    is_missing_N[replay.context_only_rows] = False  # never drawn, so never labelled
    rows = is_missing_N.nonzero().squeeze(1)
    for rows_B in rows.split(1024):
        outputs = teacher(replay.gather(rows_B))
        teacher_BA = check_outputs(outputs, len(rows_B), replay.teacher_NA.shape[1], "the teacher")
        teacher_BA = teacher_BA.to(replay.teacher_NA.device)
        if not teacher_BA.isfinite().all():
            raise FloatingPointError("the teacher's outputs on stored states are not finite; use another teacher")
        replay.teacher_NA[rows_B] = teacher_BA
    print(f"{replay.num_states:,} stored states, {len(rows):,} of them labelled now", flush=True)
    return len(rows)


def write_dataset(
    folder: Path, info: StatesInfo, parts: Iterable[Arrays], *, rows_per_shard: int = ROWS_PER_SHARD
) -> Dataset:
    """Writes rows as shards, and commits after each; continues an import of the same rows that was interrupted.

    Args:
        folder: created if missing.
        info: description of the states.
        parts: any number of rows each, all with the same arrays (`StatesInfo.layout`). Always from the first row on:
            the rows that are saved already are compared and skipped.
        rows_per_shard: bounds the memory that is needed.

    Raises:
        ValueError: the folder holds a dataset, or part of an import of other rows.
        BadFile: no states.
        OSError: no space left, no permission, or another process writes there; the shards so far stay.
        KeyboardInterrupt: a signal has arrived; the shards so far stay.
    """
    other_import = f"{folder}: holds part of another import; use another folder, or remove it first"
    with lock_folder(folder):
        check_free(folder)
        previous = last(folder, "row")
        if not previous and has_generations(folder):
            raise BadFile(f"{folder}: its manifests are damaged; remove the folder and import again")
        if previous and previous.manifest.states != info:
            raise ValueError(other_import)
        try:
            num_saved = sum(len(arrays["frames"]) for _, arrays in previous.read_shards()) if previous else 0
        except BadFile as error:
            print(f"warning: {error}; all shards are imported again", file=sys.stderr)
            previous = None
            num_saved = 0
        shards = previous.manifest.shards if previous else dict[str, ShardEntry]()
        saved = previous.read_shards() if previous else iter(())
        num_rows = 0
        try:
            for arrays in _regrouped(parts, rows_per_shard):
                first_row = num_rows
                num_rows += len(arrays["frames"])
                # A source that has changed since would give a dataset of two halves that do not belong together.
                if first_row < num_saved:
                    _, stored = next(saved)
                    if _bytes(stored) != _bytes(arrays):
                        raise ValueError(other_import)
                    continue
                manifest = Manifest(unit="row", position=num_rows, shards=shards, states=info, is_complete=False)
                previous = commit(folder, previous, manifest, new_rows=arrays, first_row=first_row)
                shards = previous.manifest.shards
        except KeyboardInterrupt:
            num_states = sum(shard.num_states for shard in shards.values())
            reason = f"{num_states:,} states are imported; run the same import again to continue it"
            raise KeyboardInterrupt(reason) from None
        if num_rows < num_saved:
            raise ValueError(other_import)
        if not shards:
            raise BadFile(f"{info.origin.source}: holds no states; use another source")
        # One more generation, without new rows, marks the dataset as complete.
        manifest = Manifest(unit="row", position=num_rows, shards=shards, states=info)
        return _as_dataset(commit(folder, previous, manifest))


def _bytes(arrays: Arrays) -> dict[str, bytes]:
    """Returns arrays as bytes, which compare NaN too."""
    return {key: array.tobytes() for key, array in arrays.items()}


def check_free(folder: Path) -> None:
    """Raises ValueError if a folder holds a complete dataset already."""
    generation = last(folder, "row") if has_generations(folder) else None
    if generation and generation.manifest.is_complete:
        raise ValueError(f"{folder}: holds a dataset already; use another folder, or remove it first")


def save_dataset(replay: Replay, folder: Path, origin: Origin) -> Dataset:
    """Writes a replay as a dataset; its teacher outputs too if `origin.teacher` is given."""
    firsts = range(0, len(replay), ROWS_PER_SHARD)
    parts = (replay.arrays(first, min(first + ROWS_PER_SHARD, len(replay))) for first in firsts)
    # Outputs of an unknown teacher would never be used.
    if origin.teacher is None:
        parts = ({key: array for key, array in part.items() if key != "teacher"} for part in parts)
    return write_dataset(folder, describe(replay, origin), parts)


def _regrouped(parts: Iterable[Arrays], num_rows: int) -> Iterator[Arrays]:
    """Yields the same rows, `num_rows` at a time."""
    held: list[Arrays] = []
    num_held = 0
    for part in parts:
        held.append(part)
        num_held += len(part["frames"])
        if num_held >= num_rows:
            joined = {key: np.concatenate([p[key] for p in held]) for key in part}
            for first in range(0, num_held - num_rows + 1, num_rows):
                yield {key: array[first : first + num_rows] for key, array in joined.items()}
            num_held %= num_rows
            held = [{key: array[len(array) - num_held :] for key, array in joined.items()}]
    if num_held:
        yield {key: np.concatenate([p[key] for p in held]) for key in held[0]}


def open_replay(states: DatasetStates | BlendedStates, teacher: Teacher, game: str, *, room: int = 0) -> Replay:
    """Returns a replay of the dataset that a state source names."""
    dataset = open_dataset(states.path)
    held_out = states.held_out if isinstance(states, DatasetStates) else 0.0
    num_held_out = max(1, round(held_out * dataset.num_rows)) if held_out else 0
    replay = load_dataset(states.path, teacher, game=game, num_held_out=num_held_out, room=room)
    replay.num_preloaded = len(replay)
    return replay
