"""The loop on problems of seconds: it learns, it repeats, it resumes where it stopped."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import policykd
from policykd.agents.networks import MLP
from policykd.agents.student import make_student
from policykd.envs.atari import make_atari
from policykd.envs.gymnasium_envs import GymnasiumEnvs
from policykd.evaluation.evaluate import evaluate
from policykd.loop import DistillConfig, distill, forward_kl
from policykd.losses import ActionNLL, Batch, ForwardKL, LogitMSE, LossFn, Metrics, ReverseKL
from policykd.replay import Replay
from policykd.schedules import Linear, ReturnGap
from policykd.states import DatasetStates, MixedStates, StateSource, StudentStates, TeacherStates
from policykd.train_state import Rollout, TrainState
from tests.core.problems import SMALL, Problem, identity_teacher
from tests.identity_env import IdentityEnv

PONG = DistillConfig(rounds=1, states_per_round=40, updates_per_round=2, batch_size=8, states=TeacherStates())


def zero_teacher(obs: Tensor) -> Tensor:
    return torch.zeros(len(obs), 6)


@pytest.mark.parametrize(
    ("loss_fn", "states"),
    [
        (forward_kl, MixedStates()),
        (ForwardKL(), TeacherStates()),
        (ReverseKL(), StudentStates()),
        (LogitMSE(), MixedStates(student=Linear(0.0, 1.0))),
        (ActionNLL(), MixedStates()),
    ],
    ids=lambda part: getattr(part, "__name__", repr(part)),
)
def test_a_student_learns_its_teacher(loss_fn: LossFn, states: StateSource, problem: Problem, eye: Tensor) -> None:
    last = problem.train(loss_fn, states=states)[-1]
    assert (problem.student(eye).argmax(dim=1) == torch.arange(4)).all()
    assert last.train["action_agreement"] > 0.99
    if not isinstance(loss_fn, ActionNLL):
        assert last.train["kl"] < 1e-3


def test_the_default_loss_is_the_forward_kl() -> None:
    one = Problem().train(rounds=3)
    other = Problem().train(ForwardKL(), rounds=3)
    assert [r.train for r in one] == [r.train for r in other]


def test_a_cold_temperature_makes_a_more_certain_student(eye: Tensor) -> None:
    def certainty(**temperature: Any) -> float:
        problem = Problem()
        problem.train(**temperature)
        return float(problem.student(eye).detach().softmax(dim=1).diagonal().mean())

    expected = [float(torch.softmax(3.0 * torch.eye(4) / t, dim=1).diagonal().mean()) for t in (1.0, 0.5)]
    assert certainty() == pytest.approx(expected[0], abs=0.02)
    assert certainty(temperature=0.5) == pytest.approx(expected[1], abs=0.02)
    assert certainty(loss_fn=ForwardKL(0.5)) == pytest.approx(expected[1], abs=0.02)


class ColdTeacher:
    """A teacher of Q-values: nobody but itself says what its temperature is."""

    temperature = 0.01

    def __call__(self, obs: Tensor) -> Tensor:
        return 0.03 * obs


def test_a_teacher_brings_its_temperature(problem: Problem, eye: Tensor) -> None:
    """Q-values 0.03 apart at 0.01: without the temperature the student would learn a nearly uniform policy."""
    assert problem.train(teacher=ColdTeacher())[-1].train["kl"] < 1e-3
    torch.testing.assert_close(problem.student(eye).softmax(dim=1), (3.0 * eye).softmax(dim=1), atol=0.02, rtol=0.0)


def test_a_run_repeats_bit_for_bit_and_other_seeds_give_other_runs() -> None:
    def measured(seed: int) -> list[object]:
        return [(r.train, r.new_states) for r in Problem(seed=seed).train(rounds=3)]

    assert measured(1) == measured(1)
    assert measured(1) != measured(2)


def test_learning_rates_are_numbers_or_functions() -> None:
    peak = Problem().train(rounds=2, learning_rate=0.02)
    assert peak[-1].learning_rate == pytest.approx(0.0)
    assert Problem().train(rounds=2, learning_rate=lambda progress: 0.1 * progress)[-1].learning_rate == 0.1
    with pytest.raises(ValueError, match="learning_rate must be at least 0, not -1"):
        DistillConfig(learning_rate=-1.0)


def test_round_measurements(problem: Problem) -> None:
    rounds = problem.train(states=MixedStates(student=Linear(0.0, 1.0, 0.5)), rounds=5)
    assert [r.index for r in rounds] == [0, 1, 2, 3, 4]
    assert [r.num_states for r in rounds] == [160, 320, 480, 640, 800]
    assert [r.num_updates for r in rounds] == [40, 80, 120, 160, 200]
    # The student that acts is from before the training that runs at the same time.
    fractions = [r.collected.student_fraction for r in rounds]
    assert fractions == pytest.approx([0.0, 0.0, 2 / 3, 1.0, 1.0])
    assert [r.schedules["states.student"] for r in rounds] == pytest.approx(fractions)
    assert [r.collected.num_nonfinite + r.train["num_skipped"] for r in rounds] == [0] * 5
    assert all(len(r.collected.episodes) == 160 for r in rounds)
    p = torch.softmax(torch.tensor([3.0, 0.0, 0.0, 0.0]), dim=0)
    assert rounds[0].new_states["teacher_entropy"] == pytest.approx(float(-(p * p.log()).sum()), rel=1e-5)
    mean_return = float(np.mean([e.episodic_return for e in rounds[0].collected.episodes]))
    assert mean_return == pytest.approx(float(p[0]), abs=0.1)  # the teacher acted in this round, sampled


@pytest.mark.parametrize("threads", [1, 2])
def test_overlapped_and_one_after_the_other_are_the_same_bits(threads: int) -> None:
    def bits(*, overlap: bool) -> list[object]:
        problem = Problem(seed=3)
        rounds = problem.train(rounds=4, threads=threads, overlap=overlap)
        weights = [w.tolist() for w in problem.student.state_dict().values()]
        assert problem.state is not None
        measured = [(r.train, r.new_states, r.collected.episodes) for r in rounds]
        return [weights, problem.state.replay.teacher_NA.tolist(), measured]

    assert bits(overlap=True) == bits(overlap=False)


def test_threads_share_a_batch_without_changing_what_is_learned() -> None:
    one, two = (Problem(seed=1).train(rounds=2, threads=threads)[-1].train for threads in (1, 2))
    assert one == pytest.approx(two, rel=1e-4)


def test_a_loop_that_is_left_early_ends_its_threads(problem: Problem) -> None:
    config = DistillConfig(rounds=8, states_per_round=160, updates_per_round=40, batch_size=64)
    num_updates = 0
    for r in distill(identity_teacher, problem.student, IdentityEnv(8, 4), config):
        num_updates = r.num_updates
        if r.index == 1:
            break
    assert num_updates == 80
    assert not any(thread.name.startswith(("collector", "trainer")) for thread in threading.enumerate())


class BrokenNow:
    """A loss that is not a number in some updates."""

    def __init__(self, first: int, last: int) -> None:
        self.broken = range(first, last)
        self.num_calls = 0

    def __call__(self, student: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        loss_B, metrics = forward_kl(student, batch)
        self.num_calls += torch.is_grad_enabled()
        is_broken = torch.is_grad_enabled() and self.num_calls in self.broken
        return loss_B * float("nan") if is_broken else loss_B, metrics


def test_an_update_that_is_not_finite_is_skipped_and_counted(problem: Problem) -> None:
    """The counter and the loss show it unmasked, the student still learns."""
    rounds = problem.train(BrokenNow(50, 53), optimizer="adam")
    assert [r.train["num_skipped"] for r in rounds] == [0, 3, 0, 0, 0, 0, 0, 0]
    assert np.isnan(rounds[1].train["loss"])
    assert np.isnan(rounds[1].train["grad_norm"])
    assert rounds[-1].train["action_agreement"] > 0.99
    assert problem.state is not None
    steps = {int(slot["step"]) for slot in problem.state.optimizer.state_dict()["state"].values()}
    assert steps == {8 * 40 - 3}


def test_a_skipped_update_leaves_the_weights_bit_for_bit(problem: Problem) -> None:
    before = [w.clone() for w in problem.student.parameters()]
    with pytest.raises(FloatingPointError, match="round 0: 10 updates"):  # a round of nothing else
        problem.train(BrokenNow(1, 11), rounds=1, updates_per_round=10)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.student.parameters(), strict=True))


def test_too_many_updates_that_are_not_finite_end_the_run(problem: Problem) -> None:
    with pytest.raises(FloatingPointError, match=r"round 1: 11 updates with loss nan"):
        problem.train(BrokenNow(41, 52))
    assert all(w.isfinite().all() for w in problem.student.parameters())
    assert problem.state is not None
    assert problem.state.round == 1


def test_states_that_the_teacher_cannot_label_are_left_out_and_counted(problem: Problem) -> None:
    calls = 0

    def sometimes(obs: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        logits_BA = identity_teacher(obs)
        if calls in (3, 25):
            logits_BA[2, 1] = float("inf")
            logits_BA[5] = float("nan")
        return logits_BA

    rounds = problem.train(teacher=sometimes)
    assert [r.collected.num_nonfinite for r in rounds] == [2, 2, 0, 0, 0, 0, 0, 0]
    assert [r.num_states for r in rounds] == [158, 316, 476, 636, 796, 956, 1116, 1276]
    assert rounds[-1].train["action_agreement"] > 0.99
    assert problem.state is not None
    assert problem.state.replay.context_only_rows.tolist() == [18, 21, 194, 197]


def test_a_teacher_with_too_many_outputs_that_are_not_finite_ends_the_run(problem: Problem) -> None:
    def poisoned(obs: Tensor) -> Tensor:
        logits_BA = identity_teacher(obs)
        logits_BA[0, 0] = float("nan")
        return logits_BA

    with pytest.raises(FloatingPointError, match=r"round 0: the teacher's outputs for 20 states"):
        problem.train(teacher=poisoned, rounds=2)


def cartpole_teacher(obs: Tensor) -> Tensor:
    """Balances the pole by its angle and angular velocity, for 500 steps from most starts."""
    push = obs[:, 2] + 0.3 * obs[:, 3] + 0.02 * obs[:, 1]
    return torch.stack([-20.0 * push, 20.0 * push], dim=1).float()


def mean_cartpole_return(policy: Callable[[Tensor], Tensor]) -> float:
    return float(np.mean(evaluate(policy, GymnasiumEnvs("CartPole-v1", 4, seed=99), 8).returns))


CARTPOLE = DistillConfig(rounds=4, states_per_round=800, updates_per_round=150, batch_size=128, learning_rate=2e-2)


def test_a_student_balances_cartpole_like_its_teacher() -> None:
    student = make_student((32,), 2, (4,))
    assert mean_cartpole_return(cartpole_teacher) > 400
    assert mean_cartpole_return(student) < 200
    *_, last = distill(cartpole_teacher, student, GymnasiumEnvs("CartPole-v1", 8, seed=0), CARTPOLE)
    assert last.train["kl"] < 0.02
    assert mean_cartpole_return(student) > 400


def test_environments_of_sb3_are_accepted() -> None:
    """The README's call with nothing but SB3's own environments; the line says what they cannot do."""
    student = make_student((32,), 2, (4,))
    envs = make_vec_env("CartPole-v1", n_envs=8, seed=0)
    with pytest.warns(UserWarning, match="cannot be resumed"):
        *_, last = policykd.distill(cartpole_teacher, student, envs, CARTPOLE)
    assert last.train["kl"] < 0.05


def test_a_users_own_module_is_a_student_too() -> None:
    student = MLP(4, (8,), 4, activation=nn.Tanh)
    config = DistillConfig(rounds=8, states_per_round=160, updates_per_round=40, batch_size=64, learning_rate=2e-2)
    *_, last = distill(identity_teacher, student, IdentityEnv(8, 4), config)
    assert last.train["action_agreement"] > 0.99


def test_frames_are_stored_once_and_the_student_is_normalised_on_them() -> None:
    student = make_student("1%", 6)
    *_, last = distill(zero_teacher, student, make_atari("Pong", 4, seed=0), PONG)
    assert last.state.replay.frames.shape == (41, 84, 84)
    assert student.net.centre == 87.0  # the brown background of Pong
    assert len(last.state.replay) == 40


class Recorded(TorchDispatchMode):
    """Records every operation of this thread."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("optimizer", "step"), [("adam", "_fused_adam_"), ("muon", "lerp_")])
