"""The protocol of every vector of environments, and adapters for those of Gymnasium and of Stable-Baselines3.

Positions in adapted environments cannot be saved, so a run on them cannot be resumed; `policykd.make_env` makes
environments that can. Suffixes name dimensions: B or N environments. Observations are `(num_envs, *obs_shape)`.
"""

import sys
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from policykd.envs import EnvState


@dataclass(frozen=True)
class Episode:
    """A full episode that ended."""

    env: int
    """index of the environment"""
    episodic_return: float
    """sum of the unclipped rewards, from reset to game over"""
    length: int
    """agent steps (4 frames each on Atari)"""
    truncated: bool = False
    """a time limit ended it"""


@dataclass(frozen=True)
class Step:
    """Result of one step of every environment."""

    obs: Tensor
    """(num_envs, *obs_shape); where an episode ended it is the first one of the next (same-step reset)"""
    rewards_B: Tensor
    """float32, unclipped"""
    starts_B: Tensor
    """bool: the observation has no past: first of a game, or of a life where the training wrappers ended an episode"""
    episodes: list[Episode] = field(default_factory=list)
    """full episodes that ended in this step"""


class VectorEnv(Protocol):
    """`num_envs` copies of an environment with discrete actions, stepped together."""

    num_envs: int
    num_actions: int
    obs_shape: tuple[int, ...]
    stack: int
    """number of frames that an observation holds along its first axis; 1 if it is not a stack"""

    def reset(self) -> Tensor:
        """Starts a new episode everywhere and returns the first observations, `(num_envs, *obs_shape)`."""
        ...

    def step(self, actions_B: Tensor, /) -> Step:
        """Takes one integer action in every environment, `(num_envs,)`; where it is negative, nothing happens."""
        ...

    def state(self) -> EnvState:
        """Returns the position in every episode, for `restore`."""
        ...

    def restore(self, state: EnvState, /) -> Tensor:
        """Returns to a position; its observations are bit-equal to the original ones."""
        ...

    def close(self) -> None:
        """Releases the environments; they cannot be used afterwards."""
        ...


def as_vector_env(envs: object, *, warn: bool = True) -> VectorEnv:
    """Returns vector environments of Gymnasium or Stable-Baselines3 as a `VectorEnv`; one of ours is returned as is.

    Actions must be `Discrete` and observations a `Box`. Frames that are channels last, `(H, W, C)` uint8, become
    channels first as SB3's `VecTransposeImage` makes them. An episode's return is the sum of the rewards that the
    environments give, or what SB3's `Monitor` reports if they have one (unclipped, over all lives).

    A single environment cannot be held while others are stepped. Where an action is negative, action 0 is taken and
    nothing of it is reported; reset the environments before that one is used again.

    Args:
        envs: a `VectorEnv`, a `gymnasium.vector.VectorEnv` in any autoreset mode, or an SB3 `VecEnv`.
        warn: issue a warning that a run on these environments cannot be resumed.

    Raises:
        ValueError: other spaces.
        TypeError: not a vector of environments.
    """
    sb3 = sys.modules.get("stable_baselines3.common.vec_env")  # not imported: then nothing can be an SB3 VecEnv
    adapter: VectorEnv
    if isinstance(envs, gym.vector.VectorEnv):
        adapter = _GymnasiumAdapter(envs)
    elif sb3 is not None and isinstance(envs, sb3.VecEnv):
        adapter = _SB3Adapter(envs)
    elif hasattr(envs, "step") and hasattr(envs, "restore"):
        return envs  # type: ignore[return-value]  # it has what the protocol asks for
    else:
        kind = "a single environment" if isinstance(envs, gym.Env) else "not a vector of environments"
        raise TypeError(f"{type(envs).__name__}: {kind}; give a vector, such as policykd.make_env(ID, num_envs=8)")
    if warn:
        warnings.warn(
            f"{type(envs).__name__}: positions in these environments cannot be saved, so a run on them cannot be"
            " resumed; make them with policykd.make_env for that",
            stacklevel=_depth_of_caller(),
        )
    return adapter


def _depth_of_caller() -> int:
    """Returns the `stacklevel` of the user's own line, however deep in this package a warning is issued."""
    depth = 1
    while sys._getframe(depth).f_globals.get("__name__", "").split(".")[0] == "policykd":
        depth += 1
    return depth


