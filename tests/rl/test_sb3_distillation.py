"""Distillation inside SB3's algorithms: SB3's own bits without the teacher's weight, faster learning with it."""

import json
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor

from policykd.envs.sb3_vec_env import SB3VecEnv
from policykd.rl.qdagger import QDagger
from policykd.rl.sb3_distillation import (
    ExpectedEntropyRegularised,
    KickstartingPPO,
    NDistill,
    OnPolicyDistillation,
    ProximalPolicyDistillation,
    StudentDriven,
)
from policykd.schedules import Linear, ReturnGap
from tests.cart_pole import cart_poles, controller, mean_return
from tests.identity_env import IdentityEnv

CPU: dict[str, Any] = {"seed": 0, "device": "cpu"}
SMALL_PPO: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_epochs": 3, **CPU}
SMALL_DQN: dict[str, Any] = {"learning_starts": 50, "target_update_interval": 100, "buffer_size": 1000, **CPU}


@cache
def mean_return_alone(kind: Any, **settings: Any) -> float:
    return mean_return(kind("MlpPolicy", cart_poles(8), **settings, **CPU).learn(4096))


def are_equal(one: BaseAlgorithm, other: BaseAlgorithm) -> bool:
    return all(map(torch.equal, one.policy.parameters(), other.policy.parameters()))


WITHOUT_WEIGHT: list[tuple[Any, Any, dict[str, Any], dict[str, Any]]] = [
    (ProximalPolicyDistillation, PPO, {**SMALL_PPO, "ent_coef": 0.01}, {}),
    (ProximalPolicyDistillation, PPO, {**SMALL_PPO, "target_kl": 0.002, "clip_range_vf": 0.1}, {}),
    (KickstartingPPO, PPO, {**SMALL_PPO, "normalize_advantage": False}, {}),
    (QDagger, DQN, SMALL_DQN, {}),
    (QDagger, DQN, {**SMALL_DQN, "n_steps": 3}, {}),
    (StudentDriven, A2C, {**CPU, "ent_coef": 0.01}, {"method": NDistill(reward_weight=1.0)}),
    (StudentDriven, A2C, {**CPU, "normalize_advantage": True}, {"method": OnPolicyDistillation(reward_weight=1.0)}),
]


@pytest.mark.parametrize(("ours", "sb3s", "settings", "more"), WITHOUT_WEIGHT)
def test_without_weight_the_parameters_are_sb3s_own_bit_for_bit(
    ours: Any, sb3s: Any, settings: dict[str, Any], more: dict[str, Any]
) -> None:
    plain = sb3s("MlpPolicy", "CartPole-v1", **settings).learn(256, log_interval=1000)

    def trained(weight: float) -> Any:
        how = {"teacher": controller, "distillation_weight": weight, **more, **settings}
        return ours("MlpPolicy", "CartPole-v1", **how).learn(256, log_interval=1000)

    without = trained(0.0)
    assert are_equal(plain, without)
    assert are_equal(plain, trained(1e-30))  # the term is computed, and too small for a float32
    assert not are_equal(plain, trained(1.0))
    sb3s_curves = {k: v for k, v in plain.logger.name_to_value.items() if k.startswith("train/")}
    assert len(sb3s_curves) > 1
    assert {name: without.logger.name_to_value[name] for name in sb3s_curves} == pytest.approx(sb3s_curves)


def test_the_teachers_labels_belong_to_their_states() -> None:
    model = ProximalPolicyDistillation("MlpPolicy", cart_poles(3), teacher=controller, **SMALL_PPO).learn(3 * 64)
    for batch in model.rollout_buffer.get(50):
        labels = model.rollout_buffer.teacher_log_BA
        torch.testing.assert_close(labels, controller(batch.observations).log_softmax(dim=1))


def gradients_of(model: BaseAlgorithm) -> Tensor:
    grads = [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in model.policy.parameters()]
    return torch.cat([grad.flatten() for grad in grads])