def test_no_update_waits_for_the_device(optimizer: Literal["adam", "muon"], step: str) -> None:
    """Between the first update of a round and its last nothing is read back or of a size that depends on data."""
    config = replace(PONG, updates_per_round=3, optimizer=optimizer)
    with Recorded() as recorded:
        list(distill(zero_teacher, make_student("1%", 6), make_atari("Pong", 4, seed=0), config))
    names = recorded.names
    first = names.index(step)
    last = len(names) - names[::-1].index(step)
    updates = names[first + 1 : last]
    assert updates.count("convolution_backward") == 2 * 3
    waiting = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}
    assert not waiting & set(updates)
    assert waiting & set(names[:first])  # measuring reads numbers back: the test can see it


class PlainDescent(torch.optim.Optimizer):
    """Gradient descent for tensors without numbers, which fused Adam does not support."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data.sub_(group["lr"] * weight.grad)


def test_updates_stay_on_the_device_of_the_states() -> None:
    """On tensors without numbers, which can neither be read back nor meet another device's, all updates are made."""
    seen = []

    def loss_fn(student: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        student_BA = student(batch.obs)
        if torch.is_grad_enabled():
            seen.append({t.device.type for t in (student_BA, batch.teacher_BA, batch.rows_B, batch.random_B)})
        return ForwardKL().per_state(student_BA, batch.teacher_BA, 1.0, 0.0), {}

    envs = IdentityEnv(4, 6)
    student = make_student("1%", 6).to("meta")
    replay = Replay(64, 4, 6, (4, 84, 84), stack=4, dtype=torch.uint8).to("meta")
    replay.size = 64
    state = TrainState(
        student=student,
        envs=envs,
        replay=replay,
        optimizer=PlainDescent(student.parameters(), {"lr": torch.zeros((), device="meta")}),
        action_generator=torch.Generator(),
        batch_generator=torch.Generator(),
        obs=envs.reset(),
        episode_starts_B=torch.ones(4, dtype=torch.bool),
        rollout=Rollout(first=64, student_fraction=0.0, episodes=[]),  # nothing to measure, which reads numbers back
    )
    states = DatasetStates(Path("stored"))  # nothing is collected
    config = DistillConfig(rounds=1, updates_per_round=5, batch_size=64, threads=4, states=states)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):  # the round's means, after its updates
        next(distill(identity_teacher, student, envs, config, loss_fn=loss_fn, state=state))
    assert seen == [{"meta"}] * 5


