"""State sources: whose actions choose the states that the student learns on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from policykd.agents.policy import Policy, sample


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
class TeacherStates:
    """The teacher plays: behavioural cloning on its own states (Rusu et al., 2015)."""

    def student_fraction(self, progress: float, /) -> float:
        """Returns 0."""
        return 0.0

    def __call__(
        self, obs: Tensor, teacher_BA: Tensor, student: Policy, progress: float, generator: torch.Generator, /
    ) -> Tensor:
        """Returns actions drawn from the teacher's policy."""
        return sample(teacher_BA, generator)


@dataclass(frozen=True)
class StudentStates:
    """The student plays from the first step: on-policy distillation (Czarnecki et al., 2019)."""

    def student_fraction(self, progress: float, /) -> float:
        """Returns 1."""
        return 1.0

    def __call__(
        self, obs: Tensor, teacher_BA: Tensor, student: Policy, progress: float, generator: torch.Generator, /
    ) -> Tensor:
        """Returns actions drawn from the student's policy."""
        return sample(student(obs).to(teacher_BA.device), generator)


@dataclass(frozen=True)
class MixedStates:
    """Each step is the teacher's with a chance that falls from 1 to 0: DAgger (Ross et al., 2011)."""

    handover: float = 0.3
    """share of the run after which only the student plays"""

    def __post_init__(self) -> None:
        if not 0.0 <= self.handover <= 1.0:
            raise ValueError(f"handover must lie in [0, 1], not {self.handover}")

    def student_fraction(self, progress: float, /) -> float:
        """Returns the share of the student's steps, rising linearly to 1 at `handover`."""
        return min(1.0, progress / self.handover) if self.handover else 1.0

    def __call__(
        self, obs: Tensor, teacher_BA: Tensor, student: Policy, progress: float, generator: torch.Generator, /
    ) -> Tensor:
        """Returns actions drawn from the student's policy in its share of the rows, from the teacher's in the rest."""
        student_plays_B = torch.rand(len(teacher_BA), generator=generator) < self.student_fraction(progress)
        teacher_actions_B = sample(teacher_BA, generator)
        if not student_plays_B.any():
            return teacher_actions_B
        student_actions_B = sample(student(obs).to(teacher_BA.device), generator)
        return torch.where(student_plays_B, student_actions_B, teacher_actions_B)


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


def spelt_out(arguments: list[str]) -> list[str]:
    """Returns a command line with `--states dataset:PATH` (or teacher, student, mixed) as tyro's subcommand."""
    kept, chosen, options, words = list[str](), list[str](), list[str](), iter(arguments)
    for word in words:
        flag, joined, value = word.partition("=")
        if flag.startswith("--states."):  # belongs behind the subcommand
            options += [word] if joined else [word, next(words, "")]
            continue
        if flag != "--states":
            kept.append(word)
            continue
        kind, _, path = (value if joined else next(words, "")).partition(":")
        if kind not in ("mixed", "student", "teacher", "dataset") or (kind == "dataset") != bool(path):
            raise ValueError(f"--states {kind}: give mixed, student, teacher or dataset:PATH")
        chosen = [f"states:{kind}-states", *(["--states.path", path] if path else [])]
    return [*kept, *chosen, *options]
