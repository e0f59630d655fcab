"""The distillation loop, top to bottom.

A round fits the student to all states so far while the next round's are visited by the student as it stood before the
fit: emulators, teacher and student work at the same time, and one after the other gives the same bits.

Suffixes name dimensions: B environments or a batch, A actions.
"""

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from policykd.agents.interrupts import check_interrupted
from policykd.agents.policy import Policy
from policykd.agents.student import Student
from policykd.cuda_graph import CapturedUpdate
from policykd.envs.vector import Episode
from policykd.learner import Learner, Visit, check_states
from policykd.losses import Loss, kl_divergence_B, log_policy
from policykd.replay import Replay
from policykd.schedules import Schedule
from policykd.states import StateSource

MAX_NONFINITE = 10
"""how many states or updates of one round may have numbers that are not finite before the run ends"""


@dataclass(frozen=True)
class Round:
    """What one round measured."""

    index: int
    num_states: int
    """labelled so far and fitted to; the next round's are visited already"""
    num_updates: int
    """gradient steps so far"""
    loss: float
    """mean over the round's updates, those that were skipped too"""
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
    """the chance of a step on the way to this round's states to be the student's"""
    num_nonfinite_states: int
    """of this round's, left out because the teacher's scores were not finite"""
    num_nonfinite_updates: int
    """skipped because loss or gradient were not finite: the weights never saw them"""
    episodes: list[Episode]
    """games that ended while this round's states were visited, whoever played them"""
    collect_seconds: float
    label_seconds: float
    """inside the collection: the teacher's forward passes, which also choose its actions"""
    fit_seconds: float
    """with measuring the student on the new states; the next round's collection goes on meanwhile"""
    seconds: float
    """of the whole round, wall"""


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
    threads: int = 1,
    overlap: bool = True,
    bf16: bool = False,
    cuda_graph: bool = False,
) -> Iterator[Round]:
    """Fits the learner's student to a teacher in place, yielding what each round measured; stop by asking for no more.

    Visiting a state takes one forward pass of the teacher, which labels it and acts. It goes on from `learner.round`,
    so that a restored learner continues its run.

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
        threads: of the CPU, that share each batch; bits depend on it. Torch's own threads are best left at one.
        overlap: visit and fit at the same time; the bits are the same without. It pays where the environments step in
            processes of their own.
        bf16: let convolutions run in bfloat16 (autocast); scores, loss and weights stay float32.
        cuda_graph: capture a whole update once and replay it; for CUDA.

    Raises:
        FloatingPointError: more than `MAX_NONFINITE` states or updates of a round were not finite.
        KeyboardInterrupt: a signal came, see `check_interrupted`; the learner is then between two rounds no more.
    """
    student, replay, optimizer = learner.student, learner.replay, learner.optimizer
    device = replay.frames.device
    weights = [p for p in student.parameters() if p.requires_grad]
    sums = torch.zeros(5, device=device)
    check_states(learner, states_per_round)

    def gradients(rows_B: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Returns one thread's share of the gradient of a batch's mean loss, and of what is measured on it."""
        teacher_BA = replay.scores_NA.index_select(0, rows_B)
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            student_BA = student(replay.gather(rows_B)).float()
        share_of_loss = loss(student_BA, teacher_BA).sum() / batch_size
        grads = torch.autograd.grad(share_of_loss, weights, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            kl_B = kl_divergence_B(log_policy(teacher_BA, temperature), log_policy(student_BA))
            agree_B = teacher_BA.argmax(dim=-1) == student_BA.argmax(dim=-1)
            return grads, torch.stack([share_of_loss, kl_B.sum() / batch_size, agree_B.sum() / batch_size])

    def update(rows_B: Tensor) -> None:
        """Takes one gradient step, unless it is not finite; nothing here waits for the device."""
        parts = list(pool.map(gradients, rows_B.chunk(num_parts))) if num_parts > 1 else [gradients(rows_B)]
        for weight, *grads in zip(weights, *(g for g, _ in parts), strict=True):
            weight.grad = sum(grads[1:], start=grads[0])
        measured = sum((m for _, m in parts[1:]), start=parts[0][1])
        norm = nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        skipped = (~(norm.isfinite() & measured[0].isfinite())).float()
        optimizer.found_inf = skipped  # type: ignore[attr-defined]  # fused Adam then leaves weights and moments alone
        optimizer.step()
        sums.add_(torch.cat([measured, norm[None], skipped[None]]))

    num_parts = max(1, min(threads, batch_size // 32)) if device.type == "cpu" else 1
    step = CapturedUpdate(update) if cuda_graph else update
    with ThreadPoolExecutor(num_parts + 1) as pool:
        if learner.visit is None and learner.round == 0:
            learner.visit = visit(teacher, learner, student, states, 0.0, states_per_round, temperature)
            if isinstance(student, Student):
                student.centre_on(replay.frames[1 : 1 + len(replay)][:: max(1, len(replay) // 256)])
        while learner.round < rounds:
            began = time.perf_counter()
            visited, num_states, end = learner.visit, replay.num_states, len(replay) - replay.num_held_out
            assert visited is not None
            check_scores(learner.round, visited)

            # 1. Measure the student on this round's states, which it has not been fitted to.
            student.eval()
            new_kl, new_agreement, teacher_entropy = compare(student, replay, visited.first, len(replay), temperature)

            # 2. Visit the next round's states with the student as it stands, while it is fitted to those so far.
            acting = copy.deepcopy(student)
            progress = learner.round / max(1, rounds - 2)
            num_steps = states_per_round if learner.round + 1 < rounds else 0
            visiting = (pool.submit if overlap else done)(
                visit, teacher, learner, acting, states, progress, num_steps, temperature
            )
            student.train()
            sums.zero_()
            began_fit, rate = time.perf_counter(), 0.0
            for u, rows_B in enumerate(replay.batches(updates_per_round, batch_size, end, learner.batch_generator)):
                check_interrupted()
                rate = learning_rate((learner.round + (u + 1) / updates_per_round) / rounds)
                for group in optimizer.param_groups:
                    group["lr"].fill_(rate)
                step(rows_B)
            mean_loss, kl, agreement, grad_norm, skipped = (sums / updates_per_round).tolist()
            fit_seconds = time.perf_counter() - began_fit
            learner.visit = visiting.result()

            # 3. Report.
            num_skipped = round(skipped * updates_per_round)
            check_updates(learner.round, num_skipped, updates_per_round, mean_loss, grad_norm)
            learner.round += 1
            learner.num_updates += updates_per_round
            yield Round(
                index=learner.round - 1,
                num_states=num_states,
                num_updates=learner.num_updates,
                loss=mean_loss,
                kl=kl,
                action_agreement=agreement,
                new_kl=new_kl,
                new_action_agreement=new_agreement,
                teacher_entropy=teacher_entropy,
                grad_norm=grad_norm,
                learning_rate=rate,
                student_fraction=visited.student_fraction,
                num_nonfinite_states=visited.num_nonfinite,
                num_nonfinite_updates=num_skipped,
                episodes=visited.episodes,
                collect_seconds=visited.collect_seconds,
                label_seconds=visited.label_seconds,
                fit_seconds=fit_seconds,
                seconds=time.perf_counter() - began,
            )


@torch.inference_mode()
def visit(
    teacher: Policy,
    learner: Learner,
    acting: nn.Module,
    states: StateSource,
    progress: float,
    num_states: int,
    temperature: float,
) -> Visit:
    """Appends states to the learner's replay, each with the teacher's raw scores; one forward pass labels and acts."""
    replay, device = learner.replay, learner.replay.frames.device
    first, num_nonfinite = len(replay) - replay.num_held_out, 0
    began, label_seconds, episodes = time.perf_counter(), 0.0, list[Episode]()
    acting.eval()
    for _ in range(num_states // learner.envs.num_envs):
        check_interrupted()
        obs = learner.obs.to(device)
        asked = time.perf_counter()
        raw_BA = teacher(obs)
        teacher_BA = raw_BA.cpu()
        finite_B = teacher_BA.isfinite().all(dim=1)
        replay.add(obs, learner.starts_B, raw_BA, finite_B)
        num_nonfinite += len(finite_B) - int(finite_B.sum())
        teacher_BA = teacher_BA.where(finite_B[:, None], 0.0) / temperature
        label_seconds += time.perf_counter() - asked
        step = learner.envs.step(states(obs, teacher_BA, acting, progress, learner.action_generator))
        learner.obs, learner.starts_B = step.obs, step.starts_B
        episodes += step.episodes
    return Visit(
        first=first,
        student_fraction=states.student_fraction(progress),
        episodes=episodes,
        num_nonfinite=num_nonfinite,
        collect_seconds=time.perf_counter() - began - label_seconds,
        label_seconds=label_seconds,
    )


@torch.inference_mode()
def compare(student: nn.Module, replay: Replay, first: int, end: int, temperature: float) -> tuple[float, float, float]:
    """Returns KL(teacher || student), action agreement and teacher entropy, means over the states from `first` on."""
    sums = torch.zeros(3, device=replay.frames.device)
    rows = torch.arange(first, end)
    rows = rows[~torch.isin(rows, replay.history)].to(replay.frames.device)
    for rows_B in rows.split(1024):
        check_interrupted()
        student_BA, teacher_BA = student(replay.gather(rows_B)), replay.scores_NA[rows_B]
        log_p_BA = log_policy(teacher_BA, temperature)
        agree_B = student_BA.argmax(dim=-1) == teacher_BA.argmax(dim=-1)
        entropy_B = -(log_p_BA.exp() * log_p_BA).sum(dim=-1)
        sums += torch.stack([kl_divergence_B(log_p_BA, log_policy(student_BA)), agree_B.float(), entropy_B]).sum(dim=1)
    kl, agreement, entropy = (sums / len(rows)).tolist()
    return kl, agreement, entropy


def check_scores(index: int, visited: Visit) -> None:
    """Raises FloatingPointError for too many states that the teacher cannot score."""
    if visited.num_nonfinite > MAX_NONFINITE:
        raise FloatingPointError(
            f"round {index}: the teacher's scores of {visited.num_nonfinite} states are not finite; give another one"
        )


def check_updates(index: int, num_skipped: int, num_updates: int, loss: float, grad_norm: float) -> None:
    """Raises FloatingPointError for too many updates that were skipped, or a round of nothing else."""
    if num_skipped > MAX_NONFINITE or 0 < num_skipped == num_updates:
        raise FloatingPointError(
            f"round {index}: {num_skipped} updates with loss {loss} or gradient norm {grad_norm} that are not finite;"
            " lower the learning rate"
        )


def done(work: Callable[..., Visit], *args: object) -> Future[Visit]:
    """Does the work at once, where an executor's `submit` would do it beside."""
    future = Future[Visit]()
    future.set_result(work(*args))
    return future