def test_bfloat16_convolutions_leave_logits_and_weights_float32() -> None:
    """Under autocast the loss sees float32 logits near those without, and the weights stay float32."""
    seen: dict[bool, Tensor] = {}
    for bf16 in (False, True):

        def loss_fn(student: nn.Module, batch: Batch, kind: bool = bf16) -> tuple[Tensor, Metrics]:
            loss_B, metrics = forward_kl(student, batch)
            assert loss_B.dtype == torch.float32
            if torch.is_grad_enabled():
                seen.setdefault(kind, student(batch.obs).float().detach())
            return loss_B, metrics

        config = DistillConfig(
            rounds=1, states_per_round=40, updates_per_round=2, batch_size=8, states=TeacherStates(), bf16=bf16
        )
        student = make_student("1%", 6)
        list(distill(zero_teacher, student, make_atari("Pong", 4, seed=0), config, loss_fn=loss_fn))
        assert {w.dtype for w in student.parameters()} == {torch.float32}
    assert not torch.equal(seen[True], seen[False])
    assert seen[True].tolist() == [pytest.approx(row, abs=0.02) for row in seen[False].tolist()]


def test_a_finished_run_is_lengthened_in_python() -> None:
    """The buffer grows, and the states that the last round did not collect come first."""
    problem = Problem()
    problem.train(rounds=2)
    rounds = problem.train(rounds=4)
    assert [(r.index, r.num_states) for r in rounds] == [(2, 480), (3, 640)]


