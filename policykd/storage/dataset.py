"""Datasets of states on disk: every frame once, in `.npz` shards, and a manifest that says what they are.

The manifest holds the sha256 of every shard. It is written after each, so that an import that is cut goes on, and so
that whoever reads beside it sees its first rows. A run's `checkpoints/` hold such shards too and can be read as a
dataset. docs/states.md has the format.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from policykd.agents.policy import Policy
from policykd.envs.games import canonical_name
from policykd.io.files import BadFile, write_atomically
from policykd.io.signals import check_interrupted
from policykd.legacy.replay import Replay
from policykd.runs.folder import lock
from policykd.storage.manifest import FORMAT, MANIFEST, About, Dataset, open_dataset, read_manifest
from policykd.storage.shards import Arrays, compressed, read_shard, row_bytes

ROWS_PER_SHARD = 16_384


def load_dataset(
    path: str | Path,
    *,
    num_actions: int,
    obs_shape: tuple[int, ...],
    game: str | None = None,
    teacher_sha256: str | None = None,
    num_held_out: int = 0,
    room: int = 0,
    device: torch.device | str = "cpu",
) -> Replay:
    """Returns a replay full of a dataset's states, its scores kept if they are this teacher's, to be labelled else.

    Args:
        path: see `open_dataset`.
        num_actions: that the teacher scores.
        obs_shape: that the teacher sees.
        game: that the student will play; states of another are refused.
        teacher_sha256: of the teacher's archive.
        num_held_out: the last rows, which are never sampled.
        room: for so many more states, which are visited.
        device: where the replay lives.

    Raises:
        BadFile: damaged, cut, or of another game, shape or number of actions, with expected and found.
        ValueError: too large, no state is left to fit to, or none is held out.
    """
    dataset = open_dataset(path)
    about = dataset.about
    if game and about.game and about.game != canonical_name(game):
        raise BadFile(f"{path}: expected states of {canonical_name(game)}, found {about.game}; give another dataset")
    if about.obs_shape != obs_shape:
        raise BadFile(f"{path}: expected observations {obs_shape}, found {about.obs_shape}; give another dataset")
    if about.num_actions not in (None, num_actions):
        raise BadFile(
            f"{path}: expected states of an agent with {num_actions} actions, found {about.num_actions};"
            " give another dataset"
        )
    if not 0 <= num_held_out < dataset.num_rows:
        raise ValueError(f"{path}: cannot hold out {num_held_out:,} of {dataset.num_rows:,} rows; hold out fewer")
    keep_scores = about.teacher is not None and about.teacher["sha256"] == teacher_sha256
    replay = fill(dataset, num_actions, keep_scores=keep_scores, room=room, device=device)
    replay.num_held_out = num_held_out
    num_fitted = len(replay) - num_held_out
    num_fitted -= int((replay.history < num_fitted).sum())
    if not num_fitted or (num_held_out and num_fitted == replay.num_states):
        raise ValueError(
            f"{path}: {num_fitted:,} states to fit to and {replay.num_states - num_fitted:,} held out, the other rows"
            " only complete stacks; import more states, or hold out another share"
        )
    return replay


def fill(
    dataset: Dataset, num_actions: int, *, keep_scores: bool, room: int = 0, device: torch.device | str = "cpu"
) -> Replay:
    """Returns a replay of all rows of a dataset, with room for more.

    Raises:
        BadFile: damaged, or an import that was cut.
        ValueError: larger than the machine's memory.
    """
    about = dataset.about
    if not dataset.is_complete:
        raise BadFile(
            f"{dataset.folder}: an import of {dataset.num_states:,} states so far that was cut, or still goes on; run"
            " the same import again, it goes on"
        )
    num_bytes = (dataset.num_rows + room) * (row_bytes(about.layout) + 1 + 4 * num_actions)
    if torch.device(device).type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if num_bytes > memory:
            raise ValueError(
                f"{dataset.folder}: {dataset.num_rows:,} rows take {num_bytes / 1e9:,.1f} GB of memory, this machine"
                f" has {memory / 1e9:,.1f}; import fewer with --num-states"
            )
    replay = Replay(
        dataset.num_rows + room,
        about.num_envs,
        num_actions,
        about.obs_shape,
        stack=about.stack,
        dtype=getattr(torch, about.dtype),
        device=device,
    )
    before_first = torch.full((about.num_envs,), -1, dtype=torch.int16)
    for name, arrays in dataset.read():
        check_interrupted()
        first = len(replay)
        if not keep_scores:
            arrays.pop("scores", None)
        replay.extend(arrays)
        before_N = torch.cat([before_first, replay.pasts_N.cpu().short()])[first : len(replay)]
        if (arrays["pasts"] > (before_N + 1).clamp(max=about.stack - 1).numpy()).any():
            raise BadFile(f"{dataset.folder / name}: a stack reaches back before its stream; import it again")
        if not _is_finite(arrays):
            raise BadFile(f"{dataset.folder / name}: holds NaN or infinite numbers; import it again")
    return replay


def _is_finite(arrays: Arrays) -> bool:
    frames, scores = arrays["frames"], arrays.get("scores", np.zeros(0))
    if "scores" in arrays and "history" in arrays:
        scores = scores[~arrays["history"]]  # what is no state is never labelled
    return bool(np.isfinite(frames).all() and np.isfinite(scores).all())


@torch.inference_mode()
def label(replay: Replay, teacher: Policy, *, batch_size: int = 1024) -> int:
    """Scores the states of a replay that have no scores yet, and returns how many they were.

    Args:
        replay: on any device; the teacher must be on the same.
        teacher: its raw scores are stored.
        batch_size: states a forward pass.

    Raises:
        FloatingPointError: a score is not finite.
    """
    waits_N = replay.scores_NA[: len(replay)].isnan().any(dim=1)
    waits_N[replay.history] = False
    rows = waits_N.nonzero().squeeze(1)
    for rows_B in rows.split(batch_size):
        check_interrupted()
        scores_BA = teacher(replay.gather(rows_B)).to(replay.scores_NA.device)
        if not scores_BA.isfinite().all():
            raise FloatingPointError("the teacher's scores of replayed states are not finite; give another teacher")
        replay.scores_NA[rows_B] = scores_BA
    return len(rows)


def write_dataset(
    folder: Path, about: About, parts: Iterable[Arrays], *, rows_per_shard: int = ROWS_PER_SHARD
) -> Dataset:
    """Writes rows as they come into shards, and the manifest after each; goes on where the same import was cut.

    Args:
        folder: made if it is missing.
        about: what the states are.
        parts: of any length, all with the same arrays: those of `Replay.arrays`, `actions`, `rewards`, `starts`; from
            the first row on, even if it goes on: what is there already is compared.
        rows_per_shard: bounds the memory that is needed.

    Raises:
        ValueError: the folder holds a dataset, or part of another import.
        BadFile: there are no states, or others than when the import was cut.
        OSError: no room, no permission, or another process writes there; the shards so far stay.
        KeyboardInterrupt: a signal came, see `check_interrupted`; the shards so far stay.
    """
    check_free(folder)
    with lock(folder):
        try:
            dataset = Dataset(folder, about, 0, 0, {}, is_complete=False)
            saved = _saved_shards(folder, about)
            for arrays in _regrouped(parts, rows_per_shard):
                name = f"states-{len(dataset.shards):04d}.npz"
                if name in saved and _is_saved(folder / name, saved[name], about, arrays):
                    dataset = _with_shard(dataset, name, saved[name], arrays)
                    continue
                saved, content = {}, compressed(arrays)
                write_atomically(folder / name, content)
                dataset = _with_shard(dataset, name, hashlib.sha256(content).hexdigest(), arrays)
                _write_manifest(dataset)
        except KeyboardInterrupt:
            if not (folder / MANIFEST).is_file():
                raise
            num_states = read_manifest(folder).num_states
            raise KeyboardInterrupt(
                f"{num_states:,} states are imported; run the same import again, it goes on"
            ) from None
        if not dataset.num_states:
            raise BadFile(f"{about.source}: holds no states; give another source")
        dataset = replace(dataset, is_complete=True)
        _write_manifest(dataset)
        for stale in set(folder.glob("states-*.npz")) - {folder / name for name in dataset.shards}:
            stale.unlink()
    return dataset


def check_free(folder: Path) -> None:
    """Raises ValueError if a folder holds a whole dataset already."""
    if (folder / MANIFEST).exists() and read_manifest(folder).is_complete:
        raise ValueError(f"{folder}: holds a dataset already; give another folder, or remove it first")


def _saved_shards(folder: Path, about: About) -> Mapping[str, str]:
    """Returns the shards of an import that was cut."""
    if not (folder / MANIFEST).exists():
        return {}
    cut = read_manifest(folder)
    if cut.about != about:
        raise ValueError(
            f"{folder}: holds part of another import ({cut.about.source}); give another folder, or remove it first"
        )
    return cut.shards


def _is_saved(path: Path, sha256: str, about: About, arrays: Arrays) -> bool:
    """Returns whether a shard of an import that was cut is whole.

    Raises:
        BadFile: it is, but the source gives other rows now.
    """
    try:
        saved = read_shard(path, sha256, about.layout, len(arrays["pasts"]))
    except BadFile as error:
        print(f"warning: {error}: it and those after it are imported again", file=sys.stderr)
        return False
    if saved.keys() != arrays.keys() or any(saved[key].tobytes() != arrays[key].tobytes() for key in saved):
        raise BadFile(f"{path}: not what {about.source} gives now; give another folder, or remove this one first")
    return True


def _with_shard(dataset: Dataset, name: str, sha256: str, arrays: Arrays) -> Dataset:
    num_rows = len(arrays["pasts"])
    num_states = num_rows - int(arrays.get("history", np.zeros(1)).sum())
    return replace(
        dataset,
        num_rows=dataset.num_rows + num_rows,
        num_states=dataset.num_states + num_states,
        shards={**dataset.shards, name: sha256},
    )


def _write_manifest(dataset: Dataset) -> None:
    counts = {"num_states": dataset.num_states, "num_rows": dataset.num_rows, "complete": dataset.is_complete}
    manifest = {"format": FORMAT, **asdict(dataset.about), **counts, "shards": dataset.shards}
    write_atomically(dataset.folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def save_dataset(
    replay: Replay,
    folder: Path,
    *,
    source: str,
    preprocessing: str,
    game: str | None = None,
    teacher: Mapping[str, str] | None = None,
) -> Dataset:
    """Writes a replay as a dataset; its scores too if `teacher` says whose they are (`algorithm`, `sha256`)."""
    about = About(
        obs_shape=tuple(replay.obs_shape),
        stack=replay.stack,
        dtype=str(replay.frames.dtype).removeprefix("torch."),
        source=source,
        preprocessing=preprocessing,
        game=canonical_name(game) if game else None,
        num_actions=replay.scores_NA.shape[1],
        num_envs=replay.num_envs,
        teacher=teacher,
    )
    firsts = range(0, len(replay), ROWS_PER_SHARD)
    parts = (replay.arrays(first, min(first + ROWS_PER_SHARD, len(replay))) for first in firsts)
    return write_dataset(folder, about, ({k: v for k, v in p.items() if teacher or k != "scores"} for p in parts))


def _regrouped(parts: Iterable[Arrays], num_rows: int) -> Iterator[Arrays]:
    held: list[Arrays] = []
    for part in parts:
        check_interrupted()
        held.append(part)
        if sum(len(p["pasts"]) for p in held) < num_rows:
            continue
        joined = {key: np.concatenate([p[key] for p in held]) for key in part}
        end = len(joined["pasts"]) // num_rows * num_rows
        for first in range(0, end, num_rows):
            yield {key: array[first : first + num_rows] for key, array in joined.items()}
        held = [{key: array[end:] for key, array in joined.items()}]
    if held and sum(len(p["pasts"]) for p in held):
        yield {key: np.concatenate([p[key] for p in held]) for key in held[0]}
