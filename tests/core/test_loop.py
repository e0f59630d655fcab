"""The loop on problems of seconds: it learns, it repeats, it goes on where it stopped."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from policykd.agents.networks import MLP
from policykd.agents.policy import Policy
from policykd.agents.student import make_student
from policykd.envs.atari import make_atari
from policykd.envs.gymnasium_envs import GymnasiumEnvs
from policykd.envs.identity import IdentityEnv
from policykd.evaluation.evaluate import evaluate
from policykd.legacy.loop import distill
from policykd.legacy.losses import ActionNLL, ForwardKL, Loss, ReverseKL, ScoreMSE
from policykd.legacy.replay import Replay
from policykd.legacy.schedules import Linear, WarmupCosine
from policykd.legacy.states import MixedStates, StateSource, StudentStates, TeacherStates
from policykd.legacy.train_state import Learner, Visit, make_learner
from policykd.legacy.trainer import Round


def identity_teacher(obs: Tensor) -> Tensor:
    return 3.0 * obs


def identity_learner(seed: int = 0) -> Learner:
    return make_learner(make_student((16,), 4, (4,), seed=seed), IdentityEnv(8, 4, seed), capacity=2000, seed=seed)


def run(
    learner: Learner,
    *,
    loss: Loss | None = None,
    states: StateSource | None = None,
    rounds: int = 8,
    teacher: Policy = identity_teacher,
    updates_per_round: int = 40,
    threads: int = 1,
    overlap: bool = True,
) -> list[Round]:
    rate = WarmupCosine(2e-2)
    return list(
        distill(
            teacher,
            learner,
            loss=loss or ForwardKL(),
            states=states or MixedStates(),
            learning_rate=rate,
            rounds=rounds,
            states_per_round=160,
            updates_per_round=updates_per_round,
            batch_size=64,
            threads=threads,
            overlap=overlap,
        )
    )


@pytest.mark.parametrize(
    "states", [TeacherStates(), StudentStates(), MixedStates(), MixedStates(student=Linear(0.0, 1.0))], ids=repr
)
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
    rounds = run(identity_learner(), states=MixedStates(student=Linear(0.0, 1.0, 0.5)), rounds=5)
    assert [r.index for r in rounds] == [0, 1, 2, 3, 4]
    assert [r.num_states for r in rounds] == [160, 320, 480, 640, 800]
    assert [r.num_updates for r in rounds] == [40, 80, 120, 160, 200]
    assert [r.student_fraction for r in rounds] == pytest.approx([0.0, 0.0, 2 / 3, 1.0, 1.0])  # one fit behind
    assert [r.num_nonfinite_states + r.num_nonfinite_updates for r in rounds] == [0] * 5
    assert all(len(r.episodes) == 160 for r in rounds)
    assert rounds[-1].learning_rate == pytest.approx(0.0)
    p = torch.softmax(torch.tensor([3.0, 0.0, 0.0, 0.0]), dim=0)
    assert rounds[0].teacher_entropy == pytest.approx(float(-(p * p.log()).sum()), rel=1e-5)
    first = rounds[0].episodes
    sampled_share = float(np.mean([e.episodic_return for e in first]))
    assert sampled_share == pytest.approx(float(p[0]), abs=0.1)  # the teacher played this round, sampled


@pytest.mark.parametrize("threads", [1, 2])
def test_overlapped_and_one_after_the_other_are_the_same_bits(threads: int) -> None:
    def bits(*, overlap: bool) -> list[object]:
        learner = identity_learner(seed=3)
        rounds = run(learner, rounds=4, threads=threads, overlap=overlap)
        weights = [w.tolist() for w in learner.student.state_dict().values()]
        replay = learner.replay
        return [weights, replay.scores_NA.tolist(), [(r.loss, r.new_kl, r.grad_norm, r.episodes) for r in rounds]]

    assert bits(overlap=True) == bits(overlap=False)


def test_threads_share_a_batch_without_changing_what_is_learned() -> None:
    one, two = (run(identity_learner(seed=1), rounds=2, threads=threads)[-1] for threads in (1, 2))
    assert (one.loss, one.kl, one.grad_norm) == pytest.approx((two.loss, two.kl, two.grad_norm), rel=1e-4)


class BrokenNow:
    """A loss that is no number in some updates (N03)."""

    def __init__(self, first: int, last: int) -> None:
        self.broken, self.num_calls = range(first, last), 0

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor) -> Tensor:
        loss_B = ForwardKL()(student_BA, teacher_BA)
        self.num_calls += 1
        return loss_B * float("nan") if self.num_calls in self.broken else loss_B


def test_an_update_that_is_not_finite_is_left_out_and_counted() -> None:
    """N03: the step is skipped, the counter and the loss show it unmasked, the student still learns."""
    learner = identity_learner()
    rounds = run(learner, loss=BrokenNow(50, 53))
    assert [r.num_nonfinite_updates for r in rounds] == [0, 3, 0, 0, 0, 0, 0, 0]
    assert np.isnan(rounds[1].loss)
    assert np.isnan(rounds[1].grad_norm)
    assert rounds[-1].action_agreement > 0.99
    steps = {int(slot["step"]) for slot in learner.optimizer.state_dict()["state"].values()}
    assert steps == {8 * 40 - 3}


def test_weights_are_those_of_a_run_without_the_broken_updates() -> None:
    """N03: an update that is not finite leaves weights and moments bit for bit as they were."""
    learner = identity_learner()
    before = [w.clone() for w in learner.student.parameters()]
    with pytest.raises(FloatingPointError, match="round 0: 10 updates"):  # a round of nothing else
        run(learner, loss=BrokenNow(1, 11), rounds=1, updates_per_round=10)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.student.parameters(), strict=True))


def test_too_many_updates_that_are_not_finite_end_the_run() -> None:
    """N03: after the bound the run ends, its weights untouched."""
    learner = identity_learner()
    with pytest.raises(FloatingPointError, match=r"round 1: 11 updates with loss nan"):
        run(learner, loss=BrokenNow(41, 52))
    assert all(w.isfinite().all() for w in learner.student.parameters())
    assert learner.round == 1


def test_states_that_the_teacher_cannot_score_are_left_out_and_counted() -> None:
    """N02: such rows are no states, nothing is fitted to them, and the run goes on."""
    calls = 0

    def sometimes(obs: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        scores_BA = identity_teacher(obs)
        if calls in (3, 25):
            scores_BA[2, 1] = float("inf")
            scores_BA[5] = float("nan")
        return scores_BA

    learner = identity_learner()
    rounds = run(learner, teacher=sometimes)
    assert [r.num_nonfinite_states for r in rounds] == [2, 2, 0, 0, 0, 0, 0, 0]
    assert [r.num_states for r in rounds] == [158, 316, 476, 636, 796, 956, 1116, 1276]
    assert rounds[-1].action_agreement > 0.99
    assert learner.replay.history.tolist() == [18, 21, 194, 197]


def test_a_teacher_that_scores_too_much_nonsense_ends_the_run() -> None:
    """N02: after the bound the run ends, naming the round."""

    def poisoned(obs: Tensor) -> Tensor:
        scores_BA = identity_teacher(obs)
        scores_BA[0, 0] = float("nan")
        return scores_BA

    with pytest.raises(FloatingPointError, match=r"round 0: the teacher's scores of 20 states"):
        run(identity_learner(), teacher=poisoned, rounds=2)


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
    games = evaluate(policy, envs, 8)
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


class Recorded(TorchDispatchMode):
    """Writes down every operation of this thread."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_no_update_waits_for_the_device() -> None:
    """Between the first update of a round and its last nothing is read back, copied over, or of a size that depends."""
    learner = make_learner(make_student("1%", 6), make_atari("Pong", 4, seed=0), capacity=80, seed=0)
    with Recorded() as recorded:
        list(
            distill(
                lambda obs: torch.zeros(len(obs), 6),
                learner,
                loss=ForwardKL(),
                states=TeacherStates(),
                learning_rate=WarmupCosine(1e-3),
                rounds=1,
                states_per_round=40,
                updates_per_round=3,
                batch_size=8,
            )
        )
    names = recorded.names
    first, last = (i for i, name in enumerate(names) if name == "_fused_adam_"), len(names)
    updates = names[next(first) : last - names[::-1].index("_fused_adam_")]
    assert updates.count("convolution_backward") == 2 * 3
    waiting = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}
    assert not waiting & set(updates)
    assert waiting & set(names[: names.index("_fused_adam_")])  # such as the rows of `compare`: the test can see them


