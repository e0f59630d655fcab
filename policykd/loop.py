"""Distils a teacher into a student: collect states, label them, train on them. Fork this file to change the algorithm.

Speed (threads, overlap, bfloat16, CUDA graphs) and safety (values that are not finite) are in `collector` and
`trainer`; neither knows which loss is minimised or who acts. Shape suffixes: B batch, A actions.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from policykd.agents.policy import as_policy, log_policy
from policykd.collector import Collector
from policykd.losses import Batch, LossFn, Metrics, check_temperature, kl_divergence_B, policy_metrics
from policykd.schedules import Quantity, WarmupStableDecay, check_bounds, follows_return, resolve, schedule_values
from policykd.states import MixedStates, StateSource
from policykd.train_state import Rollout, TrainState, make_train_state
from policykd.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Settings of the loop."""

    rounds: int = 16
    """rounds of collecting states and training on all collected so far"""
    states_per_round: int = 4000
    """states to collect and label per round: agent steps over all environments"""
    updates_per_round: int = 400
    """gradient steps per round"""
    batch_size: int = 128
    """states per gradient step"""
    learning_rate: Quantity = 4e-3
    """peak learning rate: 2 % warm-up, constant, linear decay to 0 over the last 30 %; or a schedule of your own"""
    optimizer: Literal["muon", "adam"] = "muon"
    """muon (Jordan et al., 2024), which needs fewer states and updates for the same KL, or adam"""
    states: StateSource = field(default_factory=MixedStates)
    """who acts while states are collected: by default teacher, then student (DAgger)"""
    replay_window_rounds: int = 0
    """newest rounds whose states are trained on: 1 is on-policy, 0 trains on all (aggregated)"""
    temperature: float | None = None
    """divides the teacher's outputs to give its policy; None takes the teacher's own (1 for PPO, 0.01 for Q-values)"""
    seed: int = 0
    """seed of action sampling and batches"""
    threads: int = 1
    """CPU threads per batch; the last bits of the weights depend on it"""
    overlap: bool = True
    """collect the next states while the student is trained; the result is bit for bit the same without"""
    bf16: bool = False
    """run convolutions in bfloat16 (autocast), for GPUs and CPUs that support it; weights and loss stay float32"""
    cuda_graph: bool = False
    """capture an update once per round and replay it, on a CUDA device"""

    def __post_init__(self) -> None:
        for name in ("rounds", "states_per_round", "updates_per_round", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        check_bounds("learning_rate", self.learning_rate, 0.0)
        if self.learning_rate == 0:
            raise ValueError("learning_rate must be positive, not 0: nothing would be learned")
        check_temperature("temperature", self.temperature)
        if self.optimizer not in ("adam", "muon"):
            raise ValueError(f"optimizer must be adam or muon, not {self.optimizer!r}")
        if follows_return(self.learning_rate):
            raise ValueError("learning_rate must not follow the student's return; use a schedule of the run's progress")
        if self.replay_window_rounds < 0:
            raise ValueError(f"replay_window_rounds must be at least 0, not {self.replay_window_rounds}")


@dataclass(frozen=True)
class Round:
    """Measurements of one round."""

    index: int
    num_states: int
    """states labelled and trained on so far"""
    num_updates: int
    """gradient steps so far"""
    train: dict[str, float]
    """means over the round's updates: loss, grad_norm, num_skipped, and the loss function's metrics such as kl"""
    new_states: dict[str, float]
    """the same metrics on states that the student has not been trained on: this round's, or those held out"""
    learning_rate: float
    """learning rate of the last update"""
    student_return: float | None
    """mean return of the student's latest episodes of its own, which schedules may follow"""
    schedules: dict[str, float]
    """values of all schedules but the learning rate's, by name"""
    collected: Rollout
    train_seconds: float
    """the next round's states are collected during this time"""
    seconds: float
    """wall-clock time of the whole round"""
    state: TrainState
    """the run's state after this round, to save or to change"""


def forward_kl(student: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
    """Returns KL(teacher || student) per state (Rusu et al., 2015), and the metrics to log. The function to change."""
    student_BA = student(batch.obs).float()
    kl_B = kl_divergence_B(log_policy(batch.teacher_BA, batch.temperature), log_policy(student_BA))
    return kl_B, policy_metrics(student_BA, batch)


def distill(
    teacher: object,
    student: nn.Module,
    envs: object,
    config: DistillConfig = DistillConfig(),  # frozen
    *,
    loss_fn: LossFn = forward_kl,
    state: TrainState | None = None,
) -> Iterator[Round]:
    """Returns an iterator that trains the student in place and yields after each round; `break` to stop early.

    Args:
        teacher: any callable from observations to logits or Q-values, with its `temperature` as an attribute (or 1); or
            an SB3 model.
        student: any module from observations to logits, on the device to train on.
        envs: a policykd, Gymnasium or SB3 vector environment, in which states are collected.
        config: settings.
        loss_fn: loss per state and metrics; see `policykd.losses`.
        state: a restored state of this student, to resume or lengthen a run, or one with stored states; it brings its
            own environments. By default it is made of `student` and `envs`.

    Raises:
        TypeError: a teacher that cannot be called, or environments that are not a vector environment.
        ValueError: settings, environments, networks or stored states that do not fit each other.
        FloatingPointError: too many teacher outputs or updates of a round are not finite.
    """
    # Everything that changes is in `state`; everything below reads the settings from `config`.
    state = state or make_train_state(student, envs, config, loss_fn=loss_fn)
    if state.student is not student:
        raise ValueError("state is that of another student; make it with make_train_state(student, ...)")
    policy = as_policy(teacher)
    temperature = config.temperature or float(getattr(policy, "temperature", 1.0))
    if follows_return(loss_fn, config.states):
        _ = state.progress(0.0).return_progress  # fails now rather than after hours if the teacher's return is unknown
    collector = Collector(policy, state, config, temperature)
    trainer = Trainer(state, loss_fn, config, temperature)
    # A generator of its own, so that all of the above is checked now and not at the first round.
    return _rounds(collector, trainer, state, config)


def _rounds(collector: Collector, trainer: Trainer, state: TrainState, config: DistillConfig) -> Iterator[Round]:
    """Yields the rounds of `distill`."""
    loss_fn = trainer.loss_fn
    prepare = getattr(loss_fn, "prepare", None)
    # A number is the peak of the default schedule.
    peak = config.learning_rate
    learning_rate = peak if callable(peak) else WarmupStableDecay(peak)

    with trainer, collector:
        while state.round < config.rounds:
            began = time.perf_counter()

            # 1. Take this round's states, collected and labelled. Measure the student on them: they are new to it.
            # `end` stays fixed while the collector appends behind it, so both may use the buffer at the same time.
            collected = collector.take()
            end = len(state.replay) - state.replay.num_held_out
            num_states = state.replay.num_states
            progress = state.progress(state.round / max(1, config.rounds - 1))
            if prepare:
                prepare(state.replay, len(state.replay))
            new_states = trainer.measure(collected.first, progress)

            # 2. Train on all states so far, while a copy of the student collects the next round's.
            collector.start()
            began_training = time.perf_counter()
            trainer.start_round(progress)
            rate = math.nan
            for u, (rows_B, random_B) in enumerate(state.draws(config, end)):
                run_fraction = (state.round + (u + 1) / config.updates_per_round) / config.rounds
                rate = resolve(learning_rate, run_fraction)
                trainer.step(rows_B, random_B, rate)
            train = trainer.finish_round()
            train_seconds = time.perf_counter() - began_training
            collector.finish()

            # 3. Report. A caller saves checkpoints, logs and evaluates between two rounds.
            state.round += 1
            state.num_updates += config.updates_per_round
            yield Round(
                index=state.round - 1,
                num_states=num_states,
                num_updates=state.num_updates,
                train=train,
                new_states=new_states,
                learning_rate=rate,
                student_return=progress.student_return,
                schedules=schedule_values(loss_fn, progress, "loss.") | collected.schedules,
                collected=collected,
                train_seconds=train_seconds,
                seconds=time.perf_counter() - began,
                state=state,
            )
