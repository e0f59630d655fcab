"""Options of the loop other than its default: schedules, feedback, which states, several teachers, auxiliary losses."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from policykd.agents.student import make_student
from policykd.agents.teacher import load_teacher, load_teachers
from policykd.envs.atari import make_atari
from policykd.envs.vector import Episode, Step
from policykd.loop import DistillConfig, Round, distill
from policykd.losses import (
    AuxiliaryLossWeights,
    Batch,
    ForwardKL,
    JensenShannon,
    LogitHuber,
    LogitMSE,
    LossFn,
    Metrics,
    PolicyLoss,
    SoftAndHard,
    TwoSidedKL,
)
from policykd.methods.auxiliary import AuxiliaryLosses
from policykd.methods.divergences import DecoupledKL, StandardizedKL
from policykd.methods.state_weights import ByDisagreement, ByEntropy, ByGap, StateWeight, WeightedStates
from policykd.schedules import Linear, Quantity, ReturnGap, ReturnReached, resolve
from policykd.states import BlendedStates, DatasetStates, MixedStates, StudentStates, TeacherStates
from policykd.storage.checkpoints import restore_checkpoint, save_checkpoint
from policykd.train_state import TrainState, make_train_state
from tests.core.problems import SMALL, Problem, identity_teacher
from tests.identity_env import IdentityEnv

LOSSES = [JensenShannon(), TwoSidedKL(), SoftAndHard(), LogitHuber(), DecoupledKL(), StandardizedKL()]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_every_other_loss_teaches(loss: PolicyLoss, problem: Problem) -> None:
    assert problem.train(loss)[-1].train["action_agreement"] > 0.99


@pytest.mark.parametrize("weight", [ByEntropy(), ByGap(), ByDisagreement()], ids=lambda weight: type(weight).__name__)
def test_every_weight_of_states_teaches(weight: StateWeight, problem: Problem) -> None:
    assert problem.train(WeightedStates(ForwardKL(), weight))[-1].train["kl"] < 1e-3


@pytest.mark.parametrize("make", [LogitMSE, LogitHuber])
def test_a_student_of_q_values_learns_them_and_acts_on_them_tempered(
    make: type[LogitMSE] | type[LogitHuber], eye: Tensor
) -> None:
    """The teacher's Q-values are 0.03 apart: at 0.01 its policy is that of logits 3 apart, and so is the student's."""
    problem = Problem(temperature=0.01)
    last = problem.train(make(), teacher=lambda obs: 0.03 * obs, temperature=0.01)[-1]
    assert last.train["kl"] < 1e-3
    torch.testing.assert_close(0.01 * problem.student(eye), 0.03 * eye, atol=2e-3, rtol=0.0)


@dataclass(frozen=True)
class Heavy:
    """A loss whose value is its weight."""

    weight: Quantity

    def __call__(self, student: nn.Module, batch: Batch, /) -> tuple[Tensor, Metrics]:
        return 0.0 * student(batch.obs).sum(dim=1) + resolve(self.weight, batch.progress), {}


def test_a_schedule_changes_the_loss_from_round_to_round(problem: Problem) -> None:
    rounds = problem.train(Heavy(Linear(4.0, 0.0)), rounds=5)
    assert [r.train["loss"] for r in rounds] == pytest.approx([4.0, 3.0, 2.0, 1.0, 0.0])
    assert [r.schedules["loss.weight"] for r in rounds] == pytest.approx([4.0, 3.0, 2.0, 1.0, 0.0])


def train_towards(
    problem: Problem, loss_fn: LossFn, config: DistillConfig, returns: tuple[float, float]
) -> list[Round]:
    """Trains with the returns of the teacher and of a random policy known, for schedules that follow them."""
    state = problem.make_state(config, loss_fn)
    state.teacher_return, state.random_return = returns
    return list(distill(identity_teacher, problem.student, state.envs, config, loss_fn=loss_fn, state=state))


def test_feedback_falls_as_the_student_approaches_its_teacher(problem: Problem) -> None:
    """A random policy is right in a quarter of the episodes, the teacher in 87 %."""
    loss = WeightedStates(ForwardKL(), ByEntropy(floor=ReturnGap(1.0)))
    rounds = train_towards(problem, loss, replace(SMALL, states=StudentStates()), (0.87, 0.25))
    gaps = [r.schedules["loss.weight.floor"] for r in rounds]
    assert gaps[0] > 0.6  # the first episodes, before any training, are those of a random policy
    assert gaps[-1] < 0.2
    expected = [min(1.0, max(0.0, 1 - ((r.student_return or 0.25) - 0.25) / 0.62)) for r in rounds]
    assert gaps == pytest.approx(expected)


def test_before_the_student_has_acted_it_counts_as_a_random_policy(problem: Problem) -> None:
    config = replace(SMALL, states=TeacherStates(), rounds=3)
    rounds = train_towards(problem, Heavy(ReturnGap(2.0)), config, (0.87, 0.25))
    assert [r.train["loss"] for r in rounds] == pytest.approx([2.0] * 3)
    assert [r.student_return for r in rounds] == [None] * 3


def test_an_evaluation_counts_where_the_student_does_not_act(problem: Problem) -> None:
    config = replace(SMALL, states=MixedStates(student=ReturnReached(0.0, 0.9)), rounds=4)
    state = problem.make_state(config)
    state.teacher_return = 1.0
    rounds = []
    for r in distill(identity_teacher, problem.student, state.envs, config, state=state):
        rounds.append(r)
        state.student_returns = [0.5]  # what the caller's evaluation found
    assert [r.collected.student_fraction for r in rounds] == pytest.approx([0.0, 0.0, 0.45, 0.45])
    assert [r.schedules["states.student"] for r in rounds] == pytest.approx([0.0, 0.0, 0.45, 0.45])


class Marathon(IdentityEnv):
    """Episodes of 30 steps, one point for each right action."""

    def __init__(self, num_envs: int, num_actions: int) -> None:
        super().__init__(num_envs, num_actions)
        self.returns = [0.0] * num_envs
        self.num_steps = 0

    def step(self, actions_B: Tensor) -> Step:
        played = super().step(actions_B).episodes
        self.returns = [r + e.episodic_return for r, e in zip(self.returns, played, strict=True)]
        self.num_steps += 1
        ended = [Episode(i, r, 30) for i, r in enumerate(self.returns)] if self.num_steps % 30 == 0 else []
        self.returns = [0.0] * self.num_envs if ended else self.returns
        ends_B = torch.full((self.num_envs,), bool(ended))
        return Step(self._obs(), torch.zeros(self.num_envs), ends_B, ended)


def test_an_episode_is_the_students_own_from_its_first_step_on() -> None:
    """20 steps per round: the episode that ends in the third round began under the teacher, the next one did not."""

    def rounds(states: MixedStates) -> list[Round]:
        config = replace(SMALL, states=states, rounds=5, updates_per_round=1)
        return list(distill(identity_teacher, make_student((16,), 4, (4,)), Marathon(8, 4), config))

    found = rounds(MixedStates(student=Linear(0.0, 1.0, 0.01)))
    assert [r.collected.student_fraction for r in found] == pytest.approx([0.0, 0.0, 1.0, 1.0, 1.0])
    assert [len(r.collected.episodes) for r in found] == [0, 8, 8, 0, 8]
    assert [r.student_return is None for r in found] == [True, True, True, True, False]
    assert all(r.student_return is None for r in rounds(MixedStates(student=1.0, epsilon=0.1)))


def test_the_curve_of_a_weight_is_its_mean_over_the_new_states(problem: Problem) -> None:
    rounds = problem.train(WeightedStates(ForwardKL(), ByDisagreement(floor=0.0)))
    distance = float((torch.softmax(torch.tensor([3.0, 0.0, 0.0, 0.0]), dim=0) - 0.25).abs().sum()) / 2
    first = rounds[0].new_states["state_weight"]
    assert first == pytest.approx(distance, abs=0.1)  # the untrained student is nearly uniform
    assert rounds[-1].new_states["state_weight"] == pytest.approx(0.0, abs=0.02)


class RowsSeen:
    """A loss that records the rows of every batch."""

    def __init__(self) -> None:
        self.batches: list[set[int]] = []

    def __call__(self, student: nn.Module, batch: Batch, /) -> tuple[Tensor, Metrics]:
        if torch.is_grad_enabled():
            self.batches.append(set(batch.rows_B.tolist()))
        return ForwardKL()(student, batch)


@pytest.mark.parametrize(("window", "oldest"), [(0, [0, 0, 0, 0]), (1, [0, 160, 320, 480]), (2, [0, 0, 160, 320])])
def test_the_replay_window_limits_the_rounds_that_are_trained_on(
    window: int, oldest: list[int], problem: Problem
) -> None:
    seen = RowsSeen()
    problem.train(seen, rounds=4, replay_window_rounds=window)
    for k in range(4):
        rows = set().union(*seen.batches[40 * k : 40 * (k + 1)])
        assert oldest[k] <= min(rows) < oldest[k] + 10
        assert 160 * (k + 1) - 10 < max(rows) < 160 * (k + 1)


def with_stored_states(num: int, config: DistillConfig) -> Problem:
    """Returns a problem whose replay buffer has the first `num` states of another run."""
    other = Problem(seed=5)
    other.train(rounds=2)
    assert other.state is not None
    problem = Problem()
    replay = problem.make_state(replace(SMALL, rounds=SMALL.rounds + 2)).replay
    replay.extend(other.state.replay.arrays(0, num))
    replay.num_preloaded = num
    if isinstance(config.states, DatasetStates):
        replay.num_held_out = 10
    problem.make_state(config, replay=replay)
    return problem


def test_stored_states_have_their_share_of_every_batch() -> None:
    settings: dict[str, Any] = {"rounds": 3, "replay_window_rounds": 1, "states": BlendedStates(offline_fraction=0.25)}
    problem = with_stored_states(320, replace(SMALL, **settings))
    seen = RowsSeen()
    rounds = problem.train(seen, **settings)
    assert [r.num_states for r in rounds] == [480, 640, 800]
    for k, rows in enumerate(seen.batches):
        live = {row for row in rows if row >= 320}
        assert len(rows) - len(live) <= 16  # of 64, and some are drawn twice
        assert min(live) >= 320 + 160 * (k // 40)
    assert rounds[-1].new_states["kl"] < rounds[0].new_states["kl"]


def test_offline_distillation_collects_nothing_and_measures_what_is_held_out() -> None:
    settings: dict[str, Any] = {"rounds": 3, "states": DatasetStates(Path("stored")), "learning_rate": 5e-2}
    problem = with_stored_states(320, replace(SMALL, **settings))
    seen = RowsSeen()
    rounds = problem.train(seen, **settings)
    assert [r.num_states for r in rounds] == [320] * 3
    assert max(set().union(*seen.batches)) == 309
    assert rounds[-1].new_states["kl"] < 0.01


@pytest.mark.parametrize(
    ("num_stored", "settings", "reason"),
    [
        (0, {"states": DatasetStates(Path("stored"))}, "needs a replay buffer with stored states"),
        (0, {"states": BlendedStates()}, "0 stored states were given"),
        (320, {}, "320 stored states were given"),
        (316, {"states": BlendedStates()}, "collect in as many"),
        (0, {"states_per_round": 100}, "not a multiple of num_envs 8"),
    ],
)
def test_numbers_of_states_that_do_not_fit_are_refused_before_anything_is_done(
    num_stored: int, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        with_stored_states(num_stored, replace(SMALL, **settings))


def test_a_schedule_that_follows_an_unknown_return_is_refused_at_the_start(problem: Problem) -> None:
    with pytest.raises(ValueError, match="needs a teacher that beats a random policy"):
        problem.train(Heavy(ReturnGap(1.0)))
    assert problem.state is not None
    assert len(problem.state.replay) == 0


@pytest.mark.parametrize("name", ["rounds", "states_per_round", "updates_per_round", "batch_size", "threads"])
def test_a_config_without_any_of_something_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        replace(SMALL, **{name: 0})  # type: ignore[arg-type]


def test_teachers_of_different_kinds_teach_together_and_their_disagreement_is_measured() -> None:
    teacher = load_teachers("bundled:ppo+bundled:dqn", "confidence", game="Pong")
    envs = make_atari("Pong", 4, seed=0)
    config = DistillConfig(rounds=2, states_per_round=40, updates_per_round=5, batch_size=32, states=TeacherStates())
    teacher(envs.reset())  # what it labelled before the run is not the run's
    rounds = list(distill(teacher, make_student("1%", 6), envs, config))
    replay = rounds[-1].state.replay
    obs = replay.gather(torch.arange(40))
    members = [load_teacher(f"bundled:{name}", game="Pong") for name in ("ppo", "dqn")]
    p, q = ((m(obs) / m.temperature).softmax(dim=1) for m in members)

    def entropy(x: Tensor) -> Tensor:
        return -(x * x.clamp(min=1e-30).log()).sum(dim=1)

    confidence_MB = torch.stack([1 - entropy(x) / torch.tensor(6.0).log() for x in (p, q)])
    shares_MB = confidence_MB / confidence_MB.sum(dim=0)
    mixture = shares_MB[0, :, None] * p + shares_MB[1, :, None] * q
    torch.testing.assert_close(replay.teacher_NA[:40].exp(), mixture, atol=1e-3, rtol=0.0)
    expected = entropy(mixture) - shares_MB[0] * entropy(p) - shares_MB[1] * entropy(q)
    metrics = rounds[0].collected.metrics
    assert metrics["teacher_disagreement"] == pytest.approx(float(expected.mean()), abs=1e-3)
    weights = [metrics["teacher_weight_0"], metrics["teacher_weight_1"]]
    assert weights == pytest.approx(shares_MB.mean(dim=1).tolist(), abs=1e-3)


WEIGHTS = AuxiliaryLossWeights(
    value=0.5, hint=0.5, attention=1.0, similarity=Linear(0.2, 0.0), relational=0.5, shift=0.5
)


class PongWithAuxiliaryLosses:
    """A run of the bundled PPO teacher in which everything but the logits is learned too."""

    def __init__(self, *, threads: int = 1, num_envs: int = 4, states_per_round: int = 80) -> None:
        self.config = DistillConfig(
            rounds=3,
            states_per_round=states_per_round,
            updates_per_round=12,
            batch_size=64,
            states=MixedStates(student=1.0),
            threads=threads,
        )
        self.teacher = load_teacher("bundled:ppo", game="Pong")
        self.student = make_student("1%", 6, value=True)
        self.loss_fn = AuxiliaryLosses(ForwardKL(), WEIGHTS, self.student, self.teacher)
        envs = make_atari("Pong", num_envs, 0)
        self.state: TrainState = make_train_state(self.student, envs, self.config, loss_fn=self.loss_fn)

    def train(self, until: int = 3) -> list[Round]:
        rounds = distill(
            self.teacher, self.student, self.state.envs, self.config, loss_fn=self.loss_fn, state=self.state
        )
        return [next(rounds) for _ in range(until - self.state.round)]


@pytest.mark.parametrize("threads", [1, 2])
def test_auxiliary_losses_are_learned_too(threads: int) -> None:
    rounds = PongWithAuxiliaryLosses(threads=threads).train()
    names = {"value", "hint", "attention", "similarity", "relational", "shift"}
    assert {f"{name}_loss" for name in names} <= rounds[0].train.keys()
    for name in ("hint", "attention"):  # the value's targets lie farther apart in later rounds
        assert rounds[-1].train[f"{name}_loss"] < rounds[0].train[f"{name}_loss"], name
    assert [r.schedules["loss.auxiliary.similarity"] for r in rounds] == pytest.approx([0.2, 0.1, 0.0])
    weights = {"value": 0.5, "hint": 0.5, "attention": 1.0, "similarity": 0.1, "relational": 0.5, "shift": 0.5}
    total = rounds[1].train["kl"] + sum(weight * rounds[1].train[f"{name}_loss"] for name, weight in weights.items())
    assert rounds[1].train["loss"] == pytest.approx(total, rel=1e-4)
    assert rounds[2].train["similarity_loss"] == 0.0  # not computed at weight 0


def test_a_run_with_a_trainable_loss_resumes_bit_for_bit(tmp_path: Path) -> None:
    """The projection is in the checkpoint; the teacher's features are computed again."""
    settings: dict[str, Any] = {"num_envs": 2, "states_per_round": 258}  # blocks of 256 labels end within a round
    whole = PongWithAuxiliaryLosses(**settings)
    expected = whole.train()
    first = PongWithAuxiliaryLosses(**settings)
    first.train(until=1)
    first.state.student_returns = [-21.0, -20.0]
    save_checkpoint(first.state, tmp_path)
    again = PongWithAuxiliaryLosses(**settings)
    restore_checkpoint(again.state, tmp_path)
    assert again.state.student_returns == [-21.0, -20.0]
    assert again.state.num_student_steps == first.state.num_student_steps > 0
    assert [r.train for r in again.train()] == [r.train for r in expected[1:]]
    for run, other in ((again.student, whole.student), (again.loss_fn, whole.loss_fn)):
        for name, weights in run.state_dict().items():
            assert torch.equal(other.state_dict()[name], weights), name
