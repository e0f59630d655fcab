"""Minari datasets: reads lossless ones, and writes states as one.

Read with h5py alone: for a dataset without spaces minari makes the environment that the file names, which imports
whatever module it names.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from policykd.envs.games import canonical_name
from policykd.importers.recordings import CHUNK, NO_ACTION, Recording, frames_first, rows, stacked_shape
from policykd.io.files import BadFile, sync_folder
from policykd.io.signals import check_interrupted
from policykd.replay import Replay
from policykd.storage.dataset import Dataset, fill, open_dataset
from policykd.storage.manifest import Origin, StatesInfo
from policykd.storage.shards import MAX_RATIO, Arrays

MAIN_FILE = "main_data.hdf5"


def read_minari(data: Path, *, game: str | None) -> tuple[StatesInfo, Iterator[Arrays]]:
    """Returns the states of a Minari dataset, episode by episode, and an iterator over their rows.

    Args:
        data: the folder with `metadata.json` and `main_data.hdf5`.
        game: what was played, where the metadata does not say it.

    Raises:
        BadFile: JPEG-coded images, other spaces than vectors or grey images and discrete actions, a damaged file.
    """
    path = data / MAIN_FILE
    try:
        metadata = json.loads((data / "metadata.json").read_text())
        space, actions = json.loads(metadata["observation_space"]), json.loads(metadata["action_space"])
        shape, dtype = tuple(space["shape"]), np.dtype(space["dtype"])
        num_episodes, num_actions = int(metadata["total_episodes"]), int(actions["n"])
        first_action, env_id = int(actions.get("start", 0)), json.loads(metadata.get("env_spec") or "{}").get("id")
        if num_actions < 1:
            raise ValueError(f"{num_actions} actions cannot be")
        if metadata["data_format"] != "hdf5":
            raise ValueError(f"its data_format is {metadata['data_format']!r}, only 'hdf5' is read")
        if metadata.get("jpeg_encoding", True) and _is_image(shape, dtype):
            raise ValueError(
                "its images are JPEG-coded: lossy, not what the agent saw; record with jpeg_encoding=False"
            )
        obs_shape, stack = stacked_shape(shape, dtype)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise BadFile(f"{data}: cannot be imported: {reason}; give another Minari dataset") from error
    about = StatesInfo(
        obs_shape=obs_shape,
        stack=stack,
        dtype=dtype.name,
        origin=Origin(
            f"Minari dataset {metadata.get('dataset_id', data.parent.name)}",
            f"of the environment {env_id or 'unknown'}",
            _agreed(data, env_id, game),
        ),
        num_actions=num_actions,
    )
    return about, rows(_recordings(path, num_episodes, shape, dtype, first_action), data)


def export_to_minari(dataset: str | Path, folder: Path) -> int:
    """Writes a dataset's states as a lossless Minari dataset, and returns how many episodes it has.

    The observation after an episode's last action is in no dataset, so an episode ends one step early, as truncated.
    A teacher's scores become `infos["scores"]`; where the actions that were taken are unknown they are the teacher's
    best, and rewards that are unknown are nan.

    Args:
        dataset: see `open_dataset`.
        folder: of the new Minari dataset; its name is the dataset's id.

    Raises:
        ValueError: the folder exists, or minari is missing.
        BadFile: neither actions nor scores are known, or a damaged dataset.
    """
    try:
        import h5py
        from gymnasium.spaces import Box, Discrete
        from minari.dataset.minari_storage import MinariStorage
    except ModuleNotFoundError as error:
        raise ValueError(f"{folder}: minari is missing ({error}); pip install 'minari[hdf5]'") from error
    if folder.exists():
        raise ValueError(f"{folder}: exists already; give another folder")
    source = open_dataset(dataset)
    about = source.info
    if about.num_actions is None:
        raise ValueError(f"{dataset}: does not say how many actions there are; import it again with --game")
    replay = fill(source, about.num_actions, keep_outputs=True)
    steps = _steps(source, replay)

    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        low, high = (0, 255) if about.dtype == "uint8" else (-np.inf, np.inf)
        storage = MinariStorage.new(
            temporary / "data",
            observation_space=Box(low, high, about.obs_shape, np.dtype(about.dtype).type),
            action_space=Discrete(about.num_actions),
            jpeg_encoding=False,
        )
        num_steps = 0
        with h5py.File(temporary / "data" / MAIN_FILE, "a", track_order=True) as file:
            episodes = _episodes(replay, steps["starts"])
            for number, rows_T in enumerate(episodes):
                _write_episode(file, number, replay, rows_T, steps)
                num_steps += len(rows_T) - 1
        storage.update_metadata(
            {
                "dataset_id": folder.name,
                "total_episodes": len(episodes),
                "total_steps": num_steps,
                "description": f"{about.origin.game or 'states'} from {about.origin.source}; {about.origin.preprocessing}",  # noqa: E501
                "minari_version": _minari_version(),
            }
        )
        for path in (*temporary.rglob("*"), temporary):
            sync_folder(path)  # of a file: its content
        temporary.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return len(episodes)


def _recordings(
    path: Path, num_episodes: int, shape: tuple[int, ...], dtype: np.dtype, first_action: int
) -> Iterator[Recording]:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: h5py is missing; pip install 'minari[hdf5]'") from error
    try:
        with h5py.File(path, "r") as file:
            for number in range(num_episodes):
                parts = [_array(file, f"episode_{number}", name) for name in ("observations", "actions", "rewards")]
                obs, actions, rewards = parts
                num_obs, num_steps = len(obs), len(actions)
                if obs.shape[1:] != shape or obs.dtype != dtype or not num_steps == len(rewards) == num_obs - 1:
                    raise ValueError(
                        f"episode {number}: expected observations {dtype} {shape}, one more than actions and rewards,"
                        f" found {obs.dtype} {obs.shape}, {num_steps} and {len(rewards)}"
                    )
                for first in range(0, num_obs, CHUNK):
                    check_interrupted()
                    end = min(first + CHUNK, num_obs)
                    actions_T, rewards_T = np.full(end - first, NO_ACTION), np.zeros(end - first)
                    last = min(end, num_steps) - first
                    actions_T[:last] = actions[first : first + last] - first_action
                    rewards_T[:last] = rewards[first : first + last]
                    starts_T = np.arange(first, end) == 0
                    yield Recording(frames_first(obs[first:end]), actions_T, rewards_T, starts_T)
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise BadFile(f"{path}: cannot be imported ({error}); give another Minari dataset") from error


def _array(file: Any, episode: str, name: str) -> Any:
    """Returns an array that the file itself holds: no link into another file, no more than its bytes can stand for."""
    import h5py

    for place, key in ((file, episode), (file.get(episode), name)):
        if not isinstance(place, h5py.Group) or not isinstance(place.get(key, getlink=True), h5py.HardLink):
            raise ValueError(f"{episode} has no {name} of its own")
    array = file[episode][name]
    if not isinstance(array, h5py.Dataset) or array.is_virtual or array.external or array.dtype.kind not in "buif":
        raise ValueError(f"{name} of {episode} are not plain numbers in this file")
    if not array.shape:
        raise ValueError(f"{name} of {episode} are not one for each step")
    if array.nbytes > MAX_RATIO * array.id.get_storage_size():
        raise ValueError(f"{name} of {episode} claim {array.nbytes:,} bytes that the file cannot hold")
    return array


def _is_image(shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Whether minari codes such observations as JPEG unless it is told not to."""
    return len(shape) in (2, 3) and min(shape[:2]) >= 32 and dtype == np.uint8


