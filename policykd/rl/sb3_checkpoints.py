"""Saves and restores an SB3 algorithm in the middle of its training, so that it goes on as if nothing had happened.

SB3's own `save` keeps weights and optimizer; here the games, the random streams and the replay buffer are kept too, and
nothing is a pickle. A checkpoint belongs between two rollouts: SB3 has then learned from all that it has collected.
"""

import random
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from policykd.envs.vector import VectorEnv
from policykd.io.signals import check_interrupted, seconds_since_signal
from policykd.rl.frame_buffer import FrameReplayBuffer
from policykd.storage.checkpoints import optimizer_tensors, restore_optimizer
from policykd.storage.generations import commit, last, packed, read_arrays, read_file, recover
from policykd.storage.shards import compressed

KEYS = ("counters", "episodes", "envs", "starts", "random", "num_added", "shard_ends")
COUNTERS = (
    *("num_timesteps", "_episode_num", "_n_updates", "_n_calls"),
    *("exploration_rate", "_current_progress_remaining", "evaluated_at"),
)
GRACE_SECONDS = 5.0
"""after a signal, until a rollout is given up whose end is still far away; the process is to be gone after 10"""


def save_training(model: BaseAlgorithm, envs: VectorEnv, folder: Path, *, wall_seconds: float = 0.0) -> None:
    """Writes where the training of `model` on `envs` stands; of the replay buffer only what is new.

    `wall_seconds` is how long it has taken so far; it is kept for the card.

    Raises:
        ValueError: the folder holds the checkpoints of another run.
        OSError: no room or no permission; the checkpoint before stays valid.
    """
    before, buffer = last(folder, KEYS), _buffer(model)
    steps_before = before.about["counters"]["num_timesteps"] if before else 0
    if steps_before > model.num_timesteps:
        raise ValueError(f"{folder}: holds the checkpoints of another run; give another folder")
    files, shards, num_added = dict[str, bytes](), dict[str, int](), 0
    if buffer:
        num_added, gone = buffer.num_added, buffer.num_added - buffer.buffer_size
        num_saved = 0
        if before:
            num_saved = before.about["num_added"]
            ends = zip(before.named("replay"), before.about["shard_ends"], strict=True)
            shards = {name: end for name, end in ends if end > gone}
        if num_added > num_saved:
            files["replay.npz"] = compressed(buffer.arrays(num_saved))
    tensors: dict[str, Tensor] = {f"policy.{name}": p for name, p in model.policy.named_parameters()}
    tensors |= optimizer_tensors(model.policy.optimizer)
    tensors["torch_random"] = torch.get_rng_state()
    if model.device.type == "cuda":
        tensors["cuda_random"] = torch.cuda.get_rng_state(model.device)
    kind, words, *rest = np.random.get_state(legacy=True)
    tensors["numpy_random"] = torch.from_numpy(np.asarray(words, np.int64))
    files["model.safetensors"] = packed(tensors)
    version, python_words, gauss = random.getstate()
    about = {
        "counters": {name: getattr(model, name) for name in COUNTERS if hasattr(model, name)},
        "episodes": list(model.ep_info_buffer or []),
        "envs": envs.state(),
        "starts": np.asarray(model._last_episode_starts).tolist(),
        "random": {
            "numpy": [kind, *rest],
            "python": [version, list(python_words), gauss],
            "actions": model.action_space.np_random.bit_generator.state,
        },
        "num_added": num_added,
        "shard_ends": [*shards.values(), *([num_added] if "replay.npz" in files else [])],
        "wall_seconds": wall_seconds,
    }
    commit(folder, before, files, kept=shards, at=f"step {model.num_timesteps:,}", about=about)


