"""A replay buffer for SB3's off-policy algorithms that stores each frame once.

SB3's own keeps every observation and its successor as whole stacks: 56 kB a step on Atari, here 7 kB. Suffixes name
dimensions: T steps of the ring, E environments, S stack.
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

    Steps are drawn as SB3's `ReplayBuffer` draws them, but for the few at the ring's ends whose older frames or whose
    successors are not in it. A game that was cut by a time limit counts as ended.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: gym.spaces.Box,
        action_space: gym.spaces.Discrete,
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        *,
        n_steps: int = 1,
        gamma: float = 0.99,
    ) -> None:
        """Makes room for `buffer_size` steps, over all environments.

        Args:
            buffer_size: steps kept.
            observation_space: stacks of frames `(stack, height, width)`, or vectors.
            action_space: discrete.
            device: where samples go.
            n_envs: interleaved environments.
            optimize_memory_usage: ignored; SB3 passes it.
            n_steps: rewards summed before the bootstrap (Sutton, 1988; Hessel et al., 2018).
            gamma: the discount of those rewards.
        """
        # SB3's arrays would take the memory that is saved here: it is asked for one step, and ours replace them.
        super().__init__(n_envs, observation_space, action_space, device, n_envs, handle_timeout_termination=False)
        self.buffer_size = max(buffer_size // n_envs, 1)
        self.n_steps, self.gamma = n_steps, gamma
        shape = observation_space.shape
        self.stack = shape[0] if len(shape) == 3 else 1
        frame_shape = shape[1:] if self.stack > 1 else shape
        if self.buffer_size <= n_steps + self.stack:
            raise ValueError(f"buffer_size {buffer_size} is too small for {n_envs} environments; raise it")
        size = (self.buffer_size, n_envs)
        self.frames_TE = np.zeros((*size, *frame_shape), observation_space.dtype)
        self.pasts_TE = np.zeros(size, np.uint8)
        """how many earlier frames of the same game (or life) the stack holds"""
        self.actions, self.rewards = np.zeros((*size, 1), np.int64), np.zeros(size, np.float32)
        self.dones = np.zeros(size, np.float32)
        del self.observations, self.next_observations, self.timeouts
        self.num_added = 0
        """steps of every environment since the start; the ring holds the last `buffer_size`"""

    def add(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Appends one step of every environment; `next_obs` is the next call's `obs`, or of no use after a `done`."""
        now = self.pos
        self.frames_TE[now] = obs[:, -1] if self.stack > 1 else obs
        if self.num_added:
            pasts_E = np.minimum(self.pasts_TE[now - 1] + 1, self.stack - 1)
            self.pasts_TE[now] = np.where(self.dones[now - 1], 0, pasts_E)
        self.actions[now], self.rewards[now], self.dones[now] = action.reshape(-1, 1), reward, done
        self.num_added += 1
        self.pos, self.full = self.num_added % self.buffer_size, self.num_added >= self.buffer_size

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """Returns a uniform batch of steps whose frames and successors are all in the ring."""
        oldest = max(0, self.num_added - self.buffer_size)
        first = oldest + self.stack - 1 if oldest else 0
        return self._get_samples(np.random.randint(first, self.num_added - self.n_steps, size=batch_size))

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ReplayBufferSamples:
        envs = np.random.randint(0, high=self.n_envs, size=len(batch_inds))
        steps = (batch_inds[:, None] + np.arange(self.n_steps)) % self.buffer_size
        dones = self.dones[steps, envs[:, None]]
        goes_on = np.cumprod(1.0 - dones, axis=1)
        discounts = self.gamma ** np.arange(self.n_steps)
        rewards = self.rewards[steps, envs[:, None]]
        returns = rewards[:, 0] + (rewards[:, 1:] * goes_on[:, :-1] * discounts[1:]).sum(axis=1)
        n = len(batch_inds)
        columns = (
            self._stacks(batch_inds, envs),
            self.actions[batch_inds % self.buffer_size, envs],
            self._stacks(batch_inds + self.n_steps, envs),
            1.0 - goes_on[:, -1:],
            returns[:, None].astype(np.float32),
            np.full((n, 1), self.gamma**self.n_steps, np.float32),
        )
        obs, actions, next_obs, ended, returned, bootstrap = (torch.as_tensor(c, device=self.device) for c in columns)
        return ReplayBufferSamples(obs, actions, next_obs, ended.float(), returned, discounts=bootstrap)

    def _stacks(self, steps: np.ndarray, envs: np.ndarray) -> np.ndarray:
        if self.stack == 1:
            vectors: np.ndarray = self.frames_TE[steps % self.buffer_size, envs]
            return vectors
        back_S = np.arange(self.stack - 1, -1, -1)
        stacks: np.ndarray = self.frames_TE[(steps[:, None] - back_S) % self.buffer_size, envs[:, None]]
        stacks[back_S > self.pasts_TE[steps % self.buffer_size, envs][:, None]] = 0
        return stacks

    def arrays(self, first: int) -> dict[str, np.ndarray]:
        """Returns the steps from the `first`-th ever added on that are still in the ring, for a shard on disk."""
        rows = np.arange(max(first, self.num_added - self.buffer_size, 0), self.num_added) % self.buffer_size
        kept = {"frames": self.frames_TE, "pasts": self.pasts_TE, "actions": self.actions}
        return {k: v[rows] for k, v in {**kept, "rewards": self.rewards, "dones": self.dones}.items()}

    def extend(self, arrays: dict[str, np.ndarray], last: int) -> None:
        """Puts back a shard that `arrays` returned when `last` steps had been added."""
        rows = np.arange(last - len(arrays["dones"]), last) % self.buffer_size
        self.frames_TE[rows], self.pasts_TE[rows] = arrays["frames"], arrays["pasts"]
        self.actions[rows], self.rewards[rows], self.dones[rows] = arrays["actions"], arrays["rewards"], arrays["dones"]
        self.num_added = last
        self.pos, self.full = last % self.buffer_size, last >= self.buffer_size
