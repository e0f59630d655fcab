"""An environment with one-step episodes whose best action is written in the observation, for tests that learn."""

import numpy as np
import torch
from torch import Tensor

from policykd.envs import EnvState
from policykd.envs.vector import Episode, Step


class IdentityEnv:
    """`num_envs` independent copies; reward 1 when the action equals the hot index of the observation."""

    def __init__(self, num_envs: int, num_actions: int, seed: int = 0) -> None:
        self.num_envs = num_envs
        self.num_actions = num_actions
        self.stack = 1
        self.obs_shape: tuple[int, ...] = (num_actions,)
        self._random = np.random.default_rng(seed)
        self._hot_B = torch.zeros(num_envs, dtype=torch.long)

    def reset(self) -> Tensor:
        """Returns the first observations, one-hot float32 `(num_envs, num_actions)`."""
        self._hot_B = self._draw()
        return self._obs()

    def step(self, actions_B: Tensor) -> Step:
        """Ends every episode with its reward and starts the next; where the action is negative, nothing happens."""
        plays_B = actions_B >= 0
        rewards_B = (self._hot_B == actions_B).float()
        episodes = [Episode(i, reward, 1) for i, reward in enumerate(rewards_B.tolist()) if plays_B[i]]
        self._hot_B = torch.where(plays_B, self._draw(), self._hot_B)
        return Step(self._obs(), rewards_B, plays_B, episodes)

    def state(self) -> EnvState:
        """Returns the generator's state and the hot indices."""
        return {"random": self._random.bit_generator.state, "hot": self._hot_B.tolist()}

    def restore(self, state: EnvState) -> Tensor:
        """Returns the observations of a position."""
        self._random.bit_generator.state = state["random"]
        self._hot_B = torch.tensor(state["hot"])
        return self._obs()

    def close(self) -> None:
        """Does nothing: nothing is open."""

    def _draw(self) -> Tensor:
        return torch.as_tensor(self._random.integers(self.num_actions, size=self.num_envs))

    def _obs(self) -> Tensor:
        return torch.nn.functional.one_hot(self._hot_B, self.num_actions).float()
