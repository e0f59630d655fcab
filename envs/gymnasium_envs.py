"""Any registered Gymnasium environment with discrete actions, such as CartPole, as a vector that can be resumed."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from policykd.envs import EnvState
from policykd.envs.vector import Episode, Step


class GymnasiumEnvs:
    """`num_envs` copies of a registered environment.

    Each episode is a pure function of (seed, env, number, actions), so a position is restored by replaying the actions
    since the last reset: that works for every environment that is deterministic given its seed.
    """

    def __init__(self, env_id: str, num_envs: int, seed: int, **kwargs: Any) -> None:
        """Makes the environments; `kwargs` are those of `gymnasium.make`.

        Raises:
            ValueError: an unknown id, or other spaces than Discrete actions and Box observations.
        """
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, not {num_envs}")
        try:
            self._envs: list[gym.Env[Any, Any]] = [gym.make(env_id, **kwargs) for _ in range(num_envs)]
        except gym.error.Error as error:
            raise ValueError(f"cannot make {env_id!r}: {error}") from error
        actions = self._envs[0].action_space
        obs = self._envs[0].observation_space
        if not isinstance(actions, gym.spaces.Discrete) or not isinstance(obs, gym.spaces.Box):
            raise ValueError(
                f"{env_id} has {actions} and {obs}; policykd needs discrete actions and array observations"
            )
        self.env_id = env_id
        self.seed = seed
        self.num_envs = num_envs
        self.num_actions = int(actions.n)
        self.obs_shape: tuple[int, ...] = obs.shape
        self.stack = 1
        self._first_action = int(actions.start)  # Discrete(n, start) numbers its actions from there
        self._episode_numbers = [-1] * num_envs
        self._returns = [0.0] * num_envs
        self._obs: list[np.ndarray] = []
        self._actions: list[list[int]] = [[] for _ in range(num_envs)]

    def reset(self) -> Tensor:
        """Starts a new episode everywhere and returns the first observations, `(num_envs, *obs_shape)`."""
        self._obs = [self._new_episode(i) for i in range(self.num_envs)]
        return torch.from_numpy(np.stack(self._obs))

    def step(self, actions_B: Tensor) -> Step:
        """Takes one action in every environment; where it is negative, nothing happens.

        Raises:
            RuntimeError: an environment crashed; the message has its index, episode and step.
        """
        rewards = [0.0] * self.num_envs
        starts = [False] * self.num_envs
        episodes = []
        for i, action in enumerate(actions_B.tolist()):
            if action < 0:
                continue
            self._obs[i], rewards[i], terminated, truncated = self._play(i, action)
            # Same-step reset: the observation returned is already the next episode's first.
            if terminated or truncated:
                starts[i] = True
                episodes.append(Episode(i, self._returns[i], len(self._actions[i]), truncated))
                self._obs[i] = self._new_episode(i)
        return Step(torch.from_numpy(np.stack(self._obs)), torch.tensor(rewards), torch.tensor(starts), episodes)

    def state(self) -> EnvState:
        """Returns the episode that each environment is in, and the actions since its reset."""
        return {"episodes": list(self._episode_numbers), "actions": [list(a) for a in self._actions]}

    def restore(self, state: EnvState) -> Tensor:
        """Replays every episode up to its position and returns the observations."""
        self._obs = []
        for i, (number, actions) in enumerate(zip(state["episodes"], state["actions"], strict=True)):
            self._episode_numbers[i] = number - 1  # the new episode then has this number, and so its seed
            obs = self._new_episode(i)
            for action in actions:
                obs = self._play(i, action)[0]
            self._obs.append(obs)
        return torch.from_numpy(np.stack(self._obs))

    def close(self) -> None:
        """Closes every environment."""
        for env in self._envs:
            env.close()

    def _new_episode(self, i: int) -> np.ndarray:
        self._episode_numbers[i] += 1
        self._actions[i] = []
        self._returns[i] = 0.0
        # Hashed, so that neighbouring environments and episodes have unrelated seeds.
        words = np.random.SeedSequence([self.seed, i, self._episode_numbers[i]]).generate_state(1)
        obs, _ = self._envs[i].reset(seed=int(words[0]))
        return np.asarray(obs)

    def _play(self, i: int, action: int) -> tuple[np.ndarray, float, bool, bool]:
        try:
            obs, reward, terminated, truncated, _ = self._envs[i].step(self._first_action + action)
        except Exception as error:  # an environment's own code may raise anything
            where = f"environment {i}, step {len(self._actions[i])} of episode {self._episode_numbers[i]}"
            raise RuntimeError(f"{self.env_id}: {where}: crashed ({type(error).__name__}: {error})") from error
        self._actions[i].append(action)
        self._returns[i] += float(reward)
        return np.asarray(obs), float(reward), terminated, truncated
