"""Minari datasets: reads lossless ones, and writes a dataset as one.

Read with h5py alone: for a dataset without spaces minari makes the environment that the file names, which imports
whatever module it names.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from pydantic import Json

from policykd.envs.games import canonical_name
from policykd.importers.recordings import CHUNK, NO_ACTION, Recording, frames_first, rows, states_info
from policykd.io.files import BadFile, sync_folder
from policykd.io.typed import MAX_RATIO, Arrays, read_json
from policykd.replay import Replay
from policykd.storage.dataset import load_dataset, open_dataset
from policykd.storage.generations import Count, DType, Generation, Origin, Size, StatesInfo, Text

MAIN_FILE = "main_data.hdf5"
_NEXT_STEP = "give another Minari dataset"


@dataclass(frozen=True)
class _Observations:
    shape: tuple[Size, ...]
    dtype: DType


@dataclass(frozen=True)
class _Actions:
    n: Size
    start: int = 0


@dataclass(frozen=True)
class _EnvSpec:
    id: Text | None = None


@dataclass(frozen=True)
class _Metadata:
    """Content of Minari's `metadata.json`, as far as it is needed."""

    total_episodes: Count
    observation_space: Json[_Observations]
    action_space: Json[_Actions]
    data_format: Literal["hdf5"]
    dataset_id: Text = "unknown"
    env_spec: Json[_EnvSpec] | Literal[""] | None = None
    jpeg_encoding: bool = True


def read_minari(data: Path, game: str | None) -> tuple[StatesInfo, Iterator[Arrays]]:
    """Returns the description of a Minari dataset's states, and their rows, episode by episode.

    Args:
        data: folder with `metadata.json` and `main_data.hdf5`.
        game: what was played, where the metadata does not record it.

    Raises:
        BadFile: JPEG-coded images, other spaces than vectors or grey images and discrete actions, a damaged file.
        ValueError: the metadata names another game.
    """
    metadata = read_json(_Metadata, data / "metadata.json", next_step=_NEXT_STEP)
    shape = metadata.observation_space.shape
    dtype = np.dtype(metadata.observation_space.dtype)
    # Minari codes such observations as JPEG unless jpeg_encoding=False is given.
    if metadata.jpeg_encoding and len(shape) in (2, 3) and min(shape[:2]) >= 32 and dtype == np.uint8:
        raise BadFile(
            f"{data}: its images are JPEG-coded: lossy, not what the agent saw; record with jpeg_encoding=False"
        )
    env_id = metadata.env_spec.id if isinstance(metadata.env_spec, _EnvSpec) else None
    preprocessing = f"that of the environment {env_id or 'unknown'}"
    origin = Origin(f"Minari dataset {metadata.dataset_id}", preprocessing, _agreed_game(data, env_id, game))
    try:
        info = states_info(shape, dtype, origin, metadata.action_space.n)
    except BadFile as error:
        raise BadFile(f"{data}: its {error}; {_NEXT_STEP}") from error
    return info, rows(_recordings(data / MAIN_FILE, metadata), data)


def _agreed_game(data: Path, env_id: str | None, game: str | None) -> str | None:
    """Returns the game of the dataset's environment, if that is an Atari game, or else the given one."""
    try:
        found = canonical_name(env_id) if env_id else None
    except ValueError:
        found = None  # not an Atari game
    if game and found and game != found:
        raise ValueError(f"{data}: expected states of {game}, found {found} ({env_id}); give the right --game")
    return found or game


def _recordings(path: Path, metadata: _Metadata) -> Iterator[Recording]:
    import h5py

    shape = metadata.observation_space.shape
    dtype = metadata.observation_space.dtype
    try:
        if not path.is_file():
            raise ValueError("not found, or not a file")
        with h5py.File(path, "r") as file:
            for number in range(metadata.total_episodes):
                episode = f"episode_{number}"
                obs, actions, rewards = (_array(file, episode, n) for n in ("observations", "actions", "rewards"))
                num_steps = len(actions)
                if obs.shape[1:] != shape or obs.dtype != dtype or not num_steps == len(rewards) == len(obs) - 1:
                    raise ValueError(
                        f"{episode}: expected observations {dtype} {shape}, one more than actions and rewards,"
                        f" found {obs.dtype} {obs.shape}, {num_steps} and {len(rewards)}"
                    )
                for first in range(0, len(obs), CHUNK):
                    end = min(first + CHUNK, len(obs))
                    # No action was taken at the last observation.
                    num_actions = min(end, num_steps) - first
                    actions_T = np.full(end - first, NO_ACTION)
                    actions_T[:num_actions] = actions[first : first + num_actions] - metadata.action_space.start
                    rewards_T = np.zeros(end - first)
                    rewards_T[:num_actions] = rewards[first : first + num_actions]
                    starts_T = np.arange(first, end) == 0
                    yield Recording(frames_first(obs[first:end]), actions_T, rewards_T, starts_T)
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise BadFile(f"{path}: invalid ({error}); {_NEXT_STEP}") from error


