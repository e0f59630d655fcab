"""Distillation losses: how far a student's policy is from its teacher's.

Each is a function of two score tensors and returns one number a row, in nats unless it says otherwise; the loop takes
the mean, once. The teacher's scores come raw, as its network gives them, and two conventions of temperature make a
policy of them:

- teacher only (Rusu et al., 2015): p_T = softmax(teacher / temperature) and p_S = softmax(student), so that the
  trained student plays the tempered teacher as it stands.
- two-sided (Hinton et al., 2015): `TwoSidedKL` and `DecoupledKL` soften both policies by a temperature T and multiply
  by T squared, which the gradient lost; the trained student plays the teacher as it plays itself, whatever T is.

A field that changes over a run holds a schedule, and `at(loss, progress)` is the loss of one moment.
Suffixes name dimensions: B batch, A actions. docs/losses.md has all of them in one table.
"""

import math
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

from torch import Tensor
from torch.nn.functional import cross_entropy, huber_loss

from policykd.legacy.divergences import jensen_shannon_B, standardised, taken_or_not, upcast, without
from policykd.legacy.divergences import kl_divergence_B as kl_divergence_B
from policykd.legacy.divergences import log_policy as log_policy
from policykd.legacy.schedules import Quantity

Part = TypeVar("Part")

MOST_SOFTENING = 100.0
"""of both sides: its square multiplies the rounding of a float32 KL, about 1e-8, to 1e-4"""


class Loss(Protocol):
    """A per-row distance from student to teacher."""

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns the loss of each row, `(batch,)`, of raw scores `(batch, num_actions)`."""
        ...


@dataclass(frozen=True)
class _TeacherTempered:
    temperature: Quantity | None = None
    """divides the teacher's scores; None is the teacher's own (1 for PPO and A2C, 0.01 for DQN), or 1 in Python"""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)


@dataclass(frozen=True)
class ForwardKL(_TeacherTempered):
    """KL(teacher || student): the student must cover every action the teacher takes (Rusu et al., 2015)."""

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns sum_a p_T(a) (log p_T(a) - log p_S(a)) of each row."""
        return kl_divergence_B(log_policy(teacher_BA, fixed(self.temperature)), log_policy(student_BA))


@dataclass(frozen=True)
class ReverseKL(_TeacherTempered):
    """KL(student || teacher): the student may leave out the teacher's rarer actions (Czarnecki et al., 2019)."""

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns sum_a p_S(a) (log p_S(a) - log p_T(a)) of each row."""
        return kl_divergence_B(log_policy(student_BA), log_policy(teacher_BA, fixed(self.temperature)))


@dataclass(frozen=True)
class JensenShannon(_TeacherTempered):
    """Jensen-Shannon divergence: a bounded compromise between the two KLs (Lin, 1991; Agarwal et al., 2024)."""

    share: float = 0.5
    """the teacher's in the mixture, between 0 and 1: towards 0 the loss leans to KL(teacher || student), towards 1 to
    KL(student || teacher), and is the smaller the nearer it is to either end"""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"share must lie between 0 and 1, not {self.share}; at an end the divergence is always 0")

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns share KL(p_T || m) + (1 - share) KL(p_S || m) of each row, m = share p_T + (1 - share) p_S."""
        return jensen_shannon_B(log_policy(teacher_BA, fixed(self.temperature)), log_policy(student_BA), self.share)


@dataclass(frozen=True)
class _TwoSided:
    temperature: Quantity = 1.0
    """T, divides the scores of teacher and student while they are compared; above 1 the rarer actions count for more"""
    teacher_temperature: Quantity | None = None
    """makes the teacher's scores its policy; None is the teacher's own (1 for PPO and A2C, 0.01 for DQN), or 1 in
    Python"""

    def __post_init__(self) -> None:
        check_softening(self.temperature)
        check_temperature(self.teacher_temperature)


