"""The protocol of every vector of environments, and what a step returns.

Suffixes name dimensions: B environments. Observations are `(num_envs, *obs_shape)`.
"""

from dataclasses import dataclass, field
from typing import Protocol

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
    """whether a time limit ended it"""


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
