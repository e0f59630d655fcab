"""Ways to a small network from one teacher and one set of states, each fitted with the same budget.

A way is a frozen dataclass with `__call__(begin, fit)`: it returns a student made from the student `begin` (the teacher
itself, or what another way gave) by taking `fit.updates` gradient steps, or none. docs/compression.md describes them.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from policykd.agents.networks import ConvNet, FrameNet
from policykd.agents.policy import Policy
from policykd.agents.student import Shape, Size, Student, make_student
from policykd.agents.teacher import Teacher
from policykd.envs.vector import VectorEnv
from policykd.legacy.divergences import kl_divergence_B, log_policy
from policykd.legacy.loop import distill
from policykd.legacy.losses import ActionNLL, ForwardKL, Loss, at_temperature
from policykd.legacy.replay import Replay
from policykd.legacy.schedules import WarmupCosine
from policykd.legacy.states import DatasetStates
from policykd.legacy.train_state import Learner, Visit, make_learner
from policykd.legacy.trainer import Round

ROUNDS = 20
"""into which the budget is cut: between them masks move and channels are taken out"""
FROM_SCRATCH, FROM_TRAINED = 6e-3, 2e-3
"""Adam's highest learning rate, for networks that begin at random, and for those that must not forget first what they
were trained to (docs/compression.md has what was tried)"""


@dataclass(frozen=True)
class Fit:
    """One teacher, one set of states and one budget: what every way is given alike."""

    teacher: Teacher
    envs: VectorEnv
    """one of the game; none of its states is used"""
    replay: Replay
    """full of labelled states, the last of them held out"""
    updates: int
    """gradient steps of a way"""
    batch_size: int = 256
    """states a gradient step"""
    seed: int = 0
    """of weights and batches"""

    def __post_init__(self) -> None:
        self.check_updates(self.updates)

    @staticmethod
    def check_updates(updates: int) -> None:
        """Raises ValueError for a budget that cannot be cut into rounds."""
        if updates < ROUNDS or updates % ROUNDS:
            raise ValueError(
                f"--updates {updates} is not a multiple of {ROUNDS}: the budget is cut into as many rounds"
            )

    def begin(self, student: Student) -> Student:
        """Returns a copy to be tuned: it scores as the student does, and its input scaling is that of the states."""
        num = len(self.replay)
        return recentred(student, self.replay.frames[1 : 1 + num][:: max(1, num // 256)])

    def learner(self, student: Student, *, is_trained: bool) -> Learner:
        """Returns a learner at the start; a trained student keeps the input scaling that it was trained with."""
        learner = make_learner(student, self.envs, seed=self.seed, replay=self.replay)
        if is_trained:
            first = len(self.replay) - self.replay.num_held_out
            learner.visit = Visit(first=first, student_fraction=0.0, episodes=[])
        return learner

    def goes_on_with(self, student: Student, learner: Learner) -> Learner:
        """Returns a learner of another network at the same place of the budget, with new moments of Adam."""
        new = self.learner(student, is_trained=True)
        new.round, new.num_updates, new.batch_generator = learner.round, learner.num_updates, learner.batch_generator
        return new

    def rounds(self, learner: Learner, loss: Loss, learning_rate: float) -> Iterator[Round]:
        """Takes the budget's gradient steps from where the learner is, yielding after each round; all of it is seen."""
        return distill(
            self.teacher,
            learner,
            loss=at_temperature(loss, self.teacher.temperature),
            states=DatasetStates(Path()),
            learning_rate=WarmupCosine(learning_rate),
            rounds=ROUNDS,
            states_per_round=0,
            updates_per_round=self.updates // ROUNDS,
            batch_size=self.batch_size,
            temperature=self.teacher.temperature,
            overlap=False,
        )

    @torch.inference_mode()
    def measure(self, policy: Policy) -> tuple[float, float]:
        """Returns KL(teacher || policy) in nats and the share of equal best actions, on the states held out."""
        rows_N = self._held_out()
        scores_NA = torch.cat([policy(self.replay.gather(rows_B)) for rows_B in rows_N.split(500)])
        teacher_NA = self.replay.scores_NA[rows_N]
        kl_N = kl_divergence_B(log_policy(teacher_NA, self.teacher.temperature), log_policy(scores_NA))
        agree_N = teacher_NA.argmax(dim=1) == scores_NA.argmax(dim=1)
        return float(kl_N.mean()), float(agree_N.float().mean())

    @torch.inference_mode()
    def agreement(self, one: Policy, other: Policy) -> float:
        """Returns the share of equal best actions of two policies on the states held out."""
        parts = [self.replay.gather(rows_B) for rows_B in self._held_out().split(500)]
        return float(torch.cat([one(part).argmax(dim=1) == other(part).argmax(dim=1) for part in parts]).float().mean())

    def _held_out(self) -> Tensor:
        """Returns the rows of the replay that no way is fitted to, but for those that only complete others' stacks."""
        rows_N = torch.arange(len(self.replay) - self.replay.num_held_out, len(self.replay))
        return rows_N[~torch.isin(rows_N, self.replay.history)]


