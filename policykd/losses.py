"""Distillation losses: divergences from a student's policy to its teacher's, per state, in nats unless noted.

A loss function is any `loss_fn(student, batch) -> (loss_B, metrics)`; the loop minimises the mean of `loss_B` and logs
the mean of each metric. The frozen dataclasses below are such functions. Their formula is `per_state`, which takes
raw teacher outputs (logits or Q-values) and one of two temperature conventions:

- teacher only (Rusu et al., 2015): p_T = softmax(teacher / temperature) and p_S = softmax(student). The trained
  student acts like the tempered teacher without a temperature of its own.
- two-sided (Hinton et al., 2015): both policies are softened by T and the loss is multiplied by T^2, which restores
  the gradient's scale. The trained student acts like the teacher, whatever T was.

Fields may hold schedules (`policykd.schedules`). docs/losses.md compares all losses.
Shape suffixes: B batch, A actions.
"""

import math
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, huber_loss, kl_div

from policykd.agents.policy import entropy, log_policy, upcast
from policykd.schedules import Progress, Quantity, check_bounds, resolve

MAX_TWO_SIDED_TEMPERATURE = 100.0
"""its square multiplies the rounding error of a float32 KL, about 1e-8, to 1e-4"""
MIN_TEMPERATURE = 1e-6

Metrics = dict[str, Tensor]
"""name -> value per state, `(batch,)`; each becomes a TensorBoard curve of its mean"""


@dataclass(frozen=True)
class Batch:
    """Labelled states to train on."""

    obs: Tensor
    """observations, `(batch, *obs_shape)`"""
    teacher_BA: Tensor
    """raw teacher outputs (logits or Q-values), float32 `(batch, num_actions)`"""
    rows_B: Tensor
    """rows of the states in the replay buffer, int64"""
    temperature: float
    """temperature of the teacher: softmax(teacher_BA / temperature) is its policy"""
    progress: Progress
    """how much of the run is done; constant within a round"""
    random_B: Tensor
    """64 random bits per state, int64: the only randomness that a loss function may use"""


class LossFn(Protocol):
    """A loss function: a plain function, a frozen dataclass, or an `nn.Module` with parameters of its own.

    The parameters of a module are trained together with the student and saved in checkpoints. An optional method
    `prepare(replay, num_rows)` is called before each round's training, to compute what it needs per stored state.
    """

    def __call__(self, student: nn.Module, batch: Batch, /) -> tuple[Tensor, Metrics]:
        """Returns the loss per state `(batch,)` and the metrics to log."""
        ...


@dataclass(frozen=True)
class PolicyLoss:
    """Base class of losses that compare the two policies' outputs alone."""

    def per_state(self, student_BA: Tensor, teacher_BA: Tensor, temperature: float, progress: float) -> Tensor:
        """Returns the loss per state, `(batch,)`.

        Args:
            student_BA: student's logits, `(batch, num_actions)`.
            teacher_BA: raw teacher outputs, `(batch, num_actions)`.
            temperature: the teacher's own, used where the loss does not define one.
            progress: of the run, for fields that hold schedules.
        """
        raise NotImplementedError

    def __call__(self, student: nn.Module, batch: Batch, /) -> tuple[Tensor, Metrics]:
        """Returns the loss per state and the metrics that every loss logs."""
        student_BA = student(batch.obs).float()  # float32 also under autocast: bfloat16 logits have two digits
        loss_B = self.per_state(student_BA, batch.teacher_BA, batch.temperature, batch.progress)
        return loss_B, self.metrics(student_BA, batch)

    def metrics(self, student_BA: Tensor, batch: Batch) -> Metrics:
        """Returns what is logged of each state besides the loss."""
        return policy_metrics(student_BA, batch)


