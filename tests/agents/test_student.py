"""Students: sizes, weights by seed, files, SB3's `predict`, and files that are damaged or hostile."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecFrameStack
from torch import nn

from policykd.agents.card import Provenance
from policykd.agents.networks import ConvNet, num_macs, num_parameters
from policykd.agents.student import (
    SIZES,
    Shape,
    Size,
    Student,
    init_student,
    load_student,
    make_student,
    save_student,
    student_shape,
)
from policykd.envs.atari import make_atari
from policykd.io.files import BadFile

# Of each size, with A actions, by hand: outputs of a convolution times what it sees for each, then the dense layers.
_MACS: dict[Size, Callable[[int], int]] = {
    "100%": lambda A: 400 * 32 * 256 + 81 * 64 * 512 + 49 * 64 * 576 + 3136 * 512 + 512 * A,
    "25%": lambda A: 400 * 16 * 256 + 81 * 32 * 256 + 49 * 32 * 288 + 1568 * 256 + 256 * A,
    "7%": lambda A: 400 * 16 * 256 + 81 * 16 * 256 + 49 * 16 * 144 + 784 * 128 + 128 * A,
    "4%": lambda A: 400 * 16 * 256 + 81 * 16 * 256 + 49 * 16 * 144 + 784 * 64 + 64 * A,
    "1%": lambda A: 400 * 8 * 256 + 81 * 8 * 128 + 49 * 8 * 72 + 392 * 32 + 32 * A,
    "0.3%": lambda A: 400 * 4 * 256 + 81 * 8 * 64 + 49 * 8 * 72 + 392 * 8 + 8 * A,
    "0.1%": lambda A: 400 * 2 * 256 + 81 * 4 * 32 + 49 * 4 * 36 + 196 * 4 + 4 * A,
    "narrow": lambda A: 400 * 4 * 256 + 81 * 16 * 64 + 49 * 16 * 144 + 784 * 128 + 128 * A,
    "strided": lambda A: 144 * 16 * 196 + 25 * 16 * 256 + 9 * 16 * 144 + 144 * 128 + 128 * A,
    "depthwise": lambda A: 400 * 8 * 64 + 400 * 8 * 8 + 81 * 16 * 128 + 49 * 16 * 144 + 784 * 64 + 64 * A,
    "half": lambda A: 400 * 8 * 64 + 81 * 16 * 128 + 49 * 16 * 144 + 784 * 64 + 64 * A,
    "impala": lambda A: (
        (82**2 * 4 * 36 + 4 * 41**2 * 4 * 36)
        + (41**2 * 8 * 36 + 4 * 21**2 * 8 * 72)
        + (21**2 * 8 * 72 + 4 * 11**2 * 8 * 72)
        + (968 * 64 + 64 * A)
    ),
}


def documented() -> dict[str, list[str]]:
    """Returns the rows of the table in docs/students.md by the sizes' names."""
    lines = (Path(__file__).parents[2] / "docs" / "students.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_the_documented_ones(size: Size) -> None:
    design, widths, units, *counts = documented()[size][:7]
    assert SIZES[size] == (design, tuple(map(int, widths.split("-"))), int(units))
    at_18, at_6, macs_at_18, macs_at_6 = (int(count.replace(",", "")) for count in counts)
    for num_actions, parameters, macs in ((18, at_18, macs_at_18), (6, at_6, macs_at_6)):
        student = make_student(size, num_actions)
        assert num_parameters(student) == parameters
        assert num_macs(student, (4, 84, 84)) == macs == _MACS[size](num_actions)


def test_the_document_has_every_size_and_the_papers_counts() -> None:
    """Rusu et al. (2015), table 1, at 18 actions."""
    assert list(documented()) == list(SIZES)
    paper: dict[Size, int] = {"25%": 427_874, "7%": 113_346, "4%": 61_954}
    assert {size: num_parameters(make_student(size, 18)) for size in paper} == paper


def test_a_low_rank_layer_costs_what_its_factors_cost() -> None:
    plain, factored = make_student("7%", 6), init_student(replace(student_shape("7%", 6), rank=8))
    assert num_parameters(plain) - num_parameters(factored) == 784 * 128 - 8 * (784 + 128)
    assert num_macs(factored, (4, 84, 84)) == _MACS["7%"](6) - 784 * 128 + 8 * (784 + 128)
    assert factored.net.num_features == 128


def test_the_input_scaling_is_that_of_the_pixels() -> None:
    frames = torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8)
    student = make_student("7%", 6)
    assert isinstance(student.net, ConvNet)
    student.fit_input_normalization(frames[:, -1])
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
    student.fit_input_normalization(torch.randint(0, 256, (9, 84, 84), dtype=torch.uint8))
    save_student(student, tmp_path, Provenance(game="Pong"))
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
    save_student(valued, tmp_path)
    assert torch.equal(load_student(tmp_path).values(obs), values_B)
    with pytest.raises(ValueError, match="no value head"):
        plain.values(obs)


