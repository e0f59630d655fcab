"""Student-driven distillation with a correct gradient (Czarnecki et al., 2019), as pure functions over trajectories.

The student plays, so its weights also decide which states it is asked about. A method says what one state costs, and
whether what later states cost is an action's fault too; only then is the update the gradient of something. The
derivation is in docs/rl.md. Suffixes name dimensions: B batch, A actions, T time.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class StudentDrivenMethod(Protocol):
    """What the student pays in each state that it visits, and what its actions answer for."""

    @property
    def reward_weight(self) -> float:
        """What the environment's rewards are multiplied by; 0 is distillation alone."""
        ...

    def loss_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor, /) -> Tensor:
        """Returns l(s) of each state, nats `(batch,)`, with its gradient, of two log-policies."""
        ...

    def cost(self, loss: Tensor, /) -> Tensor:
        """Returns what an action answers for where it led to a state of this `loss`, in its shape, no gradient."""
        ...


@dataclass(frozen=True)
class _RewardWeighted:
    reward_weight: float = 0.0
    """what the environment's rewards are multiplied by; 0 is distillation alone"""

    def __post_init__(self) -> None:
        if not 0.0 <= self.reward_weight < float("inf"):
            raise ValueError(f"reward_weight must not be negative, not {self.reward_weight}; 0 is distillation alone")


@dataclass(frozen=True)
class OnPolicyDistillation(_RewardWeighted):
    """H(teacher || student) where the student goes, as if it did not choose where: no objective's gradient."""

    def loss_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor, /) -> Tensor:
        """Returns H(teacher || student) = -sum_a p_T(a) log p_S(a)."""
        return cross_entropy_B(teacher_log_BA, student_log_BA)

    def cost(self, loss: Tensor, /) -> Tensor:
        """Returns 0: an action answers for nothing."""
        return torch.zeros_like(loss)


@dataclass(frozen=True)
class _Answering(_RewardWeighted):
    """A method whose actions answer for the losses of the states that they lead to."""

    entropy_weight: float = 0.0
    """0 is the paper's cross-entropy H(p || q); 1 takes H(p) off, so that l is KL(p || q), 0 where both agree"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.entropy_weight <= 1.0:
            raise ValueError(f"entropy_weight must lie in [0, 1], not {self.entropy_weight}; 1 makes l a KL divergence")

    def cost(self, loss: Tensor, /) -> Tensor:
        """Returns the loss."""
        return loss.detach()


@dataclass(frozen=True)
class NDistill(_Answering):
    """H(teacher || student) with its true gradient: r_hat_t = -gamma H(teacher || student)(s_{t+1})."""

    def loss_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor, /) -> Tensor:
        """Returns H(teacher || student) - entropy_weight H(teacher)."""
        return _less_entropy_B(teacher_log_BA, student_log_BA, self.entropy_weight)


@dataclass(frozen=True)
class ExpectedEntropyRegularised(_Answering):
    """H(student || teacher) with its true gradient: r_hat_t = -gamma H(student || teacher)(s_{t+1}).

    Czarnecki et al. reward log p_T(a_{t+1} | s_{t+1}), one draw of the same expectation; the whole of it costs nothing
    more here and has less variance. What they minimise has its least value at the teacher's best action alone.
    """

    def loss_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor, /) -> Tensor:
        """Returns H(student || teacher) - entropy_weight H(student)."""
        return _less_entropy_B(student_log_BA, teacher_log_BA, self.entropy_weight)


AnyMethod = OnPolicyDistillation | NDistill | ExpectedEntropyRegularised


def cross_entropy_B(log_p_BA: Tensor, log_q_BA: Tensor) -> Tensor:
    """Returns H(p || q) = -sum_a p(a) log q(a) of each row of two finite log-policies, nats `(batch,)`."""
    return -(log_p_BA.exp() * log_q_BA).sum(dim=-1)


def distillation_reward_BT(cost_BT: Tensor, reward_BT: Tensor, *, reward_weight: float, gamma: float) -> Tensor:
    """Returns r_hat_t = reward_weight r_t - gamma cost_{t+1}, `(batch, time)`.

    The cost of s_t is no fault of a_t, so the reward of a_t has that of the next state, discounted as it is in the
    objective. Nothing comes after the last step.

    Args:
        cost_BT: of every state in which an action was taken; 0 behind the end of a trajectory.
        reward_BT: the environment's, for the action taken there; likewise.
        reward_weight: see `StudentDrivenMethod`.
        gamma: discount of one step.
    """
    next_cost_BT = torch.cat([cost_BT[:, 1:], torch.zeros_like(cost_BT[:, :1])], dim=1)
    return reward_weight * reward_BT - gamma * next_cost_BT


def returns_BT(reward_BT: Tensor, gamma: float) -> Tensor:
    """Returns R_t = sum_{k >= t} gamma^(k-t) reward_k, `(batch, time)`."""
    total_B, columns = torch.zeros_like(reward_BT[:, 0]), []
    for reward_B in reversed(reward_BT.unbind(dim=1)):
        total_B = reward_B + gamma * total_B
        columns.append(total_B)
    return torch.stack(columns[::-1], dim=1)


def surrogate_B(log_prob_BT: Tensor, loss_BT: Tensor, reward_BT: Tensor, gamma: float) -> Tensor:
    """Returns a number for each trajectory, `(batch,)`, whose gradient is the estimator of the method's.

    sum_t gamma^t (-log p_S(a_t | s_t) R_t + l(s_t)) with R_t the return of r_hat, which is held fixed
    (Czarnecki et al., 2019). Only its gradient means something, not its value.

    Args:
        log_prob_BT: the student's, of the actions that it took; 0 behind the end of a trajectory.
        loss_BT: `loss_B` of every state in which it took them; likewise.
        reward_BT: r_hat, see `distillation_reward_BT`; likewise.
        gamma: discount of one step.
    """
    discount_T = gamma ** torch.arange(loss_BT.shape[1], dtype=loss_BT.dtype, device=loss_BT.device)
    return_BT = returns_BT(reward_BT.detach(), gamma)
    return (discount_T * (loss_BT - log_prob_BT * return_BT)).sum(dim=1)


def _less_entropy_B(log_p_BA: Tensor, log_q_BA: Tensor, entropy_weight: float) -> Tensor:
    return cross_entropy_B(log_p_BA, log_q_BA - entropy_weight * log_p_BA)