def policy_metrics(student_BA: Tensor, batch: Batch) -> Metrics:
    """Returns how close the student's policy is to the teacher's: KL(teacher || student), greedy agreement, entropy."""
    # Measured at the teacher's temperature even where the loss has its own, so that runs can be compared.
    with torch.no_grad():
        log_p_BA = log_policy(batch.teacher_BA, batch.temperature)
        same_action_B = batch.teacher_BA.argmax(dim=-1) == student_BA.argmax(dim=-1)
        return {
            "kl": kl_divergence_B(log_p_BA, log_policy(student_BA)),
            "action_agreement": same_action_B.float(),
            "teacher_entropy": entropy(log_p_BA),
        }


def kl_divergence_B(log_p_BA: Tensor, log_q_BA: Tensor) -> Tensor:
    """Returns KL(p || q) per row of two log-policies, nats `(batch,)`."""
    return kl_div(log_q_BA, log_p_BA, log_target=True, reduction="none").sum(dim=-1)


def jensen_shannon_B(log_p_BA: Tensor, log_q_BA: Tensor, teacher_share: float = 0.5) -> Tensor:
    """Returns the Jensen-Shannon divergence per row of two log-policies, nats `(batch,)` (Lin, 1991).

    w KL(p || m) + (1 - w) KL(q || m) with the mixture m = w p + (1 - w) q, which is never zero where p or q is not; at
    most log 2, at w = 0.5.
    """
    # In log space: the mixture of two tiny probabilities would underflow in float32.
    log_m_BA = torch.logaddexp(log_p_BA + math.log(teacher_share), log_q_BA + math.log1p(-teacher_share))
    to_teacher_B = kl_divergence_B(log_p_BA, log_m_BA)
    to_student_B = kl_divergence_B(log_q_BA, log_m_BA)
    return teacher_share * to_teacher_B + (1.0 - teacher_share) * to_student_B


def check_temperature(name: str, temperature: Quantity | None, maximum: float = math.inf) -> None:
    """Checks a temperature, or a schedule's values all over a run.

    Raises:
        ValueError: not positive, not finite, or above the maximum.
    """
    # The advice depends on whose temperature it is: the teacher's, or that of both sides.
    try:
        check_bounds(name, temperature, MIN_TEMPERATURE, maximum)
    except ValueError as error:
        if maximum == math.inf:
            raise ValueError(f"{error}; use 1 for PPO and A2C, 0.01 for DQN") from None
        raise ValueError(f"{error}; near the maximum the loss is what logit-mse computes") from None


@dataclass(frozen=True)
class _TeacherTempered(PolicyLoss):
    temperature: Quantity | None = None
    """temperature of the teacher's policy; None takes the teacher's own (1 for PPO and A2C, 0.01 for DQN)"""

    def __post_init__(self) -> None:
        check_temperature("temperature", self.temperature)

    def log_policies(
        self, student_BA: Tensor, teacher_BA: Tensor, temperature: float, progress: float
    ) -> tuple[Tensor, Tensor]:
        """Returns log p_T and log p_S."""
        teacher_temperature = resolve(self.temperature, progress, default=temperature)
        return log_policy(teacher_BA, teacher_temperature), log_policy(student_BA)


@dataclass(frozen=True)
class ForwardKL(_TeacherTempered):
    """KL(teacher || student): the student must cover every action the teacher takes (Rusu et al., 2015)."""

    def per_state(self, student_BA: Tensor, teacher_BA: Tensor, temperature: float, progress: float) -> Tensor:
        """Returns sum_a p_T(a) (log p_T(a) - log p_S(a)) per state."""
        log_p_BA, log_q_BA = self.log_policies(student_BA, teacher_BA, temperature, progress)
        return kl_divergence_B(log_p_BA, log_q_BA)


