"""Weights of losses: of several losses in a sum, and of every state by what its teacher and student would do there.

A per-state weight lies in [0, 1] and is a constant to the gradient. A batch of half the weight has half the gradient,
which Adam undoes: what counts is how states weigh against each other. Suffixes name dimensions: B batch, A actions.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from policykd.legacy.divergences import entropy, log_policy
from policykd.legacy.losses import Loss, check_temperature, check_within, fixed
from policykd.legacy.schedules import Quantity


class Weight(Protocol):
    """How much a state counts."""

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns the weight of each row, `(batch,)`, of raw scores `(batch, num_actions)`."""
        ...


@dataclass(frozen=True)
class WeightedSum:
    """Several losses at once."""

    losses: tuple[Loss, ...]
    weights: tuple[Quantity, ...]
    """one a loss; they need not add up to 1"""

    def __post_init__(self) -> None:
        if not isinstance(self.losses, tuple) or not isinstance(self.weights, tuple):
            raise ValueError("losses and weights must be tuples, in which schedules and temperatures are looked for")
        if not 0 < len(self.losses) == len(self.weights):
            raise ValueError(f"{len(self.losses)} losses and {len(self.weights)} weights; give each loss one weight")
        for weight in self.weights:
            check_within("weight", weight, 0.0, 1e6)

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns sum_i weight_i loss_i of each row."""
        pairs = zip(self.losses, self.weights, strict=True)
        return torch.stack([fixed(weight) * loss(student_BA, teacher_BA) for loss, weight in pairs]).sum(dim=0)


@dataclass(frozen=True)
class Weighted:
    """A loss whose states count by a weight."""

    loss: Loss
    weight: Weight

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns weight loss of each row; no gradient flows through the weight."""
        return self.weight(student_BA.detach(), teacher_BA) * self.loss(student_BA, teacher_BA)


@dataclass(frozen=True)
class _Measure:
    temperature: Quantity | None = None
    """divides the teacher's scores; None is the teacher's own (1 for PPO and A2C, 0.01 for DQN), or 1 in Python"""
    floor: Quantity = 0.1
    """weight of a state where the measure is 0; 1 weighs all states alike"""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_within("floor", self.floor, 0.0, 1.0)

    def _raised(self, measure_B: Tensor) -> Tensor:
        floor = fixed(self.floor)
        return floor + (1.0 - floor) * measure_B


@dataclass(frozen=True)
class ByEntropy(_Measure):
    """The surer the teacher is, by the entropy of its policy, the more a state counts."""

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns floor + (1 - floor) (1 - H(p_T) / log num_actions) of each row."""
        log_p_BA = log_policy(teacher_BA, fixed(self.temperature))
        return self._raised((1.0 - entropy(log_p_BA) / math.log(teacher_BA.shape[-1])).clamp(min=0.0))


@dataclass(frozen=True)
class ByGap(_Measure):
    """The surer the teacher is of its best action over its second best, the more a state counts.

    For Q-values that is their gap in units of the temperature, squashed: with all other actions out of the question it
    is tanh(gap / (2 temperature)), 0.46 for a gap of 0.01 at 0.01.
    """

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns floor + (1 - floor) (p_T(best) - p_T(second best)) of each row."""
        two_B2 = log_policy(teacher_BA, fixed(self.temperature)).exp().topk(2, dim=-1).values
        return self._raised(two_B2[:, 0] - two_B2[:, 1])


@dataclass(frozen=True)
class ByDisagreement(_Measure):
    """The more the student's policy differs from the teacher's, the more a state counts."""

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns floor + (1 - floor) TV of each row, the total variation TV = sum_a |p_S(a) - p_T(a)| / 2."""
        p_BA = log_policy(teacher_BA, fixed(self.temperature)).exp()
        return self._raised(0.5 * (log_policy(student_BA.detach()).exp() - p_BA).abs().sum(dim=-1))


AnyWeight = ByEntropy | ByGap | ByDisagreement
Measure = Literal["nothing", "entropy", "gap", "disagreement"]
"""every weight that a command offers, and its name there"""


def counted_by(loss: Loss, measure: Measure, floor: Quantity) -> Loss:
    """Returns the loss whose states count by a measure, from `floor` to 1; the loss itself for `nothing`."""
    weights: dict[str, type[AnyWeight]] = {"entropy": ByEntropy, "gap": ByGap, "disagreement": ByDisagreement}
    return Weighted(loss, weights[measure](floor=floor)) if measure != "nothing" else loss
