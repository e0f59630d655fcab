"""Distillation losses: how far a student's policy is from its teacher's.

Each is a function of two score tensors and returns one number a row, in nats unless it says otherwise; the loop takes
the mean, once. The temperature divides the teacher's scores alone and the student's softmax is untempered (Rusu et al.,
2015), so that the trained student plays the tempered teacher as it stands. Suffixes name dimensions: B batch, A
actions.
"""

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax


class Loss(Protocol):
    """A per-row distance from student to teacher."""

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns the loss of each row, `(batch,)`, of raw scores `(batch, num_actions)`."""
        ...


@dataclass(frozen=True)
class _Tempered:
    temperature: float | None = None
    """divides the teacher's scores; None is the teacher's own (1 for PPO and A2C, 0.01 for DQN), or 1 in Python"""

    def __post_init__(self) -> None:
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}; 1 for PPO and A2C, 0.01 for DQN")


@dataclass(frozen=True)
class ForwardKL(_Tempered):
    """KL(teacher || student): the student must cover every action the teacher takes (Rusu et al., 2015)."""

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns sum_a p_T(a) (log p_T(a) - log p_S(a)) of each row."""
        return kl_divergence_B(log_policy(teacher_BA, self.temperature or 1.0), log_policy(student_BA))


@dataclass(frozen=True)
class ReverseKL(_Tempered):
    """KL(student || teacher): the student may leave out the teacher's rarer actions (Czarnecki et al., 2019)."""

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns sum_a p_S(a) (log p_S(a) - log p_T(a)) of each row."""
        return kl_divergence_B(log_policy(student_BA), log_policy(teacher_BA, self.temperature or 1.0))


@dataclass(frozen=True)
class ScoreMSE:
    """Mean squared error of the raw scores: no temperature (Rusu et al., 2015, as the weak baseline)."""

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns the mean over the actions of the squared difference, in the scores' own units squared."""
        return (_widened(student_BA) - _widened(teacher_BA)).square().mean(dim=-1)


@dataclass(frozen=True)
class ActionNLL:
    """Negative log-likelihood of the teacher's best action: hard labels (Rusu et al., 2015)."""

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns -log p_S(argmax_a teacher) of each row."""
        return cross_entropy(student_BA, teacher_BA.argmax(dim=-1), reduction="none")


def at_temperature(loss: Loss, temperature: float) -> Loss:
    """Returns a loss at a teacher's temperature, unless it has its own.

    Raises:
        ValueError: a loss without a temperature, for a teacher whose scores need one to be a policy.
    """
    if isinstance(loss, ScoreMSE) and temperature != 1.0:
        raise ValueError(
            f"loss:score-mse on a teacher whose policy is softmax(scores / {temperature}) leaves a student whose"
            " actions cannot be drawn; use another loss"
        )
    if isinstance(loss, _Tempered) and loss.temperature is None:
        return replace(loss, temperature=temperature)
    return loss


def log_policy(scores_BA: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns log softmax(scores / temperature), at least float32 `(batch, num_actions)`.

    The maximum goes before the division, or 1e38 / 0.01 would overflow; half precision is widened first, or 1000 and
    999 would be one number; the least log-probability is finite, or 0 times it would be no number.
    """
    scores_BA = _widened(scores_BA)
    advantage_BA = scores_BA - scores_BA.amax(dim=-1, keepdim=True).detach()
    return log_softmax((advantage_BA / temperature).clamp(min=-1e30), dim=-1)


def kl_divergence_B(log_p_BA: Tensor, log_q_BA: Tensor) -> Tensor:
    """Returns KL(p || q) of each row of two log-policies, nats `(batch,)`."""
    return kl_div(log_q_BA, log_p_BA, log_target=True, reduction="none").sum(dim=-1)


def _widened(scores_BA: Tensor) -> Tensor:
    return scores_BA.float() if scores_BA.element_size() < 4 else scores_BA