ONE_BATCH: dict[str, Any] = {"n_steps": 64, "batch_size": 64, "n_epochs": 1, "learning_rate": 0.0, **CPU}
TERMS: list[tuple[Any, dict[str, Any]]] = [
    (ProximalPolicyDistillation, ONE_BATCH),
    (KickstartingPPO, {**ONE_BATCH, "clip_range_vf": 0.1}),
    (QDagger, {**SMALL_DQN, "learning_rate": 0.0, "student_temperature": 0.2, "teacher_temperature": 0.5}),
]


@pytest.mark.parametrize(("algorithm", "settings"), TERMS)
def test_the_gradient_of_an_update_is_sb3s_and_the_terms(algorithm: Any, settings: dict[str, Any]) -> None:
    """The term is a mean over the minibatch, at both temperatures; nothing of the student in it is held fixed."""
    how = {"teacher": controller, "max_grad_norm": 1e9, "distillation_weight": 2.0, **settings}
    model = algorithm("MlpPolicy", cart_poles(1), **how).learn(64)
    is_ppo = algorithm is not QDagger
    if is_ppo:  # as after some epochs
        model.rollout_buffer.log_probs += np.linspace(-0.5, 0.5, 64, dtype=np.float32)[:, None]

    def gradient(weight: float) -> Tensor:
        np.random.seed(0)  # minibatches
        model._train_with_teacher(weight, *([] if is_ppo else [1, 64]))
        return gradients_of(model)

    found = (gradient(2.0) - gradient(0.0)) / 2.0
    np.random.seed(0)
    Categorical = torch.distributions.Categorical
    if is_ppo:
        (batch,) = model.rollout_buffer.get(64)
        student = model.policy.get_distribution(batch.observations).distribution
        teacher = Categorical(logits=controller(batch.observations))
    else:
        batch = model.replay_buffer.sample(64)
        student = Categorical(logits=model.q_net(batch.observations) / 0.2)
        teacher = Categorical(logits=controller(batch.observations) / 0.5)
    term_B = torch.distributions.kl_divergence(teacher, student)
    if algorithm is ProximalPolicyDistillation:
        ratio_B = (student.log_prob(batch.actions.flatten()) - batch.old_log_prob).exp()
        assert 8 < (ratio_B < 0.8).sum() < 56
        term_B = term_B * ratio_B.clamp(min=0.8)  # clipped from below only
    model.policy.zero_grad()
    term_B.mean().backward()
    torch.testing.assert_close(found, gradients_of(model), rtol=1e-3, atol=1e-5)
    curves = model.logger.name_to_value
    assert curves["train/teacher_kl"] == pytest.approx(
        torch.distributions.kl_divergence(teacher, student).mean().item()
    )


PPO_8: dict[str, Any] = {"n_steps": 128, "batch_size": 128, "learning_rate": 1e-3}
FASTER: list[tuple[Any, Any, dict[str, Any], dict[str, Any]]] = [
    (ProximalPolicyDistillation, PPO, PPO_8, {}),
    (KickstartingPPO, PPO, PPO_8, {"distillation_weight": 1.0}),
    (StudentDriven, A2C, {"n_steps": 8}, {"method": OnPolicyDistillation()}),
    (StudentDriven, A2C, {"n_steps": 8}, {"method": NDistill(reward_weight=1.0)}),
    (StudentDriven, A2C, {"n_steps": 8}, {"method": ExpectedEntropyRegularised()}),
]


@pytest.mark.parametrize(("algorithm", "sb3s", "settings", "more"), FASTER)
def test_a_teacher_makes_learning_faster(
    algorithm: Any, sb3s: Any, settings: dict[str, Any], more: dict[str, Any]
) -> None:
    model = algorithm("MlpPolicy", cart_poles(8), teacher=controller, **settings, **more, **CPU)
    assert mean_return(model) < 40
    assert mean_return(model.learn(4096)) > max(140, 2 * mean_return_alone(sb3s, **settings))