class Compressor(Protocol):
    """A way to a small network."""

    def __call__(self, begin: Student, fit: Fit, /) -> Student:
        """Returns a student, in evaluation mode; `begin` stays as it is."""
        ...


@dataclass(frozen=True)
class Unchanged:
    """Takes what it is given: for rows that only store a network in another way."""

    def __call__(self, begin: Student, fit: Fit, /) -> Student:
        """Returns `begin`."""
        return begin


@dataclass(frozen=True)
class Distilled:
    """A small network from scratch on the teacher's scores (Rusu et al., 2015), or on hard labels with `ActionNLL`."""

    size: Size
    loss: Loss = field(default_factory=ForwardKL)
    learning_rate: float = FROM_SCRATCH

    def __call__(self, begin: Student, fit: Fit, /) -> Student:
        """Returns a student of the size."""
        student = make_student(self.size, fit.teacher.num_actions, seed=fit.seed)
        for _ in fit.rounds(fit.learner(student, is_trained=False), self.loss, self.learning_rate):
            pass
        return student.eval()


def hard_labels(size: Size) -> Distilled:
    """Returns the small network that is told the teacher's best action alone."""
    return Distilled(size, ActionNLL())


def teacher_as_student(teacher: Teacher) -> Student:
    """Returns the teacher's own network as a student, which pruning and factorisation begin with.

    Raises:
        ValueError: a teacher whose network is not the NatureCNN that policykd rebuilds.
    """
    net = teacher.net
    if not isinstance(net, ConvNet):
        raise ValueError(f"{teacher.ref or teacher.path}: cannot be pruned, it is no NatureCNN; give an SB3 archive")
    shape = Shape(net.widths, net.hidden, net.num_actions, net.obs_shape, temperature=teacher.temperature)
    return with_weights(shape, net.state_dict())


def with_weights(shape: Shape, weights: dict[str, Tensor]) -> Student:
    """Returns a student of a shape whose network holds these weights, by their names in it, free to be trained."""
    student = Student(shape)
    student.net.load_state_dict({name: weight.detach().clone() for name, weight in weights.items()})
    return student.requires_grad_(True).eval()


def copy_of(student: Student) -> Student:
    """Returns a student of its own weights, free to be trained."""
    copied: Student = copy.deepcopy(student)
    return copied.requires_grad_(True)


@torch.no_grad()
def recentred(student: Student, frames: Tensor) -> Student:
    """Returns a copy normalised on these frames (`Student.fit_input_normalization`) that gives the same logits.

    SB3's networks see pixels from 0 to 1, on which tuning is as badly conditioned as learning (docs/log.md).
    """
    copied = copy_of(student)
    net = copied.net
    assert isinstance(net, FrameNet)
    weight, bias = net.first_layer()
    copied.fit_input_normalization(frames)
    net.first.weight.copy_(weight * net.scale)
    net.first.bias.copy_(bias + net.centre * weight.sum(dim=(1, 2, 3)))  # type: ignore[union-attr]
    return copied


def pixel_unit(student: Student) -> float:
    """Returns what the first convolution's weights are multiplied by to be those for pixels from 0 to 1.

    Magnitudes are compared in that unit, or the input scaling would decide how much of the first layer is pruned.
    """
    assert isinstance(student.net, FrameNet)
    return 255.0 / float(student.net.scale)


def layers_with_weights(student: Student) -> list[nn.Conv2d | nn.Linear]:
    """Returns the convolutions and dense layers in order."""
    return [layer for layer in student.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