@dataclass(frozen=True)
class TwoSidedKL(_TwoSided):
    """KL(teacher || student), both softened by T, times T squared (Hinton et al., 2015)."""

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns T^2 KL(softmax(teacher / (teacher_temperature T)) || softmax(student / T)) of each row."""
        both, teacher_alone = fixed(self.temperature), fixed(self.teacher_temperature)
        log_p_BA, log_q_BA = log_policy(teacher_BA, teacher_alone * both), log_policy(student_BA, both)
        return both**2 * kl_divergence_B(log_p_BA, log_q_BA)


@dataclass(frozen=True)
class DecoupledKL(_TwoSided):
    """Two-sided KL split at the teacher's best action, so that the others can weigh more (Zhao et al., 2022).

    The two-sided KL is alpha 1 and, row by row, beta 1 - p_T(best). The paper's beta is 8 where a teacher is sure of
    one in a hundred classes; a policy has few actions and is often undecided, so 1 is the default here.
    """

    alpha: Quantity = 1.0
    """weight of whether the best action is taken or not"""
    beta: Quantity = 1.0
    """weight of how the other actions compare with each other"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_within("alpha", self.alpha, 0.0, 1e6)
        check_within("beta", self.beta, 0.0, 1e6)

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns T^2 (alpha KL(best or not) + beta KL(which of the others)) of each row."""
        both, best_B = fixed(self.temperature), teacher_BA.argmax(dim=-1)
        teacher_both = fixed(self.teacher_temperature) * both
        log_p_BA, log_q_BA = log_policy(teacher_BA, teacher_both), log_policy(student_BA, both)
        best_kl_B = kl_divergence_B(taken_or_not(log_p_BA, best_B), taken_or_not(log_q_BA, best_B))
        others_kl_B = kl_divergence_B(
            log_policy(without(teacher_BA, best_B), teacher_both), log_policy(without(student_BA, best_B), both)
        )
        return both**2 * (fixed(self.alpha) * best_kl_B + fixed(self.beta) * others_kl_B)


@dataclass(frozen=True)
class StandardisedKL:
    """KL(teacher || student) of scores that were standardised over the actions of each row (Sun et al., 2024).

    Only the order and the relative gaps of the scores count: the student may be surer or less sure than its teacher,
    on every state as it likes. Its best action is the teacher's where the loss is 0, its sampled policy need not be.
    """

    temperature: Quantity = 2.0
    """divides the standardised scores of both; the teacher's own does not matter"""

    def __post_init__(self) -> None:
        check_softening(self.temperature)

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns T^2 KL(softmax(z(teacher) / T) || softmax(z(student) / T)), z = (scores - mean) / deviation."""
        both = fixed(self.temperature)
        log_p_BA, log_q_BA = (log_policy(standardised(scores_BA), both) for scores_BA in (teacher_BA, student_BA))
        return both**2 * kl_divergence_B(log_p_BA, log_q_BA)


@dataclass(frozen=True)
class _InTeacherUnits:
    temperature: Quantity | None = None
    """multiplies the student's scores, whose softmax is played, into the teacher's units; None is the teacher's own (1
    for PPO and A2C, 0.01 for DQN), or 1 in Python"""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)


@dataclass(frozen=True)
class ScoreMSE(_InTeacherUnits):
    """Mean squared error of the scores (Rusu et al., 2015, as the weak baseline)."""

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns mean_a (temperature student - teacher)^2 of each row, in the teacher's units squared."""
        return (fixed(self.temperature) * upcast(student_BA) - upcast(teacher_BA)).square().mean(dim=-1)