def test_what_does_not_fit_is_refused_in_one_line(problem: Problem) -> None:
    with pytest.raises(ValueError, match="learning_rate must not follow the student's return"):
        DistillConfig(learning_rate=ReturnGap(1e-3))
    with pytest.raises(ValueError, match="learning_rate must be positive, not 0"):
        DistillConfig(learning_rate=0.0)
    with pytest.raises(ValueError, match="optimizer must be adam or muon, not 'sgd'"):
        DistillConfig(optimizer="sgd")  # type: ignore[arg-type]
    state = problem.make_state(SMALL)
    with pytest.raises(ValueError, match="state is that of another student"):
        distill(identity_teacher, make_student((16,), 4, (4,)), state.envs, SMALL, state=state)
    with pytest.raises(TypeError, match=r"a str is not a policy; use policykd\.load_teacher"):
        distill("bundled:dqn", problem.student, state.envs, SMALL)
    with pytest.raises(ValueError, match=r"the student returns a tensor float32 \(8, 3\), expected \(8, 4\)"):
        distill(identity_teacher, make_student((16,), 3, (4,)), state.envs, SMALL)


@pytest.mark.parametrize(
    ("teacher", "found"),
    [
        (lambda obs: (obs, obs[:, 0]), "tuple"),
        (lambda obs: obs.numpy(), "ndarray"),
        (lambda obs: torch.distributions.Categorical(logits=obs), "Categorical"),
        (lambda obs: obs.argmax(dim=1), r"a tensor int64 \(8,\)"),
        (lambda obs: obs[:, :1], r"a tensor float32 \(8, 1\)"),
        (lambda obs: obs[:1], r"a tensor float32 \(1, 4\)"),
        (lambda obs: torch.cat([obs, obs], dim=1), r"a tensor float32 \(8, 8\)"),
        (lambda obs: obs > 0, r"a tensor bool \(8, 4\)"),
    ],
)
def test_a_teacher_without_one_number_per_action_is_refused(
    teacher: Callable[[Tensor], object], found: str, problem: Problem
) -> None:
    """A shape of `(batch, 1)` would otherwise be broadcast to a uniform policy."""
    with pytest.raises(ValueError, match=f"the teacher returns {found}, expected"):
        next(distill(teacher, problem.student, IdentityEnv(8, 4, 0), SMALL))


