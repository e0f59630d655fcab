"""Collection of states: environments, teacher and student, in a background thread while the student is trained.

While the student is trained on round k's states, a copy of it from before that training collects round k + 1's. So
emulators, teacher and training run at the same time, and the results are bit for bit those of running one after the
other. Nothing here knows of losses. Shape suffixes: B environments, A actions.
"""

import copy
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import nn

from policykd.agents.policy import Policy, check_outputs, device_of
from policykd.envs.vector import Episode
from policykd.schedules import Progress, schedule_values
from policykd.states import DatasetStates, student_acts_alone
from policykd.train_state import NUM_RETURN_EPISODES, Rollout, TrainState

if TYPE_CHECKING:
    from policykd.loop import DistillConfig

MAX_NONFINITE_STATES = 10
"""states per round whose teacher outputs may be not finite (nan, inf) before the run ends"""


class Collector:
    """Collects states: `take` returns the current round's, `start` and `finish` collect the next round's."""

    def __init__(self, teacher: Policy, state: TrainState, config: "DistillConfig", temperature: float) -> None:
        self.teacher = teacher
        self.state = state
        self.config = config
        self.temperature = temperature
        self.num_states = 0 if isinstance(config.states, DatasetStates) else config.states_per_round
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="collector")
        self._stopped = threading.Event()
        self._next: Future[Rollout] | None = None

    def __enter__(self) -> "Collector":
        """Collects the first round's states, unless a checkpoint has brought them."""
        state = self.state
        num_rounds = self.config.rounds - state.round
        end = len(state.replay) - state.replay.num_held_out
        # Round 0, or the first round of a run that is lengthened: its last round collected nothing for a next one.
        has_states = state.rollout is not None and (not self.num_states or state.rollout.first < end)
        state.replay.reserve(len(state.replay) + self.num_states * (num_rounds - has_states))
        if num_rounds > 0 and not has_states:
            fraction = min(1.0, max(0, state.round - 1) / max(1, self.config.rounds - 2))
            state.rollout = self._collect(state.student, self.num_states, state.progress(fraction))
            if state.round == 0:
                state.fit_input_normalization()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stops the background thread; states of an unfinished collection are not used."""
        # The thread looks at this event once per step, so it ends within milliseconds.
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def take(self) -> Rollout:
        """Returns the states of the current round.

        Raises:
            FloatingPointError: the teacher's outputs were not finite in more than `MAX_NONFINITE_STATES` of them.
        """
        rollout = self.state.rollout
        assert rollout is not None
        if rollout.num_nonfinite > MAX_NONFINITE_STATES:
            raise FloatingPointError(
                f"round {self.state.round}: the teacher's outputs for {rollout.num_nonfinite} states are not finite;"
                " use another teacher"
            )
        self.state.student_returns = [*self.state.student_returns, *rollout.student_returns][-NUM_RETURN_EPISODES:]
        return rollout

    def start(self) -> None:
        """Starts collecting the next round's states with a copy of the student; none after the last round."""
        # The student is changed by training meanwhile, so a copy acts.
        index = self.state.round
        rounds = self.config.rounds
        acting = copy.deepcopy(self.state.student)
        num_states = self.num_states if index + 1 < rounds else 0
        # The student that acts is one training behind, so its share of the steps is too.
        progress = self.state.progress(min(1.0, index / max(1, rounds - 2)))
        if self.config.overlap:
            self._next = self._pool.submit(self._collect, acting, num_states, progress)
        else:
            self._next = Future()
            self._next.set_result(self._collect(acting, num_states, progress))

    def finish(self) -> None:
        """Waits until the next round's states are collected."""
        assert self._next is not None
        self.state.rollout = self._next.result()

    @torch.inference_mode()
    def _collect(self, acting: nn.Module, num_states: int, progress: Progress) -> Rollout:
        """Appends states to the replay buffer, labelled; one forward pass of the teacher labels and acts."""
        state = self.state
        replay = state.replay
        states = self.config.states
        alone = student_acts_alone(states, progress)
        teacher_device = device_of(self.teacher, default=replay.device)
        first = len(replay) - replay.num_held_out
        num_nonfinite = 0
        label_seconds = 0.0
        episodes: list[Episode] = []
        own_returns: list[float] = []
        began = time.perf_counter()
        take_metrics = getattr(self.teacher, "take_metrics", dict)
        take_metrics()  # discard what the teacher measured before this collection
        acting.eval()
        for _ in range(num_states // state.envs.num_envs):
            if self._stopped.is_set():
                break
            # 1. Label: raw outputs go into the buffer; rows that are not finite only serve as context.
            # Teacher and student get copies, since they may write into their input.
            obs = state.obs.to(replay.device)
            asked = time.perf_counter()
            raw_BA = self.teacher(obs.to(teacher_device, copy=True))
            raw_BA = check_outputs(raw_BA, len(obs), state.envs.num_actions, "the teacher").to(replay.device)
            teacher_BA = raw_BA.cpu()
            finite_B = teacher_BA.isfinite().all(dim=1)
            replay.add(obs, state.episode_starts_B, raw_BA, finite_B)
            num_nonfinite += len(finite_B) - int(finite_B.sum())
            teacher_BA = teacher_BA.where(finite_B[:, None], 0.0) / self.temperature
            label_seconds += time.perf_counter() - asked

            # 2. Act: the state source chooses between teacher and student.
            step = state.envs.step(states(obs.clone(), teacher_BA, acting, progress, state.action_generator))
            state.obs = step.obs
            state.episode_starts_B = step.starts_B
            episodes += step.episodes
            own_returns += self._own_returns(step.episodes, alone=alone)
        # 3. Report; what the teacher measured itself is reset for the next round.
        return Rollout(
            first=first,
            student_fraction=states.student_fraction(progress),
            episodes=episodes,
            num_nonfinite=num_nonfinite,
            collect_seconds=time.perf_counter() - began - label_seconds,
            label_seconds=label_seconds,
            metrics=take_metrics(),
            student_returns=tuple(own_returns),
            schedules=schedule_values(states, progress, "states."),
        )

    def _own_returns(self, episodes: Sequence[Episode], *, alone: bool) -> list[float]:
        """Returns the returns of those episodes that were the student's own from their first step."""
        self.state.num_student_steps = self.state.num_student_steps + 1 if alone else 0
        return [e.episodic_return for e in episodes if e.length <= self.state.num_student_steps]
