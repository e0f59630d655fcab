"""The `Policy` protocol that teachers and students share, and the action distribution of its outputs.

Suffixes name dimensions: B batch, A actions, C H W an image.
"""

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
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


def as_policy(policy: object) -> Policy:
    """Returns a callable as it is, and an SB3 model in memory as the map from observations to its outputs.

    Raises:
        TypeError: neither.
        ValueError: a model of another algorithm than PPO, A2C, DQN and QR-DQN, or one that needs `VecNormalize`.
    """
    if callable(policy):
        return cast(Policy, policy)
    if hasattr(policy, "policy") and hasattr(policy, "predict"):
        from policykd.agents.trusted import policy_of_model

        return policy_of_model(policy)
    hint = "use policykd.load_teacher(...)" if isinstance(policy, str) else "give a module, a function or an SB3 model"
    raise TypeError(f"a {type(policy).__name__} is not a policy; {hint}")


def check_outputs(outputs: object, batch_size: int, num_actions: int, who: str) -> Tensor:
    """Returns the outputs of a policy if they are numbers of the shape `(batch_size, num_actions)`.

    Raises:
        ValueError: anything else, such as a tuple, or `(batch_size, 1)`, which would be broadcast; it names `who`.
    """
    expected = (batch_size, num_actions)
    if not isinstance(outputs, Tensor):
        raise ValueError(f"{who} returns {type(outputs).__name__}, expected a tensor {expected} of logits or Q-values")
    if outputs.shape != expected or outputs.dtype == torch.bool or outputs.is_complex():
        found = f"{str(outputs.dtype).removeprefix('torch.')} {tuple(outputs.shape)}"
        raise ValueError(f"{who} returns a tensor {found}, expected {expected}: a number per observation and action")
    return outputs


def device_of(policy: object, *, default: torch.device | str) -> torch.device:
    """Returns the device of a policy's weights: of a module, a teacher's network or an ensemble's first member.

    `default` is that of a policy whose device is not known, such as a function.
    """
    if isinstance(policy, nn.Module):
        weights = next(policy.parameters(), None)
        return torch.device(default) if weights is None else weights.device
    # A policy that wraps another, a teacher, an ensemble.
    for inner in ("policy", "net"):
        if (wrapped := getattr(policy, inner, None)) is not None:
            return device_of(wrapped, default=default)
    if members := getattr(policy, "teachers", None):
        return device_of(members[0], default=default)
    return torch.device(getattr(policy, "device", default))


def policy_temperature(algorithm: str) -> float:
    """Returns the temperature that makes a policy of an algorithm's outputs.

    1 for logits and log-probabilities, 0.01 for Q-values (Rusu et al., 2015).
    """
    return 0.01 if algorithm in ("DQN", "QRDQN") else 1.0


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