def _agreed(data: Path, env_id: str | None, game: str | None) -> str | None:
    try:
        found = canonical_name(env_id) if env_id else None
    except ValueError:
        found = None
    if game and found and game != found:
        raise ValueError(f"{data}: expected states of {game}, found {found} ({env_id}); give the right --game")
    return found or game


def _steps(dataset: Dataset, replay: Replay) -> Arrays:
    """Returns actions, rewards and starts of all rows, as far as they are known."""
    keys = ("actions", "rewards", "starts")
    shards = [{key: arrays[key] for key in keys if key in arrays} for _, arrays in dataset.generation.read_shards()]
    known: Arrays = {key: np.concatenate([arrays[key] for arrays in shards]) for key in shards[0]}
    if "actions" not in known and dataset.info.origin.teacher is None:
        raise BadFile(
            f"{dataset.generation.folder}: holds neither actions nor a teacher's scores, Minari needs actions"
        )
    if "actions" not in known:
        known["actions"] = replay.teacher_NA.argmax(dim=1).numpy()
    known.setdefault("rewards", np.full(len(replay), np.nan, np.float32))
    known.setdefault(
        "starts", replay.num_past_frames_N.numpy() == 0 if replay.stack > 1 else np.zeros(len(replay), np.bool_)
    )
    return known


def _episodes(replay: Replay, starts_N: np.ndarray) -> list[torch.Tensor]:
    """Returns the rows of every episode, stream by stream."""
    episodes = []
    is_state_N = np.ones(len(replay), np.bool_)
    is_state_N[replay.context_only_rows.numpy()] = False
    for env in range(replay.num_envs):
        rows_T = np.arange(env, len(replay), replay.num_envs)
        rows_T = rows_T[is_state_N[rows_T]]
        episodes += [torch.from_numpy(r) for r in np.split(rows_T, np.flatnonzero(starts_N[rows_T])) if len(r)]
    return episodes


def _write_episode(file: Any, number: int, replay: Replay, rows_T: torch.Tensor, steps: Arrays) -> None:
    group = file.create_group(f"episode_{number}")
    num_steps = len(rows_T) - 1
    group.attrs.update({"id": number, "total_steps": num_steps})
    shape = (len(rows_T), *replay.obs_shape)
    chunks = (min(16, len(rows_T)), *replay.obs_shape)
    dtype = str(replay.frames.dtype).removeprefix("torch.")
    obs = group.create_dataset("observations", shape, dtype, chunks=chunks, compression="gzip", compression_opts=1)
    for first in range(0, len(rows_T), CHUNK):
        check_interrupted()
        obs[first : first + CHUNK] = replay.gather(rows_T[first : first + CHUNK]).numpy()
    group["actions"] = steps["actions"][rows_T[:-1]].astype(np.int64)
    group["rewards"] = steps["rewards"][rows_T[:-1]]
    group["terminations"] = np.zeros(num_steps, np.bool_)
    group["truncations"] = np.arange(1, num_steps + 1) == num_steps
    if not (scores_TA := replay.teacher_NA[rows_T]).isnan().any():
        group["infos/scores"] = scores_TA.numpy()


def _minari_version() -> Any:
    from importlib.metadata import version

    return version("minari")
