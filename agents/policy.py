"""The `Policy` protocol that teachers and students share, and the action distribution of its outputs.

Suffixes name dimensions: B batch, A actions, C H W an image.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


class Policy(Protocol):
    """A map from a batch of observations to one number per action: logits, or Q-values."""

    def __call__(self, obs_BCHW: Tensor, /) -> Tensor:
        """Returns logits or Q-values, float32 `(batch, num_actions)`."""
        ...


class PolicyNet(Policy, Protocol):
    """A policy that knows its shapes: a network, or a session of ONNX Runtime."""

    @property
    def num_actions(self) -> int:
        """Number of outputs."""
        ...

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """Shape of one observation."""
        ...

    def to(self, device: Any, /) -> Any:
        """Moves the weights to a device."""
        ...


def sample(logits_BA: Tensor, generator: torch.Generator) -> Tensor:
    """Returns one action per row, drawn from softmax(logits), int64 `(batch,)`."""
    return logits_BA.softmax(dim=-1).multinomial(1, generator=generator).squeeze(1)


def greedy(logits_BA: Tensor) -> Tensor:
    """Returns the action with the largest logit of each row, int64 `(batch,)`."""
    return logits_BA.argmax(dim=-1)


def upcast(outputs: Tensor) -> Tensor:
    """Returns half precision as float32 and anything wider unchanged: bfloat16 cannot resolve 0.01 above 8."""
    return outputs.float() if outputs.element_size() < 4 else outputs


def log_policy(outputs_BA: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns log softmax(outputs / temperature), at least float32 `(batch, num_actions)`."""
    outputs_BA = upcast(outputs_BA)
    # The row maximum is subtracted before the division: 1e38 / 0.01 would overflow.
    advantage_BA = outputs_BA - outputs_BA.amax(dim=-1, keepdim=True).detach()
    # The minimum keeps log-probabilities finite: 0 * -inf would be NaN in a divergence.
    return log_softmax((advantage_BA / temperature).clamp(min=-1e30), dim=-1)


def entropy(log_p: Tensor) -> Tensor:
    """Returns the entropy -sum_a p log p over the last dimension, nats."""
    return -(log_p.exp() * log_p).sum(dim=-1)
