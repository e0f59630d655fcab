"""KL divergence of standardised logits (Sun et al., 2024). Shape suffixes: B batch, A actions."""

from dataclasses import dataclass

from torch import Tensor

from policykd.agents.policy import log_policy, upcast
from policykd.losses import MAX_TWO_SIDED_TEMPERATURE, PolicyLoss, check_temperature, kl_divergence_B
from policykd.schedules import Quantity, resolve

MIN_SPREAD = 1e-6
"""logits that lie closer together than this count as equal"""


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
