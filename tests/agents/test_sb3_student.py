"""A student as SB3's policy: the same outputs there and back, and it learns with its own input scaling."""

import importlib
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sb3_contrib import QRDQN
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor

from policykd.agents.networks import ConvNet
from policykd.agents.sb3_student import AlgorithmName, StudentFeatures, from_sb3, to_sb3
from policykd.agents.student import SIZES, Size, Student, init_student, make_student, student_shape
from policykd.envs.atari import make_atari
from policykd.envs.gymnasium_envs import GymnasiumEnvs
from policykd.envs.sb3_vec_env import SB3VecEnv
from tests.identity_env import IdentityEnv

CPU: dict[str, Any] = {"device": "cpu", "seed": 0}
PPO_SHORT = {"n_steps": 32, "batch_size": 32, "n_epochs": 1, "learning_rate": 1e-3, **CPU}
DQN_SHORT = {"buffer_size": 200, "learning_starts": 50, "batch_size": 16, "exploration_initial_eps": 0.1, **CPU}
DQN_SHORT |= {"learning_rate": 1e-3}
SHORT: dict[str, dict[str, Any]] = {"PPO": PPO_SHORT, "DQN": DQN_SHORT, "A2C": CPU}


@cache
def frames() -> Tensor:
    """Returns 64 stacks from Pong, some way into the game."""
    envs, generator, seen = make_atari("Pong", 8, seed=3), torch.Generator().manual_seed(0), []
    obs = envs.reset()
    for t in range(64):
        obs = envs.step(torch.randint(6, (8,), generator=generator)).obs
        if t % 8 == 7:
            seen.append(obs.clone())
    return torch.cat(seen)


def student_of(kind: str, **settings: Any) -> Student:
    if kind == "vectors":
        return make_student((16, 12), 2, (4,), seed=1, **settings)
    student = make_student("1%", 6, seed=1, **settings)
    student.fit_input_normalization(frames()[:, -1])
    return student


def env_of(kind: str, num_envs: int = 2) -> SB3VecEnv:
    envs = make_atari("Pong", num_envs, seed=0) if kind == "frames" else GymnasiumEnvs("CartPole-v1", num_envs, seed=0)
    return SB3VecEnv(envs, clip_rewards=kind == "frames")


def obs_of(kind: str) -> Tensor:
    return frames() if kind == "frames" else torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(model: BaseAlgorithm, obs: Tensor, *, target: bool = False) -> Tensor:
    """Returns logits or Q-values as SB3's own code makes them of what an environment gives."""
    policy: Any = model.policy
    seen, _ = policy.obs_to_tensor(obs.numpy())
    if isinstance(model, DQN):
        return (policy.q_net_target if target else policy.q_net)(seen)  # type: ignore[no-any-return]
    logits: Tensor = policy.get_distribution(seen).distribution.logits
    return logits


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["frames", "vectors"])
@pytest.mark.parametrize("algorithm", ["PPO", "A2C", "DQN"])
def test_its_outputs_are_the_same_there_and_back(algorithm: AlgorithmName, kind: str) -> None:
    student, obs = student_of(kind, temperature=0.5), obs_of(kind)
    settings = {k: v for k, v in SHORT[algorithm].items() if k in ("buffer_size", "device", "seed")}
    model = to_sb3(student, env_of(kind), algorithm, **settings)
    with torch.no_grad():
        scores_BA = student(obs)
    assert scores_BA.std(dim=0).min() > 1e-3  # or anything would be equal
    if isinstance(model, DQN):
        assert close(outputs(model, obs), 0.5 * scores_BA)
        assert torch.equal(outputs(model, obs), outputs(model, obs, target=True))
    else:
        assert close(outputs(model, obs), scores_BA.log_softmax(dim=-1))
    greedy, _ = model.predict(obs.numpy(), deterministic=True)
    assert (greedy == scores_BA.argmax(dim=-1).numpy()).all()
    back = from_sb3(model, student)
    assert back.shape == student.shape
    with torch.no_grad():
        assert close(back(obs), scores_BA)