@pytest.mark.parametrize(("size", "obs_shape"), [("1%", (4, 84, 84)), ((8,), (4,))])
def test_a_temperature_divides_the_networks_scores(size: Size, obs_shape: tuple[int, ...], tmp_path: Path) -> None:
    plain, sharp = (make_student(size, 6, obs_shape, seed=3, temperature=t) for t in (1.0, 0.01))
    obs = torch.randint(0, 256, (5, *obs_shape), dtype=torch.uint8 if len(obs_shape) == 3 else torch.float32)
    torch.testing.assert_close(sharp(obs), 100.0 * plain(obs), atol=1e-3, rtol=1e-4)
    assert torch.equal(sharp.activations(obs).outputs_BA, sharp(obs))
    torch.testing.assert_close(sharp.folded_net()(obs), sharp(obs), atol=1e-3, rtol=1e-4)
    assert torch.equal(sharp.net(obs), plain(obs))  # folding is done on a copy
    assert plain.folded_net() is plain.net
    assert (sharp.shape.temperature, sharp.temperature) == (0.01, 1.0)  # its logits need no further division
    save_student(sharp, tmp_path)
    assert torch.equal(load_student(tmp_path)(obs), sharp(obs))
    for unplayable in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature must be positive"):
            make_student(size, 6, obs_shape, temperature=unplayable)


def test_what_an_older_reader_would_play_wrongly_says_so(tmp_path: Path) -> None:
    """A plain student's card is what it always was; another is of format 2, which the first readers refuse."""
    card = tmp_path / "student.json"
    save_student(make_student("1%", 6), tmp_path)
    plain = json.loads(card.read_text())
    assert plain["format"] == 1
    for student in (make_student("1%", 6, value=True), make_student("1%", 6, temperature=0.01)):
        save_student(student, tmp_path)
        assert json.loads(card.read_text())["format"] == 2
    low_rank = init_student(replace(student_shape("1%", 6), rank=2))
    for student in (make_student("half", 6), low_rank, Student.of(nn.Linear(4, 2), 2, (4,))):
        save_student(student, tmp_path)
        assert json.loads(card.read_text())["format"] == 3
    save_student(make_student("1%", 6, temperature=0.01), tmp_path)
    card.write_text(card.read_text().replace('"temperature": 0.01', '"temperature": -1'))
    with pytest.raises(ValueError, match="temperature must be positive, not -1"):
        load_student(tmp_path)


