import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecFrameStack

from policykd.agents.networks import ConvNet, num_macs, num_parameters
from policykd.agents.student import SIZES, Size, load_student, make_student, save_student
from policykd.envs.atari import make_atari


@pytest.mark.parametrize(
    ("size", "with_18_actions", "with_6_actions", "macs"),
    [
        ("25%", 427_874, 424_790, 3.16e6),
        ("7%", 113_346, 111_798, 2.18e6),
        ("4%", 61_954, 61_174, 2.13e6),
        ("1%", 16_842, 16_446, 0.94e6),
    ],
)
def test_sizes_are_those_of_the_paper(size: Size, with_18_actions: int, with_6_actions: int, macs: float) -> None:
    assert num_parameters(make_student(size, 18)) == with_18_actions
    student = make_student(size, 6)
    assert num_parameters(student) == with_6_actions
    assert num_macs(student, (4, 84, 84)) == pytest.approx(macs, rel=0.01)


def test_the_input_scaling_is_that_of_the_pixels() -> None:
    frames = torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8)
    student = make_student("7%", 6)
    assert isinstance(student.net, ConvNet)
    student.centre_on(frames[:, -1])
    assert student.net.centre == frames[:, -1].float().median()
    assert student.net.scale == frames[:, -1].float().std()


def test_weights_run_channels_last_and_scores_are_float32() -> None:
    student = make_student("7%", 6)
    assert isinstance(student.net, ConvNet)
    assert student.net.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert student(torch.zeros(2, 4, 84, 84, dtype=torch.uint8)).dtype == torch.float32