@pytest.mark.parametrize("convert", [Tensor.double, Tensor.half, Tensor.long, lambda t: t.requires_grad_() * 1])
def test_a_teacher_may_return_any_kind_of_number(convert: Callable[[Tensor], Tensor], problem: Problem) -> None:
    rounds = problem.train(teacher=lambda obs: convert(3.0 * obs.clone()), rounds=1)
    assert rounds[0].train == Problem().train(rounds=1)[0].train


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda loss_B: loss_B, "returns Tensor"),
        (lambda loss_B: (loss_B, loss_B), "returns tuple"),
        (lambda loss_B: (loss_B.mean(), {}), r"returns a tensor \(\) as the loss"),
        (lambda loss_B: (loss_B[:, None], {}), r"returns a tensor \(\d+, 1\) as the loss"),
        (lambda loss_B: (loss_B, {"kl": 0.5}), "returns float as kl"),
    ],
)
def test_a_loss_that_is_not_per_state_is_refused(
    result: Callable[[Tensor], Any], message: str, problem: Problem
) -> None:
    def loss(student: nn.Module, batch: Batch) -> Any:
        return result(forward_kl(student, batch)[0])

    with pytest.raises(ValueError, match=f"loss_fn loss {message}, expected \\(loss, metrics\\)"):
        problem.train(loss, rounds=1)


