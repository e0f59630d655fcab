"""What a run changes: the student, what it has learned from, and where the games stand."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from policykd.beyond_logits import Beyond
from policykd.envs.vector import Episode, VectorEnv
from policykd.feature_losses import MAX_SHIFT
from policykd.replay import Replay
from policykd.schedules import Measured

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
        shifts_B2 = torch.zeros((batch_size, 2), dtype=torch.int64, device=self.replay.frames.device)
        for rows_B in self.replay.batches(num, batch_size, end, self.batch_generator, first=first, stored=stored):
            if self.beyond and "shift" in self.beyond.active:
                drawn_B2 = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (batch_size, 2), generator=self.batch_generator)
                shifts_B2 = drawn_B2.to(shifts_B2.device)
            yield rows_B, shifts_B2

    def measured(self, teacher_return: float | None, random_return: float) -> Measured:
        """Returns what schedules may answer to."""
        returns = self.student_returns
        return Measured(sum(returns) / len(returns) if returns else None, teacher_return, random_return)

    def note_games(self, visit: Visit) -> None:
        """Keeps the returns of games that were the student's alone."""
        if visit.student_fraction == 1.0:
            returns = [*self.student_returns, *(e.episodic_return for e in visit.episodes)]
            self.student_returns = returns[-GAMES_KEPT:]


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


def check_fits(
    learner: Learner, beyond: tuple[str, ...], states_per_round: int, rounds_kept: int, stored: float
) -> None:
    """Raises ValueError for what does not fit what the learner was made for: terms beyond the scores, and states."""
    made_for = learner.beyond.active if learner.beyond else ()
    if beyond != made_for:
        raise ValueError(f"beyond asks for {beyond}, the learner was made for {made_for}; give both the same weights")
    replay, num_envs = learner.replay, learner.envs.num_envs
    if states_per_round % num_envs:
        raise ValueError(f"states_per_round {states_per_round} is not a multiple of num_envs {num_envs}")
    if not states_per_round and not 0 < replay.num_held_out < len(replay):
        raise ValueError(f"states_per_round 0 needs a replay that holds some states out, not {replay.num_held_out}")
    if not states_per_round and rounds_kept:
        raise ValueError(f"rounds_kept {rounds_kept} needs states that are visited; leave it out to learn offline")
    if states_per_round and (replay.num_given > 0) != (stored > 0.0):
        raise ValueError(f"{stored} of each batch from stored states, and the replay was given {replay.num_given}")
    if states_per_round and (replay.num_envs != num_envs or replay.num_given % num_envs):
        raise ValueError(
            f"the stored states are {replay.num_given} of {replay.num_envs} environments; visit as many at once, not"
            f" {num_envs}"
        )
