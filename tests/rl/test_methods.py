"""Every method of the command, made as the command makes it: its temperatures, its first rollout, its start."""

from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from policykd.agents.sb3_student import from_sb3
from policykd.agents.student import Student, make_student
from policykd.agents.teacher import Teacher, load_teacher
from policykd.envs.atari import make_atari
from policykd.envs.sb3_vec_env import SB3VecEnv
from policykd.rl.methods import METHODS, MethodArgs, MethodName, check_weight, make_model, with_method_defaults
from policykd.rl.qdagger import QDagger
from policykd.rl.teacher_mixin import TeacherMixin
from policykd.schedules import Exponential, Linear, Quantity, ReturnGap

NAMES: tuple[MethodName, ...] = get_args(MethodName)


@cache
def pong() -> SB3VecEnv:
    return SB3VecEnv(make_atari("Pong", 2, seed=0), clip_rewards=True)


@cache
def teacher_of(ref: str) -> Teacher:
    return load_teacher(ref, game="Pong")


@cache
def frames() -> Tensor:
    envs = make_atari("Pong", 2, seed=3)
    envs.reset()
    return torch.cat([envs.step(torch.tensor([2, 3])).obs.clone() for _ in range(30)])[-8:]


def student_for(name: MethodName) -> Student:
    student = make_student("1%", 6, seed=1, temperature=METHODS[name].student_temperature)
    student.fit_input_normalization(frames()[:, -1])
    return student


def made(name: MethodName, student: Student, ref: str = "bundled:ppo", **flags: Any) -> TeacherMixin:
    args = with_method_defaults(MethodArgs(**{"method": name, "steps": 1000, **flags}))
    return make_model(args, student, teacher_of(ref), pong(), (-20.0, 20.0), "cpu")


def outputs(model: TeacherMixin, obs: Tensor) -> Tensor:
    """Returns Q-values, or log-probabilities."""
    policy: Any = model.policy
    found: Tensor = (
        policy.q_net(obs) if isinstance(model, QDagger) else policy.get_distribution(obs).distribution.logits
    )
    return found


@pytest.mark.parametrize(("ref", "temperature"), [("bundled:ppo", 0.0), ("bundled:dqn", 0.0), ("bundled:dqn", 0.5)])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_temperatures_reach_the_teacher_and_leave_the_student_unchanged(
    name: MethodName, ref: str, temperature: float
) -> None:
    student, teacher, obs = student_for(name), teacher_of(ref), frames()
    model = made(name, student, ref, temperature=temperature)
    compared = temperature or {"bundled:ppo": 1.0, "bundled:dqn": 0.1 if name == "qdagger" else 0.01}[ref]
    expected = (teacher(obs).clone() / compared).log_softmax(dim=1)
    torch.testing.assert_close(model.teacher_log_policy(obs), expected)
    assert expected.std(dim=0).max() > 1e-3  # or anything would be equal
    torch.testing.assert_close(from_sb3(model, student)(obs), student(obs))
    if isinstance(model, QDagger):
        torch.testing.assert_close(outputs(model, obs), student.net(obs))  # the network gives Q-values
        torch.testing.assert_close(outputs(model, obs), 0.01 * student(obs))
        assert model.student_temperature == (compared if ref == "bundled:dqn" else 0.1)
    else:
        torch.testing.assert_close(outputs(model, obs), student(obs).log_softmax(dim=1))


@pytest.mark.parametrize("name", NAMES)
def test_every_method_learns_from_its_first_rollouts(name: MethodName) -> None:
    student, obs = student_for(name), frames()
    model = made(name, student, steps=256)
    updates_offline = 0
    if isinstance(model, QDagger):
        model.learn_offline(60, 5)
        updates_offline = model.num_gradient_steps
    model.learn(256, reset_num_timesteps=False, log_interval=1000)
    assert model.num_gradient_steps > updates_offline
    curves = model.logger.name_to_value
    assert all(np.isfinite(curves[f"train/{curve}"]) for curve in ("teacher_kl", "distillation_weight"))
    assert curves["train/teacher_kl"] > 0
    learned = from_sb3(model, student)
    with torch.no_grad():
        assert not torch.allclose(learned(obs), student(obs), rtol=0.01)
        torch.testing.assert_close(learned.net(obs).log_softmax(dim=1), outputs(model, obs).log_softmax(dim=1))


@pytest.mark.parametrize("steps", [200, 1_000_000])
def test_qdagger_learns_from_its_own_states_long_before_its_weight_ends(steps: int) -> None:
    model = made("qdagger", student_for("qdagger"), steps=steps)
    assert isinstance(model, QDagger)
    assert model.learning_starts <= min(steps / 20, 2000)


@pytest.mark.parametrize(
    "weight", [-1.0, float("nan"), float("inf"), ReturnGap(-2.0), Linear(1.0, -1.0), Exponential(-1.0, -2.0)]
)
def test_a_weight_that_is_negative_somewhere_is_refused(weight: Quantity) -> None:
    with pytest.raises(ValueError, match="--weight must be at least 0"):
        check_weight(weight, 0.0, 1.0)


def test_a_weight_that_follows_a_teacher_no_better_than_chance_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a teacher that beats a random policy"):
        check_weight(ReturnGap(3.0), -20.7, -20.7)
    for weight in (0.0, 3.0, ReturnGap(3.0), Linear(1.0, 0.0)):
        check_weight(weight, -20.7, 20.0)
