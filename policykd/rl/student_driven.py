"""Losses of student-driven distillation (Czarnecki et al., 2019), which `StudentDriven` in sb3_distillation.py uses.

The student collects its own states, so its weights also decide which states it is trained on. A method therefore
defines two things: the loss l(s) of one state, and whether an action is charged for the loss of the state that it leads
to. Only if it is charged is the update the gradient of an objective; docs/rl.md has the derivation.

Shape suffixes: B batch, A actions.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class StudentDrivenMethod:
    """The loss of a state that the student collects; subclass it for a method of your own."""

    charges_actions: ClassVar[bool] = True
    """whether an action is charged for the loss of the next state, which makes the update an objective's gradient"""

    reward_weight: float = 0.0
    """factor of the environment's rewards; 0 trains on the teacher alone"""

    def __post_init__(self) -> None:
        if not 0.0 <= self.reward_weight < float("inf"):
            raise ValueError(f"reward_weight must not be negative, not {self.reward_weight}; 0 is distillation alone")

    def loss_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor) -> Tensor:
        """Returns l(s) of each state, nats `(batch,)`, from two log-policies `(batch, num_actions)`."""
        raise NotImplementedError

    def cost_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor) -> Tensor:
        """Returns what the action that led to each state is charged, nats `(batch,)`, without a gradient."""
        # A reward is a number: the gradient through it is the score-function term of the policy gradient.
        loss_B = self.loss_B(student_log_BA, teacher_log_BA).detach()
        return loss_B if self.charges_actions else torch.zeros_like(loss_B)


@dataclass(frozen=True)
class OnPolicyDistillation(StudentDrivenMethod):
    """H(teacher || student) on the student's states, as if it did not choose them: not the gradient of an objective."""

    charges_actions: ClassVar[bool] = False

    def loss_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor) -> Tensor:
        """Returns H(teacher || student) = -sum_a p_T(a) log p_S(a)."""
        return cross_entropy_B(teacher_log_BA, student_log_BA)


@dataclass(frozen=True)
class _CrossEntropyMethod(StudentDrivenMethod):
    entropy_weight: float = 0.0
    """factor of H(p), which is subtracted from the paper's cross-entropy H(p || q); 1 makes it KL(p || q)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.entropy_weight <= 1.0:
            raise ValueError(f"entropy_weight must lie in [0, 1], not {self.entropy_weight}; 1 makes l a KL divergence")


@dataclass(frozen=True)
class NDistill(_CrossEntropyMethod):
    """H(teacher || student) with its true gradient: r_hat_t = -gamma H(teacher || student)(s_{t+1})."""

    def loss_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor) -> Tensor:
        """Returns H(teacher || student) - entropy_weight H(teacher)."""
        # -sum p log q + w sum p log p, in one sum
        return cross_entropy_B(teacher_log_BA, student_log_BA - self.entropy_weight * teacher_log_BA)


@dataclass(frozen=True)
class ExpectedEntropyRegularised(_CrossEntropyMethod):
    """H(student || teacher) with its true gradient: r_hat_t = -gamma H(student || teacher)(s_{t+1}).

    Czarnecki et al. reward log p_T(a_{t+1} | s_{t+1}), a one-sample estimate of the same expectation. The exact
    expectation costs nothing more here and has less variance. With `entropy_weight` 0 the minimum plays the teacher's
    best action only.
    """

    def loss_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor) -> Tensor:
        """Returns H(student || teacher) - entropy_weight H(student)."""
        # The same with the roles exchanged: here both factors depend on the student.
        return cross_entropy_B(student_log_BA, teacher_log_BA - self.entropy_weight * student_log_BA)


def cross_entropy_B(log_p_BA: Tensor, log_q_BA: Tensor) -> Tensor:
    """Returns H(p || q) = -sum_a p(a) log q(a) of each row of two finite log-policies, nats `(batch,)`."""
    return -(log_p_BA.exp() * log_q_BA).sum(dim=-1)
