"""What a run changes: the student, what it has learned from, and where the games stand."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from policykd.envs.vector import Episode, VectorEnv
from policykd.replay import Replay


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


def make_learner(
    student: nn.Module,
    envs: VectorEnv,
    *,
    capacity: int = 0,
    seed: int,
    device: torch.device | str = "cpu",
    replay: Replay | None = None,
) -> Learner:
    """Returns a learner at the start of a run.

    Args:
        student: any module that maps observations to scores; its weights are changed in place.
        envs: where states are visited.
        capacity: most states that are ever stored.
        seed: of action sampling and batches.
        device: where student, replay and gradients live.
        replay: labelled states to distil from offline, on `device`; in place of an empty one of that capacity.
    """
    obs = envs.reset()
    if replay is None:
        shape = (envs.num_envs, envs.num_actions, envs.obs_shape)
        replay = Replay(capacity, *shape, stack=envs.stack, dtype=obs.dtype, device=device)
    action_seed, batch_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
    on_cuda = torch.device(device).type == "cuda"
    optimizer = torch.optim.Adam(student.to(device).parameters(), fused=True, capturable=on_cuda)
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
    )


def check_states(learner: Learner, states_per_round: int) -> None:
    """Raises ValueError for a number of states that does not fit the environments or an offline replay."""
    replay, num_envs = learner.replay, learner.envs.num_envs
    if states_per_round % num_envs:
        raise ValueError(f"states_per_round {states_per_round} is not a multiple of num_envs {num_envs}")
    if not states_per_round and not 0 < replay.num_held_out < len(replay):
        raise ValueError(f"states_per_round 0 needs a replay that holds some states out, not {replay.num_held_out}")