@pytest.mark.parametrize(("size", "rank"), [("half", 0), ("depthwise", 5), ("strided", 0), ("impala", 3), ("0.1%", 0)])
def test_every_design_is_saved_and_loaded(size: Size, rank: int, tmp_path: Path) -> None:
    student = init_student(replace(student_shape(size, 6), value=True, rank=rank), seed=3)
    obs = torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    student.fit_input_normalization(obs[:, -1])
    assert student.net.scale == obs[:, -1].float().std()
    save_student(student, tmp_path)
    loaded = load_student(tmp_path)
    assert torch.equal(loaded(obs), student(obs))
    assert torch.equal(loaded.values(obs), student.values(obs))
    assert torch.equal(loaded.activations(obs).outputs_BA, student(obs))


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("design", "whole", "invalid"),
        ("design", "impala", "needs .* bytes of weights"),
        ("rank", -5, "give a positive one"),
        ("rank", 2**40, "not a student|needs .* bytes"),
        ("widths", [8, 8], "design nature has 3 convolutions, not 2 widths"),
        ("widths", [60_000, 60_000, 60_000], "needs .* bytes of weights"),
        ("widths", [], "no convolutions for observations"),
        ("hidden", [10**9], "invalid"),
        ("hidden", [32, 32], "needs .* bytes|not the tensors"),
        ("num_actions", 0, "invalid"),
        ("obs_shape", [10**6], "invalid"),
        ("temperature", "NaN", "temperature must be positive"),
        ("module", "\x1b[31m" * 50, "invalid"),
        ("module", "\x1b[31m", r"a student of your own module; .*\\x1b"),
    ],
)
def test_a_hostile_shape_is_refused_before_memory_is_taken(
    field: str, value: object, reason: str, tmp_path: Path
) -> None:
    save_student(make_student("1%", 6), tmp_path)
    path = tmp_path / "student.json"
    content = json.loads(path.read_text())
    content["shape"][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"^{tmp_path}.*({reason})") as raised:
        load_student(tmp_path)
    assert str(raised.value).isprintable()


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
    with pytest.raises(ValueError, match=r"choose from 100%, 25%, 7%, 4%, 1%, 0\.3%, 0\.1%, narrow, strided, depth"):
        make_student("9%", 6)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is for frames"):
        make_student("7%", 2, (4,))
    with pytest.raises(ValueError, match="design half has 3 convolutions, not 2 widths"):
        Student(Shape((8, 8), (8,), 6, (4, 84, 84), design="half"))


def test_a_damaged_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="give the folder of a finished run"):
        load_student(tmp_path)
    save_student(make_student("1%", 6), tmp_path)
    weights = tmp_path / "student.safetensors"
    card = tmp_path / "student.json"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(BadFile, match=r"not the file that student\.json describes"):
        load_student(tmp_path)
    weights.write_bytes(good)
    kept = card.read_text()
    card.write_text(card.read_text().replace('"format": 1', '"format": 5'))
    with pytest.raises(BadFile, match="format 5 is unknown to this policykd, update it"):
        load_student(tmp_path)
    for head in ("[0, 0]", "[6]", "[]"):
        card.write_text(json.dumps(json.loads(kept) | {"heads": {"Pong": json.loads(head)}}))
        with pytest.raises(BadFile, match=r"heads: Pong has .*, expected different ones of 6 outputs"):
            load_student(tmp_path)
    card.write_text("{")
    with pytest.raises(BadFile, match=r"student.json: invalid \("):
        load_student(tmp_path)
    card.unlink()
    os.mkfifo(card)
    with pytest.raises(BadFile, match="not a regular file"):
        load_student(tmp_path)


def test_nothing_that_is_written_is_a_pickle(tmp_path: Path) -> None:
    save_student(make_student("1%", 6), tmp_path)
    content = (tmp_path / "student.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])  # a length, JSON, then numbers alone
    assert {entry["dtype"] for entry in header.values()} == {"F32"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student.json", "student.safetensors"]


def test_the_parity_env_is_what_a_student_sees() -> None:
    obs = make_atari("Pong", 2, seed=0).reset()
    assert make_student("1%", 6)(obs).shape == (2, 6)


def test_a_folder_may_be_text(tmp_path: Path) -> None:
    save_student(make_student("1%", 6), str(tmp_path / "s"))
    assert load_student(str(tmp_path / "s")).shape.num_actions == 6
