"""Saves and restores an SB3 algorithm in the middle of its training, so that it goes on as if nothing had happened.

SB3's own `save` keeps weights and optimizer; here the games, the random streams and the replay buffer are kept too, and
nothing is a pickle. A checkpoint belongs between two rollouts: SB3 has then learned from all that it has collected.
"""

import random
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from policykd.checkpoints import (
    MANIFEST,
    commit,
    compressed,
    optimizer_tensors,
    packed,
    read_file,
    read_manifest,
    read_shard,
    restore_optimizer,
)
from policykd.envs.vector import VectorEnv
from policykd.frame_buffer import FrameReplayBuffer

KEYS = ("counters", "episodes", "envs", "starts", "random", "num_added")
COUNTERS = (
    *("num_timesteps", "_episode_num", "_n_updates", "_n_calls"),
    *("exploration_rate", "_current_progress_remaining"),
)


def save_training(model: BaseAlgorithm, envs: VectorEnv, folder: Path, *, wall_seconds: float = 0.0) -> None:
    """Writes where the training of `model` on `envs` stands; of the replay buffer only what is new.

    `wall_seconds` is how long it has taken so far; it is kept for the card.

    Raises:
        OSError: no room or no permission; the checkpoint before stays valid.
    """
    buffer = _buffer(model)
    files, kept, num_added = {}, dict[str, str](), 0
    if buffer:
        num_added, gone = buffer.num_added, buffer.num_added - buffer.buffer_size
        before: dict[str, Any] = {"num_added": 0, "files": {}}
        if (folder / MANIFEST).is_file():
            before = read_manifest(folder, KEYS)
        shards = {n: sha256 for n, sha256 in before["files"].items() if n.startswith("replay-")}
        kept = {n: sha256 for n, sha256 in shards.items() if _last_step(n) > gone}
        if num_added > before["num_added"]:
            files[f"replay-{num_added:010d}.npz"] = compressed(buffer.arrays(before["num_added"]))
    tensors: dict[str, Tensor] = {f"policy.{name}": p for name, p in model.policy.named_parameters()}
    tensors |= optimizer_tensors(model.policy.optimizer)
    tensors["torch_random"] = torch.get_rng_state()
    if model.device.type == "cuda":
        tensors["cuda_random"] = torch.cuda.get_rng_state(model.device)
    kind, words, *rest = np.random.get_state(legacy=True)
    tensors["numpy_random"] = torch.from_numpy(np.asarray(words, np.int64))
    files[f"model-{model.num_timesteps:010d}.safetensors"] = packed(tensors)
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
        "wall_seconds": wall_seconds,
    }
    commit(folder, files, kept=kept, about=about)


def restore_training(model: BaseAlgorithm, envs: VectorEnv, folder: Path) -> float:
    """Brings a freshly made `model` and `envs` to where `save_training` saw them; returns its `wall_seconds`.

    Go on with `model.learn(total - model.num_timesteps, reset_num_timesteps=False)`.

    Raises:
        ValueError: no checkpoint, or one whose files are not those that were saved.
    """
    manifest = read_manifest(folder, KEYS)
    buffer = _buffer(model)
    for name in sorted(n for n in manifest["files"] if n.startswith("replay-")):
        assert buffer is not None
        buffer.extend(read_shard(folder, name, manifest), _last_step(name))
    name = f"model-{manifest['counters']['num_timesteps']:010d}.safetensors"
    tensors = load_tensors(read_file(folder, name, manifest))
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
    """Saves and evaluates between rollouts, and stops the training there once a signal has come."""

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
        self.saved = self._seen = 0
        """steps at the last checkpoint, and at the start of the last rollout"""
        self._interrupted = False
        self.wall_seconds = wall_seconds
        """up to the last checkpoint"""
        self._began = time.perf_counter()

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Lets SIGINT and SIGTERM wait for the end of a rollout; a second one stops at once."""

        def note(number: int, frame: FrameType | None) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

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
        self.saved = self._seen = self.model.num_timesteps

    def _on_rollout_start(self) -> None:
        steps = self.model.num_timesteps
        if self._interrupted or steps - self.saved >= self.checkpoint_every:
            self.save()
        if self._interrupted:
            raise KeyboardInterrupt
        if self.evaluate_every and steps // self.evaluate_every > self._seen // self.evaluate_every:
            self.evaluate(steps)
        self._seen = steps

    def _on_step(self) -> bool:
        return True


def _buffer(model: BaseAlgorithm) -> FrameReplayBuffer | None:
    buffer = getattr(model, "replay_buffer", None)
    assert buffer is None or isinstance(buffer, FrameReplayBuffer)
    return buffer


def _last_step(shard: str) -> int:
    """Returns how many steps had been added when a shard was written."""
    return int(shard.removeprefix("replay-").removesuffix(".npz"))
