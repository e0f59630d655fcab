"""Several teachers as one, against mixtures computed by hand, and PPO's and A2C's critics against SB3's own."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor

from policykd.agents.archive import read_archive
from policykd.agents.card import Card
from policykd.agents.ensemble import (
    ConfidenceWeights,
    Ensemble,
    FixedWeights,
    disagreement_B,
    make_ensemble,
)
from policykd.agents.networks import ConvNet
from policykd.agents.onnx_policy import OnnxPolicy
from policykd.agents.student import make_student
from policykd.agents.teacher import Algorithm, Teacher, load_teacher, load_teachers
from policykd.envs.atari import make_atari
from policykd.export.compiled import compile_policy

OBS = torch.zeros(2, 4)


@dataclass
class FixedNet:
    """A net that returns given outputs."""

    outputs_BA: Tensor
    obs_shape: tuple[int, ...] = (4,)

    @property
    def num_actions(self) -> int:
        return self.outputs_BA.shape[1]

    def __call__(self, obs: Tensor, /) -> Tensor:
        return self.outputs_BA[: len(obs)]

    def to(self, device: Any, /) -> "FixedNet":
        return self


def fixed(outputs_BA: list[list[float]], algorithm: Algorithm = "PPO", sha256: str = "aa", **card: Any) -> Teacher:
    return Teacher(
        FixedNet(torch.tensor(outputs_BA)), algorithm, Path("a.zip"), sha256, Card(**card), ref=f"{algorithm}.zip"
    )


@pytest.fixture(scope="module")
def pong_frames() -> Tensor:
    envs = make_atari("Pong", 8, seed=0)
    envs.reset()
    generator = torch.Generator().manual_seed(0)
    return torch.cat([envs.step(torch.randint(6, (8,), generator=generator)).obs for _ in range(12)])[-64:]


def test_q_values_and_logits_mix_after_their_own_softmax() -> None:
    ppo = fixed([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]])
    dqn = fixed([[0.51, 0.50, 0.48], [1.00, 1.02, 0.98]], "DQN")
    teacher = make_ensemble([ppo, dqn], FixedWeights((3.0, 1.0)))
    found = teacher(OBS).numpy()

    def softmax(*scores: float) -> np.ndarray:
        powers = np.array([math.e**s for s in scores])
        shares: np.ndarray = powers / powers.sum()
        return shares

    mixed = [
        0.75 * softmax(1.0, 2.0, 0.5) + 0.25 * softmax(3.0, 2.0, 0.0),  # (0.51, 0.50, 0.48) / 0.01, less 48
        0.75 * softmax(0.0, 0.0, 3.0) + 0.25 * softmax(2.0, 4.0, 0.0),
    ]
    np.testing.assert_allclose(np.exp(found), mixed, rtol=1e-5)
    assert (teacher.algorithm, teacher.temperature, teacher.num_actions) == ("ENSEMBLE", 1.0, 3)
    assert teacher(OBS).dtype == torch.float32


def test_far_scores_stay_finite() -> None:
    far = make_ensemble([fixed([[1e30, -1e30]] * 2, "DQN"), fixed([[1e30, -1e30]] * 2)], FixedWeights((1.0, 0.0)))
    assert far(OBS).isfinite().all()
    assert far(OBS)[0, 0] == 0.0


def test_confidence_weighs_state_by_state() -> None:
    sure, unsure = [[30.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, math.log(2.0), 0.0]]
    log_p_MBA = torch.tensor([sure, unsure]).log_softmax(dim=-1)
    weights_MB = ConfidenceWeights()(log_p_MBA)
    torch.testing.assert_close(weights_MB.sum(dim=0), torch.ones(2))
    torch.testing.assert_close(weights_MB[:, 0], torch.tensor([1.0, 0.0]), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(weights_MB[:, 1], torch.tensor([0.0, 1.0]), atol=1e-4, rtol=0.0)
    equal = ConfidenceWeights()(torch.zeros(2, 1, 3).log_softmax(dim=-1))
    torch.testing.assert_close(equal, torch.full((2, 1), 0.5))
    # p = (1/4, 1/2, 1/4) has 1.5 log 2 nats of log 3; a uniform rival has none to spare
    between = torch.tensor([[[0.0, math.log(2.0), 0.0]], [[30.0, 0.0, 0.0]]]).log_softmax(dim=-1)
    confidence = 1.0 - 1.5 * math.log(2.0) / math.log(3.0)
    assert float(ConfidenceWeights()(between)[0, 0]) == pytest.approx(confidence / (confidence + 1.0), rel=1e-3)


def test_returns_weigh_by_what_is_above_chance(tmp_path: Path) -> None:
    path = tmp_path / "agent.zip"
    CRITICS["PPO MLP"]().save(path)
    returns = iter((9.3, -0.7, -30.0, -21.0, -20.8))
    net = load_teachers(f"{path}+{path}+{path}", "return", game="Pong", measure=lambda _: next(returns)).net
    assert isinstance(net, Ensemble)
    torch.testing.assert_close(net.weights(torch.zeros(3, 5, 2)), torch.tensor([[0.6], [0.4], [0.0]]))
    with pytest.raises(ValueError, match="none is above random play"):
        load_teachers(f"{path}+{path}", "return", game="Pong", measure=lambda _: next(returns))


def test_disagreement_is_none_between_twins_and_log_2_between_sure_opposites() -> None:
    twins = make_ensemble([fixed([[1.0, 2.0], [0.0, 5.0]])] * 2, FixedWeights((1.0, 1.0)))
    opposites = make_ensemble([fixed([[99.0, 0.0]] * 2), fixed([[0.0, 99.0]] * 2)], FixedWeights((1.0, 1.0)))
    for teacher, expected in ((twins, 0.0), (opposites, math.log(2.0))):
        assert teacher.take_metrics() == {}  # nothing labelled yet
        teacher(OBS)
        metrics = teacher.take_metrics()
        assert metrics.pop("teacher_disagreement") == pytest.approx(expected, abs=1e-6)
        assert metrics == pytest.approx({"teacher_weight_0": 0.5, "teacher_weight_1": 0.5})
        assert teacher.take_metrics() == {}


def test_disagreement_is_the_mean_kl_to_the_mixture() -> None:
    log_p_MBA = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)).log_softmax(dim=-1)
    weights_M = torch.tensor([0.5, 0.3, 0.2])
    p_MBA = log_p_MBA.exp()
    mixture_BA = torch.einsum("m,mba->ba", weights_M, p_MBA)
    kl_MB = (p_MBA * (p_MBA / mixture_BA).log()).sum(dim=-1)
    torch.testing.assert_close(disagreement_B(log_p_MBA, weights_M[:, None]), weights_M @ kl_MB)


def test_disagreement_leaves_broken_states_out() -> None:
    nan = float("nan")
    net = Ensemble([fixed([[99.0, 0.0], [nan, 0.0]]), fixed([[0.0, 99.0], [0.0, 0.0]])], FixedWeights((1.0, 1.0)))
    assert net(OBS)[1].isnan().all()  # the loop sees that this state has no label
    assert net.take_metrics()["teacher_disagreement"] == pytest.approx(math.log(2.0), abs=1e-6)


def test_what_does_not_fit_together_is_refused() -> None:
    two, three = fixed([[0.0, 0.0]]), fixed([[0.0, 0.0, 0.0]], "A2C")
    with pytest.raises(ValueError, match=r"PPO.zip has 2 actions on observations \(4,\), A2C.zip has 3 on \(4,\)"):
        make_ensemble([two, three], FixedWeights((1.0, 1.0)))
    with pytest.raises(ValueError, match="3 teacher weights for 2 teachers"):
        make_ensemble([two, two], FixedWeights((1.0, 1.0, 1.0)))
    for wrong in ((-1.0, 2.0), (0.0, 0.0), (float("nan"), 1.0), (float("inf"), 1.0)):
        with pytest.raises(ValueError, match="give numbers from 0 up"):
            FixedWeights(wrong)


def test_it_is_known_by_its_members_and_weights() -> None:
    one, other = fixed([[0.0, 1.0]], sha256="aa", reported_return=10), fixed([[1.0, 0.0]], "DQN", sha256="bb")
    mixtures = [
        make_ensemble(members, weights)
        for members, weights in (
            ([one, other], FixedWeights((1.0, 1.0))),
            ([one, other], FixedWeights((1.0, 2.0))),
            ([other, one], FixedWeights((1.0, 1.0))),
            ([one, replace(other, sha256="cc")], FixedWeights((1.0, 1.0))),
            ([one, other], ConfidenceWeights()),
        )
    ]
    assert len({m.sha256 for m in mixtures}) == len(mixtures)
    assert make_ensemble([one, other], FixedWeights((1.0, 1.0))).sha256 == mixtures[0].sha256
    assert mixtures[0].ref == "PPO.zip+DQN.zip"
    assert mixtures[0].reported_return is None
    assert [member.sha256 for member in mixtures[3].card.members] == ["aa", "cc"]
    assert (mixtures[0].temperature, mixtures[0].net.temperature) == (1.0, 1.0)  # type: ignore[attr-defined]
    both = make_ensemble([one, replace(other, card=Card(reported_return=20))], FixedWeights((1.0, 1.0)))
    assert both.reported_return is None  # nobody has played the mixture


def test_bundled_teachers_mix_by_reference(pong_frames: Tensor) -> None:
    pytest.importorskip("onnxruntime")
    ppo, dqn = (load_teacher(f"bundled:{name}", game="Pong") for name in ("ppo", "dqn"))
    for weights, kind in (("equal", FixedWeights), ("return", FixedWeights), ("confidence", ConfidenceWeights)):
        teacher = load_teachers("bundled:ppo+bundled:dqn", weights, game="Pong")
        assert isinstance(teacher.net, Ensemble)
        assert isinstance(teacher.net.weights, kind)
        assert teacher.card.game == "Pong"
        assert teacher.to("cpu").num_actions == 6
    mixture = load_teachers("bundled:ppo+bundled:dqn", "0.7,0.3", game="Pong")
    expected = 0.7 * ppo(pong_frames).softmax(dim=-1) + 0.3 * (dqn(pong_frames) / 0.01).softmax(dim=-1)
    torch.testing.assert_close(mixture(pong_frames).exp(), expected, atol=1e-5, rtol=1e-4)
    net = mixture.net
    assert isinstance(net, Ensemble)
    assert net.num_parameters == 2 * 1_687_206
    assert net.num_macs is not None
    assert 2 * 9.3e6 < net.num_macs < 2 * 9.4e6
    metrics = net.take_metrics()
    assert 0.0 < metrics["teacher_disagreement"] < math.log(2.0)
    assert [metrics["teacher_weight_0"], metrics["teacher_weight_1"]] == pytest.approx([0.7, 0.3])
    compiled = compile_policy(mixture, pong_frames)
    assert isinstance(compiled.session, Ensemble)
    assert all(isinstance(t.session, OnnxPolicy) for t in compiled.session.teachers)
    assert compiled.backend.startswith("onnxruntime")
    net.take_metrics()
    torch.testing.assert_close(compiled(pong_frames).exp(), expected, atol=1e-4, rtol=1e-3)
    again = net.take_metrics()  # one count for both
    assert again["teacher_disagreement"] == pytest.approx(metrics["teacher_disagreement"], abs=1e-4)


def test_references_with_a_plus(tmp_path: Path) -> None:
    path = tmp_path / "a+b.zip"
    shutil.copy(load_teacher("bundled:ppo", game="Pong").path, path)
    assert load_teachers(str(path)).algorithm == "PPO"
    assert load_teachers("bundled:ppo", game="Pong").algorithm == "PPO"
    with pytest.raises(ValueError, match="is for several teachers"):
        load_teachers("bundled:ppo", "0.5,0.5", game="Pong")
    with pytest.raises(ValueError, match=r"no teacher before or after a \+"):
        load_teachers("bundled:ppo+", game="Pong")
    with pytest.raises(ValueError, match=r"give equal, return, confidence, or numbers"):
        load_teachers("bundled:ppo+bundled:dqn", "most", game="Pong")
    with pytest.raises(ValueError, match="3 teacher weights for 2 teachers"):
        load_teachers("bundled:ppo+bundled:dqn", "1,1,1", game="Pong")
    with pytest.raises(ValueError, match="no reported return"):
        load_teachers(f"{path.rename(tmp_path / 'a.zip')}+bundled:dqn", "return", game="Pong")


CRITICS: dict[str, Callable[[], BaseAlgorithm]] = {
    "PPO MLP": lambda: PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, seed=1, device="cpu"),
    "A2C MLP": lambda: A2C("MlpPolicy", "CartPole-v1", seed=1, device="cpu"),
    "other layers": lambda: A2C(
        "MlpPolicy", "CartPole-v1", seed=1, device="cpu", policy_kwargs={"net_arch": {"pi": [], "vf": [16, 8]}}
    ),
    "none hidden": lambda: A2C(
        "MlpPolicy", "CartPole-v1", seed=1, device="cpu", policy_kwargs={"net_arch": {"pi": [16, 8], "vf": []}}
    ),
    "linear": lambda: A2C("MlpPolicy", "CartPole-v1", seed=1, device="cpu", policy_kwargs={"net_arch": []}),
}


def perturb(model: Any) -> None:
    """Changes every weight and bias, so that no layer is zero and no two are equal."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.policy.parameters():
            weight += 0.3 * weight.std(correction=0).clamp(min=0.1) * torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("name", CRITICS)
