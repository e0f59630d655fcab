"""State sources: who acts while states are collected, and so which states the student is trained on.

Every share and probability is a `Quantity`: a number, or a schedule over the run. Shape suffixes: B batch, A actions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from policykd.agents.policy import Policy, sample
from policykd.schedules import Linear, Quantity, check_bounds, resolve


class StateSource(Protocol):
    """Chooses the next action in every environment."""

    def student_fraction(self, progress: float, /) -> float:
        """Returns the probability that a step is the student's; `progress` is the run's, from 0 to 1."""
        ...

    def __call__(
        self, obs: Tensor, teacher_BA: Tensor, student: Policy, progress: float, generator: torch.Generator, /
    ) -> Tensor:
        """Returns actions, int64 `(batch,)`.

        Args:
            obs: observations, `(batch, *obs_shape)`.
            teacher_BA: the teacher's outputs there, divided by its temperature.
            student: the current student.
            progress: of the run, from 0 to 1.
            generator: the only source of randomness.
        """
        ...


@dataclass(frozen=True)
class _EpsilonNoise:
    epsilon: Quantity = 0.0
    """probability of a uniformly random action, whoever acts (Rusu et al., 2015, use 0.05)"""

    def __post_init__(self) -> None:
        check_bounds("epsilon", self.epsilon, 0.0, 1.0)

    def with_noise(self, actions_B: Tensor, num_actions: int, progress: float, generator: torch.Generator) -> Tensor:
        """Returns the actions with some replaced by random ones; without noise no random number is drawn."""
        # A run without noise has the same random stream, and so the same bits, as before there was noise.
        epsilon = resolve(self.epsilon, progress)
        if epsilon <= 0.0:
            return actions_B
        random_B = torch.randint(num_actions, actions_B.shape, generator=generator)
        return torch.where(torch.rand(len(actions_B), generator=generator) < epsilon, random_B, actions_B)


@dataclass(frozen=True)
class TeacherStates(_EpsilonNoise):
    """The teacher acts: behavioural cloning on its own states (Rusu et al., 2015)."""

    def student_fraction(self, progress: float, /) -> float:
        """Returns 0."""
        return 0.0

    def __call__(
        self, obs: Tensor, teacher_BA: Tensor, student: Policy, progress: float, generator: torch.Generator, /
    ) -> Tensor:
        """Returns actions sampled from the teacher's policy."""
        return self.with_noise(sample(teacher_BA, generator), teacher_BA.shape[1], progress, generator)


@dataclass(frozen=True)
class StudentStates(_EpsilonNoise):
    """The student acts from the first step: on-policy distillation (Czarnecki et al., 2019)."""

    def student_fraction(self, progress: float, /) -> float:
        """Returns 1."""
        return 1.0

    def __call__(
        self, obs: Tensor, teacher_BA: Tensor, student: Policy, progress: float, generator: torch.Generator, /
    ) -> Tensor:
        """Returns actions sampled from the student's policy."""
        actions_B = sample(student(obs).to(teacher_BA.device), generator)
        return self.with_noise(actions_B, teacher_BA.shape[1], progress, generator)


@dataclass(frozen=True)
class MixedStates(_EpsilonNoise):
    """Each step is the teacher's or, with a probability that rises to 1, the student's: DAgger (Ross et al., 2011)."""

    student: Quantity = Linear(0.0, 1.0, 0.3)  # noqa: RUF009  # frozen, so that sharing it is safe
    """student's share of the steps; linear:0:1:0.3 gives it all of them from 30 % of the run on"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("student, the student's share of the steps,", self.student, 0.0, 1.0)

    def student_fraction(self, progress: float, /) -> float:
        """Returns the student's share of the steps."""
        return resolve(self.student, progress)

    def __call__(
        self, obs: Tensor, teacher_BA: Tensor, student: Policy, progress: float, generator: torch.Generator, /
    ) -> Tensor:
        """Returns actions sampled from the student's policy in its share of the rows, else from the teacher's."""
        # The student runs on the whole batch if it acts anywhere in it: a smaller batch would save little.
        student_acts_B = torch.rand(len(teacher_BA), generator=generator) < self.student_fraction(progress)
        actions_B = sample(teacher_BA, generator)
        if student_acts_B.any():
            student_actions_B = sample(student(obs).to(teacher_BA.device), generator)
            actions_B = torch.where(student_acts_B, student_actions_B, actions_B)
        return self.with_noise(actions_B, teacher_BA.shape[1], progress, generator)


@dataclass(frozen=True)
class BlendedStates(MixedStates):
    """Stored states blended with live ones, which are collected as in `MixedStates`."""

    path: Path = Path()
    """folder of a dataset (docs/states.md), or of a run whose states are reused"""
    offline_fraction: float = 0.5
    """share of every batch that is drawn from the stored states"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.offline_fraction < 1.0:
            raise ValueError(
                f"offline_fraction must lie in (0, 1), not {self.offline_fraction}; else use dataset or mixed states"
            )


@dataclass(frozen=True)
class DatasetStates:
    """Stored states only: offline distillation. `--states dataset:PATH` for short."""

    path: Path
    """folder of a dataset (docs/states.md), or of a run whose states are reused"""
    held_out: float = 0.05
    """fraction of the states, the last ones, that the student is not trained on but measured on"""

    def __post_init__(self) -> None:
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"held_out must lie in (0, 1), not {self.held_out}")

    def student_fraction(self, progress: float, /) -> float:
        """Returns 0."""
        return 0.0

    def __call__(
        self, obs: Tensor, teacher_BA: Tensor, student: Policy, progress: float, generator: torch.Generator, /
    ) -> Tensor:
        """Never called: offline distillation collects no states."""
        raise AssertionError("states were collected in an offline distillation")


def student_acts_alone(states: StateSource, progress: float) -> bool:
    """Returns whether every step is the student's own action, without noise: its episodes are then its return."""
    # Noise or a shared episode would make the return that of another policy.
    epsilon = resolve(getattr(states, "epsilon", 0.0), progress)
    return states.student_fraction(progress) == 1.0 and epsilon == 0.0
