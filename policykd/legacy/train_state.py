"""What a run changes: the student, what it has learned from, and where the games stand."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np
import torch
from torch import Tensor, nn

from policykd.agents.student import Student
from policykd.envs.vector import Episode, VectorEnv
from policykd.io.signals import check_interrupted
from policykd.legacy.auxiliary import Beyond
from policykd.legacy.feature_losses import MAX_SHIFT
from policykd.legacy.replay import BATCHES_A_DRAW, Replay
from policykd.legacy.schedules import Measured

GAMES_KEPT = 32
"""how many of the student's latest games its return is the mean of"""


@dataclass(frozen=True)
class Visit:
    """What visiting a round's states measured."""

    first: int
    """row of its first state in the replay"""
    student_fraction: float
    episodes: list[Episode]
    num_nonfinite: int = 0
    """states whose scores from the teacher were not finite: nothing is fitted to them"""
    collect_seconds: float = 0.0
    label_seconds: float = 0.0
    disagreement: float | None = None
    """between the teachers of an ensemble: their generalised Jensen-Shannon divergence, mean, nats"""
    teacher_weights: tuple[float, ...] = ()
    """of the teachers of an ensemble, means"""
    student_returns: tuple[float, ...] = ()
    """of the games that ended and were the student's alone from their first step"""
    scheduled: dict[str, float] = field(default_factory=dict)
    """what every scheduled quantity of the state source was, by its field's name"""


@dataclass
class Learner:
    """Everything that a run changes, and so everything that a checkpoint holds."""

    student: nn.Module
    envs: VectorEnv
    replay: Replay
    optimizer: torch.optim.Optimizer
    action_generator: torch.Generator
    """draws the actions that visit states; on the CPU as the other, so that a seed means the same everywhere"""
    batch_generator: torch.Generator
    """draws the batches; besides these two and the environments' seed there is no source of chance"""
    obs: Tensor
    starts_B: Tensor
    round: int = 0
    """the next one"""
    num_updates: int = 0
    visit: Visit | None = None
    """of the next round's states: they are in the replay already"""
    beyond: Beyond | None = None
    """what is trained beside the student and thrown away, for losses beyond its scores"""
    num_labelled_beyond: int = 0
    """rows of the replay whose labels for that are known; no checkpoint keeps them, they are asked for anew"""
    student_returns: list[float] = field(default_factory=list)
    """of the latest games that the student played alone, or of an evaluation: whoever makes one may set them"""
    student_steps: int = 0
    """how many of the latest steps of every environment were the student's alone"""

    def weights(self) -> list[Tensor]:
        """Returns what gradients are taken of."""
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]

    def draws(self, num: int, batch_size: int, first: int, end: int, stored: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields `num` batches of rows of the replay, `(batch,)`, and how far their frames are shifted, `(batch, 2)`.

        Args:
            num: of batches.
            batch_size: states in each.
            first: the first row; those that a dataset gave before the run come by their own share alone.
            end: the row behind the last.
            stored: that share.
        """
        first = max(first, self.replay.num_given) if stored else first
        rows = self.replay.batches(num, batch_size, end, self.batch_generator, first=first, stored=stored)
        return zip(rows, self._shifts(num, batch_size), strict=True)

    def _shifts(self, num: int, batch_size: int) -> Iterator[Tensor]:
        """Yields shifts, many drawn and moved to the device at once; zeros where nothing is learned from them."""
        device = self.replay.frames.device
        if not self.beyond or "shift" not in self.beyond.active:
            yield from repeat(torch.zeros((batch_size, 2), dtype=torch.int64, device=device), num)
            return
        for begun in range(0, num, BATCHES_A_DRAW):
            shape = (min(BATCHES_A_DRAW, num - begun), batch_size, 2)
            shifts_UB2 = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, shape, generator=self.batch_generator)
            if device.type == "cuda":
                shifts_UB2 = shifts_UB2.pin_memory()
            yield from shifts_UB2.to(device, non_blocking=True)

    def measured(self, teacher_return: float | None, random_return: float) -> Measured:
        """Returns what schedules may answer to."""
        returns = self.student_returns
        return Measured(sum(returns) / len(returns) if returns else None, teacher_return, random_return)

    def centre_student(self) -> None:
        """Sets a student's input scaling from the frames that there are."""
        if isinstance(self.student, Student):
            num = len(self.replay)
            self.student.fit_input_normalization(self.replay.frames[1 : 1 + num][:: max(1, num // 256)])

    def label_beyond(self) -> None:
        """Asks the teacher what is learned beyond its scores, of states in the replay that it was not asked about yet.

        A state stands at the same place of as many whenever it is asked about: a resumed run is told the same bits.
        """
        replay, size = self.replay, 256
        while self.beyond and self.num_labelled_beyond < len(replay):
            check_interrupted()
            first, known = self.num_labelled_beyond // size * size, self.num_labelled_beyond
            end = min(first + size, len(replay))
            rows_B = torch.arange(first, first + size, device=replay.frames.device).clamp_(max=end - 1)
            self.beyond.label(replay.gather(rows_B), rows_B, slice(known - first, end - first))
            self.num_labelled_beyond = end

    def own_games(self, episodes: Sequence[Episode], *, alone: bool) -> list[float]:
        """Returns the returns of games that the student played alone, of those that ended in a step just taken.

        Args:
            episodes: that ended.
            alone: whether the step was the student's in every environment, without noise.
        """
        self.student_steps = self.student_steps + 1 if alone else 0
        return [e.episodic_return for e in episodes if e.length <= self.student_steps]

    def note_games(self, visit: Visit) -> None:
        """Keeps the returns of the student's latest games of its own."""
        self.student_returns = [*self.student_returns, *visit.student_returns][-GAMES_KEPT:]


def make_learner(
    student: nn.Module,
    envs: VectorEnv,
    *,
    capacity: int = 0,
    seed: int,
    device: torch.device | str = "cpu",
    replay: Replay | None = None,
    beyond: Beyond | None = None,
) -> Learner:
    """Returns a learner at the start of a run.

    Args:
        student: any module that maps observations to scores; its weights are changed in place.
        envs: where states are visited.
        capacity: most states that are ever stored.
        seed: of action sampling and batches.
        device: where student, replay and gradients live.
        replay: labelled states to distil from offline, or to go on from, on `device`; in place of an empty one of that
            capacity.
        beyond: what is trained beside the student.
    """
    obs = envs.reset()
    if replay is None:
        shape = (envs.num_envs, envs.num_actions, envs.obs_shape)
        replay = Replay(capacity, *shape, stack=envs.stack, dtype=obs.dtype, device=device)
    action_seed, batch_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
    if beyond:
        beyond.grow(replay.capacity)
    on_cuda = torch.device(device).type == "cuda"
    weights = [*student.to(device).parameters(), *(beyond.to(device).parameters() if beyond else ())]
    optimizer = torch.optim.Adam(weights, fused=True, capturable=on_cuda)
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros((), device=device)  # a tensor, so that a CUDA graph reads it anew every time
    return Learner(
        student=student,
        envs=envs,
        replay=replay,
        optimizer=optimizer,
        action_generator=torch.Generator().manual_seed(action_seed),
        batch_generator=torch.Generator().manual_seed(batch_seed),
        obs=obs,
        starts_B=torch.ones(envs.num_envs, dtype=torch.bool),
        beyond=beyond,
    )