def restore_training(model: BaseAlgorithm, envs: VectorEnv, folder: Path) -> float:
    """Brings a freshly made `model` and `envs` to where `save_training` saw them; returns its `wall_seconds`.

    Go on with `model.learn(total - model.num_timesteps, reset_num_timesteps=False)`.

    Raises:
        BadFile: no checkpoint, or none whose files are those that were saved.
    """
    generation = recover(folder, KEYS)
    manifest, buffer = generation.about, _buffer(model)
    for name, end in zip(generation.named("replay"), manifest["shard_ends"], strict=True):
        assert buffer is not None
        buffer.extend(read_arrays(generation, name), end)
    (name,) = generation.named("model")
    tensors = load_tensors(read_file(generation, name))
    with torch.no_grad():
        for parameter, value in model.policy.named_parameters():
            value.copy_(tensors[f"policy.{parameter}"])
    restore_optimizer(model.policy.optimizer, tensors)
    for counter, number in manifest["counters"].items():
        setattr(model, counter, number)
    model.ep_info_buffer = deque(manifest["episodes"], maxlen=model._stats_window_size)
    model.ep_success_buffer = deque(maxlen=model._stats_window_size)
    model._last_obs = envs.restore(manifest["envs"]).numpy()
    model._last_episode_starts = np.array(manifest["starts"])
    stored: dict[str, Any] = manifest["random"]
    kind, *rest = stored["numpy"]
    np.random.set_state((kind, tensors["numpy_random"].numpy().astype(np.uint32), *rest))
    version, words, gauss = stored["python"]
    random.setstate((version, tuple(words), gauss))
    model.action_space.np_random.bit_generator.state = stored["actions"]
    torch.set_rng_state(tensors["torch_random"])
    if model.device.type == "cuda" and "cuda_random" in tensors:
        torch.cuda.set_rng_state(tensors["cuda_random"], model.device)
    return float(manifest.get("wall_seconds", 0.0))


class Progress(BaseCallback):
    """Saves and evaluates between rollouts, and stops the training there once a signal has come.

    Where a rollout with the learning from it takes so long that a signal could not wait for its end, each begins with a
    checkpoint, and after `GRACE_SECONDS` it is given up: the training goes on from its beginning.
    """

    def __init__(
        self,
        envs: VectorEnv,
        folder: Path,
        checkpoint_every: int,
        evaluate: Callable[[int], None],
        evaluate_every: int,
        wall_seconds: float = 0.0,
    ) -> None:
        """Takes the environments, where checkpoints go, and after how many steps they are due and `evaluate` is called.

        An `evaluate_every` of 0 is never; `wall_seconds` were spent before.
        """
        super().__init__()
        self.envs, self.folder, self.checkpoint_every = envs, folder, checkpoint_every
        self.evaluate, self.evaluate_every = evaluate, evaluate_every
        self.saved = 0
        """steps at the last checkpoint"""
        self.wall_seconds = wall_seconds
        """up to the last checkpoint"""
        self._began = self._rollout_began = time.perf_counter()

    def save(self) -> None:
        """Writes a checkpoint and prints a line about it."""
        steps, seconds = self.model.num_timesteps, time.perf_counter() - self._began
        self._began += seconds
        self.wall_seconds += seconds
        save_training(self.model, self.envs, self.folder, wall_seconds=self.wall_seconds)
        recent = [e["r"] for e in self.model.ep_info_buffer or []]
        score = f"{np.mean(recent):.2f} in the last {len(recent)} games" if recent else "no game ended yet"
        print(f"{steps:>11,} steps: {score}, {(steps - self.saved) / seconds:.0f} steps/s; saved", flush=True)
        self.saved = steps

    def _on_training_start(self) -> None:
        model: Any = self.model
        self.saved, self._rollout_began = model.num_timesteps, time.perf_counter()
        model.evaluated_at = getattr(model, "evaluated_at", model.num_timesteps)  # there, so that checkpoints have it
        self._hook = model.policy.optimizer.register_step_pre_hook(self._stop_if_late)

    def _on_training_end(self) -> None:
        self._hook.remove()

    def _on_rollout_start(self) -> None:
        model: Any = self.model
        steps, is_slow = model.num_timesteps, time.perf_counter() - self._rollout_began > GRACE_SECONDS / 2
        is_due = self.evaluate_every and steps // self.evaluate_every > model.evaluated_at // self.evaluate_every
        if is_due or is_slow or seconds_since_signal() or steps - self.saved >= self.checkpoint_every:
            self.save()
        check_interrupted()
        if is_due:
            self.evaluate(steps)
            model.evaluated_at = steps
        self._rollout_began = time.perf_counter()

    def _on_step(self) -> bool:
        self._stop_if_late()
        return True

    def _stop_if_late(self, *_: object) -> None:
        if seconds_since_signal() > GRACE_SECONDS:
            check_interrupted()


def _buffer(model: BaseAlgorithm) -> FrameReplayBuffer | None:
    buffer = getattr(model, "replay_buffer", None)
    assert buffer is None or isinstance(buffer, FrameReplayBuffer)
    return buffer
