"""Checkpoints of an SB3 algorithm in the middle of its training, from which it continues bit for bit.

SB3's own `save` holds weights and optimizer; here the environments, the random streams and the replay buffer are saved
too, and nothing is a pickle. A checkpoint is written between two rollouts, when SB3 has learned from all that it has
collected.
"""

from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import JsonValue
from safetensors.torch import load as load_tensors
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor

from policykd.envs.vector import VectorEnv
from policykd.io.typed import Arrays, parse_json, to_json
from policykd.rl.frame_buffer import FrameReplayBuffer
from policykd.storage.checkpoints import optimizer_tensors, pack_tensors, restore_optimizer
from policykd.storage.generations import Manifest, ShardEntry, commit, last, recover

COUNTERS = (
    *("num_timesteps", "_episode_num", "_n_updates", "_n_calls"),
    *("exploration_rate", "_current_progress_remaining", "evaluated_at"),
)
"""attributes of SB3's algorithms, and of `Training`"""


@dataclass(frozen=True)
class TrainingProgress:
    """Content of `progress-NNNNNN.json`: everything in a checkpoint that is neither a tensor nor a stored step."""

    counters: dict[str, int | float]
    episodes: tuple[dict[str, int | float], ...]
    """SB3's `ep_info_buffer`"""
    envs: dict[str, JsonValue]
    """state of the environments: JSON that only they understand"""
    episode_starts: tuple[bool, ...]
    numpy_random: tuple[str, int, int, float]
    """name of the generator, position, whether a Gaussian is cached, and that Gaussian"""
    action_random: dict[str, JsonValue]
    """state of NumPy's bit generator"""
    wall_seconds: float


def save_training(model: BaseAlgorithm, envs: VectorEnv, folder: Path, *, wall_seconds: float = 0.0) -> None:
    """Writes a checkpoint of the training of `model` on `envs`; of the replay buffer only the new steps.

    The model is between two rollouts; `wall_seconds`, the duration of the training so far, is saved too.

    Raises:
        ValueError: the folder holds the checkpoints of another run.
        OSError: no space left or no permission; the previous checkpoint stays valid.
    """
    previous = last(folder, "step", max_position=model.num_timesteps)
    shards = previous.manifest.shards if previous else dict[str, ShardEntry]()
    buffer = _buffer(model)
    num_saved = max((shard.first_row + shard.num_rows for shard in shards.values()), default=0)
    new_rows: Arrays = {}
    if buffer:
        # Shards whose last step has left the ring are dropped.
        oldest = buffer.num_added - buffer.buffer_size
        shards = {name: s for name, s in shards.items() if s.first_row + s.num_rows > oldest}
        new_rows = buffer.arrays(num_saved) if buffer.num_added > num_saved else {}

    # Weights, optimizer, and the global random streams, from which SB3 draws actions and minibatches.
    tensors: dict[str, Tensor] = {f"policy.{name}": p for name, p in model.policy.named_parameters()}
    tensors |= optimizer_tensors(model.policy.optimizer)
    tensors["torch_random"] = torch.get_rng_state()
    if model.device.type == "cuda":
        tensors["cuda_random"] = torch.cuda.get_rng_state(model.device)
    kind, words, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors["numpy_random"] = torch.from_numpy(np.asarray(words, np.int64))
    progress = TrainingProgress(
        counters={name: getattr(model, name) for name in COUNTERS if hasattr(model, name)},
        episodes=tuple(model.ep_info_buffer or ()),
        envs=envs.state(),
        episode_starts=tuple(np.asarray(model._last_episode_starts).tolist()),
        numpy_random=(str(kind), int(position), int(has_gauss), float(cached)),
        action_random=dict(model.action_space.np_random.bit_generator.state),
        wall_seconds=wall_seconds,
    )
    files = {"model.safetensors": pack_tensors(tensors), "progress.json": to_json(progress, indent=None)}
    manifest = Manifest(unit="step", position=model.num_timesteps, shards=shards)
    first_row = buffer.num_added - len(new_rows["dones"]) if buffer and new_rows else 0
    commit(folder, previous, manifest, files, new_rows, first_row=first_row)


def restore_training(model: BaseAlgorithm, envs: VectorEnv, folder: Path) -> float:
    """Restores a new `model` and its `envs` from the newest checkpoint; returns its `wall_seconds`.

    Continue with `model.learn(total - model.num_timesteps, reset_num_timesteps=False)`.

    Raises:
        BadFile: no checkpoint, or none that is intact.
    """
    generation = recover(folder, "step")
    progress = parse_json(TrainingProgress, generation.read_kind("progress"), folder)
    buffer = _buffer(model)
    for name, arrays in generation.read_shards():
        assert buffer is not None
        shard = generation.manifest.shards[name]
        buffer.extend(arrays, shard.first_row + shard.num_rows)
    tensors = load_tensors(generation.read_kind("model"))
    with torch.no_grad():
        for parameter, weight in model.policy.named_parameters():
            weight.copy_(tensors[f"policy.{parameter}"])
    restore_optimizer(model.policy.optimizer, tensors)
    # SB3's attributes between two rollouts; `learn(reset_num_timesteps=False)` leaves them as they are.
    for counter, number in progress.counters.items():
        setattr(model, counter, number)
    model.ep_info_buffer = deque(progress.episodes, maxlen=model._stats_window_size)
    model.ep_success_buffer = deque(maxlen=model._stats_window_size)
    model._last_obs = envs.restore(progress.envs).numpy()
    model._last_episode_starts = np.array(progress.episode_starts)
    # The random streams last, because building environments and networks has drawn from them.
    kind, position, has_gauss, gauss = progress.numpy_random
    np.random.set_state((kind, tensors["numpy_random"].numpy().astype(np.uint32), position, has_gauss, gauss))
    model.action_space.np_random.bit_generator.state = progress.action_random
    torch.set_rng_state(tensors["torch_random"])
    if model.device.type == "cuda" and "cuda_random" in tensors:
        torch.cuda.set_rng_state(tensors["cuda_random"], model.device)
    return progress.wall_seconds


def _buffer(model: BaseAlgorithm) -> FrameReplayBuffer | None:
    buffer = getattr(model, "replay_buffer", None)
    assert buffer is None or isinstance(buffer, FrameReplayBuffer)
    return buffer
