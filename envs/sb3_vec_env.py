"""Our environments as Stable-Baselines3's `VecEnv`, for its algorithms to train on."""

from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from policykd.envs.vector import VectorEnv


class SB3VecEnv(VecEnv):
    """A `VectorEnv` behind SB3's interface; on Atari the observations are stacks, channels first.

    A lost life ends an episode for the algorithm, as under SB3's AtariWrapper; `info["episode"]` is the whole game with
    unclipped rewards. A game that a time limit ends counts as terminated: its last observation is not available.
    """

    def __init__(self, envs: VectorEnv, *, clip_rewards: bool) -> None:
        """Wraps `envs`; with `clip_rewards` the algorithm sees their sign alone (Mnih et al., 2015)."""
        self.envs = envs
        self.clip_rewards = clip_rewards
        # Frames are bytes; the bounds of vectors are unknown, and no algorithm of SB3 needs them.
        observations: gym.Space[Any] = gym.spaces.Box(-np.inf, np.inf, envs.obs_shape, np.float32)
        if len(envs.obs_shape) == 3:
            observations = gym.spaces.Box(0, 255, envs.obs_shape, np.uint8)
        super().__init__(envs.num_envs, observations, gym.spaces.Discrete(envs.num_actions))
        self._actions_B = torch.zeros(0)

    def reset(self) -> np.ndarray:
        """Starts a new game everywhere and returns the first observations, `(num_envs, *obs_shape)`."""
        return self.envs.reset().numpy()

    def step_async(self, actions: np.ndarray) -> None:
        """Takes the actions, `(num_envs,)`, that `step_wait` plays."""
        self._actions_B = torch.from_numpy(np.asarray(actions))

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Returns observations, rewards float32, ends (of a game or a life) and infos."""
        step = self.envs.step(self._actions_B)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for e in step.episodes:
            infos[e.env]["episode"] = {"r": e.episodic_return, "l": e.length, "t": 0.0}
        # SB3 takes `dones` as ends of episodes: after a lost life the value of the next state must not be bootstrapped.
        rewards = step.rewards_B.numpy()
        return step.obs.numpy(), np.sign(rewards) if self.clip_rewards else rewards, step.starts_B.numpy(), infos

    def close(self) -> None:
        """Closes the environments."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        """Returns an attribute of the vector, once per requested environment."""
        return [getattr(self.envs, attr_name, None) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:
        """Raises NotImplementedError: environments of the vector are not separate objects."""
        raise NotImplementedError(f"{attr_name} cannot be set on {type(self.envs).__name__}")

    def env_method(
        self, method_name: str, *method_args: Any, indices: int | Iterable[int] | None = None, **method_kwargs: Any
    ) -> list[Any]:
        """Raises NotImplementedError: environments of the vector are not separate objects."""
        raise NotImplementedError(f"{method_name} cannot be called on {type(self.envs).__name__}")

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: int | Iterable[int] | None = None
    ) -> list[bool]:
        """Returns True for `Monitor` alone, as `info["episode"]` is the whole game with unclipped rewards.

        SB3's `evaluate_policy` and `EvalCallback` ask this before they trust it.
        """
        return [issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]
