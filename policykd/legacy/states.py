"""State sources: whose actions choose the states that the student learns on.

Every share and chance is a `Quantity`: a number, or a schedule over the run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from policykd.agents.policy import Policy, sample
from policykd.legacy.schedules import Linear, Quantity, value


class StateSource(Protocol):
    """Chooses the next action in every environment."""

    def student_fraction(self, progress: float, /) -> float:
        """Returns the share of steps that the student takes; `progress` runs from 0 to 1 over the run."""
        ...

    def __call__(
        self, obs: Tensor, teacher_BA: Tensor, student: Policy, progress: float, generator: torch.Generator, /
    ) -> Tensor:
        """Returns actions, `(batch,)`.

        Args:
            obs: `(batch, *obs_shape)`.
            teacher_BA: the teacher's scores there, divided by its temperature.
            student: as far as it has learned.
            progress: from 0 to 1 over the run.
            generator: the only source of chance.
        """
        ...


@dataclass(frozen=True)
class _Noisy:
    epsilon: Quantity = 0.0
    """chance of a step to be drawn from all actions alike, whoever plays (Rusu et al., 2015, take 0.05)"""

    def noisy(self, actions_B: Tensor, num_actions: int, progress: float, generator: torch.Generator) -> Tensor:
        """Returns the actions with some of them replaced by any; without noise no number is drawn."""
        epsilon = value(self.epsilon, progress)
        if not 0.0 <= epsilon <= 1.0:
            raise ValueError(f"epsilon is a chance and must lie in [0, 1], not {epsilon}")
        if epsilon <= 0.0:
            return actions_B
        any_B = torch.randint(num_actions, actions_B.shape, generator=generator)
        return torch.where(torch.rand(len(actions_B), generator=generator) < epsilon, any_B, actions_B)


@dataclass(frozen=True)
class TeacherStates(_Noisy):
    """The teacher plays: behavioural cloning on its own states (Rusu et al., 2015)."""

    def student_fraction(self, progress: float, /) -> float:
        """Returns 0."""
        return 0.0

    def __call__(
        self, obs: Tensor, teacher_BA: Tensor, student: Policy, progress: float, generator: torch.Generator, /
    ) -> Tensor:
        """Returns actions drawn from the teacher's policy."""
        return self.noisy(sample(teacher_BA, generator), teacher_BA.shape[1], progress, generator)


@dataclass(frozen=True)
class StudentStates(_Noisy):
    """The student plays from the first step: on-policy distillation (Czarnecki et al., 2019)."""

    def student_fraction(self, progress: float, /) -> float:
        """Returns 1."""
        return 1.0

    def __call__(
        self, obs: Tensor, teacher_BA: Tensor, student: Policy, progress: float, generator: torch.Generator, /
    ) -> Tensor:
        """Returns actions drawn from the student's policy."""
        actions_B = sample(student(obs).to(teacher_BA.device), generator)
        return self.noisy(actions_B, teacher_BA.shape[1], progress, generator)


@dataclass(frozen=True)
class MixedStates(_Noisy):
    """Each step is the teacher's or, with a chance that rises to 1, the student's: DAgger (Ross et al., 2011)."""

    student: Quantity = Linear(0.0, 1.0, 0.3)  # noqa: RUF009
    """the student's share of the steps; linear:0:1:0.3 leaves all of them to it after 0.3 of the run"""

    def student_fraction(self, progress: float, /) -> float:
        """Returns the share of the student's steps.

        Raises:
            ValueError: not in [0, 1].
        """
        fraction = value(self.student, progress)
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"the student's share of the steps must lie in [0, 1], not {fraction}")
        return fraction

    def __call__(
        self, obs: Tensor, teacher_BA: Tensor, student: Policy, progress: float, generator: torch.Generator, /
    ) -> Tensor:
        """Returns actions drawn from the student's policy in its share of the rows, from the teacher's in the rest."""
        student_plays_B = torch.rand(len(teacher_BA), generator=generator) < self.student_fraction(progress)
        actions_B = sample(teacher_BA, generator)
        if student_plays_B.any():
            student_actions_B = sample(student(obs).to(teacher_BA.device), generator)
            actions_B = torch.where(student_plays_B, student_actions_B, actions_B)
        return self.noisy(actions_B, teacher_BA.shape[1], progress, generator)


@dataclass(frozen=True)
class BlendedStates(MixedStates):
    """Stored states beside live ones, which are visited as in a mixture."""

    path: Path = Path()
    """of a dataset (docs/states.md), or of a run whose states are used again"""
    stored: float = 0.5
    """share of every batch that is drawn from the stored states"""

    def __post_init__(self) -> None:
        if not 0.0 < self.stored < 1.0:
            raise ValueError(f"stored must lie in (0, 1), not {self.stored}; else use dataset or mixed states")


@dataclass(frozen=True)
class DatasetStates:
    """Stored states, and none is visited: offline distillation; `--states dataset:PATH` for short."""

    path: Path
    """of a dataset (docs/states.md), or of a run whose states are used again"""
    held_out: float = 0.05
    """share of the states, the last ones, that the student is not fitted to but measured on"""

    def __post_init__(self) -> None:
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"held_out must lie in (0, 1), not {self.held_out}")

    def student_fraction(self, progress: float, /) -> float:
        """Returns 0."""
        return 0.0

    def __call__(
        self, obs: Tensor, teacher_BA: Tensor, student: Policy, progress: float, generator: torch.Generator, /
    ) -> Tensor:
        """Is never asked."""
        raise AssertionError("states were visited in an offline distillation")
