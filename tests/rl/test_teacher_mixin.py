"""What every algorithm with a teacher refuses, warns of and gives up at, before SB3 or torch report it their way."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor
from torch import Tensor, nn

from policykd.rl.qdagger import QDagger
from policykd.rl.sb3_distillation import KickstartingPPO, ProximalPolicyDistillation, StudentDriven
from policykd.rl.teacher_mixin import finite_steps
from policykd.schedules import Linear, Quantity, ReturnGap, ReturnReached

CPU: dict[str, Any] = {"seed": 0, "device": "cpu"}
SMALL: dict[Any, dict[str, Any]] = {
    ProximalPolicyDistillation: {"n_steps": 64, "batch_size": 32, "n_epochs": 2, **CPU},
    KickstartingPPO: {"n_steps": 64, "batch_size": 32, "n_epochs": 2, **CPU},
    StudentDriven: {**CPU},
    QDagger: {"learning_starts": 20, "buffer_size": 1000, **CPU},
}
ALGORITHMS = list(SMALL)


def even(obs_BO: Tensor) -> Tensor:
    return torch.zeros(len(obs_BO), 2)


class OneStep(gym.Env[Any, np.int64]):
    """Ends at once; its observations are of a space that the test gives."""

    def __init__(self, observation_space: gym.Space[Any], action_space: gym.Space[Any] | None = None) -> None:
        self.observation_space = observation_space
        self.action_space: Any = action_space or gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self.observation_space.sample(), {}

    def step(self, action: np.int64) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 1.0, True, False, {}


BOX = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_invalid_arguments_are_refused_in_one_line(algorithm: Any) -> None:
    for settings, message in (
        ({"teacher": None}, f"{algorithm.__name__} has no teacher"),
        ({"teacher_temperature": 0.0}, "_temperature must be .*, not 0"),
        ({"teacher_temperature": float("nan")}, "_temperature must be .*, not nan"),
        ({"distillation_weight": -1.0}, "distillation_weight must be at least 0, not -1"),
        ({"distillation_weight": float("nan")}, "distillation_weight must be at least 0, not nan"),
    ):
        with pytest.raises(ValueError, match=message):
            algorithm("MlpPolicy", "CartPole-v1", **{"teacher": even, **SMALL[algorithm], **settings})
    continuous = OneStep(BOX, gym.spaces.Box(-1.0, 1.0, (1,), np.float32))
    named = OneStep(gym.spaces.Dict({"a": BOX}))
    for policy in ("MlpPolicy", "MultiInputPolicy"):
        with pytest.raises(ValueError, match="discrete actions, not Box"):
            algorithm(policy, continuous, teacher=even, **SMALL[algorithm])
        with pytest.raises(ValueError, match="one array, not Dict observations"):
            algorithm(policy, named, teacher=even, **SMALL[algorithm])


@pytest.mark.parametrize("algorithm", [ProximalPolicyDistillation, StudentDriven])
def test_a_rollout_buffer_without_teacher_labels_is_refused(algorithm: Any) -> None:
    with pytest.raises(ValueError, match="rollout_buffer_class RolloutBuffer has no teacher labels"):
        algorithm("MlpPolicy", "CartPole-v1", teacher=even, rollout_buffer_class=RolloutBuffer, **SMALL[algorithm])
    algorithm("MlpPolicy", "CartPole-v1", teacher=even, rollout_buffer_class=None, **SMALL[algorithm])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_teacher_with_another_number_of_actions_is_refused(algorithm: Any) -> None:
    model = algorithm("MlpPolicy", OneStep(BOX), teacher=lambda obs: torch.zeros(len(obs), 3), **SMALL[algorithm])
    with pytest.raises(ValueError, match=r"the teacher's outputs are \(\d+, 3\), not \(\d+, 2\)"):
        model.learn(64)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_student_that_diverges_or_has_diverged_at_the_very_end_is_given_up(algorithm: Any) -> None:
    model = algorithm("MlpPolicy", "CartPole-v1", teacher=even, **{**SMALL[algorithm], "learning_rate": 1e30})
    with pytest.raises(FloatingPointError, match=r"not finite.*diverged; lower --learning-rate or --weight"):
        model.learn(600)
    with torch.no_grad():
        for weight in model.policy.parameters():
            weight.fill_(3e38)
    with pytest.raises(FloatingPointError, match="the student's weights are not finite"):
        model.learn(0)


def test_an_infinite_td_target_is_given_up() -> None:
    model = QDagger("MlpPolicy", "CartPole-v1", teacher=even, **SMALL[QDagger])
    with torch.no_grad():
        for weight in model.q_net_target.parameters():
            weight.fill_(1e30)
    with pytest.raises(FloatingPointError, match=r"the student's (losses|gradients) are not finite"):
        model.learn(60)


def test_an_optimizer_step_that_is_not_finite_is_not_taken() -> None:
    policy: Any = nn.Linear(1, 1)
    policy.optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    before = policy.weight.clone()

    def step(loss: Tensor) -> None:
        policy.zero_grad()
        with finite_steps(policy):
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            policy.optimizer.step()

    for factor in (float("nan"), float("inf"), 1e30):  # the norm of the last one overflows, and is clipped to 0
        with pytest.raises(FloatingPointError, match="gradient"):
            step(policy(torch.ones(1)).sum() * factor)
    tiny = policy(torch.ones(1)).sum() * 0.0 + (policy.weight * 0.0).sum().sqrt()  # finite, with an infinite slope
    with pytest.raises(FloatingPointError, match="gradient"):
        step(tiny)
    assert torch.equal(policy.weight, before)
    step(policy(torch.ones(1)).sum())
    assert not torch.equal(policy.weight, before)


@pytest.mark.parametrize("weight", [ReturnGap(1.0), ReturnReached(1.0, 0.0), Linear(1.0, 0.0)])
def test_a_weight_that_would_never_change_is_warned_of(weight: Quantity) -> None:
    how: dict[str, Any] = {"teacher": even, "reference_returns": (0.0, 2.0), "distillation_weight": weight, **CPU}
    silent = DummyVecEnv([lambda: OneStep(BOX)] * 2)
    model = StudentDriven("MlpPolicy", silent, **how)
    if isinstance(weight, Linear):
        model.learn(20)
    else:
        with pytest.warns(UserWarning, match="wrap the environment in SB3's Monitor"):
            model.learn(20)
    # SB3 wraps a single environment itself.
    StudentDriven("MlpPolicy", OneStep(BOX), **how).learn(20)
    StudentDriven("MlpPolicy", VecMonitor(silent), **how).learn(20)
