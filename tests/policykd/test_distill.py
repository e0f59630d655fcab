"""The loop on problems of seconds: it learns, it repeats, it goes on where it stopped."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from policykd.agents.networks import MLP
from policykd.agents.student import make_student
from policykd.distill import Learner, Round, distill, make_learner
from policykd.envs.atari import make_atari
from policykd.envs.gymnasium_envs import GymnasiumEnvs
from policykd.envs.identity import IdentityEnv
from policykd.evaluation import evaluate
from policykd.losses import ActionNLL, ForwardKL, Loss, ReverseKL, ScoreMSE
from policykd.schedules import WarmupCosine
from policykd.states import MixedStates, StateSource, StudentStates, TeacherStates


def identity_teacher(obs: Tensor) -> Tensor:
    return 3.0 * obs


def identity_learner(seed: int = 0) -> Learner:
    return make_learner(make_student((16,), 4, (4,), seed=seed), IdentityEnv(8, 4, seed), capacity=2000, seed=seed)


def run(
    learner: Learner, *, loss: Loss | None = None, states: StateSource | None = None, rounds: int = 8
) -> list[Round]:
    rate = WarmupCosine(2e-2)
    return list(
        distill(
            identity_teacher,
            learner,
            loss=loss or ForwardKL(),
            states=states or MixedStates(),
            learning_rate=rate,
            rounds=rounds,
            states_per_round=160,
            updates_per_round=40,
            batch_size=64,
        )
    )


@pytest.mark.parametrize("states", [TeacherStates(), StudentStates(), MixedStates(), MixedStates(1.0)], ids=repr)
@pytest.mark.parametrize("loss", [ForwardKL(), ReverseKL(), ScoreMSE(), ActionNLL()], ids=repr)
def test_a_student_learns_its_teacher(loss: Loss, states: StateSource) -> None:
    learner = identity_learner()
    last = run(learner, loss=loss, states=states)[-1]
    assert (learner.student(torch.eye(4)).argmax(dim=1) == torch.arange(4)).all()
    assert last.action_agreement > 0.99
    if not isinstance(loss, ActionNLL):
        assert last.kl < 1e-3


def test_a_cold_temperature_makes_a_surer_student() -> None:
    def sureness(temperature: float) -> float:
        learner = identity_learner()
        run(learner, loss=ForwardKL(temperature))
        return float(learner.student(torch.eye(4)).detach().softmax(dim=1).diagonal().mean())

    expected = [float(torch.softmax(3.0 * torch.eye(4) / t, dim=1).diagonal().mean()) for t in (1.0, 0.5)]
    assert [sureness(1.0), sureness(0.5)] == pytest.approx(expected, abs=0.02)


def test_a_run_repeats_bit_for_bit() -> None:
    def measured() -> list[tuple[float, ...]]:
        return [(r.loss, r.kl, r.new_kl, r.grad_norm) for r in run(identity_learner(seed=1), rounds=3)]

    assert measured() == measured()


def test_other_seeds_give_other_runs() -> None:
    assert run(identity_learner(seed=1), rounds=1)[0].loss != run(identity_learner(seed=2), rounds=1)[0].loss


def test_what_a_round_says() -> None:
    rounds = run(identity_learner(), states=MixedStates(0.5), rounds=5)
    assert [r.index for r in rounds] == [0, 1, 2, 3, 4]
    assert [r.num_states for r in rounds] == [160, 320, 480, 640, 800]
    assert [r.num_updates for r in rounds] == [40, 80, 120, 160, 200]
    assert [r.student_fraction for r in rounds] == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0])
    assert all(len(r.episodes) == 160 for r in rounds)
    assert rounds[-1].learning_rate == pytest.approx(0.0)
    p = torch.softmax(torch.tensor([3.0, 0.0, 0.0, 0.0]), dim=0)
    assert rounds[0].teacher_entropy == pytest.approx(float(-(p * p.log()).sum()), rel=1e-5)
    first = rounds[0].episodes
    sampled_share = float(np.mean([e.episodic_return for e in first]))
    assert sampled_share == pytest.approx(float(p[0]), abs=0.1)  # the teacher played this round, sampled


def test_the_loss_is_not_finite() -> None:
    def broken(student_BA: Tensor, teacher_BA: Tensor) -> Tensor:
        return student_BA.sum(dim=1) * float("nan")

    with pytest.raises(FloatingPointError, match="round 0"):
        run(identity_learner(), loss=broken, rounds=1)


def test_a_round_that_does_not_divide_is_refused() -> None:
    rounds = distill(
        identity_teacher,
        identity_learner(),
        loss=ForwardKL(),
        states=TeacherStates(),
        learning_rate=WarmupCosine(1e-3),
        rounds=1,
        states_per_round=10,
        updates_per_round=1,
    )
    with pytest.raises(ValueError, match="multiple of num_envs 8"):
        next(rounds)


def cartpole_teacher(obs: Tensor) -> Tensor:
    """Balances the pole by its angle and angular velocity, for 500 steps from most starts."""
    push = obs[:, 2] + 0.3 * obs[:, 3] + 0.02 * obs[:, 1]
    return torch.stack([-20.0 * push, 20.0 * push], dim=1).float()


def play_cartpole(policy: Callable[[Tensor], Tensor]) -> float:
    envs = GymnasiumEnvs("CartPole-v1", 4, seed=99)
    games = evaluate(policy, envs, 8, deterministic=True, generator=torch.Generator().manual_seed(0))
    return float(np.mean(games.returns))


def test_a_student_balances_cartpole_like_its_teacher() -> None:
    student = make_student((32,), 2, (4,))
    assert play_cartpole(cartpole_teacher) > 400
    before = play_cartpole(student)
    learner = make_learner(student, GymnasiumEnvs("CartPole-v1", 8, seed=0), capacity=3200, seed=0)
    *_, last = distill(
        cartpole_teacher,
        learner,
        loss=ForwardKL(),
        states=MixedStates(),
        learning_rate=WarmupCosine(1e-2),
        rounds=4,
        states_per_round=800,
        updates_per_round=150,
        batch_size=128,
    )
    assert last.kl < 0.02
    assert before < 200
    assert play_cartpole(student) > 400


def test_a_users_own_module_is_a_student_too() -> None:
    learner = make_learner(MLP(4, (8,), 4, activation=nn.Tanh), IdentityEnv(8, 4), capacity=2000, seed=0)
    assert run(learner)[-1].action_agreement > 0.99


def test_frames_are_stored_once_and_the_student_is_centred_on_them() -> None:
    envs = make_atari("Pong", 4, seed=0)
    student = make_student("1%", 6)
    learner = make_learner(student, envs, capacity=80, seed=0)
    list(
        distill(
            lambda obs: torch.zeros(len(obs), 6),
            learner,
            loss=ForwardKL(),
            states=TeacherStates(),
            learning_rate=WarmupCosine(1e-3),
            rounds=2,
            states_per_round=40,
            updates_per_round=2,
            batch_size=8,
        )
    )
    assert learner.replay.frames.shape == (81, 84, 84)
    assert student.net.centre == 87.0  # the brown behind Pong's court
    assert len(learner.replay) == 80
