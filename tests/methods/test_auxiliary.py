"""What is learned beside the scores: what is asked of the teacher, what is compared with it, and that it is learned."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from stable_baselines3 import A2C
from torch import Tensor, nn

from policykd.agents.ensemble import load_teachers
from policykd.agents.networks import ConvNet
from policykd.agents.student import Size, Student, make_student
from policykd.agents.teacher import Teacher, load_teacher
from policykd.envs.atari import make_atari
from policykd.legacy.auxiliary import Beyond, BeyondLogits
from policykd.legacy.feature_losses import (
    attention_loss_B,
    attention_maps,
    hint_loss_B,
    relational_loss_B,
    shift_loss_B,
    shifted_frames,
    similarity_loss_B,
    value_loss_B,
)
from policykd.legacy.schedules import Linear, at

ALL = BeyondLogits(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def frames() -> Tensor:
    envs = make_atari("Pong", 8, seed=0)
    envs.reset()
    generator = torch.Generator().manual_seed(0)
    return torch.cat([envs.step(torch.randint(6, (8,), generator=generator)).obs for _ in range(12)])[-48:]


@pytest.fixture(scope="module")
def ppo() -> Teacher:
    return load_teacher("bundled:ppo", game="Pong")


@pytest.fixture(scope="module")
def student() -> Student:
    return make_student("1%", 6, value=True, seed=1)


@pytest.fixture
def cart_pole(tmp_path: Path) -> Teacher:
    """ReLU as the students have: the states that it finds opposite, a network without signs cannot."""
    kwargs = {"activation_fn": nn.ReLU}
    A2C("MlpPolicy", "CartPole-v1", seed=1, device="cpu", policy_kwargs=kwargs).save(tmp_path / "agent.zip")
    return load_teacher(tmp_path / "agent.zip")


def shifts(num: int) -> Tensor:
    return torch.randint(-4, 5, (num, 2), generator=torch.Generator().manual_seed(0))


def calls(layer: nn.Module) -> list[int]:
    """Returns a list that grows by one each time a layer is run."""
    seen = list[int]()
    layer.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    return seen


def test_terms_are_the_formulas_of_the_rows_that_were_asked_for(frames: Tensor, ppo: Teacher, student: Student) -> None:
    assert isinstance(ppo.net, ConvNet)
    beyond = Beyond(ALL, student, ppo)
    beyond.grow(50)
    where = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:48]
    for part in torch.arange(48).split(20):
        beyond.label(frames[part], where[part])
    picked = torch.tensor([3, 40, 17, 17, 5, 30, 47, 0])
    obs, shifts_B2 = frames[picked], shifts(8)
    scores_BA, found = beyond.terms(obs, where[picked], shifts_B2, student, ALL)
    ours, theirs = student.activations(obs), ppo.net.activations(obs)
    assert beyond.projection is not None
    expected = {
        "value": value_loss_B(student.values(obs), ppo.values(obs)),
        "hint": hint_loss_B(beyond.projection(ours.hidden_BF), theirs.hidden_BF),
        "attention": attention_loss_B(attention_maps(ours.maps), attention_maps(theirs.maps), 3),
        "similarity": similarity_loss_B(ours.hidden_BF, theirs.hidden_BF),
        "relational": relational_loss_B(ours.hidden_BF, theirs.hidden_BF),
        "shift": shift_loss_B(ours.outputs_BA, student(shifted_frames(obs, shifts_B2))),
    }
    assert torch.equal(scores_BA, student(obs))
    assert found.keys() == expected.keys()
    for name, loss_B in expected.items():
        assert loss_B.std() > 0, name
        torch.testing.assert_close(found[name], loss_B, atol=1e-4, rtol=2e-3, msg=name)  # labels in float16


@pytest.mark.parametrize("name", ALL.active)
def test_only_what_weighs_is_computed(name: str, frames: Tensor, ppo: Teacher) -> None:
    config, fresh = BeyondLogits(**{name: 0.5}), make_student("1%", 6, value=name == "value")
    beyond = Beyond(config, fresh, ppo)
    beyond.grow(8)
    rows = torch.arange(8)
    beyond.label(frames[:8], rows)
    kept = {n for n, rows_N in beyond.named_buffers() if rows_N.numel()}
    kinds = {"value": {"values_N1"}, "attention": {"attention_NP"}, "shift": set()}
    assert kept == kinds.get(name, {"hidden_NF"})
    assert all(rows_N.isfinite().all() for rows_N in beyond.buffers())
    assert list(beyond.terms(frames[:8], rows, shifts(8), fresh, config)[1]) == [name]
    assert beyond.terms(frames[:8], rows, shifts(8), fresh, BeyondLogits())[1] == {}
    assert [n for n, _ in beyond.named_parameters()] == list(beyond.state_dict())
    assert bool(list(beyond.parameters())) == (name == "hint")


def test_a_state_costs_one_pass_of_each_network(frames: Tensor) -> None:
    teacher, fresh = load_teacher("bundled:ppo", game="Pong"), make_student("1%", 6, value=True)
    assert isinstance(teacher.net, ConvNet)
    assert isinstance(fresh.net, ConvNet)
    beyond = Beyond(ALL, fresh, teacher)
    beyond.grow(8)
    asked, passed = calls(teacher.net.conv2), calls(fresh.net.conv2)
    beyond.label(frames[:8], torch.arange(8))
    assert asked == [8]
    beyond.terms(frames[:8], torch.arange(8), shifts(8), fresh, ALL)
    assert (asked, passed) == ([8], [8, 8])  # the second is of the shifted frames
    beyond.terms(frames[:8], torch.arange(8), shifts(8), fresh, BeyondLogits(value=1.0, hint=1.0))
    assert passed == [8, 8, 8]


def test_what_was_not_labelled_is_no_number(frames: Tensor, ppo: Teacher, student: Student) -> None:
    config = BeyondLogits(value=1.0, hint=1.0, attention=1.0)
    beyond = Beyond(config, student, ppo)
    beyond.grow(4)
    beyond.label(frames[:4], torch.arange(4))
    before = [rows_N.clone() for rows_N in beyond.buffers()]
    beyond.grow(8)
    assert all(torch.equal(rows_N[:4], old) for rows_N, old in zip(beyond.buffers(), before, strict=True))
    beyond.grow(2)
    assert len(beyond.values_N1) == 8
    for loss_B in beyond.terms(frames[:8], torch.arange(8), shifts(8), student, config)[1].values():
        assert loss_B.isfinite().tolist() == [True] * 4 + [False] * 4


def test_threads_share_it(frames: Tensor, ppo: Teacher, student: Student) -> None:
    beyond, rows = Beyond(ALL, student, ppo), torch.arange(48)
    beyond.grow(48)
    beyond.label(frames, rows)

    def losses(part: Tensor) -> dict[str, Tensor]:
        return beyond.terms(frames[part], part, shifts(48)[part], student, ALL)[1]

    parts = rows.split(12)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(losses, parts))
    for part, together in zip(parts, found, strict=True):
        for name, loss_B in losses(part).items():
            assert torch.equal(loss_B, together[name])


def test_convolutions_in_bfloat16_give_losses_in_float32(frames: Tensor, ppo: Teacher, student: Student) -> None:
    beyond, rows = Beyond(ALL, student, ppo), torch.arange(16)
    beyond.grow(16)
    beyond.label(frames[:16], rows)
    exact = beyond.terms(frames[:16], rows, shifts(16), student, ALL)[1]
    with torch.autocast("cpu", torch.bfloat16):
        scores_BA, found = beyond.terms(frames[:16], rows, shifts(16), student, ALL)
    assert scores_BA.dtype == torch.float32
    for name, loss_B in found.items():
        assert loss_B.dtype == torch.float32
        torch.testing.assert_close(loss_B, exact[name], atol=0.02, rtol=0.2)


def test_a_schedule_counts_as_learned() -> None:
    config = BeyondLogits(hint=Linear(1.0, 0.0), shift=0.1)
    assert config.active == ("hint", "shift")
    assert at(config, 0.25) == BeyondLogits(hint=0.75, shift=0.1)
    assert BeyondLogits().active == ()
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="the weight of attention is"):
            BeyondLogits(attention=wrong)


def test_a_seed_decides_the_projection(ppo: Teacher, student: Student) -> None:
    one, same, other = (Beyond(BeyondLogits(hint=1.0), student, ppo, seed=s).state_dict() for s in (0, 0, 1))
    assert torch.equal(one["projection.weight"], same["projection.weight"])
    assert not torch.equal(one["projection.weight"], other["projection.weight"])


@pytest.mark.parametrize(("name", "share"), [("value", 0.05), ("hint", 0.1), ("similarity", 0.4), ("relational", 0.4)])
def test_what_the_teacher_knows_is_learned(name: str, share: float, cart_pole: Teacher) -> None:
    """Each term falls when it is trained, with the projection where it has one."""
    config, rows = BeyondLogits(**{name: 1.0}), torch.arange(128)
    fresh, obs = (
        make_student((32,), 2, (4,), value=True),
        torch.randn(128, 4, generator=torch.Generator().manual_seed(0)),
    )
    beyond = Beyond(config, fresh, cart_pole)
    beyond.grow(128)
    beyond.label(obs, rows)
    optimizer = torch.optim.Adam([*fresh.parameters(), *beyond.parameters()], lr=1e-2)
    history = []
    for _ in range(150):
        _, losses = beyond.terms(obs, rows, torch.zeros(128, 2, dtype=torch.int64), fresh, config)
        loss = losses[name].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    print(name, history[0], history[-1])
    assert history[-1] < share * history[0]
    if name == "value":
        with torch.no_grad():
            assert torch.corrcoef(torch.stack([fresh.values(obs), cart_pole.values(obs)]))[0, 1] > 0.95


def test_q_values_give_values_and_features(frames: Tensor, student: Student) -> None:
    teacher = load_teacher("bundled:dqn", game="Pong")
    beyond = Beyond(ALL, student, teacher)
    beyond.grow(8)
    beyond.label(frames[:8], torch.arange(8))
    torch.testing.assert_close(beyond.values_N1.squeeze(1), teacher(frames[:8]).amax(dim=1))


def test_what_is_not_there_is_said(cart_pole: Teacher, ppo: Teacher, student: Student) -> None:
    plain, mlp = make_student("1%", 6), make_student((8,), 2, (4,), value=True)
    mixture = load_teachers("bundled:ppo+bundled:dqn", game="Pong")
    with pytest.raises(ValueError, match=r"needs a student with a value head"):
        Beyond(BeyondLogits(value=1.0), plain, ppo)
    with pytest.raises(ValueError, match=r"bundled:ppo\+bundled:dqn: no critic"):
        Beyond(BeyondLogits(value=1.0), student, mixture)
    with pytest.raises(ValueError, match=r"beyond hint, similarity needs the teacher's features: bundled:ppo\+bundled"):
        Beyond(BeyondLogits(hint=1.0, similarity=1.0), student, mixture)
    with pytest.raises(ValueError, match="needs a teacher and a student with convolutions"):
        Beyond(BeyondLogits(attention=1.0), mlp, cart_pole)
    with pytest.raises(ValueError, match="a student that sees frames"):
        Beyond(BeyondLogits(shift=1.0), mlp, cart_pole)
    Beyond(BeyondLogits(shift=1.0), plain, mixture)  # asks nothing of the teacher
    with pytest.raises(ValueError, match=r"maps are \(20, 9, 7\) pixels wide as the teacher's, this design's are \(4"):
        Beyond(BeyondLogits(attention=1.0), make_student("impala", 6), ppo)
    with pytest.raises(ValueError, match=r"beyond hint, shift: Linear shows its scores alone; leave it out"):
        Beyond(BeyondLogits(hint=1.0, shift=1.0), Student.of(torch.nn.Linear(4, 2), 2, (4,)), cart_pole)


@pytest.mark.parametrize("size", ["narrow", "depthwise", "half"])
def test_what_a_design_learns_beyond_scores_reaches_its_weights(size: Size, ppo: Teacher, frames: Tensor) -> None:
    """Their maps are of the teacher's sizes; those of a depthwise convolution alone are not maps of the picture yet."""
    config, fresh = BeyondLogits(hint=0.5, attention=0.5), make_student(size, 6, seed=1)
    beyond, rows_B = Beyond(config, fresh, ppo), torch.arange(16)
    beyond.grow(16)
    beyond.label(frames[:16], rows_B)
    shifts_B2 = torch.zeros((16, 2), dtype=torch.int64)
    _, losses = beyond.terms(frames[:16], rows_B, shifts_B2, fresh, config)
    sum(loss_B.mean() for loss_B in losses.values()).backward()  # type: ignore[union-attr]
    untouched = {name for name, p in fresh.named_parameters() if p.grad is None or not p.grad.any()}
    assert untouched == {"net.dense.1.weight", "net.dense.1.bias"}
