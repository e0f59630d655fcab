"""Archives that SB3 itself wrote, read without SB3, score as SB3's own models do."""

import json
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib import QRDQN, TRPO, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv

from policykd.agents.archive import read_archive
from policykd.agents.networks import ConvNet, num_macs, num_parameters
from policykd.agents.rebuild import rebuild
from policykd.agents.teacher import load_teacher
from policykd.envs.atari import make_atari
from policykd.envs.gymnasium_envs import GymnasiumEnvs

ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], dict[str, Any]]] = {
    "PPO": (PPO, {"n_steps": 8, "batch_size": 8}),
    "A2C": (A2C, {}),
    "DQN": (DQN, {"buffer_size": 1}),
    "QRDQN": (QRDQN, {"buffer_size": 1}),
}


class Frames(gym.Env[np.ndarray, np.int64]):
    """Spaces of preprocessed Atari, nothing behind them."""

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space: gym.Space[Any] = gym.spaces.Discrete(18)


def atari_frames(count: int) -> torch.Tensor:
    envs = make_atari("Seaquest", 16, seed=0)
    envs.reset()
    generator = torch.Generator().manual_seed(0)
    steps = [envs.step(torch.randint(18, (16,), generator=generator)).obs for _ in range(count // 16 + 1)]
    return torch.cat(steps)[:count]


def cart_pole_states(count: int) -> torch.Tensor:
    envs = GymnasiumEnvs("CartPole-v1", 16, seed=0)
    envs.reset()
    generator = torch.Generator().manual_seed(0)
    steps = [envs.step(torch.randint(2, (16,), generator=generator)).obs for _ in range(count // 16 + 1)]
    return torch.cat(steps)[:count]


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    return atari_frames(256)


@pytest.fixture(scope="module")
def many_frames() -> torch.Tensor:
    return atari_frames(10_000)


def make(algorithm: str, policy: str, **kwargs: Any) -> BaseAlgorithm:
    """Returns an SB3 model whose layers all differ from what they begin as, biases and targets too."""
    kind, arguments = ALGORITHMS[algorithm]
    env = DummyVecEnv([Frames]) if policy == "CnnPolicy" else "CartPole-v1"
    model = kind(policy, env, seed=1, device="cpu", **arguments, policy_kwargs=kwargs or None)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.policy.parameters():
            weight.data += (
                torch.randn(weight.shape, generator=generator) * 0.3 * weight.std(correction=0).clamp(min=0.03)
            )
    return model


@torch.no_grad()
def sb3_scores(model: Any, obs: torch.Tensor) -> torch.Tensor:
    if isinstance(model, DQN):
        scores_BA: torch.Tensor = model.q_net(obs)
    elif isinstance(model, QRDQN):
        scores_BA = model.quantile_net(obs).mean(dim=1)
    else:
        scores_BA = model.policy.get_distribution(obs).distribution.logits
    return scores_BA


@torch.no_grad()
def spread_scores(model: Any, obs: torch.Tensor) -> None:
    """Scales the last layer so that scores differ by about 1, as a trained agent's do; PPO's begins near zero."""
    layers = {DQN: "q_net.q_net", QRDQN: "quantile_net.quantile_net"}
    last: Any = model.policy.get_submodule(layers.get(type(model), "action_net"))
    last = last[-1] if isinstance(last, torch.nn.Sequential) else last
    for _ in range(2):
        spread = sb3_scores(model, obs).std()
        last.weight /= spread
        last.bias /= spread


def assert_same_scores(model: BaseAlgorithm, path: Path, obs: torch.Tensor) -> None:
    """Compares scores, and actions with SB3's predict: equal unless two of SB3's scores are as good as equal."""
    spread_scores(model, obs[:64])
    model.save(path)
    teacher, others = load_teacher(path), 0
    for batch in obs.split(500):
        expected, found = sb3_scores(model, batch), teacher(batch)
        if teacher.algorithm in ("PPO", "A2C"):
            found = found.log_softmax(dim=-1)
        assert (found - expected).abs().max() <= 1e-4
        actions, _ = model.predict(batch.numpy(), deterministic=True)
        best = expected.topk(2, dim=1).values
        differ = found.argmax(dim=1) != torch.from_numpy(actions)
        others += int(differ.sum())
        assert not (differ & (best[:, 0] - best[:, 1] > 1e-4)).any()
    assert others <= len(obs) / 10_000
    assert sb3_scores(model, obs[:64]).std() > 0.5  # there is something to be wrong about
    print(f"{path.stem}: {others} of {len(obs)} actions differ")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_scores_on_cart_pole_are_those_of_sb3(algorithm: str, tmp_path: Path) -> None:
    assert_same_scores(make(algorithm, "MlpPolicy"), tmp_path / f"{algorithm}.zip", cart_pole_states(10_000))
    teacher = load_teacher(tmp_path / f"{algorithm}.zip")
    assert (teacher.algorithm, teacher.num_actions, teacher.obs_shape) == (algorithm, 2, (4,))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_scores_on_atari_are_those_of_sb3(algorithm: str, tmp_path: Path, frames: torch.Tensor) -> None:
    assert_same_scores(make(algorithm, "CnnPolicy"), tmp_path / f"{algorithm}.zip", frames)
    teacher = load_teacher(tmp_path / f"{algorithm}.zip")
    assert (teacher.algorithm, teacher.num_actions, teacher.obs_shape) == (algorithm, 18, (4, 84, 84))
    assert teacher.temperature == (0.01 if algorithm in ("DQN", "QRDQN") else 1.0)
    assert isinstance(teacher.net, ConvNet)
    assert num_parameters(teacher.net) == 1_693_362  # a QR-DQN's quantiles are one linear layer


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_scores_on_10_000_frames_are_those_of_sb3(algorithm: str, tmp_path: Path, many_frames: torch.Tensor) -> None:
    assert_same_scores(make(algorithm, "CnnPolicy"), tmp_path / f"{algorithm}.zip", many_frames)


@pytest.mark.parametrize(
    ("algorithm", "policy", "kwargs"),
    [
        ("PPO", "MlpPolicy", {"activation_fn": torch.nn.ELU, "net_arch": [32]}),
        ("PPO", "MlpPolicy", {"net_arch": []}),
        ("A2C", "MlpPolicy", {"net_arch": {"pi": [16, 8, 4], "vf": [5]}}),
        ("DQN", "MlpPolicy", {"net_arch": [256, 256], "activation_fn": torch.nn.LeakyReLU}),
        ("QRDQN", "MlpPolicy", {"n_quantiles": 10, "net_arch": [24]}),
        ("PPO", "CnnPolicy", {"share_features_extractor": False}),
        ("DQN", "CnnPolicy", {"normalize_images": False}),
        ("DQN", "CnnPolicy", {"net_arch": [64], "features_extractor_kwargs": {"features_dim": 128}}),
        ("A2C", "CnnPolicy", {"net_arch": [64], "activation_fn": torch.nn.ReLU}),
        ("QRDQN", "CnnPolicy", {"n_quantiles": 25}),
    ],
    ids=str,
)
def test_what_the_policy_kwargs_say_is_honoured(
    algorithm: str, policy: str, kwargs: dict[str, Any], tmp_path: Path, frames: torch.Tensor
) -> None:
    obs = frames[:64] if policy == "CnnPolicy" else cart_pole_states(500)
    model = make(algorithm, policy, **kwargs)
    assert_same_scores(model, tmp_path / "agent.zip", obs)


def rewrite(path: Path, *, data: dict[str, Any] | None = None, drop: tuple[str, ...] = ()) -> Path:
    """Writes an archive again with other JSON, or with fewer tensors."""
    with zipfile.ZipFile(path) as archive:
        described = json.loads(archive.read("data"))
        state = torch.load(archive.open("policy.pth"), weights_only=True)
    for key, value in (data or {}).items():
        described[key] = described[key] | value if isinstance(value, dict) else value
    other = path.with_name("other.zip")
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("data", json.dumps(described))
        with archive.open("policy.pth", "w") as stream:
            torch.save({name: t for name, t in state.items() if not name.startswith(drop or ("-",))}, stream)
    return other


def test_an_archive_of_before_sb3_1_7(tmp_path: Path, frames: torch.Tensor) -> None:
    """It has one features extractor under its old name, and the shape of the observations under another key."""
    model = make("PPO", "CnnPolicy")
    spread_scores(model, frames[:64])
    model.save(tmp_path / "agent.zip")
    space = {"_shape": None, "shape": "(4, 84, 84)", ":type:": "<class 'gym.spaces.box.Box'>"}
    kept = {"observation_space": {k: v for k, v in space.items() if v}}
    path = rewrite(tmp_path / "agent.zip", data=kept, drop=("pi_features_extractor.", "vf_features_extractor."))
    found = load_teacher(path)(frames[:64]).log_softmax(dim=-1)
    torch.testing.assert_close(found, sb3_scores(model, frames[:64]), atol=1e-4, rtol=0.0)


class Doubled(gym.Env[np.ndarray, np.int64]):
    observation_space = gym.spaces.Box(0, 255, (84, 84, 3), np.uint8)
    action_space = gym.spaces.Discrete(3)


class Continuous(gym.Env[np.ndarray, np.ndarray]):
    observation_space = gym.spaces.Box(-1, 1, (4,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)


class Grid(gym.Env[np.int64, np.int64]):
    observation_space = gym.spaces.Discrete(16)
    action_space = gym.spaces.Discrete(4)


class Matrix(gym.Env[np.ndarray, np.int64]):
    observation_space = gym.spaces.Box(-1, 1, (2, 3), np.float32)
    action_space = gym.spaces.Discrete(4)


class Extractor(torch.nn.Flatten):
    """A custom features extractor without tensors of its own."""

    def __init__(self, space: gym.Space[Any]) -> None:
        super().__init__()
        self.features_dim = gym.spaces.flatdim(space)


SMALL: dict[str, Any] = {"n_steps": 8, "batch_size": 8, "device": "cpu"}
REFUSED: dict[str, tuple[Any, str]] = {
    "three colours": (lambda: PPO("CnnPolicy", DummyVecEnv([Doubled]), **SMALL), r"expected .*4, 84.* found.*3, 84"),
    "continuous actions": (lambda: PPO("MlpPolicy", Continuous(), **SMALL), "expected a Discrete .* found Box"),
    "a grid": (lambda: PPO("MlpPolicy", Grid(), **SMALL), "expected a Box .* found Discrete"),
    "a matrix": (lambda: PPO("MlpPolicy", Matrix(), **SMALL), r"expected observations \(2, 3\).* found \(6,\)"),
    "Tanh after convolutions": (
        lambda: make("PPO", "CnnPolicy", net_arch=[32]), "expected ReLU .* found Tanh.*--trust-pickle"
    ),
    "another activation": (
        lambda: make("PPO", "MlpPolicy", activation_fn=torch.nn.ReLU6), "expected an activation .* found .*ReLU6"
    ),
    "a custom extractor": (
        lambda: make("DQN", "MlpPolicy", features_extractor_class=Extractor),
        "expected SB3's features extractor, found .*Extractor.*--trust-pickle",
    ),
    "recurrent": (lambda: RecurrentPPO("MlpLstmPolicy", "CartPole-v1", **SMALL), "recurrent"),
    "with masks": (lambda: MaskablePPO("MlpPolicy", "CartPole-v1", **SMALL), "expected a policy .*found .*maskable"),
    "TRPO": (lambda: TRPO("MlpPolicy", "CartPole-v1", **SMALL), "expected a PPO, A2C, DQN or QR-DQN policy"),
}  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore:You provided an OpenAI Gym", "ignore:.*must be a Gymnasium", "ignore:You are trying"
)
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_faithfully_is_refused(name: str, tmp_path: Path) -> None:
    model, reason = REFUSED[name]
    model().save(tmp_path / "agent.zip")
    with pytest.raises(ValueError, match=reason) as error:
        rebuild(read_archive(tmp_path / "agent.zip"))
    assert str(error.value).startswith(str(tmp_path / "agent.zip"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("algorithm", "changes", "reason"),
    [
        ("PPO", {"data": {"action_space": {"n": "3"}}}, "expected 3 actions, as in its `data`, found 2"),
        ("QRDQN", {"data": {"action_space": {"n": "3"}}}, r"expected n_quantiles times .* \(3\).* found 400 outputs"),
        ("QRDQN", {"data": {"action_space": {"n": "?"}}}, r"number of actions \(None\)"),
        ("QRDQN", {"data": {"policy_kwargs": {"n_quantiles": 100}}}, "found 400 outputs"),
        ("DQN", {"data": {"observation_space": {"_shape": [5]}}}, r"expected observations \(5,\).* found \(4,\)"),
        ("DQN", {"drop": ("q_net.q_net.0",)}, "expected dense layers q_net.q_net.0, 2, 4..., found '2, 4'"),
        ("DQN", {"drop": ("q_net.q_net.2.bias",)}, "expected q_net.q_net.2.bias in 1 dimensions, found nothing"),
        ("PPO", {"drop": ("action_net",)}, "expected a PPO, A2C, DQN or QR-DQN policy, found tensors such as"),
    ],
)
def test_what_does_not_agree_is_expected_and_found(
    algorithm: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    make(algorithm, "MlpPolicy").save(tmp_path / "agent.zip")
    with pytest.raises(ValueError, match=reason):
        rebuild(read_archive(rewrite(tmp_path / "agent.zip", **changes)))


@pytest.mark.parametrize(("algorithm", "sb3"), [("ppo", PPO), ("dqn", DQN)])
def test_a_bundled_teacher_is_a_nature_cnn_and_opens_in_sb3(
    algorithm: str, sb3: type[BaseAlgorithm], frames: torch.Tensor
) -> None:
    teacher = load_teacher(f"bundled:{algorithm}", game="ALE/Pong-v5")
    assert isinstance(teacher.net, ConvNet)
    assert num_parameters(teacher.net) == 1_687_206
    assert 9.3e6 < num_macs(teacher.net, teacher.obs_shape) < 9.4e6
    model = sb3.load(teacher.path, device="cpu", custom_objects={"buffer_size": 1})
    found = teacher(frames) if algorithm == "dqn" else teacher(frames).log_softmax(dim=-1)
    torch.testing.assert_close(found, sb3_scores(model, frames), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("algorithm", "least"), [("ppo", 18.0), ("dqn", 15.0)])
def test_a_bundled_card_says_what_the_file_is(algorithm: str, least: float) -> None:
    teacher = load_teacher(f"bundled:{algorithm}", game="Pong")
    assert teacher.card.sha256 == teacher.sha256
    assert teacher.path.stat().st_size < 7_000_000
    for protocol in ("noop_sampled", "sticky_greedy"):
        assert len(teacher.card.protocols[protocol].returns) >= 100
    assert teacher.reported_return is not None
    assert teacher.reported_return >= least


def test_a_teacher_of_another_game_is_refused() -> None:
    bundled = load_teacher(game="Pong").path
    with pytest.raises(ValueError, match="plays Pong, not Breakout"):
        load_teacher(bundled, game="Breakout")
