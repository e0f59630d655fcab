"""A replay buffer for SB3's off-policy algorithms that stores each frame once.

SB3's own stores every observation and its successor as whole stacks of frames: 56 kB per step on Atari, here 7 kB.

Shape suffixes: T steps of the ring, E environments, S stack.
"""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize


class FrameReplayBuffer(ReplayBuffer):
    """A ring of the newest frames with n-step returns, for `DQN(replay_buffer_class=FrameReplayBuffer)`.

    Steps are sampled as SB3's `ReplayBuffer` samples them, except for the few at the ends of the ring whose older
    frames or whose successors are not in it. An episode that a time limit cut counts as terminated.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: gym.spaces.Box,
        action_space: gym.spaces.Discrete,
        *,
        n_steps: int = 1,
        gamma: float = 0.99,
        **kwargs: Any,
    ) -> None:
        """Allocates the ring of `buffer_size` steps over all environments.

        Observations are stacks of frames `(stack, height, width)`, or vectors; actions are discrete. `n_steps` rewards
        are summed before the bootstrap (Sutton, 1988; Hessel et al., 2018), discounted by `gamma`. The other arguments
        are SB3's; `optimize_memory_usage` is ignored.

        Raises:
            ValueError: the ring is shorter than a sample.
        """
        # SB3 would allocate the arrays that this class replaces: give it a single step per environment.
        kwargs |= {"optimize_memory_usage": False, "handle_timeout_termination": False}
        super().__init__(kwargs.get("n_envs", 1), observation_space, action_space, **kwargs)
        del self.observations, self.next_observations, self.timeouts
        self.buffer_size = max(buffer_size // self.n_envs, 1)
        self.n_steps = n_steps
        self.gamma = gamma
        shape = observation_space.shape
        self.stack = shape[0] if len(shape) == 3 else 1
        if self.buffer_size <= n_steps + self.stack:
            raise ValueError(f"buffer_size {buffer_size} is too small for {self.n_envs} environments; raise it")
        size = (self.buffer_size, self.n_envs)
        frame_shape = shape[1:] if self.stack > 1 else shape
        self.frames_TE = np.zeros((*size, *frame_shape), observation_space.dtype)
        self.num_past_frames_TE = np.zeros(size, np.uint8)
        """earlier frames in the stack that are of the same episode (or life); the others are zeros"""
        self.actions = np.zeros((*size, 1), np.int64)
        self.rewards = np.zeros(size, np.float32)
        self.dones = np.zeros(size, np.float32)
        self.num_added = 0
        """steps per environment since the start; the ring holds the last `buffer_size`"""

    def add(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[Any],
    ) -> None:
        """Appends a step of every environment; `next_obs` is the next call's `obs`, and unused after a `done`."""
        # The newest frame of each stack; the older ones are in the ring already, or zeros.
        now = self.pos
        self.frames_TE[now] = obs[:, -1] if self.stack > 1 else obs
        if self.num_added:
            num_past_frames_E = np.minimum(self.num_past_frames_TE[now - 1] + 1, self.stack - 1)
            self.num_past_frames_TE[now] = np.where(self.dones[now - 1], 0, num_past_frames_E)
        self.actions[now] = action.reshape(-1, 1)
        self.rewards[now] = reward
        self.dones[now] = done
        self._set_num_added(self.num_added + 1)

    def reset(self) -> None:
        """Empties the ring."""
        self._set_num_added(0)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """Returns a uniform batch of steps whose frames and successors are all in the ring."""
        # The stacks of the oldest steps and the successors of the newest ones are not complete.
        oldest = max(0, self.num_added - self.buffer_size)
        first = oldest + self.stack - 1 if oldest else 0
        return self._get_samples(np.random.randint(first, self.num_added - self.n_steps, size=batch_size))

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ReplayBufferSamples:
        # NumPy's global generator, in SB3's order: the same draws as SB3's own buffers.
        envs = np.random.randint(0, high=self.n_envs, size=len(batch_inds))
        steps = (batch_inds[:, None] + np.arange(self.n_steps)) % self.buffer_size
        # A reward counts if no earlier step of the n ended the episode.
        is_alive = np.cumprod(1.0 - self.dones[steps, envs[:, None]], axis=1)
        discounts = self.gamma ** np.arange(self.n_steps)
        rewards = self.rewards[steps, envs[:, None]]
        returns = rewards[:, 0] + (rewards[:, 1:] * is_alive[:, :-1] * discounts[1:]).sum(axis=1)
        columns = (
            self._stacks(batch_inds, envs),
            self.actions[batch_inds % self.buffer_size, envs],
            self._stacks(batch_inds + self.n_steps, envs),
            (1.0 - is_alive[:, -1:]).astype(np.float32),
            returns[:, None].astype(np.float32),
            np.full((len(batch_inds), 1), self.gamma**self.n_steps, np.float32),
        )
        return ReplayBufferSamples(*(torch.as_tensor(column, device=self.device) for column in columns))

    def _stacks(self, steps: np.ndarray, envs: np.ndarray) -> np.ndarray:
        """Returns the observations of steps, with zeros for the frames before the start of an episode."""
        if self.stack == 1:
            vectors: np.ndarray = self.frames_TE[steps % self.buffer_size, envs]
            return vectors
        back_S = np.arange(self.stack - 1, -1, -1)
        stacks: np.ndarray = self.frames_TE[(steps[:, None] - back_S) % self.buffer_size, envs[:, None]]
        stacks[back_S > self.num_past_frames_TE[steps % self.buffer_size, envs][:, None]] = 0
        return stacks

    def arrays(self, first: int) -> dict[str, np.ndarray]:
        """Returns the steps from number `first` on that are still in the ring, for a shard on disk."""
        rows = np.arange(max(first, self.num_added - self.buffer_size, 0), self.num_added) % self.buffer_size
        return {name: array[rows] for name, array in self._columns().items()}

    def extend(self, arrays: dict[str, np.ndarray], num_added: int) -> None:
        """Restores a shard that `arrays` returned when `num_added` steps had been added."""
        rows = np.arange(num_added - len(arrays["dones"]), num_added) % self.buffer_size
        for name, array in self._columns().items():
            array[rows] = arrays[name]
        self._set_num_added(num_added)

    def _columns(self) -> dict[str, np.ndarray]:
        return {
            "frames": self.frames_TE,
            "num_past_frames": self.num_past_frames_TE,
            "actions": self.actions,
            "rewards": self.rewards,
            "dones": self.dones,
        }

    def _set_num_added(self, num_added: int) -> None:
        self.num_added = num_added
        self.pos = num_added % self.buffer_size
        self.full = num_added >= self.buffer_size
