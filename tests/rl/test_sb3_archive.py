"""What a training ends with opens in SB3 and is read without it, and is the same agent in both."""

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from sb3_contrib import QRDQN
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor, nn

from policykd.agents.networks import MLP, ConvNet
from policykd.agents.rebuild import Sb3Algorithm
from policykd.agents.student import make_student
from policykd.agents.teacher import load_teacher
from policykd.agents.trusted import Sb3PolicyNet
from policykd.envs.atari import make_atari
from policykd.envs.sb3_vec_env import SB3VecEnv
from policykd.rl.frame_buffer import FrameReplayBuffer
from policykd.rl.sb3_archive import InputScaling, centre_input, start_from, write_teacher

BUFFER = {"buffer_size": 200, "replay_buffer_class": FrameReplayBuffer}
ALGORITHMS: dict[Sb3Algorithm, tuple[type[BaseAlgorithm], dict[str, Any]]] = {
    "PPO": (PPO, {"n_steps": 8, "batch_size": 8}),
    "A2C": (A2C, {}),
    "DQN": (DQN, BUFFER),
    "QRDQN": (QRDQN, BUFFER),
}


def make(algorithm: Sb3Algorithm) -> BaseAlgorithm:
    kind, settings = ALGORITHMS[algorithm]
    envs = SB3VecEnv(make_atari("Pong", 2, seed=0), clip_rewards=True)
    model = kind("CnnPolicy", envs, seed=1, device="cpu", **settings)
    model.policy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


@pytest.fixture(scope="module")
def frames() -> Tensor:
    envs = make_atari("Pong", 8, seed=0)
    envs.reset()
    generator = torch.Generator().manual_seed(0)
    return torch.cat([envs.step(torch.randint(6, (8,), generator=generator)).obs for _ in range(80)][20:])[::4]


@torch.no_grad()
def scores(model: BaseAlgorithm, algorithm: Sb3Algorithm, obs: Tensor) -> Tensor:
    found: Tensor = Sb3PolicyNet(model.policy.eval(), algorithm, (4, 84, 84), 6)(obs)
    return found if "DQN" in algorithm else found.log_softmax(dim=-1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_centred_agent_is_the_plain_archive_it_is_written_as(
    algorithm: Sb3Algorithm, tmp_path: Path, frames: Tensor
) -> None:
    model = make(algorithm)
    plain = scores(model, algorithm, frames)
    centre_input(model.policy, InputScaling(87.0, 37.0))
    expected = scores(model, algorithm, frames)
    assert (expected - plain).abs().max() > 1e-3

    archive = tmp_path / "agent.zip"
    write_teacher(model, archive, InputScaling(87.0, 37.0))

    teacher = load_teacher(archive)
    found = teacher(frames) if "DQN" in algorithm else teacher(frames).log_softmax(dim=-1)
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=5e-3)  # weights are stored in half precision
    assert teacher.algorithm == algorithm
    opened = ALGORITHMS[algorithm][0].load(archive, device="cpu", custom_objects={"buffer_size": 1})
    torch.testing.assert_close(scores(opened, algorithm, frames), found, atol=1e-5, rtol=1e-4)
    assert archive.stat().st_size < (4_900_000 if algorithm == "QRDQN" else 3_700_000)
    with zipfile.ZipFile(archive) as members:
        assert len(members.read("policy.optimizer.pth")) < 3_000


@pytest.mark.parametrize("centred", [False, True])
def test_a_policy_that_starts_from_a_teacher_is_it(centred: bool, frames: Tensor) -> None:
    teacher = load_teacher("bundled", game="Pong")
    model = make("PPO")
    scaling = InputScaling(87.0, 37.0) if centred else InputScaling()
    start_from(model.policy, teacher, scaling)
    if centred:
        centre_input(model.policy, scaling)
    torch.testing.assert_close(scores(model, "PPO", frames), teacher(frames).log_softmax(dim=-1), atol=1e-4, rtol=1e-4)
    values_B = model.policy.predict_values(frames).squeeze(-1)  # type: ignore[operator]
    torch.testing.assert_close(values_B, teacher.values(frames), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("centred", [False, True])
def test_a_policy_that_starts_from_a_student_is_it(centred: bool, frames: Tensor) -> None:
    student = make_student("100%", 6, seed=1, value=True).eval()
    student.fit_input_normalization(frames[:, -1])
    model = make("PPO")
    scaling = InputScaling(87.0, 37.0) if centred else InputScaling()
    start_from(model.policy, student, scaling)
    if centred:
        centre_input(model.policy, scaling)
    torch.testing.assert_close(scores(model, "PPO", frames), student(frames).log_softmax(dim=-1), atol=1e-4, rtol=1e-4)
    values_B = model.policy.predict_values(frames).squeeze(-1)  # type: ignore[operator]
    torch.testing.assert_close(values_B, student.values(frames), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "net",
    [
        MLP(4, (8,), 2, activation=nn.ReLU),
        ConvNet((16, 64, 64), (512,), 6),
        ConvNet((32, 64, 64), (256,), 6),
    ],
    ids=["an MLP", "fewer filters", "fewer features"],
)
def test_a_network_of_another_shape_is_no_start(net: ConvNet | MLP) -> None:
    teacher = dataclasses.replace(load_teacher("bundled", game="Pong"), net=net)
    with pytest.raises(ValueError, match="--start-from: bundled:ppo is not SB3's NatureCNN"):
        start_from(make("PPO").policy, teacher, InputScaling())


def test_q_values_are_no_policy_to_start_with() -> None:
    teacher = dataclasses.replace(load_teacher("bundled", game="Pong"), algorithm="DQN")
    policy: Any = make("PPO").policy
    head = policy.action_net.weight.clone()
    start_from(policy, teacher, InputScaling())
    assert (policy.action_net.weight == head).all()
