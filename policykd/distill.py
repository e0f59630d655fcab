"""The distillation loop, top to bottom.

Suffixes name dimensions: B environments or a batch, A actions.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from policykd.agents.policy import Policy
from policykd.agents.student import Student
from policykd.envs.vector import Episode, VectorEnv
from policykd.losses import Loss, kl_divergence_B, log_policy
from policykd.replay import Replay
from policykd.schedules import Schedule
from policykd.states import StateSource


@dataclass(frozen=True)
class Round:
    """What one round measured."""

    index: int
    num_states: int
    """labelled so far"""
    num_updates: int
    """gradient steps so far"""
    loss: float
    """mean over the round's updates"""
    kl: float
    """KL(teacher || student), mean over the round's batches, nats"""
    action_agreement: float
    """share of those states where both have the same best action"""
    new_kl: float
    """KL(teacher || student) on states that the student was not fitted to, nats: this round's before the fit; offline,
    those that are held out"""
    new_action_agreement: float
    """agreement there"""
    teacher_entropy: float
    """of the teacher's policy on this round's states, nats"""
    grad_norm: float
    """2-norm of the gradient, mean over the updates"""
    learning_rate: float
    """of the last update"""
    student_fraction: float
    """the chance of a step in this round to be the student's"""
    episodes: list[Episode]
    """games that ended while collecting, whoever played them"""
    collect_seconds: float
    label_seconds: float
    """inside the collection: the teacher's forward passes, which also choose its actions"""
    fit_seconds: float
    """with measuring the student on the new states"""


@dataclass
class Learner:
    """Everything that a run changes, and so everything that a checkpoint holds."""

    student: nn.Module
    envs: VectorEnv
    replay: Replay
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    """the only source of chance besides the environments' seed; on the CPU"""
    obs: Tensor
    starts_B: Tensor
    round: int = 0
    """the next one"""
    num_updates: int = 0
    episodes: list[Episode] = field(default_factory=list)


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
    return Learner(
        student=student.to(device),
        envs=envs,
        replay=replay,
        optimizer=torch.optim.Adam(student.parameters(), fused=True),
        generator=torch.Generator().manual_seed(seed),
        obs=obs,
        starts_B=torch.ones(envs.num_envs, dtype=torch.bool),
    )