def test_values_are_those_of_sb3(name: str, tmp_path: Path) -> None:
    model = CRITICS[name]()
    perturb(model)
    model.save(tmp_path / "agent.zip")
    obs = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    teacher, policy = load_teacher(tmp_path / "agent.zip"), model.policy
    assert "critic" not in teacher.__dict__  # not read before it is asked for
    expected_B = policy.predict_values(obs).detach().squeeze(1)  # type: ignore[operator]
    assert expected_B.std() > 0.1
    torch.testing.assert_close(teacher.values(obs), expected_B, atol=1e-4, rtol=0.0)
    seen = teacher.net.activations(obs)  # type: ignore[attr-defined]
    torch.testing.assert_close(teacher.values(obs, seen), expected_B, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("separate", [False, True])
def test_values_of_frames_are_those_of_sb3(separate: bool, tmp_path: Path, pong_frames: Tensor) -> None:
    path = load_teacher("bundled:ppo", game="Pong").path
    model = PPO.load(path, device="cpu")
    if separate:
        kwargs: dict[str, Any] = {"share_features_extractor": False, "net_arch": []}
        policy = type(model.policy)(model.observation_space, model.action_space, lambda _: 0.0, **kwargs)
        model.policy, model.policy_kwargs = policy, {"share_features_extractor": False}
        perturb(model)
        path = tmp_path / "agent.zip"
        model.save(path)
    teacher = load_teacher(path)
    expected_B = model.policy.predict_values(pong_frames).detach().squeeze(1)
    torch.testing.assert_close(teacher.values(pong_frames), expected_B, atol=1e-4, rtol=1e-4)
    assert isinstance(teacher.critic, ConvNet if separate else torch.nn.Linear)
    assert expected_B.std() > 0.01


def test_the_value_of_q_values_is_the_best_one(pong_frames: Tensor) -> None:
    teacher = load_teacher("bundled:dqn", game="Pong")
    model = DQN.load(teacher.path, device="cpu", custom_objects={"buffer_size": 1})
    with torch.no_grad():
        expected_B = model.q_net(pong_frames).max(dim=1).values
    torch.testing.assert_close(teacher.values(pong_frames), expected_B, atol=1e-4, rtol=1e-4)
    assert isinstance(teacher.net, ConvNet)
    torch.testing.assert_close(teacher.values(pong_frames, teacher.net.activations(pong_frames)), expected_B)


def test_a_teacher_without_a_critic_says_so(tmp_path: Path) -> None:
    mixture = make_ensemble([fixed([[0.0, 1.0]])] * 2, FixedWeights((1.0, 1.0)))
    for teacher in (fixed([[0.0, 1.0]]), fixed([[0.0, 1.0]], "ONNX"), mixture):
        with pytest.raises(ValueError, match=r"no critic, .*give another teacher"):
            teacher.values(OBS)
    path = tmp_path / "agent.zip"
    CRITICS["PPO MLP"]().save(path)
    teacher = load_teacher(path)
    CRITICS["A2C MLP"]().save(path)
    with pytest.raises(ValueError, match="changed since it was loaded"):
        teacher.values(OBS)
    assert "value_net.weight" in read_archive(path).tensors


def test_the_critic_moves_with_the_teacher() -> None:
    teacher = load_teacher("bundled:ppo", game="Pong")
    assert next(teacher.critic.parameters()).device.type == "cpu"
    teacher.to("meta")
    assert next(teacher.critic.parameters()).device.type == "meta"


def test_members_need_not_be_archives() -> None:
    """Anything that a `Teacher` holds will do."""
    members = [
        Teacher(make_student((8,), 2, (4,), seed=s).net, "PPO", Path("s.zip"), str(s), ref=str(s)) for s in (0, 1)
    ]
    assert make_ensemble(members, ConfidenceWeights())(torch.randn(3, 4)).exp().sum(dim=1).allclose(torch.ones(3))
