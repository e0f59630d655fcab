"""Mutable state of a run: student, optimizer, replay buffer, environments, random generators.

Everything that a checkpoint holds is here. Shape suffixes: B environments, U updates.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from policykd.agents.policy import check_outputs
from policykd.agents.student import Student
from policykd.envs.vector import Episode, VectorEnv, as_vector_env
from policykd.optimizer import Muon
from policykd.replay import BATCHES_PER_DRAW, DrawRange, Replay, to_device
from policykd.schedules import Progress
from policykd.states import BlendedStates, DatasetStates

if TYPE_CHECKING:
    from policykd.loop import DistillConfig

NUM_RETURN_EPISODES = 32
"""latest episodes whose mean is the student's return"""


@dataclass(frozen=True)
class Rollout:
    """The states of one round, already in the replay buffer, and what their collection measured."""

    first: int
    """row of the first of its states"""
    student_fraction: float
    """probability that a step was the student's"""
    episodes: list[Episode]
    """episodes that ended meanwhile, whoever acted"""
    num_nonfinite: int = 0
    """states that are left out because the teacher's outputs were not finite"""
    collect_seconds: float = 0.0
    """environment steps and the student's actions"""
    label_seconds: float = 0.0
    """the teacher's forward passes, which also choose its actions"""
    metrics: dict[str, float] = field(default_factory=dict)
    """means that the teacher measured itself, such as the disagreement of an ensemble's members"""
    student_returns: tuple[float, ...] = ()
    """returns of the episodes that were the student's own from their first step"""
    schedules: dict[str, float] = field(default_factory=dict)
    """values of the state source's schedules, by name"""


