"""QDagger on SB3's DQN: Q-learning with a teacher whose weight is annealed to zero (Agarwal et al., 2022).

Shape suffixes: B batch, A actions.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import TrainFreq
from stable_baselines3.common.utils import obs_as_tensor, polyak_update
from torch import Tensor, nn

from policykd.agents.policy import sample
from policykd.losses import check_temperature
from policykd.rl.teacher_mixin import TeacherMixin
from policykd.schedules import Schedule

LOG_INTERVAL = 1000
"""updates between two points of the offline curves"""
Q_VALUE_TEMPERATURE = 0.1
"""at which Q-values are compared; the 0.01 at which they are played (Rusu et al., 2015) gives hard labels"""
OFFLINE_CURVES = ("loss", "td_loss", "teacher_kl", "distillation_weight")


class QDagger(TeacherMixin, DQN):
    """DQN's loss + weight mean KL(softmax(Q_T / tau) || softmax(Q_S / tau)), on states that the student collects.

    `learn_offline`, to be called before `learn`, does the same on states that the teacher collects. The weight in the
    paper is `ReturnGap(3.0)`, which falls as the student's return approaches the teacher's.
    """

    default_weight: ClassVar[float | Schedule] = 3.0
    q_net: Any
    q_net_target: Any
    replay_buffer: Any

    def __init__(
        self,
        *args: Any,
        teacher_temperature: float | None = None,
        student_temperature: float | None = None,
        distillation_end_fraction: float = 0.6,
        **kwargs: Any,
    ) -> None:
        """Takes the arguments of SB3's DQN and of `TeacherMixin`, and these.

        Args:
            *args: SB3's `policy` and `env`.
            teacher_temperature: divides the teacher's outputs; None is 1 for a teacher whose own temperature is 1 (the
                logits of PPO and A2C), else 0.1.
            student_temperature: divides the student's Q-values; None is 0.1 with a teacher of logits, else the
                teacher's.
            distillation_end_fraction: fraction of the run after which the weight is 0.
            **kwargs: SB3's other arguments; `n_steps` for n-step returns.
        """
        # Logits are played at 1, so they are compared at 1; Q-values are compared more softly than they are played.
        has_logits = getattr(kwargs.get("teacher"), "temperature", None) == 1.0
        if student_temperature is None:
            student_temperature = Q_VALUE_TEMPERATURE if has_logits else teacher_temperature or Q_VALUE_TEMPERATURE
        if teacher_temperature is None:
            teacher_temperature = 1.0 if has_logits else Q_VALUE_TEMPERATURE
        check_temperature("student_temperature", student_temperature)
        self.student_temperature = student_temperature
        self.distillation_end_fraction = distillation_end_fraction
        super().__init__(*args, teacher_temperature=teacher_temperature, **kwargs)

    def current_weight(self) -> float:
        """Returns the distillation weight now, 0 after `distillation_end_fraction` of the run."""
        progress = 1.0 - self._current_progress_remaining
        return super().current_weight() if progress < self.distillation_end_fraction else 0.0

    def learn_offline(self, num_steps: int, num_updates: int) -> None:
        """Trains on states that the teacher collects; continue with `learn(..., reset_num_timesteps=False)`.

        Curves are named `offline/` over updates counted up to 0, where `learn` starts. At the end the replay buffer is
        emptied and all environments are reset.

        Args:
            num_steps: agent steps of the teacher over all environments; the replay buffer keeps the last of them.
            num_updates: gradient steps, with the weight of a student that has not played yet.

        Raises:
            FloatingPointError: training has diverged.
        """
        # As at the start of `learn`, so that schedules and the weight have their first values.
        self._setup_learn(num_steps, tb_log_name=f"{type(self).__name__}-offline")
        self._current_progress_remaining = 1.0
        print(f"collecting {num_steps:,} steps of the teacher", flush=True)
        # Without random actions (Rusu et al., 2015) the Q-values of other actions would never be trained.
        collect_with_teacher(self, self.teacher_log_policy, num_steps, epsilon=0.05)

        # The target network follows as often per gradient step as it will in `learn`.
        assert isinstance(self.train_freq, TrainFreq)
        steps_per_train = self.train_freq.frequency * self.n_envs
        target_interval = max(self.target_update_interval * max(self.gradient_steps, 1) // steps_per_train, 1)
        # `train` names its curves train/: here they are renamed, and become means over LOG_INTERVAL updates.
        curves = self.logger
        scratch = Logger(None, [])
        for update in range(1, num_updates + 1):
            self._logger = scratch
            try:
                self.train(1, self.batch_size)
            finally:
                self._logger = curves
            for name in OFFLINE_CURVES:
                curves.record_mean(f"offline/{name}", scratch.name_to_value[f"train/{name}"])
            is_last = update == num_updates
            if update % target_interval == 0 or is_last:
                polyak_update(self.q_net.parameters(), self.q_net_target.parameters(), self.tau)
            if update % LOG_INTERVAL == 0 or is_last:
                kl = curves.name_to_value["offline/teacher_kl"]
                print(f"{update:,} of {num_updates:,} updates on the teacher's states: KL {kl:.3f} nats", flush=True)
                curves.dump(update - num_updates)

        # The student starts with an empty buffer and with episodes of its own.
        self.replay_buffer.reset()
        assert self.env is not None
        self._last_obs = self.env.reset()  # pyright: ignore[reportAttributeAccessIssue]  # frames
        self._last_episode_starts = np.ones(self.n_envs, dtype=bool)
        if self._vec_normalize_env is not None:
            self._last_original_obs = self._vec_normalize_env.get_original_obs()

    @property
    def output_layer(self) -> nn.Module:  # type: ignore[override]
        """Network that returns the Q-values."""
        network: nn.Module = self.q_net
        return network

    def teacher_labels(self, inputs: Tensor) -> Tensor:
        """Returns the teacher's log-policies of the observations, which are the network's inputs."""
        return self.teacher_log_policy(inputs)

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Takes gradient steps on states of the replay buffer."""
        weight = self.current_weight()
        terms = self._train_with_teacher(weight, gradient_steps, batch_size)
        # SB3's loss is the n-step TD loss (Huber).
        td_loss = self.logger.name_to_value["train/loss"]
        self.logger.record("train/td_loss", td_loss)
        self.logger.record("train/loss", td_loss + weight * float(np.mean(terms)))


