"""What a run may be told beside its loss: schedules, feedback, which states, several teachers, more than scores."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from policykd.agents.ensemble import load_teachers
from policykd.agents.student import make_student
from policykd.agents.teacher import load_teacher
from policykd.envs.atari import make_atari
from policykd.envs.identity import IdentityEnv
from policykd.envs.vector import Episode, Step
from policykd.legacy.auxiliary import Beyond, BeyondLogits
from policykd.legacy.loop import distill
from policykd.legacy.losses import AnyLoss, ForwardKL, Loss, ScoreHuber, ScoreMSE, at_temperature
from policykd.legacy.replay import Replay
from policykd.legacy.schedules import Linear, Quantity, ReturnGap, ReturnReached, WarmupCosine
from policykd.legacy.state_weights import ByDisagreement, ByEntropy, ByGap, Weight, Weighted
from policykd.legacy.states import MixedStates, StateSource, StudentStates, TeacherStates
from policykd.legacy.train_state import Learner, make_learner
from policykd.legacy.trainer import Round
from policykd.storage.checkpoints import restore_checkpoint, save_checkpoint

FORWARD, MIXED = ForwardKL(), MixedStates()


def identity_teacher(obs: Tensor) -> Tensor:
    return 3.0 * obs


def identity_learner(seed: int = 0, temperature: float = 1.0) -> Learner:
    student = make_student((16,), 4, (4,), seed=seed, temperature=temperature)
    return make_learner(student, IdentityEnv(8, 4, seed), capacity=2000, seed=seed)


def run(
    learner: Learner,
    *,
    loss: Loss = FORWARD,
    states: StateSource = MIXED,
    rounds: int = 8,
    teacher: Callable[[Tensor], Tensor] = identity_teacher,
    **more: Any,
) -> list[Round]:
    settings = {"states_per_round": 160, "updates_per_round": 40, "batch_size": 64, **more}
    rate = WarmupCosine(2e-2)
    return list(distill(teacher, learner, loss=loss, states=states, learning_rate=rate, rounds=rounds, **settings))


@pytest.mark.parametrize("loss", [kind() for kind in get_args(AnyLoss)], ids=lambda loss: type(loss).__name__)
def test_every_loss_of_the_command_line_teaches(loss: Loss) -> None:
    learner = identity_learner()
    assert run(learner, loss=loss)[-1].action_agreement > 0.99


@pytest.mark.parametrize("weight", [ByEntropy(), ByGap(), ByDisagreement()], ids=lambda weight: type(weight).__name__)
def test_every_weight_of_states_teaches(weight: Weight) -> None:
    learner = identity_learner()
    assert run(learner, loss=Weighted(ForwardKL(), weight))[-1].kl < 1e-3


@pytest.mark.parametrize("make", [ScoreMSE, ScoreHuber])
def test_a_student_of_q_values_learns_them_and_plays_them_tempered(make: type[ScoreMSE] | type[ScoreHuber]) -> None:
    """The teacher's Q-values are 0.03 apart: at 0.01 its policy is that of logits 3 apart, and so is the student's."""
    learner = identity_learner(temperature=0.01)
    last = run(learner, loss=at_temperature(make(), 0.01), teacher=lambda obs: 0.03 * obs, temperature=0.01)[-1]
    assert last.kl < 1e-3
    torch.testing.assert_close(0.01 * learner.student(torch.eye(4)), 0.03 * torch.eye(4), atol=2e-3, rtol=0.0)


@dataclass(frozen=True)
class Heavy:
    """A loss whose value is its weight."""

    weight: Quantity

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        assert isinstance(self.weight, float)
        return 0.0 * student_BA.sum(dim=1) + self.weight


def test_a_schedule_changes_the_loss_from_round_to_round() -> None:
    rounds = run(identity_learner(), loss=Heavy(Linear(4.0, 0.0)), rounds=5)
    assert [r.loss for r in rounds] == pytest.approx([4.0, 3.0, 2.0, 1.0, 0.0])
    assert [r.scheduled["loss.weight"] for r in rounds] == pytest.approx([4.0, 3.0, 2.0, 1.0, 0.0])


def test_feedback_falls_as_the_student_comes_near() -> None:
    """Random play gets a quarter of the episodes right, the teacher 87 %."""
    loss = Weighted(ForwardKL(), ByEntropy(floor=ReturnGap(1.0)))
    goal: dict[str, Any] = {"teacher_return": 0.87, "random_return": 0.25}
    rounds = run(identity_learner(), loss=loss, states=StudentStates(), **goal)
    gaps = [r.scheduled["loss.weight.floor"] for r in rounds]
    assert gaps[0] > 0.6  # the first games, before any fit, are those of chance
    assert gaps[-1] < 0.2
    expected = [min(1.0, max(0.0, 1 - ((r.student_return or 0.25) - 0.25) / 0.62)) for r in rounds]
    assert gaps == pytest.approx(expected)


def test_before_the_student_has_played_it_counts_as_no_better_than_chance() -> None:
    goal: dict[str, Any] = {"teacher_return": 0.87, "random_return": 0.25}
    rounds = run(identity_learner(), loss=Heavy(ReturnGap(2.0)), states=TeacherStates(), rounds=3, **goal)
    assert [r.loss for r in rounds] == pytest.approx([2.0] * 3)
    assert [r.student_return for r in rounds] == [None] * 3


def test_an_evaluation_counts_where_the_student_does_not_play() -> None:
    learner = identity_learner()
    settings: dict[str, Any] = {
        "states_per_round": 160,
        "updates_per_round": 10,
        "teacher_return": 1.0,
        "random_return": 0.0,
    }
    states = MixedStates(student=ReturnReached(0.0, 0.9))
    rounds = []
    rate = WarmupCosine(1e-2)
    for r in distill(
        identity_teacher, learner, loss=ForwardKL(), states=states, learning_rate=rate, rounds=4, **settings
    ):
        rounds.append(r)
        learner.student_returns = [0.5]  # what the caller's evaluation found
    assert [r.student_fraction for r in rounds] == pytest.approx([0.0, 0.0, 0.45, 0.45])
    assert [r.scheduled["states.student"] for r in rounds] == pytest.approx([0.0, 0.0, 0.45, 0.45])


class Marathon(IdentityEnv):
    """Episodes of 30 steps, one point for each right action."""

    def __init__(self, num_envs: int, num_actions: int) -> None:
        super().__init__(num_envs, num_actions)
        self.returns, self.num_steps = [0.0] * num_envs, 0

    def step(self, actions_B: Tensor) -> Step:
        played = super().step(actions_B).episodes
        self.returns = [r + e.episodic_return for r, e in zip(self.returns, played, strict=True)]
        self.num_steps += 1
        ended = [Episode(i, r, 30) for i, r in enumerate(self.returns)] if self.num_steps % 30 == 0 else []
        self.returns = [0.0] * self.num_envs if ended else self.returns
        ends_B = torch.full((self.num_envs,), bool(ended))
        return Step(self._obs(), torch.zeros(self.num_envs), ends_B, ended)


def test_a_game_is_the_students_own_from_its_first_step_on() -> None:
    """20 steps a round: the game that ends in the third round began under the teacher, the next one did not."""
    student = make_student((16,), 4, (4,), seed=0)
    learner = make_learner(student, Marathon(8, 4), capacity=2000, seed=0)
    states = MixedStates(student=Linear(0.0, 1.0, 0.01))
    rounds = run(learner, states=states, rounds=5, updates_per_round=1)
    assert [r.student_fraction for r in rounds] == pytest.approx([0.0, 0.0, 1.0, 1.0, 1.0])
    assert [len(r.episodes) for r in rounds] == [0, 8, 8, 0, 8]
    assert [r.student_return is None for r in rounds] == [True, True, True, True, False]
    noisy = MixedStates(student=1.0, epsilon=0.1)
    other = make_learner(make_student((16,), 4, (4,), seed=0), Marathon(8, 4), capacity=2000, seed=0)
    assert all(r.student_return is None for r in run(other, states=noisy, rounds=5, updates_per_round=1))


def test_the_curve_of_a_weight_is_its_mean_over_the_new_states() -> None:
    rounds = run(identity_learner(), loss=Weighted(FORWARD, ByDisagreement(floor=0.0)))
    far = float((torch.softmax(torch.tensor([3.0, 0.0, 0.0, 0.0]), dim=0) - 0.25).abs().sum()) / 2
    assert rounds[0].state_weight == pytest.approx(far, abs=0.1)  # the untrained student is nearly uniform
    assert rounds[-1].state_weight == pytest.approx(0.0, abs=0.02)
    assert run(identity_learner(), rounds=1)[0].state_weight is None


def rows_fitted(learner: Learner) -> list[set[int]]:
    """Returns a list that is filled with the rows of every batch."""
    seen: list[set[int]] = []
    gather = learner.replay.gather

    def noted(rows_B: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(set(rows_B.tolist()))
        return gather(rows_B)

    learner.replay.gather = noted  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize(("rounds_kept", "oldest"), [(0, [0, 0, 0, 0]), (1, [0, 160, 320, 480]), (2, [0, 0, 160, 320])])
def test_which_rounds_are_fitted_to(rounds_kept: int, oldest: list[int]) -> None:
    learner = identity_learner()
    seen = rows_fitted(learner)
    run(learner, rounds=4, rounds_kept=rounds_kept)
    for k in range(4):
        rows = set().union(*seen[40 * k : 40 * (k + 1)])
        assert oldest[k] <= min(rows) < oldest[k] + 10
        assert 160 * (k + 1) - 10 < max(rows) < 160 * (k + 1)


def test_stored_states_have_their_share_of_every_batch() -> None:
    stored = identity_learner(seed=5)
    run(stored, rounds=2)
    given = stored.replay
    learner = identity_learner()
    learner.replay.extend(given.arrays(0, 320))
    learner.replay.num_given = 320
    seen = rows_fitted(learner)
    rounds = run(learner, rounds=3, stored=0.25, rounds_kept=1)
    assert [r.num_states for r in rounds] == [480, 640, 800]
    for k, rows in enumerate(seen):
        live = {row for row in rows if row >= 320}
        assert len(rows) - len(live) <= 16  # of 64, and some are drawn twice
        assert min(live) >= 320 + 160 * (k // 40)
    assert rounds[-1].new_kl < rounds[0].new_kl


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"states_per_round": 0}, "needs a replay that holds some states out"),
        ({"stored": 0.5}, "the replay was given 0"),
        ({"beyond": BeyondLogits(value=1.0)}, "the learner was made for"),
        ({"states_per_round": 100}, "not a multiple"),
        ({"loss": ForwardKL(Linear(1.0, 0.0))}, "temperature must be positive"),  # in the last round
        ({"loss": Heavy(ReturnGap(1.0))}, "needs a teacher that beats random play"),
        ({"states": MixedStates(student=Linear(0.0, 1.5))}, "share of the steps"),
        ({"states": TeacherStates(epsilon=Linear(0.0, 7.0))}, "epsilon is a chance"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_done(more: dict[str, Any], reason: str) -> None:
    learner = identity_learner()
    with pytest.raises(ValueError, match=reason):
        run(learner, **more)
    assert len(learner.replay) == 0


@pytest.mark.parametrize(
    ("num_given", "more", "reason"),
    [
        (320, {"states_per_round": 0, "rounds_kept": 1}, "needs states that are visited"),
        (316, {"stored": 0.5}, "visit as many at once"),
        (320, {"stored": 0.001}, "leaves no room for both"),
        (320, {"stored": 0.999}, "leaves no room for both"),
    ],
)
def test_stored_states_that_do_not_fit_are_refused(num_given: int, more: dict[str, Any], reason: str) -> None:
    given = identity_learner(seed=5)
    run(given, rounds=2)
    learner = identity_learner()
    learner.replay.extend(given.replay.arrays(0, num_given))
    learner.replay.num_given, learner.replay.num_held_out = num_given, 10
    with pytest.raises(ValueError, match=reason):
        run(learner, **more)


def test_teachers_of_different_kinds_teach_together_and_their_disagreement_is_told() -> None:
    teacher = load_teachers("bundled:ppo+bundled:dqn", "confidence", game="Pong")
    envs = make_atari("Pong", 4, seed=0)
    learner = make_learner(make_student("1%", 6), envs, capacity=80, seed=0)
    teacher(learner.obs)  # what it was asked before the run is not the run's
    settings: dict[str, Any] = {"states_per_round": 40, "updates_per_round": 5, "batch_size": 32}
    rounds = list(
        distill(
            teacher,
            learner,
            loss=ForwardKL(),
            states=TeacherStates(),
            learning_rate=WarmupCosine(2e-3),
            rounds=2,
            **settings,
        )
    )
    members = [load_teacher(f"bundled:{name}", game="Pong") for name in ("ppo", "dqn")]
    obs = learner.replay.gather(torch.arange(40))
    p, q = ((m(obs) / m.temperature).softmax(dim=1) for m in members)
    confidence_MB = torch.stack(
        [1 + (x * x.clamp(min=1e-30).log()).sum(dim=1) / torch.tensor(6.0).log() for x in (p, q)]
    )
    shares_MB = confidence_MB / confidence_MB.sum(dim=0)
    mixture = shares_MB[0, :, None] * p + shares_MB[1, :, None] * q
    torch.testing.assert_close(learner.replay.scores_NA[:40].exp(), mixture, atol=1e-3, rtol=0.0)

    def entropy(x: Tensor) -> Tensor:
        return -(x * x.clamp(min=1e-30).log()).sum(dim=1)

    expected = entropy(mixture) - shares_MB[0] * entropy(p) - shares_MB[1] * entropy(q)
    assert rounds[0].teacher_disagreement == pytest.approx(float(expected.mean()), abs=1e-3)
    assert rounds[0].teacher_weights == pytest.approx(shares_MB.mean(dim=1).tolist(), abs=1e-3)
    assert run(identity_learner(), rounds=1)[0].teacher_disagreement is None


ALL = BeyondLogits(value=0.5, hint=0.5, attention=1.0, similarity=Linear(0.2, 0.0), relational=0.5, shift=0.5)


def pong(seed: int = 0, num_envs: int = 4) -> Learner:
    student = make_student("1%", 6, value=True, seed=seed)
    beyond = Beyond(ALL, student, load_teacher("bundled:ppo", game="Pong"), seed=seed)
    return make_learner(student, make_atari("Pong", num_envs, seed), capacity=800, seed=seed, beyond=beyond)


def fitted(learner: Learner, until: int, threads: int = 1, states_per_round: int = 80) -> list[Round]:
    rounds = distill(
        load_teacher("bundled:ppo", game="Pong"),
        learner,
        loss=ForwardKL(),
        states=MixedStates(student=1.0),
        learning_rate=WarmupCosine(2e-3),
        rounds=3,
        states_per_round=states_per_round,
        updates_per_round=12,
        batch_size=64,
        beyond=ALL,
        threads=threads,
    )
    return [next(rounds) for _ in range(until - learner.round)]


@pytest.mark.parametrize("threads", [1, 2])
def test_what_lies_beyond_the_scores_is_learned_too(threads: int) -> None:
    learner = pong()
    rounds = fitted(learner, 3, threads)
    assert set(rounds[0].terms) == {"value", "hint", "attention", "similarity", "relational", "shift"}
    for name in ("hint", "attention"):  # the value's targets lie farther apart in later rounds
        assert rounds[-1].terms[name] < rounds[0].terms[name], name
    assert [r.scheduled["beyond.similarity"] for r in rounds] == pytest.approx([0.2, 0.1, 0.0])
    weights = {"value": 0.5, "hint": 0.5, "attention": 1.0, "similarity": 0.1, "relational": 0.5, "shift": 0.5}
    total = rounds[1].kl + sum(weights[name] * term for name, term in rounds[1].terms.items())
    assert rounds[1].loss == pytest.approx(total, rel=1e-4)
    assert rounds[2].terms["similarity"] == 0.0  # at weight 0 it is not computed


def test_a_run_with_projections_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """The projections are in the checkpoint, what the teacher said beyond its scores is asked for again."""
    whole = pong(num_envs=2)
    expected = fitted(whole, 3, states_per_round=258)  # the last two of each visit are asked about by themselves
    first = pong(num_envs=2)
    fitted(first, 1, states_per_round=258)
    first.student_returns = [-21.0, -20.0]
    save_checkpoint(first, tmp_path)
    again = pong(num_envs=2)
    restore_checkpoint(again, tmp_path)
    assert again.student_returns == [-21.0, -20.0]
    assert again.student_steps == first.student_steps > 0
    found = fitted(again, 3, states_per_round=258)
    assert [(r.loss, r.terms) for r in found] == [(r.loss, r.terms) for r in expected[1:]]
    assert whole.beyond is not None
    assert again.beyond is not None
    for name, weights in (whole.student.state_dict() | whole.beyond.state_dict()).items():
        assert torch.equal((again.student.state_dict() | again.beyond.state_dict())[name], weights), name


def test_labels_beyond_the_scores_stay_on_the_device_of_the_states() -> None:
    """On tensors without numbers, which can meet no other device's."""
    learner = pong()
    assert learner.beyond is not None
    learner.replay = Replay(40, 4, 6, (4, 84, 84), stack=4, dtype=torch.uint8, device="meta")
    learner.replay.size = 40
    seen = []

    def label(obs: Tensor, rows_B: Tensor, new: slice) -> None:
        seen.append((obs.device.type, rows_B.device.type, len(rows_B), new))

    learner.beyond.label = label  # type: ignore[assignment]
    learner.label_beyond()
    assert seen == [("meta", "meta", 256, slice(0, 40))]