@pytest.mark.parametrize("algorithm", [ProximalPolicyDistillation, KickstartingPPO])
def test_a_student_ends_above_a_weak_teacher(algorithm: Any) -> None:
    num_actions = 4

    def weak(obs_BO: Tensor) -> Tensor:
        """Is right in two of four states, and wrong in the others."""
        wrong_BA = obs_BO.roll(1, dims=1)
        return 3 * torch.where(obs_BO[:, :2].any(dim=1, keepdim=True), obs_BO, wrong_BA)

    states = torch.eye(num_actions)
    played: dict[int, list[int]] = {}

    class Watch(BaseCallback):
        def _on_rollout_start(self) -> None:
            played[self.num_timesteps] = self.model.predict(states.numpy(), deterministic=True)[0].tolist()

        def _on_step(self) -> bool:
            return True

    envs = SB3VecEnv(IdentityEnv(16, num_actions), clip_rewards=False)
    settings = {**SMALL_PPO, "n_steps": 32, "batch_size": 128, "learning_rate": 3e-3}
    model = algorithm("MlpPolicy", envs, teacher=weak, distillation_weight=Linear(1.0, 0.0), **settings)
    model.learn(6144, Watch())
    assert played[1024] == weak(states).argmax(dim=1).tolist() == [0, 1, 3, 0]  # first it imitates the teacher
    assert played[5632] == [0, 1, 2, 3]


def test_an_episode_that_a_time_limit_cut_keeps_its_value_whatever_rewards_weigh() -> None:
    envs = DummyVecEnv([lambda: gym.make("CartPole-v1", max_episode_steps=4)])
    how: dict[str, Any] = {"method": OnPolicyDistillation(), "n_steps": 4, "learning_rate": 0.0, **CPU}
    model = StudentDriven("MlpPolicy", envs, teacher=controller, **how).learn(4)
    assert model.rollout_buffer.rewards[:3].tolist() == [[0.0]] * 3
    assert model.rollout_buffer.rewards[3, 0] != 0.0


ARCHIVED: list[tuple[Any, Any, dict[str, Any]]] = [
    (ProximalPolicyDistillation, PPO, SMALL_PPO),
    (StudentDriven, A2C, CPU),
    (QDagger, DQN, SMALL_DQN),
]


@pytest.mark.parametrize(("algorithm", "sb3s", "settings"), ARCHIVED)
def test_an_archive_has_no_teacher_and_opens_with_sb3s_own_class(
    algorithm: Any, sb3s: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = algorithm("MlpPolicy", cart_poles(1), teacher=controller, **settings).learn(130)
    model.save(tmp_path / "student.zip")
    with zipfile.ZipFile(tmp_path / "student.zip") as archive:
        assert not {"teacher", "rollout_buffer_class"} & json.loads(archive.read("data")).keys()
    assert are_equal(sb3s.load(tmp_path / "student.zip", device="cpu"), model)

    again = algorithm.load(tmp_path / "student.zip", cart_poles(1), teacher=controller, device="cpu")
    assert are_equal(again, model)
    assert not are_equal(again.learn(130), model)

    lost = algorithm.load(tmp_path / "student.zip", cart_poles(1), device="cpu")
    lost.predict(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="loaded without its teacher"):
        lost.learn(130)


def test_the_weight_follows_progress_and_returns_and_is_a_curve() -> None:
    how: dict[str, Any] = {"teacher": controller, "reference_returns": (0.0, 100.0)}
    model = KickstartingPPO("MlpPolicy", cart_poles(1), **how, **SMALL_PPO)
    model.learn(128, log_interval=100)
    assert model.logger.name_to_value["train/distillation_weight"] == 0.0  # the end of the default schedule
    assert model.logger.name_to_value["train/teacher_kl"] > 0.0

    gap = QDagger("MlpPolicy", cart_poles(1), distillation_weight=ReturnGap(3.0), **how, **SMALL_DQN)
    assert gap.current_weight() == 3.0
    gap.learn(0)
    gap.ep_info_buffer.extend([{"r": 20.0}, {"r": 30.0}])  # type: ignore[union-attr]
    gap._current_progress_remaining = 0.5
    assert gap.current_weight() == pytest.approx(2.25)
    gap._current_progress_remaining = 0.4
    assert gap.current_weight() == 0.0  # after distillation_end_fraction