def test_teacher_and_student_may_write_into_their_input() -> None:
    """Otherwise the student would learn on observations that no environment shows."""

    class Writing(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, obs: Tensor) -> Tensor:
            outputs: Tensor = self.net(obs)
            if not self.training:  # autograd itself refuses it in training
                obs.zero_()
            return outputs

    def teacher(obs: Tensor) -> Tensor:
        outputs = 3.0 * obs
        obs.zero_()
        return outputs

    frames = []
    for student, labels in ((nn.Linear(4, 4), identity_teacher), (Writing(nn.Linear(4, 4)), teacher)):
        torch.manual_seed(0)
        for module in student.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        *_, last = distill(labels, student, IdentityEnv(8, 4, 0), replace(SMALL, rounds=2, states=StudentStates()))
        frames.append(last.state.replay.frames)
    assert torch.equal(*frames)


def test_an_sb3_model_in_memory_teaches_like_its_archive(tmp_path: Path) -> None:
    model = DQN("MlpPolicy", "CartPole-v1", seed=0, buffer_size=10)
    model.save(tmp_path / "dqn.zip")
    config = DistillConfig(rounds=1, states_per_round=32, updates_per_round=2, batch_size=8)
    weights = []
    for teacher in (model, policykd.load_teacher(tmp_path / "dqn.zip")):
        student = make_student((8,), 2, (4,))
        next(distill(teacher, student, policykd.make_env("CartPole-v1", 2, 0), config))
        weights.append(nn.utils.parameters_to_vector(student.parameters()))
    torch.testing.assert_close(*weights)
    games = evaluate(model, policykd.make_env("CartPole-v1", 2, 0), 4)
    assert games == evaluate(policykd.load_teacher(tmp_path / "dqn.zip"), policykd.make_env("CartPole-v1", 2, 0), 4)


def test_a_model_whose_outputs_are_not_scores_is_refused(problem: Problem) -> None:
    with pytest.raises(ValueError, match=r"a SAC model with .* is not supported; give one of PPO, A2C, DQN, QRDQN"):
        distill(SAC("MlpPolicy", "Pendulum-v1", buffer_size=10), problem.student, IdentityEnv(8, 4, 0), SMALL)
    normalized = PPO("MlpPolicy", VecNormalize(make_vec_env("CartPole-v1", 2)))
    with pytest.raises(ValueError, match="trained with VecNormalize"):
        distill(normalized, problem.student, IdentityEnv(8, 4, 0), SMALL)


def test_the_student_is_in_evaluation_mode_between_rounds() -> None:
    """As after SB3's `predict`: its actions must not depend on dropout, nor change the statistics of BatchNorm."""
    student = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
    modes = [student.training for _ in distill(identity_teacher, student, IdentityEnv(8, 4, 0), SMALL)]
    assert modes == [False] * SMALL.rounds
    assert not student.training
    assert student[0].num_batches_tracked == SMALL.rounds * SMALL.updates_per_round  # trained in training mode


def test_a_warning_about_environments_names_the_users_line(problem: Problem) -> None:
    envs = make_vec_env("CartPole-v1", 2)
    with pytest.warns(UserWarning, match="cannot be resumed") as caught:
        distill(lambda obs: obs[:, :2], make_student((8,), 2, (4,)), envs, SMALL)
    assert caught[0].filename == __file__