def _array(file: Any, episode: str, name: str) -> Any:
    """Returns an array that the file itself holds: no link into another file, and no larger than its bytes allow."""
    import h5py

    # HDF5 can link to other files on this machine, and declare terabytes in a few bytes.
    for place, key in ((file, episode), (file.get(episode), name)):
        if not isinstance(place, h5py.Group) or not isinstance(place.get(key, getlink=True), h5py.HardLink):
            raise ValueError(f"{episode} has no {name} of its own")
    array = file[episode][name]
    if not isinstance(array, h5py.Dataset) or array.is_virtual or array.external or array.dtype.kind not in "buif":
        raise ValueError(f"{name} of {episode} are not plain numbers in this file")
    if not array.shape:
        raise ValueError(f"{name} of {episode} are one number, not one per step")
    if array.nbytes > MAX_RATIO * array.id.get_storage_size():
        raise ValueError(f"{name} of {episode} claim {array.nbytes:,} bytes that the file cannot hold")
    return array


def export_to_minari(dataset: str | Path, folder: Path) -> int:
    """Writes a dataset's states as a lossless Minari dataset, and returns the number of episodes.

    A dataset does not have the observation after an episode's last action, so an episode ends one step early, as
    truncated. A teacher's outputs become `infos["scores"]`. Actions that are unknown are the teacher's best, and
    unknown rewards are nan.

    Args:
        dataset: see `open_dataset`.
        folder: of the new Minari dataset; its name is the dataset's id.

    Raises:
        ValueError: the folder exists.
        BadFile: neither actions nor teacher outputs are known, or a damaged dataset.
        ModuleNotFoundError: minari is not installed.
    """
    import h5py
    from minari.dataset.minari_storage import MinariStorage

    if folder.exists():
        raise ValueError(f"{folder}: exists already; use another folder")
    source = open_dataset(dataset)
    info = source.info
    if info.num_actions is None:
        raise ValueError(f"{dataset}: its number of actions is unknown; import it again with --game")
    replay = load_dataset(dataset)
    steps = _steps(source.generation, replay)
    episodes = _episodes(replay, steps["starts"])
    # Minari needs the bounds of the space, which a dataset does not store.
    low, high = (0, 255) if info.dtype == "uint8" else (-np.inf, np.inf)
    metadata = {
        "dataset_id": folder.name,
        "total_episodes": len(episodes),
        "total_steps": sum(len(rows_T) - 1 for rows_T in episodes),
        "description": f"{info.origin.game or 'states'} from {info.origin.source}; {info.origin.preprocessing}",
        "minari_version": version("minari"),
    }

    # Under a temporary name until it is complete.
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        storage = MinariStorage.new(
            temporary / "data",
            observation_space=Box(low, high, info.obs_shape, np.dtype(info.dtype).type),
            action_space=Discrete(info.num_actions),
            jpeg_encoding=False,
        )
        # Not minari's update_episodes, which does not compress: a state would take 28 kB in place of 0.4.
        with h5py.File(temporary / "data" / MAIN_FILE, "a", track_order=True) as file:
            for number, rows_T in enumerate(episodes):
                _write_episode(file.create_group(f"episode_{number}"), number, replay, rows_T, steps)
        storage.update_metadata(metadata)
        for path in (*temporary.rglob("*"), temporary):
            sync_folder(path)  # of a file: its content
        temporary.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return len(episodes)


def _steps(generation: Generation, replay: Replay) -> Arrays:
    """Returns actions, rewards and starts of all rows; what is unknown is filled in."""
    shards = [arrays for _, arrays in generation.read_shards()]
    if "actions" not in shards[0] and "teacher" not in shards[0]:
        raise BadFile(f"{generation.folder}: has neither actions nor teacher outputs; Minari needs actions")
    steps: Arrays = {
        "actions": replay.teacher_NA.argmax(dim=1).numpy(),
        "rewards": np.full(len(replay), np.nan, np.float32),
        "starts": (replay.num_past_frames_N.numpy() == 0) & (replay.stack > 1),
    }
    known = {key: np.concatenate([arrays[key] for arrays in shards]) for key in steps if key in shards[0]}
    return {**steps, **known}


def _episodes(replay: Replay, starts_N: np.ndarray) -> list[torch.Tensor]:
    """Returns the rows of every episode, stream by stream."""
    episodes = []
    is_state_N = np.ones(len(replay), np.bool_)
    is_state_N[replay.context_only_rows.numpy()] = False
    # Rows of different environments alternate; an episode is consecutive within its own.
    for env in range(replay.num_envs):
        rows_T = np.arange(env, len(replay), replay.num_envs)
        rows_T = rows_T[is_state_N[rows_T]]
        parts = np.split(rows_T, np.flatnonzero(starts_N[rows_T]))
        episodes += [torch.from_numpy(part) for part in parts if len(part)]
    return episodes


def _write_episode(group: Any, number: int, replay: Replay, rows_T: torch.Tensor, steps: Arrays) -> None:
    num_steps = len(rows_T) - 1
    group.attrs.update({"id": number, "total_steps": num_steps})
    chunks = (min(16, len(rows_T)), *replay.obs_shape)
    obs = replay.gather(rows_T).numpy()
    group.create_dataset("observations", data=obs, chunks=chunks, compression="gzip", compression_opts=1)
    group["actions"] = steps["actions"][rows_T[:-1]].astype(np.int64)
    group["rewards"] = steps["rewards"][rows_T[:-1]]
    group["terminations"] = np.zeros(num_steps, np.bool_)
    group["truncations"] = np.arange(1, num_steps + 1) == num_steps
    teacher_TA = replay.teacher_NA[rows_T]
    if not teacher_TA.isnan().any():
        group["infos/scores"] = teacher_TA.numpy()
