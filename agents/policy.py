"""What every teacher and every student is: a map from observations to action scores.

Suffixes name dimensions: B batch, A actions, C H W an image.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


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


def widened(scores: Tensor) -> Tensor:
    """Returns scores as at least float32: half precision has no hundredths of a number above 8."""
    return scores.float() if scores.element_size() < 4 else scores


def log_policy(scores_BA: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns log softmax(scores / temperature), at least float32 `(batch, num_actions)`.

    The maximum goes before the division, or 1e38 / 0.01 would overflow; half precision is widened first, or 1000 and
    999 would be one number; the least log-probability is finite, or 0 times it would be no number.
    """
    scores_BA = widened(scores_BA)
    advantage_BA = scores_BA - scores_BA.amax(dim=-1, keepdim=True).detach()
    return log_softmax((advantage_BA / temperature).clamp(min=-1e30), dim=-1)


def entropy(log_p: Tensor) -> Tensor:
    """Returns -sum_a p log p over the last dimension, nats."""
    return -(log_p.exp() * log_p).sum(dim=-1)
