"""The distillation loop, top to bottom.

A round fits the student to the states so far while the next round's are visited by the student as it stood before the
fit: emulators, teacher and student work at the same time, and one after the other gives the same bits. What follows a
schedule, but for the learning rate, changes from round to round.

Suffixes name dimensions: B environments or a batch, A actions.
"""

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from policykd.agents.ensemble import Ensemble
from policykd.agents.policy import Policy
from policykd.agents.student import Student
from policykd.envs.vector import Episode
from policykd.io.signals import check_interrupted
from policykd.legacy.auxiliary import Beyond, BeyondLogits
from policykd.legacy.cuda_graph import CapturedUpdate
from policykd.legacy.divergences import kl_divergence_B, log_policy
from policykd.legacy.losses import Loss
from policykd.legacy.rehearsal import rehearse
from policykd.legacy.schedules import Measured, Schedule, at, value, values
from policykd.legacy.states import StateSource
from policykd.legacy.train_state import Learner, Visit
from policykd.legacy.trainer import Round, check_scores, check_updates, compare

SCORES_ALONE = BeyondLogits()


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
    beyond: BeyondLogits = SCORES_ALONE,
    rounds_kept: int = 0,
    stored: float = 0.0,
    teacher_return: float | None = None,
    random_return: float = 0.0,
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
        beyond: weights of what else than the teacher's scores is learned, for a learner with such a part.
        rounds_kept: fit to the states of so many of the newest rounds: 1 is on-policy, 0 fits to all (aggregated).
        stored: share of each batch that is drawn from the states which the replay was given before the run.
        teacher_return: mean episodic return of the teacher, for schedules that follow the student's.
        random_return: of play at random, likewise.
        threads: of the CPU, that share each batch; bits depend on it. Torch's own threads are best left at one.
        overlap: visit and fit at the same time; the bits are the same without. It pays where the environments step in
            processes of their own.
        bf16: let convolutions run in bfloat16 (autocast); scores, loss and weights stay float32.
        cuda_graph: capture a whole update once and replay it; for CUDA.

    Raises:
        FloatingPointError: more than `MAX_NONFINITE` states or updates of a round were not finite.
        KeyboardInterrupt: a signal came, see `check_interrupted`; the learner is then between two rounds no more.
    """
    student, replay, optimizer, extra = learner.student, learner.replay, learner.optimizer, learner.beyond
    device = replay.frames.device
    weights, names, goal = learner.weights(), beyond.active, (teacher_return, random_return)
    sums = torch.zeros(5 + len(names), device=device)
    now, step = (loss, beyond), None
    rehearse(
        learner,
        loss=loss,
        beyond=beyond,
        states=states,
        rounds=rounds,
        states_per_round=states_per_round,
        batch_size=batch_size,
        rounds_kept=rounds_kept,
        stored=stored,
        teacher_return=teacher_return,
        random_return=random_return,
    )

    def gradients(rows_B: Tensor, shifts_B2: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Returns one thread's share of the gradient of a batch's mean loss, and of what is measured on it."""
        loss_now, beyond_now = now
        teacher_BA, obs = replay.scores_NA.index_select(0, rows_B), replay.gather(rows_B)
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            student_BA, terms_NB = forward(student, extra, obs, rows_B, shifts_B2, beyond_now)
        loss_B = loss_now(student_BA, teacher_BA)
        for name, term_B in zip(names, terms_NB, strict=True):
            loss_B = loss_B + getattr(beyond_now, name) * term_B
        share_of_loss = loss_B.sum() / batch_size
        grads = torch.autograd.grad(share_of_loss, weights, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            kl_B = kl_divergence_B(log_policy(teacher_BA, temperature), log_policy(student_BA))
            agree_B = teacher_BA.argmax(dim=-1) == student_BA.argmax(dim=-1)
            parts = torch.stack([kl_B, agree_B.float(), *terms_NB])
            return grads, torch.cat([share_of_loss[None], parts.sum(dim=1) / batch_size])

    def update(rows_B: Tensor, shifts_B2: Tensor) -> None:
        """Takes one gradient step, unless it is not finite; nothing here waits for the device."""
        batch = rows_B, shifts_B2
        parts = [*pool.map(gradients, *(t.chunk(num_parts) for t in batch))] if num_parts > 1 else [gradients(*batch)]
        for weight, *grads in zip(weights, *(g for g, _ in parts), strict=True):
            weight.grad = sum(grads[1:], start=grads[0])
        measured = sum((m for _, m in parts[1:]), start=parts[0][1])
        norm = nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        skipped = (~(norm.isfinite() & measured[0].isfinite())).float()
        optimizer.found_inf = skipped  # type: ignore[attr-defined]  # fused Adam then leaves weights and moments alone
        optimizer.step()
        sums.add_(torch.cat([norm[None], skipped[None], measured]))

    num_parts = max(1, min(threads, batch_size // 32)) if device.type == "cpu" else 1
    learner.label_beyond()
    with ThreadPoolExecutor(num_parts + 1) as pool:
        if learner.visit is None and learner.round == 0:
            how = states, 0.0, learner.measured(*goal), states_per_round, temperature
            learner.visit = visit(teacher, learner, student, *how)
            learner.centre_student()
        while learner.round < rounds:
            began = time.perf_counter()
            visited, num_states, end = learner.visit, replay.num_states, len(replay) - replay.num_held_out
            assert visited is not None
            check_scores(learner.round, visited)
            learner.note_games(visited)
            measured, progress = learner.measured(*goal), learner.round / max(1, rounds - 1)
            now, before = at((loss, beyond), progress, measured), now
            if step is None or now != before:  # a graph holds the loss's numbers
                step = CapturedUpdate(update) if cuda_graph else update
            scheduled = values(loss, progress, measured, "loss.") | values(beyond, progress, measured, "beyond.")

            # 1. Measure the student on this round's states, which it has not been fitted to.
            student.eval()
            compared = compare(student, replay, visited.first, now[0], temperature)

            # 2. Visit the next round's states with the student as it stands, while it is fitted to those so far.
            acting = copy.deepcopy(student)
            num_steps = states_per_round if learner.round + 1 < rounds else 0
            how = states, min(1.0, learner.round / max(1, rounds - 2)), measured, num_steps, temperature
            visiting = (pool.submit if overlap else done)(visit, teacher, learner, acting, *how)
            student.train()
            sums.zero_()
            began_fit, rate = time.perf_counter(), 0.0
            newest = rounds_kept * states_per_round or end
            draws = learner.draws(updates_per_round, batch_size, max(0, end - newest), end, stored)
            for u, (rows_B, shifts_B2) in enumerate(draws):
                check_interrupted()
                rate = learning_rate((learner.round + (u + 1) / updates_per_round) / rounds)
                for group in optimizer.param_groups:
                    group["lr"].fill_(rate)
                step(rows_B, shifts_B2)
            grad_norm, skipped, mean_loss, kl, agreement, *terms = (sums / updates_per_round).tolist()
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
                new_kl=compared.kl,
                new_action_agreement=compared.action_agreement,
                teacher_entropy=compared.teacher_entropy,
                grad_norm=grad_norm,
                learning_rate=rate,
                student_fraction=visited.student_fraction,
                num_nonfinite_states=visited.num_nonfinite,
                num_nonfinite_updates=num_skipped,
                episodes=visited.episodes,
                student_return=measured.student_return,
                scheduled=scheduled | visited.scheduled,
                terms=dict(zip(names, terms, strict=True)),
                teacher_disagreement=visited.disagreement,
                teacher_weights=visited.teacher_weights,
                state_weight=compared.state_weight,
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
    measured: Measured,
    num_states: int,
    temperature: float,
) -> Visit:
    """Appends states to the learner's replay, each with the teacher's raw scores; one forward pass labels and acts."""
    replay, device = learner.replay, learner.replay.frames.device
    first, num_nonfinite = len(replay) - replay.num_held_out, 0
    began, label_seconds, episodes, own_returns = time.perf_counter(), 0.0, list[Episode](), list[float]()
    scheduled, states = values(states, progress, measured, "states."), at(states, progress, measured)
    fraction = states.student_fraction(progress)
    alone = fraction == 1.0 and not value(getattr(states, "epsilon", 0.0), progress)
    net = getattr(teacher, "net", teacher)
    ensemble = net if isinstance(net, Ensemble) else None
    if ensemble:
        ensemble.take_disagreement()  # of whatever it was asked before
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
        own_returns += learner.own_games(step.episodes, alone=alone)
    asked = time.perf_counter()
    learner.label_beyond()
    label_seconds += time.perf_counter() - asked
    shares = ensemble.take_disagreement() if ensemble else None
    return Visit(
        first=first,
        student_fraction=fraction,
        episodes=episodes,
        num_nonfinite=num_nonfinite,
        collect_seconds=time.perf_counter() - began - label_seconds,
        label_seconds=label_seconds,
        disagreement=shares.disagreement if shares else None,
        teacher_weights=shares.weights if shares else (),
        student_returns=tuple(own_returns),
        scheduled=scheduled,
    )


def forward(
    student: nn.Module, extra: Beyond | None, obs: Tensor, rows_B: Tensor, shifts_B2: Tensor, now: BeyondLogits
) -> tuple[Tensor, list[Tensor]]:
    """Returns the student's scores, float32, and what is learned beyond them, each `(batch,)`; 0 at weight 0."""
    if extra is None:
        return student(obs).float(), []
    assert isinstance(student, Student)
    student_BA, terms = extra.terms(obs, rows_B, shifts_B2, student, now)
    nothing_B = torch.zeros(len(obs), device=obs.device)
    return student_BA.float(), [terms.get(name, nothing_B) for name in extra.active]


def done(work: Callable[..., Visit], *args: object) -> Future[Visit]:
    """Does the work at once, where an executor's `submit` would do it beside."""
    future = Future[Visit]()
    future.set_result(work(*args))
    return future