class _Adapter(ABC):
    """A `VectorEnv` over environments of another library."""

    resets_next_step = False
    """the step after the last one of an episode ignores the action and returns the next first observation"""
    has_monitor = False
    """`info["episode"]` marks the end of an episode, and any other end is that of a life"""

    def __init__(self, envs: Any, actions: gym.Space[Any], observations: gym.Space[Any], *, stack: int = 1) -> None:
        if not isinstance(actions, gym.spaces.Discrete) or not isinstance(observations, gym.spaces.Box):
            raise ValueError(
                f"{type(envs).__name__} has {actions} and {observations}; policykd needs Discrete actions and a Box"
            )
        self.envs = envs
        self.num_envs: int = envs.num_envs
        self.num_actions = int(actions.n)
        self._first_action = int(actions.start)
        self._is_frames = len(observations.shape) == 3 and observations.dtype == np.uint8
        # SB3's rule: the smallest dimension of a picture is that of its channels.
        self._is_channels_last = self._is_frames and int(np.argmin(observations.shape)) != 0
        height, width, channels = observations.shape if self._is_channels_last else (0, 0, 0)
        self.obs_shape: tuple[int, ...] = (channels, height, width) if channels else observations.shape
        # Stacks can be rebuilt from single frames only where each frame has one channel.
        self.stack = stack if self.obs_shape[:1] == (stack,) else 1
        self._returns_N = np.zeros(self.num_envs)
        self._lengths_N = np.zeros(self.num_envs, np.int64)
        self._ended_N = np.zeros(self.num_envs, np.bool_)
        self._obs = torch.zeros(0)

    @abstractmethod
    def _reset(self) -> np.ndarray:
        """Returns the first observations."""

    @abstractmethod
    def _step(self, actions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Any]:
        """Returns observations, rewards, ends of episodes, ends by a time limit, and infos."""

    def reset(self) -> Tensor:
        """Starts a new episode everywhere and returns the first observations, `(num_envs, *obs_shape)`."""
        for array in (self._returns_N, self._lengths_N, self._ended_N):
            array[:] = 0
        self._obs = self._tensor(self._reset())
        return self._obs

    def step(self, actions_B: Tensor) -> Step:
        """Takes one action in every environment; where it is negative, nothing is reported."""
        actions_N = actions_B.cpu().numpy()
        is_idle_N = actions_N < 0
        obs, rewards_N, ended_N, truncated_N, infos = self._step(np.where(is_idle_N, 0, actions_N) + self._first_action)
        ended_N = np.array(ended_N, np.bool_)
        # The reward of the step that only resets is 0 in Gymnasium already.
        rewards_N = np.where(is_idle_N, 0.0, rewards_N)
        was_reset_N = self._ended_N if self.resets_next_step else np.zeros_like(ended_N)
        starts_N = (was_reset_N if self.resets_next_step else ended_N) & ~is_idle_N
        self._ended_N = ended_N  # for the next step
        self._returns_N += rewards_N
        self._lengths_N += ~is_idle_N & ~was_reset_N

        episodes: list[Episode] = []
        for i in np.flatnonzero(ended_N & ~is_idle_N).tolist():
            episodic_return = float(self._returns_N[i])
            length = int(self._lengths_N[i])
            if self.has_monitor:
                if "episode" not in infos[i]:
                    continue  # a lost life
                episodic_return = float(infos[i]["episode"]["r"])
                length = int(infos[i]["episode"]["l"])
            episodes.append(Episode(i, episodic_return, length, bool(truncated_N[i])))
            self._returns_N[i] = 0.0
            self._lengths_N[i] = 0
        new_obs = self._tensor(obs)
        idle = torch.from_numpy(is_idle_N)
        new_obs[idle] = self._obs[idle]
        self._obs = new_obs
        return Step(new_obs, torch.from_numpy(rewards_N).float(), torch.from_numpy(starts_N), episodes)

    def state(self) -> EnvState:
        """Raises ValueError: the position cannot be saved."""
        raise ValueError(
            f"{type(self.envs).__name__}: positions in these environments cannot be saved or restored; make them with"
            " policykd.make_env"
        )

    def restore(self, state: EnvState) -> Tensor:
        """Raises ValueError: the position cannot be restored."""
        self.state()
        raise AssertionError

    def close(self) -> None:
        """Closes the environments."""
        self.envs.close()

    def _tensor(self, obs: np.ndarray) -> Tensor:
        """Returns a copy, as both libraries reuse their buffers, uint8 or float32."""
        if self._is_channels_last:
            obs = np.moveaxis(obs, -1, 1)
        return torch.from_numpy(np.array(obs, np.uint8 if self._is_frames else np.float32))


class _GymnasiumAdapter(_Adapter):
    """`gymnasium.vector.VectorEnv` in each of its autoreset modes.

    Gymnasium's frame stacks repeat the first frame where ours begin with zeros, so `stack` is 1.
    """

    def __init__(self, envs: gym.vector.VectorEnv[Any, Any, Any]) -> None:
        super().__init__(envs, envs.single_action_space, envs.single_observation_space)
        mode = AutoresetMode((envs.metadata or {}).get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self.resets_next_step = mode is AutoresetMode.NEXT_STEP
        self._is_disabled = mode is AutoresetMode.DISABLED

    def _reset(self) -> np.ndarray:
        return np.asarray(self.envs.reset()[0])

    def _step(self, actions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Any]:
        # The batched Discrete space of Gymnasium has int64 actions.
        obs, rewards_N, terminated_N, truncated_N, infos = self.envs.step(actions_N.astype(np.int64))
        ended_N = np.asarray(terminated_N | truncated_N, np.bool_)
        # Without autoreset, ended environments are reset here, in the same step.
        if self._is_disabled and ended_N.any():
            obs, _ = self.envs.reset(options={"reset_mask": ended_N.copy()})
        return obs, rewards_N, ended_N, truncated_N, infos


class _SB3Adapter(_Adapter):
    """`stable_baselines3.common.vec_env.VecEnv`, which resets an environment in the step that ends its episode."""

    def __init__(self, envs: Any) -> None:
        from stable_baselines3.common.monitor import Monitor
        from stable_baselines3.common.vec_env import VecFrameStack, VecMonitor, is_vecenv_wrapped, unwrap_vec_wrapper

        stacked = unwrap_vec_wrapper(envs, VecFrameStack)
        stack = 1 if stacked is None else int(stacked.stacked_obs.n_stack)
        super().__init__(envs, envs.action_space, envs.observation_space, stack=stack)
        # The rule of SB3's evaluate_policy.
        self.has_monitor = is_vecenv_wrapped(envs, VecMonitor) or all(envs.env_is_wrapped(Monitor))

    def _reset(self) -> np.ndarray:
        return np.asarray(self.envs.reset())

    def _step(self, actions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Any]:
        obs, rewards_N, ended_N, infos = self.envs.step(actions_N)
        truncated_N = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        return obs, rewards_N, ended_N, truncated_N, infos