@pytest.mark.parametrize(("size", "rank"), [*((size, 0) for size in SIZES if size not in ("25%", "1%")), ("7%", 4)])
@torch.no_grad()
def test_every_design_goes_there_and_back(size: Size, rank: int, tmp_path: Path) -> None:
    student = init_student(replace(student_shape(size, 6), rank=rank), seed=1)
    student.fit_input_normalization(frames()[:, -1])
    model = to_sb3(student, device="cpu")
    model.save(tmp_path / "agent.zip")
    loaded, scores_BA = PPO.load(tmp_path / "agent.zip", device="cpu"), student(frames())
    assert scores_BA.std(dim=0).max() > 1e-3
    assert close(outputs(loaded, frames()), scores_BA.log_softmax(dim=-1))
    assert close(from_sb3(loaded, init_student(replace(student_shape(size, 6), rank=rank)))(frames()), scores_BA)
    with pytest.raises(ValueError, match=r"student has Shape\(.*num_actions=6.* `like` has Shape"):
        from_sb3(loaded, init_student(replace(student_shape(size, 6), rank=rank + 1)))


@pytest.mark.parametrize("kind", ["frames", "vectors"])
@pytest.mark.parametrize("algorithm", ["PPO", "DQN"])
def test_it_continues_to_learn_and_comes_back(algorithm: AlgorithmName, kind: str, tmp_path: Path) -> None:
    student, obs = student_of(kind), obs_of(kind)
    before = {name: t.clone() for name, t in student.state_dict().items()}
    model = to_sb3(student, env_of(kind), algorithm, **SHORT[algorithm])
    model.learn(128)
    back = from_sb3(model, student)
    assert all(torch.equal(t, before[name]) for name, t in student.state_dict().items()), "the first student changed"
    for name, t in back.state_dict().items():
        assert torch.equal(t, before[name]) == name.endswith(("centre", "scale")), name
    model.save(tmp_path / "agent.zip")
    loaded = type(model).load(tmp_path / "agent.zip", device="cpu")
    assert torch.equal(outputs(loaded, obs), outputs(model, obs))
    with torch.no_grad():
        found = back(obs) if algorithm == "DQN" else back(obs).log_softmax(dim=-1)
        assert close(found, outputs(model, obs))
        assert close(from_sb3(loaded, student)(obs), back(obs))
        assert not close(back(obs), student(obs))


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("PPO", {"n_steps": 32, "batch_size": 128, "n_epochs": 3}),
        ("A2C", {"use_rms_prop": False}),
        ("DQN", {"learning_starts": 50, "batch_size": 64, "target_update_interval": 50, "exploration_fraction": 0.5}),
    ],
)
def test_what_it_learns_from_rewards_is_the_students(algorithm: AlgorithmName, settings: dict[str, Any]) -> None:
    student, states = make_student((16,), 4, (4,), seed=0), torch.eye(4)
    envs = SB3VecEnv(IdentityEnv(16, 4), clip_rewards=False)
    model = student.to_sb3(envs, algorithm, learning_rate=1e-2, seed=0, device="cpu", **settings)
    model.learn(4096)
    with torch.no_grad():
        assert student(states).argmax(dim=1).tolist() != [0, 1, 2, 3]
        assert student.from_sb3(model)(states).argmax(dim=1).tolist() == [0, 1, 2, 3]


def test_the_gradient_is_that_of_the_centred_network() -> None:
    """With frames / 255 the same function would have another gradient, and learning would fall onto the plateau."""
    student, obs = student_of("frames"), frames()[:16]
    policy: Any = to_sb3(student, env_of("frames"), **PPO_SHORT).policy
    student(obs).softmax(dim=-1)[:, 2].sum().backward()
    policy.get_distribution(obs).distribution.probs[:, 2].sum().backward()
    assert isinstance(student.net, ConvNet)
    extractor = policy.features_extractor
    for mine, theirs in zip(student.net.conv1.parameters(), extractor.net.conv1.parameters(), strict=True):
        assert mine.grad is not None
        assert mine.grad.abs().max() > 1e-4
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    held = {id(w) for group in policy.optimizer.param_groups for w in group["params"]}
    assert held == {id(w) for w in policy.parameters()}


@pytest.mark.parametrize("shared", [True, False])
def test_a_value_head_is_the_critic(shared: bool) -> None:
    student, obs = student_of("frames", value=True), frames()
    model = to_sb3(student, env_of("frames"), policy_kwargs={"share_features_extractor": shared}, **PPO_SHORT)
    policy: Any = model.policy
    with torch.no_grad():
        assert student.values(obs).std() > 1e-3
        assert close(policy.predict_values(obs).squeeze(1), student.values(obs))
    model.learn(64)
    if shared:
        back = from_sb3(model, student)
        with torch.no_grad():
            assert close(back.values(obs), policy.predict_values(obs).squeeze(1))
            assert not close(back.values(obs), student.values(obs))
    else:
        with pytest.warns(UserWarning, match="value head stays"):
            from_sb3(model, student)