@dataclass(frozen=True)
class ReverseKL(_TeacherTempered):
    """KL(student || teacher): the student may leave out the teacher's rarer actions (Czarnecki et al., 2019)."""

    def per_state(self, student_BA: Tensor, teacher_BA: Tensor, temperature: float, progress: float) -> Tensor:
        """Returns sum_a p_S(a) (log p_S(a) - log p_T(a)) per state."""
        log_p_BA, log_q_BA = self.log_policies(student_BA, teacher_BA, temperature, progress)
        return kl_divergence_B(log_q_BA, log_p_BA)


@dataclass(frozen=True)
class JensenShannon(_TeacherTempered):
    """Jensen-Shannon divergence: a bounded compromise between the two KLs (Lin, 1991; Agarwal et al., 2024)."""

    teacher_share: float = 0.5
    """teacher's share w of the mixture, in (0, 1): towards 0 the loss resembles KL(teacher || student), towards 1
    KL(student || teacher), and its scale shrinks towards either end"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.teacher_share < 1.0:
            raise ValueError(f"teacher_share must lie in (0, 1), not {self.teacher_share}; at 0 and 1 the loss is 0")

    def per_state(self, student_BA: Tensor, teacher_BA: Tensor, temperature: float, progress: float) -> Tensor:
        """Returns w KL(p_T || m) + (1 - w) KL(p_S || m) per state, with m = w p_T + (1 - w) p_S."""
        log_p_BA, log_q_BA = self.log_policies(student_BA, teacher_BA, temperature, progress)
        return jensen_shannon_B(log_p_BA, log_q_BA, self.teacher_share)


@dataclass(frozen=True)
class TwoSided(PolicyLoss):
    """Base class of losses that soften both policies by the same temperature."""

    temperature: Quantity = 1.0
    """T, divides the logits of teacher and student while they are compared; above 1 rarer actions weigh more"""
    teacher_temperature: Quantity | None = None
    """temperature of the teacher's policy; None takes the teacher's own (1 for PPO and A2C, 0.01 for DQN)"""

    def __post_init__(self) -> None:
        check_temperature("temperature", self.temperature, MAX_TWO_SIDED_TEMPERATURE)
        check_temperature("teacher_temperature", self.teacher_temperature)

    def temperatures(self, temperature: float, progress: float) -> tuple[float, float]:
        """Returns T, and what the raw teacher outputs are divided by: its own temperature times T."""
        # The teacher's own temperature turns its outputs into logits first; T then softens both sides alike.
        both = resolve(self.temperature, progress)
        return both, resolve(self.teacher_temperature, progress, default=temperature) * both


@dataclass(frozen=True)
class TwoSidedKL(TwoSided):
    """KL(teacher || student), both softened by T, times T^2 (Hinton et al., 2015)."""

    def per_state(self, student_BA: Tensor, teacher_BA: Tensor, temperature: float, progress: float) -> Tensor:
        """Returns T^2 KL(softmax(teacher / (teacher_temperature T)) || softmax(student / T)) per state."""
        both, teacher_both = self.temperatures(temperature, progress)
        return both**2 * kl_divergence_B(log_policy(teacher_BA, teacher_both), log_policy(student_BA, both))


@dataclass(frozen=True)
class _OutputRegression(PolicyLoss):
    temperature: float | None = None
    """multiplies the student's logits, so that they are compared in the teacher's units; None takes the teacher's own
    (1 for PPO and A2C, 0.01 for DQN)"""

    def __post_init__(self) -> None:
        check_temperature("temperature", self.temperature)

    def in_teacher_units(self, student_BA: Tensor, temperature: float) -> Tensor:
        """Returns the student's logits in the teacher's units (Q-values for a DQN teacher)."""
        return resolve(self.temperature, 0.0, default=temperature) * upcast(student_BA)


@dataclass(frozen=True)
class LogitMSE(_OutputRegression):
    """Mean squared error of the outputs (Rusu et al., 2015, as the weak baseline)."""

    def per_state(self, student_BA: Tensor, teacher_BA: Tensor, temperature: float, progress: float) -> Tensor:
        """Returns mean_a (temperature student - teacher)^2 per state, in the teacher's units squared."""
        return (self.in_teacher_units(student_BA, temperature) - upcast(teacher_BA)).square().mean(dim=-1)


