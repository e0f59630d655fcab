"""QDagger on SB3's DQN: Q-learning with a teacher that is weaned away (Agarwal et al., 2022).

Suffixes name dimensions: B batch, A actions.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples, TrainFreq
from stable_baselines3.common.utils import obs_as_tensor, polyak_update
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from policykd.agents.policy import sample
from policykd.io.signals import check_interrupted
from policykd.legacy.losses import kl_divergence_B, log_policy
from policykd.legacy.schedules import Quantity
from policykd.rl.teacher_mixin import Taught, descend

LOGGED_EVERY = 1000
"""updates, before the student plays itself"""
SAID_EVERY = 10_000
"""steps of the teacher's"""


class QDagger(Taught, DQN):
    """DQN's loss + weight mean KL(softmax(Q_T / tau) || softmax(Q_S / tau)), on the student's own games.

    `learn_offline`, before `learn`, does the same on games of the teacher's. The weight of the paper is
    `ReturnGap(3.0)`: it falls as the student's return comes near the teacher's.
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        *,
        teacher_temperature: float = 0.1,
        student_temperature: float | None = None,
        distillation_weight: Quantity = 3.0,
        weaned_after: float = 0.6,
        **kwargs: Any,
    ) -> None:
        """Takes SB3's arguments for DQN, those of `Taught`, and these.

        Args:
            policy: SB3's.
            env: SB3's.
            teacher_temperature: divides the teacher's scores; 1 for the logits of PPO and A2C.
            student_temperature: divides the student's Q-values; by default the same.
            distillation_weight: a number or a schedule.
            weaned_after: share of the run after which the weight is 0.
            **kwargs: SB3's, for DQN; `n_steps` for n-step returns.
        """
        self.weaned_after = weaned_after
        self.student_temperature = teacher_temperature if student_temperature is None else student_temperature
        if student_temperature is not None and not 0.0 < student_temperature < math.inf:
            raise ValueError(f"student_temperature must be positive, not {student_temperature}; 0.1 for Q-values")
        super().__init__(
            policy, env, teacher_temperature=teacher_temperature, distillation_weight=distillation_weight, **kwargs
        )

    def current_weight(self) -> float:
        """Returns what the distillation weighs now: 0 once the student is weaned."""
        return super().current_weight() if 1.0 - self._current_progress_remaining < self.weaned_after else 0.0

    def learn_offline(
        self,
        num_steps: int,
        num_updates: int,
        *,
        epsilon: float = 0.05,
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        """Lets the teacher play `num_steps` steps, then learns from them; the student's own replay stays empty.

        Curves are `offline/` ones over updates, counted up to 0, where `learn` goes on. Environments start anew, here
        and at the end: no game of the teacher's is the student's.

        Args:
            num_steps: over all environments.
            num_updates: gradient steps, with the weight of a student that has not played yet.
            epsilon: share of random actions (Rusu et al., 2015), without which Q-learning knows no other actions.
            say: takes a line now and then about how far it is, such as `print`.

        Raises:
            FloatingPointError: it has diverged.
        """
        self._setup_learn(num_steps, tb_log_name=f"{type(self).__name__}-offline")
        self._current_progress_remaining = 1.0
        weight = self.current_weight()
        buffer = self._teacher_games(num_steps, epsilon, say)
        assert isinstance(self.train_freq, TrainFreq)
        between = self.target_update_interval * max(self.gradient_steps, 1) // (self.train_freq.frequency * self.n_envs)
        curves = defaultdict[str, list[float]](list)
        self.policy.set_training_mode(True)
        for update in range(1, num_updates + 1):
            check_interrupted()
            self._update(buffer.sample(self.batch_size, env=self._vec_normalize_env), weight, curves)
            if update % max(between, 1) == 0 or update == num_updates:
                polyak_update(self.q_net.parameters(), self.q_net_target.parameters(), self.tau)
            if update % LOGGED_EVERY == 0 or update == num_updates:
                self.check_weights()
                kl = float(np.mean(curves["teacher_kl"]))
                say(f"{update:,} of {num_updates:,} updates on the teacher's games: KL {kl:.3f} nats")
                self._record("offline", weight, curves)
                self.logger.dump(update - num_updates)
                curves.clear()
        self._n_updates += num_updates
        self._start_anew()

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Takes gradient steps on the student's own games."""
        assert self.replay_buffer is not None
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        weight, curves = self.current_weight(), defaultdict[str, list[float]](list)
        for _ in range(gradient_steps):
            self._update(self.replay_buffer.sample(batch_size, env=self._vec_normalize_env), weight, curves)
        self.check_weights()
        self._n_updates += gradient_steps
        self._record("train", weight, curves)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _update(self, batch: ReplayBufferSamples, weight: float, curves: defaultdict[str, list[float]]) -> None:
        td_loss, teacher_kl = self._losses(batch)
        loss = td_loss + weight * teacher_kl
        for name, number in (("loss", loss), ("td_loss", td_loss), ("teacher_kl", teacher_kl)):
            curves[name].append(number.item())
        descend(self.policy, loss, self.max_grad_norm)

    def _losses(self, batch: ReplayBufferSamples) -> tuple[Tensor, Tensor]:
        """Returns the TD loss (Huber, over n steps) and the KL divergence, both means over the batch."""
        discount = self.gamma if batch.discounts is None else batch.discounts
        with torch.no_grad():
            best_B1 = self.q_net_target(batch.next_observations).amax(dim=1, keepdim=True)
            target_B1 = batch.rewards + (1 - batch.dones) * discount * best_B1
        q_BA = self.q_net(batch.observations)
        taken_B1 = q_BA.gather(1, batch.actions.long())
        teacher_log_BA = self.teacher_log_policy(batch.observations)
        kl_B = kl_divergence_B(teacher_log_BA, log_policy(q_BA, self.student_temperature))
        return smooth_l1_loss(taken_B1, target_B1), kl_B.mean()

    def _record(self, phase: str, weight: float, curves: defaultdict[str, list[float]]) -> None:
        for name, numbers in curves.items():
            self.logger.record(f"{phase}/{name}", float(np.mean(numbers)))
        self.logger.record(f"{phase}/distillation_weight", weight)

    def _start_anew(self) -> None:
        """Puts the first states of new games where `learn(reset_num_timesteps=False)` goes on."""
        assert self.env is not None
        self._last_obs = self.env.reset()  # type: ignore[assignment]
        self._last_episode_starts = np.ones(self.n_envs, dtype=bool)
        if self._vec_normalize_env is not None:
            self._last_original_obs = self._vec_normalize_env.get_original_obs()

    def _teacher_games(self, num_steps: int, epsilon: float, say: Callable[[str], object]) -> ReplayBuffer:
        """Returns a replay buffer of so many steps of the teacher's, drawn from its policy."""
        assert self.env is not None
        assert self.replay_buffer_class is not None
        how: dict[str, Any] = {"device": self.device, "n_envs": self.n_envs, **self.replay_buffer_kwargs}
        how |= {"observation_space": self.observation_space, "action_space": self.action_space}
        how["optimize_memory_usage"] = self.optimize_memory_usage
        buffer = self.replay_buffer_class(num_steps, **how)
        generator = torch.Generator().manual_seed(self.seed or 0)
        num_rounds = max(1, num_steps // self.n_envs)
        for i in range(num_rounds):
            check_interrupted()
            if i % max(1, SAID_EVERY // self.n_envs) == 0 and i:
                say(f"{i * self.n_envs:,} of {num_steps:,} steps of the teacher's")
            log_BA = self.teacher_log_policy(obs_as_tensor(self._last_obs, self.device)).cpu()  # type: ignore[arg-type]
            random_B = torch.randint(log_BA.shape[1], (self.n_envs,), generator=generator)
            is_random_B = torch.rand(self.n_envs, generator=generator) < epsilon
            actions = torch.where(is_random_B, random_B, sample(log_BA, generator)).numpy()
            new_obs, rewards, dones, infos = self.env.step(actions)
            self._store_transition(buffer, actions, new_obs, rewards, dones, infos)  # type: ignore[arg-type]
        return buffer
