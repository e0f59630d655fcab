"""Auxiliary losses: what is computed from the teacher, what is compared with it, and that it is learned."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from stable_baselines3 import A2C
from torch import Tensor, nn

from policykd.agents.networks import ConvNet
from policykd.agents.student import Size, Student, make_student
from policykd.agents.teacher import Teacher, load_teacher, load_teachers
from policykd.envs.atari import make_atari
from policykd.losses import AuxiliaryLossWeights, Batch, ForwardKL
from policykd.methods.auxiliary import AuxiliaryLosses
from policykd.methods.feature_losses import (
    attention_loss_B,
    attention_maps,
    hint_loss_B,
    random_shifts,
    relational_loss_B,
    shift_frames,
    shift_loss_B,
    similarity_loss_B,
    value_loss_B,
)
from policykd.replay import Replay
from policykd.schedules import Linear, Progress, iter_schedules

ALL = AuxiliaryLossWeights(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


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
    """ReLU as the students have: a network without negative outputs cannot be similar to tanh features."""
    kwargs = {"activation_fn": nn.ReLU}
    A2C("MlpPolicy", "CartPole-v1", seed=1, device="cpu", policy_kwargs=kwargs).save(tmp_path / "agent.zip")
    return load_teacher(tmp_path / "agent.zip")


def stored(obs: Tensor, capacity: int = 0, num_actions: int = 6) -> Replay:
    """Returns a buffer whose states are independent observations."""
    replay = Replay(max(capacity, len(obs)), 1, num_actions, tuple(obs.shape[1:]), dtype=obs.dtype)
    replay.frames[1 : 1 + len(obs)] = obs
    replay.size = len(obs)
    return replay


def make_batch(replay: Replay, rows_B: Tensor) -> Batch:
    random_B = torch.randint(2**62, (len(rows_B),), generator=torch.Generator().manual_seed(0))
    return Batch(replay.gather(rows_B), replay.teacher_NA[rows_B], rows_B, 1.0, Progress(0.0), random_B)


def prepared(weights: AuxiliaryLossWeights, student: Student, teacher: Teacher, replay: Replay) -> AuxiliaryLosses:
    losses = AuxiliaryLosses(ForwardKL(), weights, student, teacher)
    losses.prepare(replay, len(replay))
    return losses


def forward_calls(layer: nn.Module) -> list[int]:
    """Returns a list that grows by the batch size at each forward pass of a layer."""
    seen = list[int]()
    layer.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    return seen


def test_each_loss_is_its_formula_on_the_rows_of_the_batch(frames: Tensor, ppo: Teacher, student: Student) -> None:
    assert isinstance(ppo.net, ConvNet)
    replay = stored(frames)
    losses = prepared(ALL, student, ppo, replay)
    batch = make_batch(replay, torch.tensor([3, 40, 17, 17, 5, 30, 47, 0]))
    ours, theirs = student.activations(batch.obs), ppo.net.activations(batch.obs)
    assert losses.projection is not None
    shifted = shift_frames(batch.obs, random_shifts(batch.random_B))
    expected = {
        "value_loss": value_loss_B(student.values(batch.obs), ppo.values(batch.obs)),
        "hint_loss": hint_loss_B(losses.projection(ours.hidden_BF), theirs.hidden_BF),
        "attention_loss": attention_loss_B(attention_maps(ours.maps), attention_maps(theirs.maps), 3),
        "similarity_loss": similarity_loss_B(ours.hidden_BF, theirs.hidden_BF),
        "relational_loss": relational_loss_B(ours.hidden_BF, theirs.hidden_BF),
        "shift_loss": shift_loss_B(ours.outputs_BA, student(shifted)),
    }
    total_B, metrics = losses(student, batch)
    assert expected.keys() < metrics.keys()
    for name, loss_B in expected.items():
        assert loss_B.std() > 0, name
        torch.testing.assert_close(metrics[name], loss_B, atol=1e-4, rtol=2e-3, msg=name)  # labels in float16
    plain_B, _ = ForwardKL()(student, batch)
    torch.testing.assert_close(total_B, plain_B + sum(metrics[name] for name in expected))


@pytest.mark.parametrize("name", ALL.active)
def test_only_what_has_a_weight_is_computed(name: str, frames: Tensor, ppo: Teacher) -> None:
    fresh = make_student("1%", 6, value=name == "value")
    replay = stored(frames[:8])
    losses = prepared(AuxiliaryLossWeights(**{name: 0.5}), fresh, ppo, replay)
    kept = {n for n, rows_N in losses.named_buffers() if rows_N.numel()}
    buffers = {"value": {"teacher_values_N"}, "attention": {"teacher_attention_NP"}, "shift": set()}
    assert kept == buffers.get(name, {"teacher_hidden_NF"})
    assert all(rows_N.isfinite().all() for rows_N in losses.buffers())
    _, metrics = losses(fresh, make_batch(replay, torch.arange(8)))
    assert [n for n in metrics if n.endswith("_loss")] == [f"{name}_loss"]
    assert [n for n, _ in losses.named_parameters()] == list(losses.state_dict())
    assert bool(list(losses.parameters())) == (name == "hint")


def test_a_state_costs_one_pass_of_each_network(frames: Tensor) -> None:
    teacher, fresh = load_teacher("bundled:ppo", game="Pong"), make_student("1%", 6, value=True)
    assert isinstance(teacher.net, ConvNet)
    assert isinstance(fresh.net, ConvNet)
    replay = stored(frames[:8])
    losses = AuxiliaryLosses(ForwardKL(), ALL, fresh, teacher)
    of_teacher, of_student = forward_calls(teacher.net.conv2), forward_calls(fresh.net.conv2)
    losses.prepare(replay, 8)
    losses.prepare(replay, 8)  # labels nothing twice
    assert of_teacher == [256]
    losses(fresh, make_batch(replay, torch.arange(8)))
    assert of_teacher == [256]
    assert of_student == [8, 8]  # the second is of the shifted frames


def test_states_that_are_not_prepared_give_nan_and_earlier_labels_stay(
    frames: Tensor, ppo: Teacher, student: Student
) -> None:
    replay = stored(frames[:8])
    losses = AuxiliaryLosses(ForwardKL(), AuxiliaryLossWeights(value=1.0, hint=1.0, attention=1.0), student, ppo)
    losses.prepare(replay, 4)
    before = [rows_N.clone() for rows_N in losses.buffers()]
    _, metrics = losses(student, make_batch(replay, torch.arange(8)))
    for name in ("value_loss", "hint_loss", "attention_loss"):
        assert metrics[name].isfinite().tolist() == [True] * 4 + [False] * 4
    losses.prepare(stored(frames[:8], capacity=20), 8)
    assert all(torch.equal(rows_N[:4], old[:4]) for rows_N, old in zip(losses.buffers(), before, strict=True))
    assert len(losses.teacher_values_N) == 20


def test_threads_share_it(frames: Tensor, ppo: Teacher, student: Student) -> None:
    replay = stored(frames)
    losses = prepared(ALL, student, ppo, replay)
    batches = [make_batch(replay, part) for part in torch.arange(48).split(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: losses(student, batch)[0], batches))
    for batch, together_B in zip(batches, found, strict=True):
        assert torch.equal(losses(student, batch)[0], together_B)


def test_convolutions_in_bfloat16_give_losses_in_float32(frames: Tensor, ppo: Teacher, student: Student) -> None:
    replay = stored(frames[:16])
    losses = prepared(ALL, student, ppo, replay)
    batch = make_batch(replay, torch.arange(16))
    _, exact = losses(student, batch)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = losses(student, batch)
    for name in (f"{name}_loss" for name in ALL.active):
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], exact[name], atol=0.02, rtol=0.2)


def test_a_weight_with_a_schedule_is_active() -> None:
    weights = AuxiliaryLossWeights(hint=Linear(1.0, 0.0), shift=0.1)
    assert weights.active == ("hint", "shift")
    assert [name for name, _ in iter_schedules(weights)] == ["hint"]
    assert AuxiliaryLossWeights().active == ()
    for invalid in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="the weight of the auxiliary loss attention must be at least 0"):
            AuxiliaryLossWeights(attention=invalid)


def test_a_seed_decides_the_projection(ppo: Teacher, student: Student) -> None:
    def projection(seed: int) -> Tensor:
        losses = AuxiliaryLosses(ForwardKL(), AuxiliaryLossWeights(hint=1.0), student, ppo, seed=seed)
        assert losses.projection is not None
        return losses.projection.weight

    assert torch.equal(projection(0), projection(0))
    assert not torch.equal(projection(0), projection(1))


@pytest.mark.parametrize(("name", "share"), [("value", 0.05), ("hint", 0.1), ("similarity", 0.4), ("relational", 0.4)])
def test_each_loss_falls_when_it_is_trained(name: str, share: float, cart_pole: Teacher) -> None:
    fresh = make_student((32,), 2, (4,), value=True)
    obs = torch.randn(128, 4, generator=torch.Generator().manual_seed(0))
    replay = stored(obs, num_actions=2)
    losses = prepared(AuxiliaryLossWeights(**{name: 1.0}), fresh, cart_pole, replay)
    batch = make_batch(replay, torch.arange(128))
    optimizer = torch.optim.Adam([*fresh.parameters(), *losses.parameters()], lr=1e-2)
    history = []
    for _ in range(150):
        _, metrics = losses(fresh, batch)
        loss = metrics[f"{name}_loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < share * history[0]
    if name == "value":
        with torch.no_grad():
            assert torch.corrcoef(torch.stack([fresh.values(obs), cart_pole.values(obs)]))[0, 1] > 0.95


def test_q_values_give_values_and_features(frames: Tensor, student: Student) -> None:
    teacher = load_teacher("bundled:dqn", game="Pong")
    losses = prepared(ALL, student, teacher, stored(frames[:8]))
    torch.testing.assert_close(losses.teacher_values_N, teacher(frames[:8]).amax(dim=1))


def test_what_a_teacher_or_student_lacks_is_named(cart_pole: Teacher, ppo: Teacher, student: Student) -> None:
    plain, mlp = make_student("1%", 6), make_student((8,), 2, (4,), value=True)
    mixture = load_teachers("bundled:ppo+bundled:dqn", game="Pong")
    own_module = Student.of(torch.nn.Linear(4, 2), 2, (4,))
    cases: list[tuple[dict[str, Any], Student, Teacher, str]] = [
        ({"value": 1.0}, plain, ppo, "needs a value head"),
        ({"value": 1.0}, student, mixture, r"bundled:ppo\+bundled:dqn: no critic"),
        ({"hint": 1.0, "similarity": 1.0}, student, mixture, "losses hint, similarity need the teacher's features"),
        ({"attention": 1.0}, mlp, cart_pole, "needs a teacher and a student with convolutions"),
        ({"shift": 1.0}, mlp, cart_pole, "needs a student of images"),
        ({"attention": 1.0}, make_student("impala", 6), ppo, r"maps are \(20, 9, 7\) pixels wide"),
        ({"hint": 1.0, "shift": 1.0}, own_module, cart_pole, "losses hint, shift need the student's features"),
    ]
    for weights, learner, teacher, reason in cases:
        with pytest.raises(ValueError, match=reason):
            AuxiliaryLosses(ForwardKL(), AuxiliaryLossWeights(**weights), learner, teacher)
    AuxiliaryLosses(ForwardKL(), AuxiliaryLossWeights(shift=1.0), plain, mixture)  # needs nothing of the teacher


@pytest.mark.parametrize("size", ["narrow", "depthwise", "half"])
def test_the_losses_of_a_design_reach_its_weights(size: Size, ppo: Teacher, frames: Tensor) -> None:
    """Their maps have the teacher's sizes; the output of a depthwise convolution alone is not a map yet."""
    fresh = make_student(size, 6, seed=1)
    replay = stored(frames[:16])
    losses = prepared(AuxiliaryLossWeights(hint=0.5, attention=0.5), fresh, ppo, replay)
    _, metrics = losses(fresh, make_batch(replay, torch.arange(16)))
    (metrics["hint_loss"] + metrics["attention_loss"]).mean().backward()
    untouched = {name for name, p in fresh.named_parameters() if p.grad is None or not p.grad.any()}
    assert untouched == {"net.dense.1.weight", "net.dense.1.bias"}