@dataclass(frozen=True)
class LogitHuber(_OutputRegression):
    """Huber loss of the outputs: squared near the teacher's, linear far off, so that rare large outputs matter less."""

    delta: float = 1.0
    """difference at which the loss becomes linear, in the teacher's units"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.delta > 0:
            raise ValueError(f"delta must be positive, not {self.delta}; DQN uses 1")

    def per_state(self, student_BA: Tensor, teacher_BA: Tensor, temperature: float, progress: float) -> Tensor:
        """Returns mean_a of d^2 / 2 for |d| <= delta, else delta (|d| - delta / 2); d = temperature student - teacher.

        That is torch's convention (Huber, 1964): near the teacher's outputs it is half of `LogitMSE`.
        """
        scaled_BA = self.in_teacher_units(student_BA, temperature)
        return huber_loss(scaled_BA, upcast(teacher_BA), reduction="none", delta=self.delta).mean(dim=-1)


@dataclass(frozen=True)
class ActionNLL(PolicyLoss):
    """Negative log-likelihood of the teacher's best action: hard labels (Rusu et al., 2015)."""

    def per_state(self, student_BA: Tensor, teacher_BA: Tensor, temperature: float, progress: float) -> Tensor:
        """Returns -log p_S(argmax_a teacher) per state."""
        return cross_entropy(upcast(student_BA), teacher_BA.argmax(dim=-1), reduction="none")


@dataclass(frozen=True)
class SoftAndHard(_TeacherTempered):
    """Weighted sum of soft and hard targets (Hinton et al., 2015), the hard one being the teacher's best action.

    Its minimum, which is not 0, is the policy (1 - hard) p_T plus `hard` on the best action.
    """

    hard: Quantity = 0.1
    """weight of the hard target, from 0 (`ForwardKL`) to 1 (`ActionNLL`)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("hard", self.hard, 0.0, 1.0)

    def per_state(self, student_BA: Tensor, teacher_BA: Tensor, temperature: float, progress: float) -> Tensor:
        """Returns (1 - hard) KL(p_T || p_S) - hard log p_S(argmax_a teacher) per state."""
        # Cross-entropy with the best action is a KL to a one-hot policy, so both terms are in nats.
        hard = resolve(self.hard, progress)
        log_p_BA, log_q_BA = self.log_policies(student_BA, teacher_BA, temperature, progress)
        nll_B = cross_entropy(upcast(student_BA), teacher_BA.argmax(dim=-1), reduction="none")
        return (1.0 - hard) * kl_divergence_B(log_p_BA, log_q_BA) + hard * nll_B


@dataclass(frozen=True)
class AuxiliaryLossWeights:
    """Weights of the auxiliary losses (docs/auxiliary_losses.md); 0 leaves one out, a schedule changes it."""

    value: Quantity = 0.0
    """squared error of the student's value head against PPO's or A2C's critic, or max Q"""
    hint: Quantity = 0.0
    """relative squared error of a linear map from the student's last hidden layer to the teacher's (FitNets)"""
    attention: Quantity = 0.0
    """distance between the image regions where both networks' convolutions are active"""
    similarity: Quantity = 0.0
    """distance between both networks' similarities of the states of a batch"""
    relational: Quantity = 0.0
    """difference between the distances and angles of a batch's states in both networks' hidden layers"""
    shift: Quantity = 0.0
    """KL from the student's policy to its policy on the frames shifted by up to 4 pixels"""

    def __post_init__(self) -> None:
        for field in fields(self):
            check_bounds(f"the weight of the auxiliary loss {field.name}", getattr(self, field.name), 0.0)

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the losses that are used at some time: those whose weight is a schedule, or not 0."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != 0.0)
