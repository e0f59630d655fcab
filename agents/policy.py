"""What every teacher and every student is: a map from observations to action scores.

Suffixes name dimensions: B batch, A actions, C H W an image.
"""

from typing import Protocol

import torch
from torch import Tensor


class Policy(Protocol):
    """Anything that scores the actions of a batch of observations."""

    def __call__(self, obs_BCHW: Tensor, /) -> Tensor:
        """Returns scores (logits or Q-values), float32 `(batch, num_actions)`."""
        ...


def sample(scores_BA: Tensor, generator: torch.Generator) -> Tensor:
    """Draws one action a row from softmax(scores), `(batch,)`."""
    return scores_BA.softmax(dim=-1).multinomial(1, generator=generator).squeeze(1)


def greedy(scores_BA: Tensor) -> Tensor:
    """Returns the best action of each row, `(batch,)`."""
    return scores_BA.argmax(dim=-1)