def distill(
    teacher: Policy,
    learner: Learner,
    *,
    loss: Loss,
    states: StateSource,
    learning_rate: Schedule,
    rounds: int,
    states_per_round: int,
    updates_per_round: int,
    batch_size: int = 256,
    temperature: float = 1.0,
) -> Iterator[Round]:
    """Fits the learner's student to a teacher in place, yielding what each round measured; stop by asking for no more.

    A round visits states (acting and labelling share one forward pass of the teacher), adds them to the replay and fits
    the student to batches drawn from all of it. It goes on from `learner.round`, so that a restored learner continues
    its run.

    Args:
        teacher: scores observations; raw scores are stored.
        learner: student, environments, replay, optimizer.
        loss: of a batch of rows; its mean is minimised with Adam.
        states: whose actions choose the states.
        learning_rate: as a function of the run's progress.
        rounds: times to visit, then fit.
        states_per_round: a multiple of the number of environments; 0 visits none and fits to what the replay holds
            (offline), but for the states that it holds out.
        updates_per_round: gradient steps.
        batch_size: states a gradient step.
        temperature: divides the teacher's scores where it acts, and in the measured KL.

    Raises:
        FloatingPointError: the loss or the gradient is no longer finite.
    """
    student, envs, replay, generator = learner.student, learner.envs, learner.replay, learner.generator
    device = replay.frames.device
    if states_per_round % envs.num_envs:
        raise ValueError(f"states_per_round {states_per_round} is not a multiple of num_envs {envs.num_envs}")
    if not states_per_round and not 0 < replay.num_held_out < len(replay):
        raise ValueError(f"states_per_round 0 needs a replay that holds some states out, not {replay.num_held_out}")

    while learner.round < rounds:
        progress = learner.round / max(1, rounds - 1)

        # 1. Visit states and label each with the teacher's scores.
        began, label_seconds, episodes = time.perf_counter(), 0.0, list[Episode]()
        first_new = len(replay) - replay.num_held_out
        student.eval()
        for _ in range(states_per_round // envs.num_envs):
            obs = learner.obs.to(device)
            with torch.inference_mode():
                asked = time.perf_counter()
                teacher_BA = teacher(obs)
                replay.add(obs, learner.starts_B, teacher_BA)
                teacher_BA = teacher_BA.cpu() / temperature
                label_seconds += time.perf_counter() - asked
                actions_B = states(obs, teacher_BA, student, progress, generator)
            step = envs.step(actions_B)
            learner.obs, learner.starts_B = step.obs, step.starts_B
            episodes += step.episodes
        collect_seconds = time.perf_counter() - began
        began = time.perf_counter()
        if learner.round == 0 and isinstance(student, Student):
            student.centre_on(replay.frames[1 : 1 + len(replay)][:: max(1, len(replay) // 256)])
        new_kl, new_agreement, teacher_entropy = compare(student, replay, first_new, temperature)

        # 2. Fit the student to every state so far.
        rate = 0.0
        student.train()
        sums = torch.zeros(4, device=device)
        for update in range(updates_per_round):
            rate = learning_rate((learner.round + (update + 1) / updates_per_round) / rounds)
            for group in learner.optimizer.param_groups:
                group["lr"] = rate
            obs, teacher_BA = replay.sample(batch_size, generator)
            student_BA = student(obs)
            batch_loss = loss(student_BA, teacher_BA).mean()
            learner.optimizer.zero_grad(set_to_none=True)
            batch_loss.backward()
            norm = nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None])
            learner.optimizer.step()
            with torch.no_grad():
                kl_B = kl_divergence_B(log_policy(teacher_BA, temperature), log_policy(student_BA))
                agree_B = teacher_BA.argmax(dim=-1) == student_BA.argmax(dim=-1)
                sums += torch.stack([batch_loss, norm, kl_B.mean(), agree_B.float().mean()])
        mean_loss, grad_norm, kl, agreement = (sums / updates_per_round).tolist()
        fit_seconds = time.perf_counter() - began
        if not torch.isfinite(sums).all():
            raise FloatingPointError(
                f"round {learner.round}: loss {mean_loss}, gradient norm {grad_norm}; lower the learning rate"
            )

        # 3. Report.
        learner.round += 1
        learner.num_updates += updates_per_round
        yield Round(
            index=learner.round - 1,
            num_states=replay.num_states,
            num_updates=learner.num_updates,
            loss=mean_loss,
            kl=kl,
            action_agreement=agreement,
            new_kl=new_kl,
            new_action_agreement=new_agreement,
            teacher_entropy=teacher_entropy,
            grad_norm=grad_norm,
            learning_rate=rate,
            student_fraction=states.student_fraction(progress),
            episodes=episodes,
            collect_seconds=collect_seconds - label_seconds,
            label_seconds=label_seconds,
            fit_seconds=fit_seconds,
        )


@torch.inference_mode()
def compare(student: nn.Module, replay: Replay, first: int, temperature: float) -> tuple[float, float, float]:
    """Returns KL(teacher || student), action agreement and teacher entropy, means over the states from `first` on."""
    sums = torch.zeros(3, device=replay.frames.device)
    rows = torch.arange(first, len(replay))
    rows = rows[~torch.isin(rows, replay.history)].to(replay.frames.device)
    for rows_B in rows.split(1024):
        student_BA, teacher_BA = student(replay.gather(rows_B)), replay.scores_NA[rows_B]
        log_p_BA = log_policy(teacher_BA, temperature)
        agree_B = student_BA.argmax(dim=-1) == teacher_BA.argmax(dim=-1)
        entropy_B = -(log_p_BA.exp() * log_p_BA).sum(dim=-1)
        sums += torch.stack([kl_divergence_B(log_p_BA, log_policy(student_BA)), agree_B.float(), entropy_B]).sum(dim=1)
    kl, agreement, entropy = (sums / len(rows)).tolist()
    return kl, agreement, entropy
