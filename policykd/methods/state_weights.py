"""Weighted states.

A state's weight lies in [0, 1] and is a constant to the gradient. A batch of half the weight has half the gradient,
which the optimizer undoes: what counts is how states weigh relative to each other. Shape suffixes: B batch, A actions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from policykd.agents.policy import entropy, log_policy
from policykd.losses import Batch, Metrics, PolicyLoss, check_temperature
from policykd.schedules import Quantity, check_bounds, resolve

StateWeighting = Literal["none", "entropy", "gap", "disagreement"]
"""the weightings that a command offers"""


StateWeight = Callable[[Tensor, Tensor, float, float], Tensor]
"""weight of each state, `(batch,)`, from the arguments of `PolicyLoss.per_state`"""


@dataclass(frozen=True)
class WeightedStates(PolicyLoss):
    """A loss whose states are weighted."""

    loss: PolicyLoss
    weight: StateWeight

    def per_state(self, student_BA: Tensor, teacher_BA: Tensor, temperature: float, progress: float) -> Tensor:
        """Returns weight times loss per state; no gradient flows through the weight."""
        weight_B = self.weight(student_BA.detach(), teacher_BA, temperature, progress)
        return weight_B * self.loss.per_state(student_BA, teacher_BA, temperature, progress)

    def metrics(self, student_BA: Tensor, batch: Batch) -> Metrics:
        """Returns the metrics of the loss, with the weight among them."""
        weight_B = self.weight(student_BA.detach(), batch.teacher_BA, batch.temperature, batch.progress)
        return self.loss.metrics(student_BA, batch) | {"state_weight": weight_B}


@dataclass(frozen=True)
class _StateMeasure:
    temperature: Quantity | None = None
    """temperature of the teacher's policy; None takes the teacher's own (1 for PPO and A2C, 0.01 for DQN)"""
    floor: Quantity = 0.1
    """weight of a state where the measure is 0; 1 weighs all states alike"""

    def __post_init__(self) -> None:
        check_temperature("temperature", self.temperature)
        check_bounds("floor", self.floor, 0.0, 1.0)

    def teacher_log_policy(self, teacher_BA: Tensor, temperature: float, progress: float) -> Tensor:
        """Returns log p_T."""
        return log_policy(teacher_BA, resolve(self.temperature, progress, default=temperature))

    def above_floor(self, measure_B: Tensor, progress: float) -> Tensor:
        """Returns floor + (1 - floor) measure."""
        floor = resolve(self.floor, progress)
        return floor + (1.0 - floor) * measure_B


@dataclass(frozen=True)
class ByEntropy(_StateMeasure):
    """Weight that grows with the teacher's certainty, by the entropy of its policy."""

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, temperature: float, progress: float, /) -> Tensor:
        """Returns floor + (1 - floor) (1 - H(p_T) / log num_actions) per state."""
        entropy_B = entropy(self.teacher_log_policy(teacher_BA, temperature, progress))
        certainty_B = (1.0 - entropy_B / math.log(teacher_BA.shape[-1])).clamp(min=0.0)
        return self.above_floor(certainty_B, progress)


@dataclass(frozen=True)
class ByGap(_StateMeasure):
    """Weight that grows with the gap between the teacher's two best actions.

    For Q-values that is their gap in units of the temperature, squashed: if no other action matters it is
    tanh(gap / (2 temperature)), 0.46 for a gap of 0.01 at temperature 0.01.
    """

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, temperature: float, progress: float, /) -> Tensor:
        """Returns floor + (1 - floor) (p_T(best) - p_T(second best)) per state."""
        best_two_B2 = self.teacher_log_policy(teacher_BA, temperature, progress).exp().topk(2, dim=-1).values
        return self.above_floor(best_two_B2[:, 0] - best_two_B2[:, 1], progress)


@dataclass(frozen=True)
class ByDisagreement(_StateMeasure):
    """Weight that grows with the distance between the student's policy and the teacher's."""

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, temperature: float, progress: float, /) -> Tensor:
        """Returns floor + (1 - floor) TV per state, the total variation TV = sum_a |p_S(a) - p_T(a)| / 2."""
        p_BA = self.teacher_log_policy(teacher_BA, temperature, progress).exp()
        total_variation_B = 0.5 * (log_policy(student_BA.detach()).exp() - p_BA).abs().sum(dim=-1)
        return self.above_floor(total_variation_B, progress)


def weigh_states(loss: PolicyLoss, weighting: StateWeighting, floor: Quantity) -> PolicyLoss:
    """Returns the loss with its states weighted from `floor` to 1; the loss itself for "none"."""
    if weighting == "none":
        return loss
    measures: dict[str, type[ByEntropy | ByGap | ByDisagreement]] = {
        "entropy": ByEntropy,
        "gap": ByGap,
        "disagreement": ByDisagreement,
    }
    return WeightedStates(loss, measures[weighting](floor=floor))
