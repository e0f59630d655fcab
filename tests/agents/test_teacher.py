"""Archives that SB3 itself wrote, read without SB3, score as SB3's own models do."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv

from policykd.agents.networks import num_macs, num_parameters
from policykd.agents.teacher import load_teacher
from policykd.envs.atari import make_atari

ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], dict[str, Any]]] = {
    "PPO": (PPO, {"n_steps": 8, "batch_size": 8}),
    "A2C": (A2C, {}),
    "DQN": (DQN, {"buffer_size": 1}),
}


class Frames(gym.Env[np.ndarray, np.int64]):
    """Spaces of preprocessed Atari, nothing behind them."""

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(6)


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    envs = make_atari("Seaquest", 16, seed=0)
    envs.reset()
    generator = torch.Generator().manual_seed(0)
    return torch.cat([envs.step(torch.randint(6, (16,), generator=generator)).obs for _ in range(20)])


def sb3_scores(model: BaseAlgorithm, obs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        if isinstance(model, DQN):
            scores_BA: torch.Tensor = model.q_net(obs)
        else:
            scores_BA = model.policy.get_distribution(obs).distribution.logits  # type: ignore[operator]
    return scores_BA


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", ["CNN on frames", "MLP on CartPole"])
def test_scores_are_those_of_sb3(algorithm: str, kind: str, tmp_path: Path, frames: torch.Tensor) -> None:
    make, kwargs = ALGORITHMS[algorithm]
    if kind == "CNN on frames":
        model, obs = make("CnnPolicy", DummyVecEnv([Frames]), seed=1, device="cpu", **kwargs), frames
    else:
        model = make("MlpPolicy", "CartPole-v1", seed=1, device="cpu", **kwargs)
        obs = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    model.save(tmp_path / "agent.zip")

    teacher = load_teacher(tmp_path / "agent.zip")

    expected = sb3_scores(model, obs)
    found = teacher(obs) if algorithm == "DQN" else teacher(obs).log_softmax(dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    best, _ = model.predict(obs.numpy(), deterministic=True)
    assert (teacher(obs).argmax(dim=1).numpy() == best).mean() > 0.999
    assert teacher.algorithm == algorithm
    assert teacher.temperature == (0.01 if algorithm == "DQN" else 1.0)


def test_the_bundled_teacher_is_a_nature_cnn_and_opens_in_sb3(frames: torch.Tensor) -> None:
    teacher = load_teacher(game="ALE/Pong-v5")
    assert num_parameters(teacher.net) == 1_687_206
    assert 9.3e6 < num_macs(teacher.net, teacher.obs_shape) < 9.4e6
    sb3 = PPO.load(teacher.path, device="cpu")
    torch.testing.assert_close(teacher(frames).log_softmax(dim=-1), sb3_scores(sb3, frames), atol=1e-4, rtol=1e-4)


def test_the_bundled_card_says_what_the_file_is() -> None:
    teacher = load_teacher("bundled", game="Pong")
    assert teacher.card["sha256"] == teacher.sha256
    assert teacher.path.stat().st_size < 7_000_000
    for protocol in ("noop_sampled", "sticky_greedy"):
        assert len(teacher.card["protocols"][protocol]["returns"]) >= 100


def test_a_teacher_of_another_game_is_refused() -> None:
    bundled = load_teacher(game="Pong").path
    with pytest.raises(ValueError, match="plays Pong, not Breakout"):
        load_teacher(bundled, game="Breakout")
    with pytest.raises(ValueError, match=r"no teacher is bundled for Breakout, only for Pong; give --teacher"):
        load_teacher(game="Breakout")
    with pytest.raises(ValueError, match="which bundled teacher"):
        load_teacher()
