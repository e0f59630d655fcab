"""Training with a fixed budget on a teacher's stored states: from scratch, or after a step of compression.

Suffixes name dimensions: B batch, A actions, N stored states.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from policykd.agents.policy import Policy, log_policy
from policykd.agents.student import Size, Student, make_student
from policykd.agents.teacher import Teacher
from policykd.compression.networks import with_normalized_input
from policykd.envs.vector import VectorEnv
from policykd.loop import DistillConfig, distill, forward_kl
from policykd.losses import LossFn, kl_divergence_B
from policykd.replay import DrawRange, Replay
from policykd.schedules import Progress, WarmupCosine
from policykd.states import DatasetStates
from policykd.train_state import make_train_state

ROUNDS = 20
"""parts of the budget; between two parts masks move and channels are removed"""

# Peak learning rates of Adam; docs/compression.md ("What was tried") has the measurements.
FROM_SCRATCH = 6e-3
FROM_TRAINED = 2e-3
"""lower, so that the first updates do not destroy what the network knows"""


@dataclass(frozen=True)
class ComparisonSettings:
    """Settings that all rows of a comparison share; they are recorded with every row."""

    game: str
    teacher_sha256: str
    states: str
    """path of the run or dataset that the states come from"""
    updates: int = 3000
    """gradient steps, a multiple of `ROUNDS`"""
    batch_size: int = 256
    """states per gradient step"""
    seed: int = 0
    """random seed (weights, batches, games)"""

    def __post_init__(self) -> None:
        """Raises ValueError for a budget that cannot be divided into rounds."""
        if self.updates < ROUNDS or self.updates % ROUNDS:
            raise ValueError(f"--updates must be a positive multiple of {ROUNDS}, not {self.updates}")


@dataclass(frozen=True)
class FineTuning:
    """Teacher, labelled states and budget that all methods of a comparison share."""

    settings: ComparisonSettings
    teacher: Teacher
    envs: VectorEnv
    """an environment of the game; it is not stepped"""
    replay: Replay
    """labelled states; the last `num_held_out` rows are only measured on"""
    threads: int = 1
    """CPU threads per batch"""

    def prepare(self, student: Student) -> Student:
        """Returns a copy to tune: it computes the same function, with its input scaling fitted to the states."""
        num_rows = len(self.replay)
        # The same frames that `distill` fits the scaling to, so that it finds it fitted already.
        frames = self.replay.frames[1 : 1 + num_rows][:: max(1, num_rows // 256)]
        return with_normalized_input(student, frames)

    def train(
        self,
        student: Student,
        peak_learning_rate: float,
        loss_fn: LossFn = forward_kl,
        *,
        first_round: int = 0,
        num_rounds: int = ROUNDS,
    ) -> Iterator[int]:
        """Trains a student in place, and yields the number of finished rounds of the budget after each round.

        Args:
            student: trained in place.
            peak_learning_rate: of Adam, after a warm-up; it decays to 0 over the whole budget.
            loss_fn: distillation loss.
            first_round: rounds of the budget that are spent already.
            num_rounds: rounds to train for.
        """
        # One schedule over the whole budget, also for a network that is trained in parts.
        schedule = WarmupCosine(peak_learning_rate)

        def learning_rate(progress: Progress) -> float:
            return schedule((first_round + num_rounds * progress) / ROUNDS)

        config = DistillConfig(
            rounds=num_rounds,
            updates_per_round=self.settings.updates // ROUNDS,
            batch_size=self.settings.batch_size,
            learning_rate=learning_rate,
            optimizer="adam",  # for which the peak rates of all methods were searched
            states=DatasetStates(Path()),  # offline: the states are in the replay buffer already
            # Another seed per part, or a network that is trained in parts would see the same batches in each.
            seed=self.settings.seed + first_round,
            threads=self.threads,
        )
        state = make_train_state(student, self.envs, config, loss_fn=loss_fn, replay=self.replay)
        for trained in distill(self.teacher, student, self.envs, config, loss_fn=loss_fn, state=state):
            yield first_round + trained.index + 1

    def train_fully(self, student: Student, peak_learning_rate: float, loss_fn: LossFn = forward_kl) -> Student:
        """Trains a student in place with the whole budget and returns it, in evaluation mode."""
        for _ in self.train(student, peak_learning_rate, loss_fn):
            pass
        return student.eval()

    @torch.inference_mode()
    def measure(self, policy: Policy) -> tuple[float, float]:
        """Returns KL(teacher || policy) in nats and the fraction of equal greedy actions, on the held-out states."""
        rows_N = self.replay.states_from(len(self.replay) - self.replay.num_held_out)
        # Batches bound the memory of an ONNX policy, which keeps all activations.
        student_NA = torch.cat([policy(self.replay.gather(rows_B)) for rows_B in rows_N.split(500)])
        teacher_NA = self.replay.teacher_NA[rows_N]
        kl_N = kl_divergence_B(log_policy(teacher_NA, self.teacher.temperature), log_policy(student_NA))
        agree_N = teacher_NA.argmax(dim=1) == student_NA.argmax(dim=1)
        return float(kl_N.mean()), float(agree_N.float().mean())

    def calibration_states(self, num: int) -> Tensor:
        """Returns `num` training states, always the same, as uint8 `(num, 4, 84, 84)`."""
        # Not from the held-out states, or agreement would be measured on states that int8 was fitted to.
        drawn = DrawRange(0, len(self.replay) - self.replay.num_held_out)
        batches = self.replay.batches(1, num, drawn, torch.Generator().manual_seed(0))
        return self.replay.gather(next(batches))


def train_from_scratch(size: Size, tuning: FineTuning, loss_fn: LossFn = forward_kl) -> Student:
    """Returns a student of a size, distilled from random weights (Rusu et al., 2015, "Policy Distillation").

    The loss is a KL divergence for soft targets, `ActionNLL` for hard labels.
    """
    student = make_student(size, tuning.teacher.num_actions, seed=tuning.settings.seed)
    return tuning.train_fully(student, FROM_SCRATCH, loss_fn)
