"""What every vector of environments is: the protocol, and what a step returns.

Suffixes name dimensions: B environments. Observations are `(num_envs, *obs_shape)`.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Episode:
    """A whole game that ended."""

    env: int
    """which of the environments played it"""
    episodic_return: float
    """sum of the unclipped rewards, from reset to game over"""
    length: int
    """agent steps (4 frames each on Atari)"""
    truncated: bool = False
    """whether a time limit ended it"""


@dataclass(frozen=True)
class Step:
    """What one step of every environment returns."""

    obs: Tensor
    """(num_envs, *obs_shape); where an episode ended it is the first one of the next (same-step reset)"""
    rewards_B: Tensor
    """float32, unclipped"""
    starts_B: Tensor
    """bool: the observation has no past: first of a game, or of a life where the training wrappers ended an episode"""
    episodes: list[Episode] = field(default_factory=list)
    """the whole games that ended in this step"""


class VectorEnv(Protocol):
    """`num_envs` copies of an environment with discrete actions, stepped together."""

    num_envs: int
    num_actions: int
    obs_shape: tuple[int, ...]
    stack: int
    """how many past frames an observation holds along its first axis; 1 means that it stands alone"""

    def reset(self) -> Tensor:
        """Starts a new game everywhere and returns the first observations, `(num_envs, *obs_shape)`."""
        ...

    def step(self, actions_B: Tensor, /) -> Step:
        """Takes one integer action in every environment, `(num_envs,)`; where it is negative, nothing happens."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns what `restore` needs, as JSON: the position in every game."""
        ...

    def restore(self, state: dict[str, Any], /) -> Tensor:
        """Goes back to a position and returns its observations, bit-equal to those that stood there."""
        ...

    def close(self) -> None:
        """Ends what was started for the environments; they cannot be used any more."""
        ...