def test_a_seed_decides_the_weights() -> None:
    a, b, c = (make_student("1%", 6, seed=s) for s in (0, 0, 1))
    assert all((x == y).all() for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not torch.equal(a.get_parameter("net.dense.0.weight"), c.get_parameter("net.dense.0.weight"))


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    student = make_student("4%", 6, seed=3)
    student.centre_on(torch.randint(0, 256, (9, 84, 84), dtype=torch.uint8))
    save_student(student, tmp_path, {"game": "Pong"})
    obs = torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    for where in (tmp_path, tmp_path / "student.json"):
        assert (load_student(where)(obs) == student(obs)).all()
    with safe_open(tmp_path / "student.safetensors", "pt") as file:
        assert "net.conv1.weight" in file.keys()  # noqa: SIM118
    assert json.loads((tmp_path / "student.json").read_text())["game"] == "Pong"


def test_a_value_head_leaves_the_policy_as_it_is(tmp_path: Path) -> None:
    plain, valued = make_student("1%", 6, seed=3), make_student("1%", 6, seed=3, value=True)
    obs = torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    assert torch.equal(plain(obs), valued(obs))
    assert num_parameters(valued) == num_parameters(plain) == 16_446
    assert sum(p.numel() for p in valued.parameters()) == 16_446 + 33
    values_B, seen = valued.values(obs), valued.activations(obs)
    assert valued.value_head is not None
    expected_B = seen.hidden_BF @ valued.value_head.weight[0] + valued.value_head.bias
    torch.testing.assert_close(values_B, expected_B)
    assert values_B.std() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert valued.values(obs).dtype == torch.float32
    save_student(valued, tmp_path, {})
    assert torch.equal(load_student(tmp_path).values(obs), values_B)
    with pytest.raises(ValueError, match="no value head"):
        plain.values(obs)


@pytest.mark.parametrize(("size", "obs_shape"), [("1%", (4, 84, 84)), ((8,), (4,))])
def test_a_temperature_divides_the_networks_scores(size: Size, obs_shape: tuple[int, ...], tmp_path: Path) -> None:
    plain, sharp = (make_student(size, 6, obs_shape, seed=3, temperature=t) for t in (1.0, 0.01))
    obs = torch.randint(0, 256, (5, *obs_shape), dtype=torch.uint8 if len(obs_shape) == 3 else torch.float32)
    torch.testing.assert_close(sharp(obs), 100.0 * plain(obs), atol=1e-3, rtol=1e-4)
    assert torch.equal(sharp.activations(obs).scores_BA, sharp(obs))
    torch.testing.assert_close(sharp.folded_net()(obs), sharp(obs), atol=1e-3, rtol=1e-4)
    assert torch.equal(sharp.net(obs), plain(obs))  # folding is done on a copy
    assert plain.folded_net() is plain.net
    save_student(sharp, tmp_path, {})
    assert torch.equal(load_student(tmp_path)(obs), sharp(obs))
    for unplayable in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature must be positive"):
            make_student(size, 6, obs_shape, temperature=unplayable)


def test_what_an_older_reader_would_play_wrongly_says_so(tmp_path: Path) -> None:
    """A plain student's card is what it always was; another is of format 2, which the first readers refuse."""
    card = tmp_path / "student.json"
    save_student(make_student("1%", 6), tmp_path, {})
    plain = json.loads(card.read_text())
    assert (plain["format"], set(plain["shape"])) == (1, {"widths", "hidden", "num_actions", "obs_shape"})
    for student in (make_student("1%", 6, value=True), make_student("1%", 6, temperature=0.01)):
        save_student(student, tmp_path, {})
        assert json.loads(card.read_text())["format"] == 2
    card.write_text(card.read_text().replace('"temperature": 0.01', '"temperature": -1'))
    with pytest.raises(ValueError, match="not a student of policykd"):
        load_student(tmp_path)


def test_predict_has_sb3s_signature() -> None:
    student = make_student("1%", 6)
    obs = np.random.default_rng(0).integers(0, 256, (7, 4, 84, 84), dtype=np.uint8)
    best, state = student.predict(obs, deterministic=True)
    assert best.shape == (7,)
    assert state is None
    assert (student.predict(np.moveaxis(obs, 1, -1), deterministic=True)[0] == best).all()
    one, _ = student.predict(obs[0], deterministic=True)
    assert one == best[0]
    torch.manual_seed(0)
    drawn = {int(student.predict(obs[0])[0]) for _ in range(100)}
    assert len(drawn) > 1  # an untrained student is nearly uniform


@pytest.mark.parametrize(
    "obs", [np.zeros((4, 80, 80), np.uint8), np.zeros((1, 1, 4, 84, 84), np.uint8), np.zeros((4, 84, 84))]
)
def test_a_wrong_observation_says_what_is_expected(obs: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected"):
        make_student("1%", 6).predict(obs)


def test_sb3s_evaluate_policy_accepts_a_student() -> None:
    env = VecFrameStack(make_atari_env("PongNoFrameskip-v4", n_envs=2, seed=0), 4)
    mean, _ = evaluate_policy(make_student("1%", 6), env, n_eval_episodes=2)  # type: ignore[arg-type]
    assert isinstance(mean, float)
    assert -21 <= mean <= -15


def test_sb3s_evaluate_policy_accepts_an_mlp_student() -> None:
    env = make_vec_env("CartPole-v1", n_envs=2, seed=0)
    mean, _ = evaluate_policy(make_student((16,), 2, (4,)), env, n_eval_episodes=4)  # type: ignore[arg-type]
    assert isinstance(mean, float)
    assert 8 <= mean <= 500


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="choose from 25%, 7%, 4%, 1%"):
        make_student("9%", 6)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is for frames"):
        make_student("7%", 2, (4,))
    assert set(SIZES) == {"25%", "7%", "4%", "1%"}


def test_a_damaged_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give the folder of a finished run"):
        load_student(tmp_path)
    save_student(make_student("1%", 6), tmp_path, {})
    weights, card = tmp_path / "student.safetensors", tmp_path / "student.json"
    good, says = weights.read_bytes(), card.read_text()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"not the file that student\.json describes"):
        load_student(tmp_path)
    weights.write_bytes(good)
    card.write_text(says.replace('"format": 1', '"format": 3'))
    with pytest.raises(ValueError, match="student of format 3"):
        load_student(tmp_path)
    card.write_text("{")
    with pytest.raises(ValueError, match="not a student"):
        load_student(tmp_path)


def test_nothing_that_is_written_is_a_pickle(tmp_path: Path) -> None:
    save_student(make_student("1%", 6), tmp_path, {})
    content = (tmp_path / "student.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])  # a length, JSON, then numbers alone
    assert {entry["dtype"] for entry in header.values()} == {"F32"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student.json", "student.safetensors"]


def test_the_parity_env_is_what_a_student_sees() -> None:
    obs = make_atari("Pong", 2, seed=0).reset()
    assert make_student("1%", 6)(obs).shape == (2, 6)