@dataclass
class TrainState:
    """Mutable training state: what `distill` changes, and what a checkpoint restores."""

    student: nn.Module
    envs: VectorEnv
    replay: Replay
    optimizer: torch.optim.Optimizer
    action_generator: torch.Generator
    """draws actions while collecting; on the CPU like the other, so that a seed means the same on every device"""
    batch_generator: torch.Generator
    """draws batches; these two, the environments' seed and the run's seed are the only sources of randomness"""
    obs: Tensor
    """current observations of all environments"""
    episode_starts_B: Tensor
    """bool, true where the current observation starts an episode or life"""
    loss_module: nn.Module | None = None
    """the loss function, if it has parameters: they are trained with the student and then discarded"""
    round: int = 0
    """index of the next round"""
    num_updates: int = 0
    rollout: Rollout | None = None
    """the next round's states, collected already"""
    student_returns: list[float] = field(default_factory=list)
    """latest returns of the student's own episodes; a caller may set those of an evaluation"""
    num_student_steps: int = 0
    """latest consecutive steps of every environment that were the student's alone"""
    teacher_return: float | None = None
    """mean episodic return of the teacher, for schedules that follow the student's"""
    random_return: float = 0.0
    """mean episodic return of a random policy, likewise"""

    @property
    def device(self) -> torch.device:
        """Where student, replay buffer and gradients are."""
        return self.replay.device

    def parameters(self) -> list[Tensor]:
        """Returns the parameters that gradients are taken of."""
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]

    def progress(self, fraction: float) -> Progress:
        """Returns the run's progress with the returns that schedules may follow."""
        returns = self.student_returns
        student_return = sum(returns) / len(returns) if returns else None
        return Progress(fraction, student_return, self.teacher_return, self.random_return)

    def draws(self, config: "DistillConfig", end: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields this round's batches: rows of the replay buffer and 64 random bits per state, both int64 `(batch,)`.

        Args:
            config: number and size of the batches, window and share of stored states.
            end: row after the last that is trained on.
        """
        # The newest rounds only, or everything; states that are held out are behind `end`.
        window = config.replay_window_rounds * config.states_per_round
        first = max(0, end - window) if window else 0
        offline_fraction = 0.0
        if isinstance(config.states, BlendedStates):
            offline_fraction = config.states.offline_fraction
            first = max(first, self.replay.num_preloaded)  # stored states come in by their own share alone
        drawn = DrawRange(first, end, offline_fraction)
        rows = self.replay.batches(config.updates_per_round, config.batch_size, drawn, self.batch_generator)
        return zip(rows, self._random_bits(config), strict=True)

    def _random_bits(self, config: "DistillConfig") -> Iterator[Tensor]:
        # Seeded per round, so that a resumed run draws the same bits without a generator in the checkpoint.
        seed = int(np.random.SeedSequence([config.seed, self.round]).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(seed)
        for begun in range(0, config.updates_per_round, BATCHES_PER_DRAW):
            num = min(BATCHES_PER_DRAW, config.updates_per_round - begun)
            bits_UB = torch.randint(2**63 - 1, (num, config.batch_size), generator=generator)
            yield from to_device(bits_UB, self.device)

    def fit_input_normalization(self) -> None:
        """Sets the student's input scaling from the frames collected so far (some 256 of them)."""
        # A module of the user's scales its own input.
        if isinstance(self.student, Student):
            num = len(self.replay)
            self.student.fit_input_normalization(self.replay.frames[1 : 1 + num][:: max(1, num // 256)])


def make_train_state(
    student: nn.Module, envs: object, config: "DistillConfig", *, loss_fn: object = None, replay: Replay | None = None
) -> TrainState:
    """Returns the state at the start of a run; the student is trained in place, on the device that it is on.

    Args:
        student: any module that maps observations to logits.
        envs: a policykd, Gymnasium or SB3 vector environment to collect states in.
        config: seed, and the number of states that the replay buffer has room for.
        loss_fn: the run's loss function; if it is an `nn.Module`, its parameters are trained too.
        replay: labelled states to start from (offline or blended distillation), in place of an empty buffer.

    Raises:
        ValueError: the environments or the stored states do not fit the config.
    """
    vector_env = as_vector_env(envs)
    # The student decides the device: everything that an update touches is moved there.
    obs = vector_env.reset()
    device = next(student.parameters()).device
    # Allocated once, for all rounds: a buffer that grows would copy gigabytes.
    if replay is None:
        shape = (vector_env.num_envs, vector_env.num_actions, vector_env.obs_shape)
        replay = Replay(config.rounds * config.states_per_round, *shape, stack=vector_env.stack, dtype=obs.dtype)
    replay = replay.to(device)
    _check_fits(config, vector_env, replay)
    _check_student(student, obs.to(device), vector_env.num_actions)

    # One generator per purpose, so that the number of batches does not change which actions are drawn.
    action_seed, batch_seed = np.random.SeedSequence(config.seed).generate_state(2).tolist()
    loss_module = loss_fn.to(device) if isinstance(loss_fn, nn.Module) else None
    parameters = [*student.parameters(), *(loss_module.parameters() if loss_module else ())]
    # The rate is a tensor, so that a captured CUDA graph reads its current value.
    lr = torch.zeros((), device=device)
    optimizer: torch.optim.Optimizer
    if config.optimizer == "muon":
        optimizer = Muon(parameters, lr)
    else:
        optimizer = torch.optim.Adam(parameters, lr, fused=True, capturable=device.type == "cuda")
    return TrainState(
        student=student,
        envs=vector_env,
        replay=replay,
        optimizer=optimizer,
        action_generator=torch.Generator().manual_seed(action_seed),
        batch_generator=torch.Generator().manual_seed(batch_seed),
        obs=obs,
        episode_starts_B=torch.ones(vector_env.num_envs, dtype=torch.bool),
        loss_module=loss_module,
    )


@torch.inference_mode()
def _check_student(student: nn.Module, obs: Tensor, num_actions: int) -> None:
    """Raises ValueError if the student does not return one number per observation and action."""
    was_training = student.training
    check_outputs(student.eval()(obs.clone()), len(obs), num_actions, "the student")
    student.train(was_training)


def _check_fits(config: "DistillConfig", envs: VectorEnv, replay: Replay) -> None:
    """Raises ValueError for numbers of states that do not fit the environments, the replay buffer or each other."""
    # Offline: the buffer is complete, and the student is measured on what it is not trained on.
    if isinstance(config.states, DatasetStates):
        if not 0 < replay.num_held_out < len(replay):
            raise ValueError("offline distillation needs a replay buffer with stored states, some of them held out")
        return
    if config.states_per_round % envs.num_envs:
        raise ValueError(
            f"states_per_round {config.states_per_round} is not a multiple of num_envs {envs.num_envs}; change either"
        )
    # Blended: the streams of stored and live states continue in the same environments.
    is_blended = isinstance(config.states, BlendedStates)
    if is_blended != (replay.num_preloaded > 0):
        raise ValueError(
            f"states are {config.states}, and {replay.num_preloaded} stored states were given; use BlendedStates"
            " together with the replay buffer of a dataset"
        )
    if replay.num_envs != envs.num_envs or replay.num_preloaded % envs.num_envs:
        raise ValueError(
            f"the {replay.num_preloaded} stored states come from {replay.num_envs} environments; collect in as many"
            f" (--num-envs {replay.num_envs}), not {envs.num_envs}"
        )
