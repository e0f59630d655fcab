"""Custom policies through SB3's own load: the same outputs, old archives too, and a warning on standard error."""

import base64
import hashlib
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib import QRDQN
from stable_baselines3 import A2C, DQN, PPO

from policykd.agents.archive import read_archive, read_members
from policykd.agents.networks import num_parameters
from policykd.agents.rebuild import rebuild
from policykd.agents.teacher import load_teacher
from policykd.agents.trusted import Sb3PolicyNet, load_with_sb3

MODULE = '''
import torch
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

class Extractor(BaseFeaturesExtractor):
    """Has what ours do not read: normalisation, with a counter that is not a float."""

    def __init__(self, space):
        super().__init__(space, features_dim=8)
        self.layers = torch.nn.Sequential(torch.nn.Linear(space.shape[0], 8), torch.nn.BatchNorm1d(8), torch.nn.GELU())

    def forward(self, obs):
        return self.layers(obs)
'''
OBS = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "PPO": (PPO, {"n_steps": 8, "batch_size": 8, "learning_rate": lambda left: left * 1e-3}),
    "A2C": (A2C, {}),
    "DQN": (DQN, {"buffer_size": 10, "optimize_memory_usage": False}),
    "QRDQN": (QRDQN, {"buffer_size": 10}),
}


class Frames(gym.Env[np.ndarray, np.int64]):
    """Spaces of preprocessed Pong, nothing behind them."""

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(6)


class Touch:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def extractor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "my_extractor.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_extractor", raising=False)
    return __import__("my_extractor").Extractor


def load(path: Path) -> tuple[Sb3PolicyNet, str]:
    return load_with_sb3(path, read_members(path)[1])


def custom(algorithm: str, extractor: Any, path: Path) -> torch.Tensor:
    """Saves a custom agent and returns its own scores of OBS."""
    kind, kwargs = KINDS[algorithm]
    policy_kwargs = {"features_extractor_class": extractor, "net_arch": [16, 8]}
    model = kind("MlpPolicy", "CartPole-v1", seed=0, device="cpu", policy_kwargs=policy_kwargs, **kwargs)
    model.policy.set_training_mode(False)
    with torch.no_grad():
        for weight in model.policy.parameters():
            weight.add_(torch.randn(weight.shape) * 0.3)
        if algorithm == "DQN":
            scores_BA: torch.Tensor = model.q_net(OBS)
        elif algorithm == "QRDQN":
            scores_BA = model.quantile_net(OBS).mean(dim=1)
        else:
            scores_BA = model.policy.get_distribution(OBS).distribution.logits
    model.save(path)
    return scores_BA


def rewrite(path: Path, entries: dict[str, Any], *, drop: tuple[str, ...] = ()) -> None:
    """Writes an archive again with some entries of its JSON replaced."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name not in drop}
    members["data"] = json.dumps(json.loads(members["data"]) | entries).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def old_space(name: str, **attributes: Any) -> dict[str, Any]:
    """Returns a space as SB3 1 wrote it: a pickle of gym's class and its readable attributes."""
    kind = f"gym.spaces.{name.lower()}"
    code = f"c{kind}\n{name}\n)\x81.".encode()
    return {":type:": f"<class '{kind}.{name}'>", ":serialized:": base64.b64encode(code).decode(), **attributes}


@pytest.mark.parametrize("algorithm", KINDS)
def test_a_custom_policy_scores_as_in_sb3(
    algorithm: str, extractor: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "agent.zip"
    expected = custom(algorithm, extractor, path)
    with pytest.raises(ValueError, match="--trust-pickle"):
        load_teacher(path)
    teacher = load_teacher(path, trust_pickle=True)
    assert torch.equal(teacher(OBS), expected)
    assert (teacher.algorithm, teacher.num_actions, teacher.obs_shape) == (algorithm, 2, (4,))
    last = 2 * 200 if algorithm == "QRDQN" else 2
    acting = (4 * 8 + 8) + 2 * 8 + (8 * 16 + 16) + (16 * 8 + 8) + (8 * last + last)  # no target, no critic
    assert num_parameters(cast(Sb3PolicyNet, teacher.net)) == acting
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {path}: loaded with SB3, which executes code in the file (--trust-pickle)"
    ]


@pytest.mark.parametrize("algorithm", KINDS)
def test_an_archive_of_the_days_of_gym_loads(algorithm: str, extractor: Any, tmp_path: Path) -> None:
    """SB3 alone raises No module named 'gym'; its spaces are built from what can be read, and buffers are not."""
    path = tmp_path / "agent.zip"
    expected = custom(algorithm, extractor, path)
    spaces = {
        "observation_space": old_space("Box", dtype="float32", shape=[4], low="[-1 -1 -1 -1]", high="[1 1 1 1]"),
        "action_space": old_space("Discrete", n="2", shape=[], dtype="int64"),
    }
    large = {"optimize_memory_usage": True, "buffer_size": 10**9} if "DQN" in algorithm else {"n_steps": 10**9}
    rewrite(path, spaces | large, drop=("policy.optimizer.pth",))
    with pytest.raises(ModuleNotFoundError, match="gym"):
        KINDS[algorithm][0].load(path)
    net, found = load(path)
    assert found == algorithm
    with torch.no_grad():
        assert torch.equal(net(OBS), expected)


