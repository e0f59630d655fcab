"""Decoupled and standardized KL divergence, two variants of the two-sided KL.

The decoupled one (Zhao et al., 2022) compares the best action and the others separately; the standardized one (Sun et
al., 2024) compares only the order and the relative gaps of the logits.

Shape suffixes: B batch, A actions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from policykd.agents.policy import log_policy, upcast
from policykd.losses import MAX_TWO_SIDED_TEMPERATURE, PolicyLoss, TwoSided, check_temperature, kl_divergence_B
from policykd.schedules import Quantity, check_bounds, resolve

MIN_SPREAD = 1e-6
"""logits that lie closer together than this count as equal"""
_MAX_WEIGHT = 1e6


@dataclass(frozen=True)
class DecoupledKL(TwoSided):
    """Two-sided KL split at the teacher's best action, so that the other actions can weigh more.

    The plain two-sided KL is alpha 1 and, state by state, beta 1 - p_T(best). The paper's beta is 8, for a teacher that
    is sure of one in a hundred classes; a policy has few actions and is often undecided, so 1 is the default here.
    """

    alpha: Quantity = 1.0
    """weight of whether the best action is taken or not"""
    beta: Quantity = 1.0
    """weight of how the other actions compare with each other"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("alpha", self.alpha, 0.0, _MAX_WEIGHT)
        check_bounds("beta", self.beta, 0.0, _MAX_WEIGHT)

    def per_state(self, student_BA: Tensor, teacher_BA: Tensor, temperature: float, progress: float) -> Tensor:
        """Returns T^2 (alpha KL(best or not) + beta KL(which of the others)) per state."""
        both, teacher_both = self.temperatures(temperature, progress)
        best_B = teacher_BA.argmax(dim=-1)
        # 1. Binary distributions: the teacher's best action, or any other.
        log_p_B2 = best_or_other(log_policy(teacher_BA, teacher_both), best_B)
        log_q_B2 = best_or_other(log_policy(student_BA, both), best_B)
        # 2. Distributions over the other actions alone.
        log_p_others_BA = log_policy(drop_action(teacher_BA, best_B), teacher_both)
        log_q_others_BA = log_policy(drop_action(student_BA, best_B), both)
        # 3. T^2 restores the gradient's scale, as in the two-sided KL.
        best_term_B = resolve(self.alpha, progress) * kl_divergence_B(log_p_B2, log_q_B2)
        others_term_B = resolve(self.beta, progress) * kl_divergence_B(log_p_others_BA, log_q_others_BA)
        return both**2 * (best_term_B + others_term_B)


def drop_action(logits_BA: Tensor, action_B: Tensor) -> Tensor:
    """Returns the logits of all actions but one per row, `(batch, num_actions - 1)`, in their order."""
    rank = torch.arange(logits_BA.shape[-1] - 1, device=logits_BA.device)
    return logits_BA.gather(-1, rank + (rank >= action_B[:, None]).long())


def best_or_other(log_p_BA: Tensor, action_B: Tensor) -> Tensor:
    """Returns log p(action) and log(1 - p(action)) per row, `(batch, 2)`.

    The second is a sum over the other actions, since 1 - p(action) is 0 in float32 from p(action) = 1 - 3e-8 on.
    """
    log_best_B1 = log_p_BA.gather(-1, action_B[:, None])
    return torch.cat([log_best_B1, drop_action(log_p_BA, action_B).logsumexp(dim=-1, keepdim=True)], dim=-1)


@dataclass(frozen=True)
class StandardizedKL(PolicyLoss):
    """KL(teacher || student) of logits that were standardised over the actions of each state.

    Only the order and the relative gaps of the logits count: the student may be more or less certain than its teacher
    in every state. Where the loss is 0 its best action is the teacher's; its sampled policy need not be.
    """

    temperature: Quantity = 2.0
    """divides the standardised logits of both; the teacher's own temperature does not matter"""

    def __post_init__(self) -> None:
        check_temperature("temperature", self.temperature, MAX_TWO_SIDED_TEMPERATURE)

    def per_state(self, student_BA: Tensor, teacher_BA: Tensor, temperature: float, progress: float) -> Tensor:
        """Returns T^2 KL(softmax(z(teacher) / T) || softmax(z(student) / T)), z = (logits - mean) / deviation."""
        both = resolve(self.temperature, progress)
        log_p_BA = log_policy(standardize(teacher_BA), both)
        log_q_BA = log_policy(standardize(student_BA), both)
        return both**2 * kl_divergence_B(log_p_BA, log_q_BA)


def standardize(logits_BA: Tensor) -> Tensor:
    """Returns (logits - mean) / standard deviation over the actions of each row.

    The deviation is the population's, the root of the mean square. A row of equal logits becomes zeros, with a finite
    gradient.
    """
    logits_BA = upcast(logits_BA)
    advantage_BA = logits_BA - logits_BA.amax(dim=-1, keepdim=True).detach()
    # Divide by the largest difference first: the square of 1e38 would overflow, that of 1e-38 underflow.
    advantage_BA = advantage_BA / advantage_BA.detach().abs().amax(dim=-1, keepdim=True).clamp(min=MIN_SPREAD)
    centred_BA = advantage_BA - advantage_BA.mean(dim=-1, keepdim=True)
    # Up to 5,000 numbers that span [-1, 0] vary by more than 1e-4, so this clamp only affects rows of equal logits.
    return centred_BA / centred_BA.square().mean(dim=-1, keepdim=True).clamp(min=1e-4).sqrt()