def test_without_a_value_head_values_start_at_zero() -> None:
    policy: Any = to_sb3(student_of("vectors"), env_of("vectors"), **PPO_SHORT).policy
    assert (policy.predict_values(obs_of("vectors")) == 0).all()


def test_q_values_are_the_temperature_times_the_scores() -> None:
    student, obs = student_of("vectors"), obs_of("vectors")
    model = to_sb3(student, env_of("vectors"), "DQN", temperature=0.01, **DQN_SHORT)
    with torch.no_grad():
        assert close(outputs(model, obs) * 100, student(obs))
    model.learn(128)
    with torch.no_grad():
        back = from_sb3(model, student)
        assert close(back(obs), outputs(model, obs) * 100)
        regressed = from_sb3(model, student_of("vectors", temperature=0.01))
        assert close(regressed(obs), back(obs))
        assert close(regressed.net(obs), outputs(model, obs))


@pytest.mark.parametrize(("algorithm", "kind"), [("PPO", "vectors"), ("DQN", "frames")])
def test_without_an_environment_it_plays_and_is_saved(algorithm: AlgorithmName, kind: str, tmp_path: Path) -> None:
    student, obs = student_of(kind), obs_of(kind)
    model = to_sb3(student, None, algorithm, device="cpu")
    model.save(tmp_path / "agent.zip")
    settings = DQN_SHORT if algorithm == "DQN" else PPO_SHORT
    loaded = type(model).load(tmp_path / "agent.zip", env=env_of(kind), custom_objects=settings)
    actions, _ = loaded.predict(obs.numpy(), deterministic=True)
    with torch.no_grad():
        assert (actions == student(obs).argmax(dim=-1).numpy()).all()
    loaded.learn(64)
    assert not torch.equal(outputs(loaded, obs), outputs(model, obs))


def test_a_subclass_is_taken_and_channels_last_is_understood() -> None:
    class Ours(PPO):
        """An algorithm of one's own."""

    student, obs = student_of("frames"), frames()
    model = to_sb3(student, env_of("frames"), Ours, **PPO_SHORT)
    assert type(model) is Ours
    last, _ = model.predict(np.moveaxis(obs.numpy(), 1, -1), deterministic=True)
    with torch.no_grad():
        assert (last == student(obs).argmax(dim=-1).numpy()).all()


def test_what_does_not_fit_is_refused() -> None:
    student, env = student_of("vectors"), env_of("vectors")
    with pytest.raises(ValueError, match="no policy that a student fits in; give PPO, A2C, DQN"):
        to_sb3(student, env, QRDQN)
    with pytest.raises(ValueError, match="TRPO: no policy"):
        to_sb3(student, env, "TRPO")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"temperature 0\.01 is for DQN; A2C's outputs are logits"):
        to_sb3(student, env, A2C, temperature=0.01)
    with pytest.raises(ValueError, match="must be positive, not 0"):
        to_sb3(student, env, "DQN", temperature=0.0)
    with pytest.raises(ValueError, match="policy_kwargs net_arch, normalize_images are the student's"):
        to_sb3(student, env, policy_kwargs={"normalize_images": True, "net_arch": [64]})
    with pytest.raises(ValueError, match=r"observations are \(4,\), the student's \(4, 84, 84\)"):
        to_sb3(student_of("frames"), env, device="cpu")
    with pytest.raises(ValueError, match=r"actions are Discrete\(2\), the student's 3"):
        to_sb3(make_student((8,), 3, (4,)), env, device="cpu")
    with pytest.raises(ValueError, match="without a hidden layer"):
        to_sb3(make_student((), 2, (4,)), env, device="cpu")
    with pytest.raises(ValueError, match="this PPO was not made by to_sb3"):
        from_sb3(PPO("MlpPolicy", env, device="cpu"), student)
    with pytest.raises(ValueError, match=r"hidden=\(16, 12\), num_actions=2.*`like` .*hidden=\(8,\)"):
        from_sb3(to_sb3(student, env, device="cpu"), make_student((8,), 2, (4,)))


def test_its_features_are_its_last_hidden_layer() -> None:
    student = student_of("frames")
    extractor = to_sb3(student, None, device="cpu").policy.features_extractor
    assert isinstance(extractor, StudentFeatures)
    with torch.no_grad():
        assert torch.equal(extractor(frames().float()), student.activations(frames()).hidden_BF)


def test_a_missing_sb3_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    monkeypatch.delitem(sys.modules, "policykd.agents.sb3_student")
    with pytest.raises(ValueError, match=r"pip install 'policykd\[sb3\]'"):
        importlib.import_module("policykd.agents.sb3_student")