def test_an_old_archive_without_custom_classes_needs_no_trust(tmp_path: Path) -> None:
    path = tmp_path / "agent.zip"
    model = DQN("MlpPolicy", "CartPole-v1", device="cpu", buffer_size=10)
    model.save(path)
    spaces = {
        "observation_space": old_space("Box", dtype="float32", shape=[4]),
        "action_space": old_space("Discrete", n="2"),
    }
    rewrite(path, spaces)
    net, algorithm = rebuild(read_archive(path))
    assert algorithm == "DQN"
    with torch.no_grad():
        torch.testing.assert_close(net(OBS), model.q_net(OBS))


def test_an_unpacked_archive_loads(extractor: Any, tmp_path: Path) -> None:
    expected = custom("PPO", extractor, tmp_path / "agent.zip")
    with zipfile.ZipFile(tmp_path / "agent.zip") as archive:
        for name in ("data", "policy.pth"):  # all that is fetched from the Hub
            archive.extract(name, tmp_path / "agent")
    net, _ = load(tmp_path / "agent")
    with torch.no_grad():
        assert torch.equal(net(OBS), expected)


def test_a_class_that_is_not_there_is_one_line(extractor: Any, tmp_path: Path) -> None:
    path = tmp_path / "agent.zip"
    custom("A2C", extractor, path)
    (tmp_path / "my_extractor.py").unlink()
    del sys.modules["my_extractor"]
    with pytest.raises(ValueError, match=r"agent.zip: .*No module named 'my_extractor'.*PYTHONPATH") as error:
        load(path)
    assert "\n" not in str(error.value)
    (tmp_path / "my_extractor.py").write_text("")  # the module is there, the class is not: SB3 only warns
    with pytest.raises(ValueError, match=r"agent.zip: .*Could not deserialize") as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shared", [True, False])
def test_a_critic_of_its_own_is_no_cost(shared: bool, tmp_path: Path) -> None:
    policy_kwargs = {"share_features_extractor": shared}
    model = PPO("CnnPolicy", Frames(), n_steps=8, batch_size=8, device="cpu", policy_kwargs=policy_kwargs)
    before = num_parameters(model.policy)
    live = Sb3PolicyNet(model.policy.eval(), "PPO", (4, 84, 84), 6)
    assert num_parameters(model.policy) == before  # it may be in training
    model.save(tmp_path / "agent.zip")
    net, _ = load(tmp_path / "agent.zip")
    assert num_parameters(net) == num_parameters(rebuild(read_archive(tmp_path / "agent.zip"))[0]) == 1_687_206
    obs = torch.randint(256, (8, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(net(obs), live(obs))


def test_what_was_hashed_is_what_is_executed(extractor: Any, tmp_path: Path) -> None:
    """The file is exchanged once it was hashed: what is loaded is what was there before."""
    path = tmp_path / "agent.zip"
    expected = custom("PPO", extractor, path)
    sha256, members = read_members(path)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    code = base64.b64encode(pickle.dumps(Touch(tmp_path / "mark"))).decode()
    rewrite(path, {"policy_kwargs": {":type:": "dict", ":serialized:": code}})
    net, _ = load_with_sb3(path, members)
    assert not (tmp_path / "mark").exists()
    with torch.no_grad():
        assert torch.equal(net(OBS), expected)


@pytest.mark.parametrize(("algorithm", "library"), [("PPO", "stable_baselines3"), ("QRDQN", "sb3_contrib")])
def test_without_sb3_it_says_what_to_install(
    algorithm: str,
    library: str,
    extractor: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    custom(algorithm, extractor, tmp_path / "agent.zip")
    monkeypatch.setitem(sys.modules, library, None)  # what import finds where it is not installed
    with pytest.raises(ValueError, match=rf"agent.zip: .*{library}.*; pip install 'policykd\[sb3\]'$") as error:
        load(tmp_path / "agent.zip")
    assert "\n" not in str(error.value)
    assert capsys.readouterr().err == ""  # nothing was executed


def test_only_what_makes_the_policy_is_executed(extractor: Any, tmp_path: Path) -> None:
    """The warning is true: code in the policy's own pickles runs. Code in the others does not."""
    path = tmp_path / "agent.zip"
    custom("PPO", extractor, path)
    for key in ("lr_schedule", "zzz", "rollout_buffer_class", "policy_kwargs"):
        code = base64.b64encode(pickle.dumps(Touch(tmp_path / key))).decode()
        rewrite(path, {key: {":type:": "dict", ":serialized:": code}})
        if key != "policy_kwargs":
            load(path)
    with pytest.raises(ValueError, match="SB3 cannot load it"):  # it is not a dictionary
        load(path)
    assert [
        key for key in ("lr_schedule", "zzz", "rollout_buffer_class", "policy_kwargs") if (tmp_path / key).exists()
    ] == ["policy_kwargs"]


def test_another_algorithm_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "agent.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", '{"gamma": 0.99}')
        archive.writestr("policy.pth", b"")
    with pytest.raises(ValueError, match="expected a PPO, A2C, DQN or QR-DQN archive"):
        load(path)
