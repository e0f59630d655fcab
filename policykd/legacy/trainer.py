"""What a round of distillation measured, and when its numbers end a run.

Suffixes name dimensions: B a batch, A actions.
"""

from dataclasses import dataclass

import torch
from torch import nn

from policykd.envs.vector import Episode
from policykd.io.signals import check_interrupted
from policykd.legacy.divergences import entropy, kl_divergence_B, log_policy
from policykd.legacy.losses import Loss
from policykd.legacy.replay import Replay
from policykd.legacy.state_weights import Weighted
from policykd.legacy.train_state import Visit

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
    student_return: float | None
    """mean episodic return of the student's latest games of its own, on which schedules may depend"""
    scheduled: dict[str, float]
    """what every scheduled quantity but the learning rate was in this round, by name"""
    terms: dict[str, float]
    """what is learned beyond the scores, each mean over the updates before its weight"""
    teacher_disagreement: float | None
    """between the teachers of an ensemble on this round's states: generalised Jensen-Shannon divergence, nats"""
    teacher_weights: tuple[float, ...]
    """of the teachers of an ensemble, means over this round's states"""
    state_weight: float | None
    """mean weight of this round's states, where a loss weighs them"""
    collect_seconds: float
    label_seconds: float
    """inside the collection: the teacher's forward passes, which also choose its actions"""
    fit_seconds: float
    """with measuring the student on the new states; the next round's collection goes on meanwhile"""
    seconds: float
    """of the whole round, wall"""


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


@dataclass(frozen=True)
class Comparison:
    """How a student stands to its teacher on some states: means."""

    kl: float
    """KL(teacher || student), nats"""
    action_agreement: float
    teacher_entropy: float
    state_weight: float | None
    """of the loss, where it weighs states"""


@torch.inference_mode()
def compare(student: nn.Module, replay: Replay, first: int, loss: Loss, temperature: float) -> Comparison:
    """Returns how the student stands to the teacher at its temperature on the states from row `first` on."""
    weight = loss.weight if isinstance(loss, Weighted) else None
    sums = torch.zeros(4, device=replay.frames.device)
    rows = torch.arange(first, len(replay))
    rows = rows[~torch.isin(rows, replay.history)].to(replay.frames.device)
    for rows_B in rows.split(1024):
        check_interrupted()
        student_BA, teacher_BA = student(replay.gather(rows_B)), replay.scores_NA[rows_B]
        log_p_BA = log_policy(teacher_BA, temperature)
        kl_B = kl_divergence_B(log_p_BA, log_policy(student_BA))
        agree_B = student_BA.argmax(dim=-1) == teacher_BA.argmax(dim=-1)
        entropy_B = entropy(log_p_BA)
        weight_B = weight(student_BA, teacher_BA) if weight else torch.ones_like(kl_B)
        sums += torch.stack([kl_B, agree_B.float(), entropy_B, weight_B]).sum(dim=1)
    kl, agreement, teacher_entropy, mean_weight = (sums / len(rows)).tolist()
    return Comparison(kl, agreement, teacher_entropy, mean_weight if weight else None)
