"""Vector environments of Gymnasium and of Stable-Baselines3 behind the `VectorEnv` protocol.

Their positions cannot be saved, so a run on them cannot be resumed; `policykd.make_env` makes environments that can.
"""

import sys
import warnings
from typing import Any, Protocol, TypeGuard

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from policykd.envs.vector import Episode, Step, VectorEnv


def as_vector_env(envs: object, *, warn: bool = True) -> VectorEnv:
    """Returns vector environments of Gymnasium or Stable-Baselines3 as a `VectorEnv`; one of ours is returned as is.

    Actions must be `Discrete` and observations a `Box`. Frames that are channels last, `(H, W, C)` uint8, become
    channels first as SB3's `VecTransposeImage` makes them. An episode's return is the sum of the rewards that the
    environments give, or what SB3's `Monitor` reports if they have one (unclipped, over all lives).

    An environment cannot be held while others are stepped. Where an action is negative, action 0 is taken and nothing
    of it is reported; reset the environments before that one is used again.

    Args:
        envs: a `VectorEnv`, a `gymnasium.vector.VectorEnv` in any autoreset mode, or an SB3 `VecEnv`.
        warn: issue a warning that a run on these environments cannot be resumed.

    Raises:
        ValueError: other spaces.
        TypeError: not a vector of environments.
    """
    adapter: VectorEnv
    if isinstance(envs, gym.vector.VectorEnv):
        adapter = _Adapter(_GymnasiumSource(envs))
    elif _is_sb3(envs):
        adapter = _Adapter(_SB3Source(envs))
    elif hasattr(envs, "step") and hasattr(envs, "restore"):
        return envs  # type: ignore[return-value]  # it has what the protocol asks for
    elif isinstance(envs, gym.Env):
        raise TypeError(f"{envs}: a single environment; give a vector, such as policykd.make_env(ID, num_envs=8)")
    else:
        raise TypeError(f"{type(envs).__name__}: not a vector of environments; give policykd.make_env(ID, num_envs=8)")
    if warn:
        warnings.warn(
            f"{type(envs).__name__}: positions in these environments cannot be saved, so a run on them cannot be"
            " resumed; make them with policykd.make_env for that",
            stacklevel=2,
        )
    return adapter


class _Transition:
    """What one step returned, before episodes are counted. N is the number of environments."""

    def __init__(self, obs: np.ndarray, rewards_N: np.ndarray, num_envs: int) -> None:
        self.obs = obs
        self.rewards_N = np.asarray(rewards_N, np.float64)
        self.starts_N = np.zeros(num_envs, np.bool_)
        """the observation is the first one of an episode, or of a life"""
        self.ended_N = np.zeros(num_envs, np.bool_)
        """an episode ended"""
        self.truncated_N = np.zeros(num_envs, np.bool_)
        """a time limit ended it"""
        self.skipped_N = np.zeros(num_envs, np.bool_)
        """the environment only reset itself and ignored the action"""
        self.reported: dict[int, tuple[float, int]] = {}
        """environment -> return and length of the episode, where the environment keeps count itself"""


class _Source(Protocol):
    """The differences between the libraries."""

    name: str
    num_envs: int
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    stack: int

    def reset(self) -> np.ndarray: ...

    def step(self, actions_N: np.ndarray) -> _Transition: ...

    def close(self) -> None: ...


class _Adapter:
    """A `VectorEnv` over one of the sources."""

    def __init__(self, source: _Source) -> None:
        actions, box = source.action_space, source.observation_space
        if not isinstance(actions, gym.spaces.Discrete) or not isinstance(box, gym.spaces.Box):
            raise ValueError(f"{source.name} has {actions} and {box}; policykd needs Discrete actions and a Box")
        self._source = source
        self._first_action = int(actions.start)
        self._is_frames = len(box.shape) == 3 and box.dtype == np.uint8
        # SB3's rule: the smallest dimension of a picture is that of its channels.
        self._is_channels_last = self._is_frames and int(np.argmin(box.shape)) != 0
        self.obs_shape: tuple[int, ...] = box.shape
        if self._is_channels_last:
            self.obs_shape = (box.shape[2], box.shape[0], box.shape[1])
        self.num_envs = source.num_envs
        self.num_actions = int(actions.n)
        # Stacks can be rebuilt from single frames only where each frame has one channel.
        self.stack = source.stack if self.obs_shape[0] == source.stack else 1
        self._returns_N = np.zeros(self.num_envs)
        self._lengths_N = np.zeros(self.num_envs, np.int64)
        self._obs = torch.zeros(0)

    def reset(self) -> Tensor:
        """Starts a new episode everywhere and returns the first observations, `(num_envs, *obs_shape)`."""
        self._returns_N[:] = 0.0
        self._lengths_N[:] = 0
        self._obs = self._tensor(self._source.reset())
        return self._obs

    def step(self, actions_B: Tensor) -> Step:
        """Takes one action in every environment; where it is negative, nothing is reported."""
        actions_N = actions_B.cpu().numpy()
        is_idle_N = actions_N < 0
        t = self._source.step(np.where(is_idle_N, 0, actions_N) + self._first_action)
        t.rewards_N[is_idle_N] = 0.0
        t.starts_N[is_idle_N] = False
        plays_N = ~is_idle_N & ~t.skipped_N
        self._returns_N += t.rewards_N
        self._lengths_N += plays_N
        episodes = []
        for i in np.flatnonzero(t.ended_N & ~is_idle_N).tolist():
            episodic_return, length = t.reported.get(i, (float(self._returns_N[i]), int(self._lengths_N[i])))
            episodes.append(Episode(i, episodic_return, length, bool(t.truncated_N[i])))
            self._returns_N[i] = 0.0
            self._lengths_N[i] = 0
        obs = self._tensor(t.obs)
        is_idle_B = torch.from_numpy(is_idle_N)
        obs[is_idle_B] = self._obs[is_idle_B]
        self._obs = obs
        return Step(obs, torch.from_numpy(t.rewards_N).float(), torch.from_numpy(t.starts_N), episodes)

    def state(self) -> dict[str, Any]:
        """Raises ValueError: the position cannot be saved."""
        raise ValueError(
            f"{self._source.name}: positions in these environments cannot be saved; make them with policykd.make_env"
        )

    def restore(self, state: dict[str, Any]) -> Tensor:
        """Raises ValueError: the position cannot be restored."""
        raise ValueError(
            f"{self._source.name}: positions in these environments cannot be restored; make them with policykd.make_env"
        )

    def close(self) -> None:
        """Closes the environments."""
        self._source.close()

    def _tensor(self, obs: np.ndarray) -> Tensor:
        """Returns a copy, as both libraries reuse their buffers, uint8 or float32."""
        if self._is_channels_last:
            obs = np.moveaxis(obs, -1, 1)
        return torch.from_numpy(np.array(obs, np.uint8 if self._is_frames else np.float32))


