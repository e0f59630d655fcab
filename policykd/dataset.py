"""Datasets of states on disk: every frame once, in `.npz` shards, and a manifest that says what they are.

The manifest is written last and holds the sha256 of every shard, so that a folder without one is no dataset. A run's
`checkpoints/` hold such shards too and can be read as a dataset. docs/states.md has the format.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from policykd.agents.files import write_atomically
from policykd.agents.policy import Policy
from policykd.checkpoints import compressed
from policykd.envs.games import canonical_name
from policykd.manifest import FORMAT, MANIFEST, About, Dataset, open_dataset
from policykd.replay import Replay
from policykd.shards import Arrays, row_bytes

ROWS_PER_SHARD = 16_384


def load_dataset(
    path: str | Path,
    *,
    num_actions: int,
    obs_shape: tuple[int, ...],
    game: str | None = None,
    teacher_sha256: str | None = None,
    num_held_out: int = 0,
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
        device: where the replay lives.

    Raises:
        ValueError: damaged, too large, or of another game, shape or number of actions, with expected and found; no
            state is left to fit to, or none is held out.
    """
    dataset = open_dataset(path)
    about = dataset.about
    if game and about.game and about.game != canonical_name(game):
        raise ValueError(f"{path}: expected states of {canonical_name(game)}, found {about.game}; give another dataset")
    if about.obs_shape != obs_shape:
        raise ValueError(f"{path}: expected observations {obs_shape}, found {about.obs_shape}; give another dataset")
    if about.num_actions not in (None, num_actions):
        raise ValueError(
            f"{path}: expected states of an agent with {num_actions} actions, found {about.num_actions};"
            " give another dataset"
        )
    if not 0 <= num_held_out < dataset.num_rows:
        raise ValueError(f"{path}: cannot hold out {num_held_out:,} of {dataset.num_rows:,} rows; hold out fewer")
    keep_scores = about.teacher is not None and about.teacher["sha256"] == teacher_sha256
    replay = fill(dataset, num_actions, keep_scores=keep_scores, device=device)
    replay.num_held_out = num_held_out
    num_fitted = len(replay) - num_held_out
    num_fitted -= int((replay.history < num_fitted).sum())
    if not num_fitted or (num_held_out and num_fitted == replay.num_states):
        raise ValueError(
            f"{path}: {num_fitted:,} states to fit to and {replay.num_states - num_fitted:,} held out, the other rows"
            " only complete stacks; import more states, or hold out another share"
        )
    return replay


def fill(dataset: Dataset, num_actions: int, *, keep_scores: bool, device: torch.device | str = "cpu") -> Replay:
    """Returns a replay of all rows of a dataset.

    Raises:
        ValueError: damaged, or larger than the machine's memory.
    """
    about = dataset.about
    num_bytes = dataset.num_rows * (row_bytes(about.layout) + 1 + 4 * num_actions)
    if torch.device(device).type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if num_bytes > memory:
            raise ValueError(
                f"{dataset.folder}: {dataset.num_rows:,} rows take {num_bytes / 1e9:,.1f} GB of memory, this machine"
                f" has {memory / 1e9:,.1f}; import fewer with --num-states"
            )
    replay = Replay(
        dataset.num_rows,
        about.num_envs,
        num_actions,
        about.obs_shape,
        stack=about.stack,
        dtype=getattr(torch, about.dtype),
        device=device,
    )
    before_first = torch.full((about.num_envs,), -1, dtype=torch.int16)
    for name, arrays in dataset.read():
        first = len(replay)
        if not keep_scores:
            arrays.pop("scores", None)
        replay.extend(arrays)
        before_N = torch.cat([before_first, replay.pasts_N.cpu().short()])[first : len(replay)]
        if (arrays["pasts"] > (before_N + 1).clamp(max=about.stack - 1).numpy()).any():
            raise ValueError(f"{dataset.folder / name}: a stack reaches back before its stream; import it again")
        if not _is_finite(arrays):
            raise ValueError(f"{dataset.folder / name}: holds NaN or infinite numbers; import it again")
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
        scores_BA = teacher(replay.gather(rows_B)).to(replay.scores_NA.device)
        if not scores_BA.isfinite().all():
            raise FloatingPointError("the teacher's scores of replayed states are not finite; give another teacher")
        replay.scores_NA[rows_B] = scores_BA
    return len(rows)


def write_dataset(
    folder: Path, about: About, parts: Iterable[Arrays], *, rows_per_shard: int = ROWS_PER_SHARD
) -> Dataset:
    """Writes rows as they come into shards, then the manifest.

    Args:
        folder: made if it is missing; the shards of an interrupted import in it are removed.
        about: what the states are.
        parts: of any length, all with the same arrays: those of `Replay.arrays`, `actions`, `rewards`, `starts`.
        rows_per_shard: bounds the memory that is needed.

    Raises:
        ValueError: the folder holds a dataset, or there are no rows.
        OSError: no room or no permission; what is there is no dataset.
    """
    check_free(folder)
    for stale in [*folder.glob("states-*.npz"), *folder.glob(".states-*.npz.*.tmp")]:
        stale.unlink()
    shards: dict[str, str] = {}
    num_rows = num_states = 0
    for arrays in _regrouped(parts, rows_per_shard):
        name, content = f"states-{len(shards):04d}.npz", compressed(arrays)
        write_atomically(folder / name, content)
        shards[name] = hashlib.sha256(content).hexdigest()
        num_rows += len(arrays["pasts"])
        num_states += len(arrays["pasts"]) - int(arrays.get("history", np.zeros(1)).sum())
    if not num_states:
        raise ValueError(f"{about.source}: holds no states; give another source")
    counts = {"num_states": num_states, "num_rows": num_rows}
    manifest = {"format": FORMAT, **asdict(about), **counts, "shards": shards}
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return Dataset(folder, about, num_rows, num_states, shards)


def check_free(folder: Path) -> None:
    """Raises ValueError if a folder holds a dataset already."""
    if (folder / MANIFEST).exists():
        raise ValueError(f"{folder}: holds a dataset already; give another folder, or remove it first")


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