class PlainDescent(torch.optim.Optimizer):
    """Fused Adam knows no tensors without numbers."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data.sub_(group["lr"] * weight.grad)


def test_updates_stay_on_the_device_and_scores_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without numbers, which can neither be read back nor meet another device's, all updates are made."""
    kinds = []

    def seen(student_BA: Tensor, teacher_BA: Tensor) -> Tensor:
        kinds.append((student_BA.device.type, student_BA.dtype, teacher_BA.device.type, teacher_BA.dtype))
        return ForwardKL()(student_BA, teacher_BA)

    monkeypatch.setattr("policykd.legacy.loop.compare", lambda *_: (0.0, 0.0, 0.0))  # reads numbers back, as it should
    envs, student = IdentityEnv(4, 6), make_student("1%", 6).to("meta")
    replay = Replay(64, 4, 6, (4, 84, 84), stack=4, dtype=torch.uint8, device="meta")
    replay.size, replay.num_held_out = 64, 4
    learner = Learner(
        student=student,
        envs=envs,
        replay=replay,
        optimizer=PlainDescent(student.parameters(), {"lr": torch.zeros((), device="meta")}),
        action_generator=torch.Generator(),
        batch_generator=torch.Generator(),
        obs=envs.reset(),
        starts_B=torch.ones(4, dtype=torch.bool),
        visit=Visit(first=60, student_fraction=0.0, episodes=[]),
    )
    rounds = distill(
        identity_teacher,
        learner,
        loss=seen,
        states=TeacherStates(),
        learning_rate=WarmupCosine(1e-3),
        rounds=1,
        states_per_round=0,
        updates_per_round=5,
        batch_size=64,
        threads=4,  # of the CPU: no other device's batch is cut
    )
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):  # the round's numbers, after its updates
        next(rounds)
    assert kinds == [("meta", torch.float32, "meta", torch.float32)] * 5


def test_bfloat16_convolutions_leave_scores_and_weights_float32() -> None:
    """N04: under autocast the loss sees float32 scores, near those without, and the weights stay float32."""
    seen: dict[bool, Tensor] = {}
    for bf16 in (False, True):
        learner = make_learner(make_student("1%", 6), make_atari("Pong", 4, seed=0), capacity=40, seed=0)

        def loss(student_BA: Tensor, teacher_BA: Tensor, kind: bool = bf16) -> Tensor:
            assert student_BA.dtype == teacher_BA.dtype == torch.float32
            seen.setdefault(kind, student_BA.detach())
            return ForwardKL()(student_BA, teacher_BA)

        list(
            distill(
                lambda obs: torch.zeros(len(obs), 6),
                learner,
                loss=loss,
                states=TeacherStates(),
                learning_rate=WarmupCosine(1e-3),
                rounds=1,
                states_per_round=40,
                updates_per_round=2,
                batch_size=8,
                bf16=bf16,
            )
        )
        assert {w.dtype for w in learner.student.parameters()} == {torch.float32}
    assert not torch.equal(seen[True], seen[False])
    assert seen[True].tolist() == [pytest.approx(row, abs=0.02) for row in seen[False].tolist()]