class _GymnasiumSource:
    """`gymnasium.vector.VectorEnv` in each of its autoreset modes."""

    def __init__(self, envs: gym.vector.VectorEnv[Any, Any, Any]) -> None:
        self._envs = envs
        self.name = type(envs).__name__
        self.num_envs = envs.num_envs
        self.observation_space = envs.single_observation_space
        self.action_space = envs.single_action_space
        self.stack = 1  # Gymnasium repeats the first frame where our stacks begin with zeros
        mode = (envs.metadata or {}).get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self._mode = mode if isinstance(mode, AutoresetMode) else AutoresetMode(mode)
        self._ended_N = np.zeros(self.num_envs, np.bool_)

    def reset(self) -> np.ndarray:
        self._ended_N[:] = False
        obs, _ = self._envs.reset()
        return np.asarray(obs)

    def step(self, actions_N: np.ndarray) -> _Transition:
        obs, rewards_N, terminated_N, truncated_N, _ = self._envs.step(actions_N.astype(np.int64))
        t = _Transition(obs, rewards_N, self.num_envs)
        t.ended_N = np.asarray(terminated_N | truncated_N, np.bool_)
        t.truncated_N = np.asarray(truncated_N, np.bool_)
        if self._mode is AutoresetMode.NEXT_STEP:
            # The step after an episode's last one ignores the action and returns the first observation of the next.
            t.starts_N = self._ended_N
            t.skipped_N = self._ended_N
            self._ended_N = t.ended_N.copy()
            return t
        t.starts_N = t.ended_N.copy()
        if self._mode is AutoresetMode.DISABLED and t.ended_N.any():
            t.obs, _ = self._envs.reset(options={"reset_mask": t.ended_N.copy()})
        return t

    def close(self) -> None:
        self._envs.close()


class _SB3Source:
    """`stable_baselines3.common.vec_env.VecEnv`, which resets an environment in the step that ends its episode."""

    def __init__(self, envs: Any) -> None:
        from stable_baselines3.common.monitor import Monitor
        from stable_baselines3.common.vec_env import VecFrameStack, VecMonitor, is_vecenv_wrapped, unwrap_vec_wrapper

        self._envs = envs
        self.name = type(envs).__name__
        self.num_envs = envs.num_envs
        self.observation_space = envs.observation_space
        self.action_space = envs.action_space
        stack = unwrap_vec_wrapper(envs, VecFrameStack)
        self.stack = 1 if stack is None else int(stack.stacked_obs.n_stack)
        # With a Monitor, as under AtariWrapper, the end of an episode may be that of a life (evaluate_policy's rule).
        self._has_monitor = is_vecenv_wrapped(envs, VecMonitor) or all(envs.env_is_wrapped(Monitor))

    def reset(self) -> np.ndarray:
        return np.asarray(self._envs.reset())

    def step(self, actions_N: np.ndarray) -> _Transition:
        obs, rewards_N, ended_N, infos = self._envs.step(actions_N)
        t = _Transition(obs, rewards_N, self.num_envs)
        t.starts_N = np.array(ended_N, np.bool_)
        t.ended_N = t.starts_N.copy()
        for i in np.flatnonzero(t.ended_N).tolist():
            t.truncated_N[i] = infos[i].get("TimeLimit.truncated", False)
            if not self._has_monitor:
                continue
            episode = infos[i].get("episode")
            if episode is None:
                t.ended_N[i] = False
            else:
                t.reported[i] = (float(episode["r"]), int(episode["l"]))
        return t

    def close(self) -> None:
        self._envs.close()


def _is_sb3(envs: object) -> TypeGuard[Any]:
    """Returns whether these are environments of SB3, without importing it."""
    module = sys.modules.get("stable_baselines3.common.vec_env")
    return module is not None and isinstance(envs, module.VecEnv)