@torch.no_grad()
def collect_with_teacher(
    model: OffPolicyAlgorithm, teacher_log_policy: Callable[[Any], Tensor], num_steps: int, *, epsilon: float = 0.0
) -> None:
    """Fills a model's replay buffer with a teacher's steps, after the model's `_setup_learn`.

    Actions are sampled, with the model's seed, from the log-policies `(batch, num_actions)` that `teacher_log_policy`
    returns for observations; a fraction `epsilon` of them is uniformly random. `num_steps` counts over all
    environments, and is rounded down to a multiple of their number.
    """
    generator = torch.Generator().manual_seed(model.seed or 0)
    env: Any = model.env
    buffer: Any = model.replay_buffer
    for _ in range(max(1, num_steps // model.n_envs)):
        obs: Any = model._last_obs
        # SB3's own collection loop, with the teacher's actions in place of the student's.
        log_BA = teacher_log_policy(obs_as_tensor(obs, model.device)).cpu()
        random_B = torch.randint(log_BA.shape[1], (model.n_envs,), generator=generator)
        is_random_B = torch.rand(model.n_envs, generator=generator) < epsilon
        actions = torch.where(is_random_B, random_B, sample(log_BA, generator)).numpy()
        new_obs, rewards, dones, infos = env.step(actions)
        model._store_transition(buffer, actions, new_obs, rewards, dones, infos)