@dataclass(frozen=True)
class ScoreHuber(_InTeacherUnits):
    """Huber loss of the scores: squared near the teacher's, linear far off, so that rare large scores do not rule."""

    delta: float = 1.0
    """difference at which it becomes linear, in the teacher's units"""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if not self.delta > 0:
            raise ValueError(f"delta must be positive, not {self.delta}; 1 is DQN's")

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns mean_a of d^2 / 2 up to |d| = delta, then delta (|d| - delta / 2), d = temperature student - teacher.

        That is torch's convention (Huber, 1964): near the teacher's scores it is half of `ScoreMSE`.
        """
        scaled_BA = fixed(self.temperature) * upcast(student_BA)
        return huber_loss(scaled_BA, upcast(teacher_BA), reduction="none", delta=self.delta).mean(dim=-1)


@dataclass(frozen=True)
class ActionNLL:
    """Negative log-likelihood of the teacher's best action: hard labels (Rusu et al., 2015)."""

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns -log p_S(argmax_a teacher) of each row."""
        return cross_entropy(upcast(student_BA), teacher_BA.argmax(dim=-1), reduction="none")


@dataclass(frozen=True)
class SoftAndHard(_TeacherTempered):
    """Weighted sum of soft and hard targets (Hinton et al., 2015), the hard one being the teacher's best action.

    Least, and not 0, where the student plays (1 - hard) p_T and its best action for the rest.
    """

    hard: Quantity = 0.1
    """weight of the hard target, from 0 (`ForwardKL`) to 1 (`ActionNLL`)"""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_within("hard", self.hard, 0.0, 1.0)

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        """Returns (1 - hard) KL(p_T || p_S) - hard log p_S(argmax_a teacher) of each row."""
        hard = fixed(self.hard)
        soft_B = ForwardKL(self.temperature)(student_BA, teacher_BA)
        return (1.0 - hard) * soft_B + hard * ActionNLL()(student_BA, teacher_BA)


AnyLoss = (
    ForwardKL
    | ReverseKL
    | JensenShannon
    | TwoSidedKL
    | SoftAndHard
    | DecoupledKL
    | StandardisedKL
    | ScoreMSE
    | ScoreHuber
    | ActionNLL
)
"""every loss that a command offers"""


def at_temperature(loss: Part, temperature: float) -> Part:
    """Returns a loss or a weight at a teacher's temperature, unless it has its own.

    That is every field `temperature` or `teacher_temperature` that is None, here and in the losses and weights inside.
    """
    if isinstance(loss, tuple):
        return type(loss)(at_temperature(part, temperature) for part in loss)
    if not is_dataclass(loss) or isinstance(loss, type):
        return loss
    changes: dict[str, Any] = {}
    for name in [field.name for field in fields(loss) if field.init]:
        part = getattr(loss, name)
        is_missing = part is None and name in ("temperature", "teacher_temperature")
        changes[name] = temperature if is_missing else at_temperature(part, temperature)
    return replace(loss, **changes)


def fixed(quantity: Quantity | None, otherwise: float = 1.0) -> float:
    """Returns a field's number, or another for None.

    Raises:
        ValueError: it is a schedule, which has no number before a moment of the run is chosen.
    """
    if quantity is None:
        return otherwise
    if callable(quantity):
        raise ValueError(f"{quantity} changes over a run; call at(loss, progress) first, or make it a Varying")
    return quantity


def check_within(name: str, quantity: Quantity | None, least: float, most: float) -> None:
    """Raises a ValueError where a field is a number outside its bounds; a schedule is seen when its number is."""
    if isinstance(quantity, int | float) and not least <= quantity <= most:
        raise ValueError(f"{name} must lie in [{least:g}, {most:g}], not {quantity}")


def check_temperature(temperature: Quantity | None) -> None:
    """Raises a ValueError where a temperature is a number that is not positive and finite; see `check_within`."""
    if isinstance(temperature, int | float) and not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, not {temperature}; 1 for PPO and A2C, 0.01 for DQN")


def check_softening(temperature: Quantity) -> None:
    """Raises a ValueError for a temperature of both sides whose square would multiply float32's rounding errors."""
    check_temperature(temperature)
    if isinstance(temperature, int | float) and temperature > MOST_SOFTENING:
        raise ValueError(
            f"temperature of both sides must be at most {MOST_SOFTENING:g}, not {temperature}; from 10 on the loss is"
            " nearly half the squared difference of the scores, which score-mse is at once"
        )
