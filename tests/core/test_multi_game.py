"""Several games as one vector of environments, one teacher, one state source and one loss."""

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from policykd import DistillConfig, distill, load_student, make_student
from policykd.agents.networks import ConvNet
from policykd.agents.policy import log_policy, sample
from policykd.agents.student import Student, read_student_card, save_student
from policykd.envs.atari import make_atari
from policykd.losses import ActionNLL, Batch, ForwardKL, JensenShannon, LossFn, ReverseKL, TwoSidedKL
from policykd.multi_game import (
    UNAVAILABLE,
    MultiGameEnvs,
    MultiGameLoss,
    MultiGameStates,
    MultiGameTeacher,
    separate_heads,
    shared_head,
)
from policykd.schedules import Progress
from policykd.states import MixedStates, StudentStates, TeacherStates

NUM = 2
"""environments of each game"""


@pytest.fixture
def envs() -> Iterator[MultiGameEnvs]:
    with closing(MultiGameEnvs({game: make_atari(game, NUM, 0) for game in ("Pong", "Breakout")})) as joined:
        yield joined


class Bright:
    """A teacher whose outputs depend on the pixels."""

    def __init__(self, num_actions: int, temperature: float = 1.0) -> None:
        self.num_actions, self.temperature = num_actions, temperature

    def __call__(self, obs: Tensor) -> Tensor:
        mean_B = obs.float().mean(dim=(1, 2, 3)) / 50.0
        return torch.stack([torch.sin(mean_B * (k + 1)) for k in range(self.num_actions)], dim=1)


def make_teacher(envs: MultiGameEnvs) -> MultiGameTeacher:
    return MultiGameTeacher({"Breakout": Bright(4, temperature=0.5), "Pong": Bright(6)}, envs)


def test_heads_are_separate_or_the_actions_of_a_common_set() -> None:
    assert separate_heads({"Pong": 3, "Breakout": 2}) == {"Pong": (0, 1, 2), "Breakout": (3, 4)}
    names = {"Pong": ("NOOP", "RIGHT"), "Breakout": ("FIRE", "NOOP")}
    assert shared_head(names, ("NOOP", "FIRE", "RIGHT")) == {"Pong": (0, 2), "Breakout": (1, 0)}


def test_the_games_are_those_of_their_own_environments(envs: MultiGameEnvs) -> None:
    assert (envs.num_envs, envs.num_actions, envs.obs_shape, envs.stack) == (4, 10, (4, 84, 84), 4)
    assert envs.available_EA.tolist() == [[True] * 6 + [False] * 4] * 2 + [[False] * 6 + [True] * 4] * 2
    with closing(make_atari("Pong", NUM, 0)) as pong, closing(make_atari("Breakout", NUM, 0)) as breakout:
        assert torch.equal(envs.reset(), torch.cat([pong.reset(), breakout.reset()]))
        for _ in range(5):
            step = envs.step(torch.tensor([2, 3, 6 + 1, 6 + 3]))
            expected = [pong.step(torch.tensor([2, 3])), breakout.step(torch.tensor([1, 3]))]
            assert torch.equal(step.obs, torch.cat([e.obs for e in expected]))
            assert torch.equal(step.rewards_B, torch.cat([e.rewards_B for e in expected]))
        # A held environment stands still, the others do not.
        before = envs.step(torch.tensor([2, 3, 7, 9])).obs
        after = envs.step(torch.tensor([-1, 3, -1, 6])).obs
        assert [bool((before[i] == after[i]).all()) for i in range(4)] == [True, False, True, False]


def test_an_output_of_another_game_is_refused(envs: MultiGameEnvs) -> None:
    envs.reset()
    with pytest.raises(ValueError, match=r"outputs \[6, 7\]: not all are actions of Pong"):
        envs.step(torch.tensor([6, 7, 6, 7]))


def test_a_position_is_restored(envs: MultiGameEnvs) -> None:
    envs.reset()
    state = envs.state()
    actions = torch.tensor([2, 3, 7, 8])
    first = [envs.step(actions).obs for _ in range(3)]
    envs.restore(state)
    assert all(torch.equal(envs.step(actions).obs, obs) for obs in first)
    with pytest.raises(ValueError, match="the state is that of Pong, these are Pong, Breakout"):
        envs.restore({"Pong": state["Pong"]})


def test_environments_that_do_not_fit_are_refused() -> None:
    with closing(make_atari("Pong", 1, 0)) as one, closing(make_atari("Breakout", 2, 0)) as two:
        with pytest.raises(ValueError, match=r"Breakout has 2 environments .* Pong has 1"):
            MultiGameEnvs({"Pong": one, "Breakout": two})
        with pytest.raises(ValueError, match=r"Pong has 6 actions, its head is \(0, 1\)"):
            MultiGameEnvs({"Pong": one}, {"Pong": (0, 1)})


def test_each_teacher_labels_its_own_game_at_its_own_temperature(envs: MultiGameEnvs) -> None:
    obs = envs.reset()
    outputs = make_teacher(envs)(obs)
    torch.testing.assert_close(outputs[:2, :6], Bright(6)(obs[:2]).log_softmax(1))
    torch.testing.assert_close(outputs[2:, 6:], (Bright(4)(obs[2:]) / 0.5).log_softmax(1))
    given = MultiGameTeacher({"Breakout": Bright(4, temperature=0.5), "Pong": Bright(6)}, envs, temperature=0.25)(obs)
    torch.testing.assert_close(given[:2, :6], (Bright(6)(obs[:2]) / 0.25).log_softmax(1))
    torch.testing.assert_close(given[2:, 6:], (Bright(4)(obs[2:]) / 0.25).log_softmax(1))
    assert (outputs[:2, 6:] == UNAVAILABLE).all()
    assert (outputs[2:, :6] == UNAVAILABLE).all()
    with pytest.raises(ValueError, match="3 observations for 4 environments"):
        make_teacher(envs)(obs[:3])
    with pytest.raises(ValueError, match="teachers of Pong for the games Pong, Breakout"):
        MultiGameTeacher({"Pong": Bright(6)}, envs)


@pytest.mark.parametrize(
    "states", [TeacherStates(), StudentStates(), MixedStates(student=0.5), TeacherStates(epsilon=1.0)]
)
def test_actions_are_those_of_the_game(states: MixedStates, envs: MultiGameEnvs) -> None:
    obs = envs.reset()
    generator = torch.Generator().manual_seed(0)
    source = MultiGameStates(states, envs)
    student = make_student("0.1%", envs.num_actions)
    counts = torch.zeros(envs.num_envs, envs.num_actions)
    for k in range(300):
        # Outputs of a teacher that are not finite become zeros, also in the columns of other games.
        teacher_BA = make_teacher(envs)(obs) if k % 2 else torch.zeros(4, 10)
        actions_B = source(obs, teacher_BA, student, 0.5, generator)
        counts += torch.nn.functional.one_hot(actions_B, envs.num_actions)
    assert ((counts > 0) == envs.available_EA).all()
    assert source.student_fraction(0.5) == states.student_fraction(0.5)
    if states.epsilon:  # uniform over the game's own actions
        torch.testing.assert_close(counts[0, :6], torch.full((6,), 50.0), atol=25.0, rtol=0.0)


@pytest.mark.parametrize("loss", [ForwardKL(), ReverseKL(), JensenShannon(), TwoSidedKL(temperature=10.0), ActionNLL()])
def test_losses_are_those_of_the_games_own_outputs(loss: LossFn, envs: MultiGameEnvs) -> None:
    obs = envs.reset().repeat(3, 1, 1, 1)
    teacher_BA = make_teacher(envs)(envs.reset()).repeat(3, 1)
    rows_B = torch.arange(12)
    batch = Batch(obs, teacher_BA, rows_B, 1.0, Progress(0.0), rows_B)
    student = make_student("0.1%", envs.num_actions, seed=3)
    loss_B, metrics = MultiGameLoss(loss, envs)(student, batch)
    for game, rows in envs.rows.items():
        own = (rows_B % 4 >= rows.start) & (rows_B % 4 < rows.stop)
        head = list(envs.heads[game])
        alone = Batch(obs[own], teacher_BA[own][:, head], rows_B[own], 1.0, Progress(0.0), rows_B[own])
        expected_B, expected = loss(student.with_outputs(head), alone)
        torch.testing.assert_close(loss_B[own], expected_B)
        for name, value_B in expected.items():
            torch.testing.assert_close(metrics[f"{game}/{name}"].mean(), value_B.mean())
    torch.testing.assert_close(metrics["kl"].mean(), (metrics["Pong/kl"] + metrics["Breakout/kl"]).mean() / 2)
    # States of one game leave the other's head alone.
    pong = rows_B % 4 < 2
    assert isinstance(student.net, ConvNet)
    (gradient,) = torch.autograd.grad(loss_B[pong].sum(), [student.net.dense[-1].get_parameter("weight")])
    assert (gradient[:6] != 0).any(dim=1).all()
    assert (gradient[6:] == 0).all()


def test_one_game_alone_is_distilled_bit_for_bit_as_without_the_masks() -> None:
    half = MixedStates(student=0.5)
    config = DistillConfig(rounds=2, states_per_round=32, updates_per_round=4, batch_size=16, states=half)
    weights: list[Tensor] = []
    for is_joined in (False, True):
        with closing(make_atari("Pong", 4, 0)) as pong:
            student = make_student("0.1%", 6)
            if is_joined:
                joined = MultiGameEnvs({"Pong": pong})
                states = MultiGameStates(half, joined)
                teacher = MultiGameTeacher({"Pong": Bright(6)}, joined)
                rounds = distill(
                    teacher, student, joined, replace(config, states=states), loss_fn=MultiGameLoss(ForwardKL(), joined)
                )
            else:
                rounds = distill(lambda obs: log_policy(Bright(6)(obs)), student, pong, config, loss_fn=ForwardKL())
            assert len(list(rounds)) == 2
            weights.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert torch.equal(*weights)


def test_a_student_of_two_games_learns_both(envs: MultiGameEnvs) -> None:
    config = DistillConfig(
        rounds=2, states_per_round=64, updates_per_round=60, batch_size=32, states=MultiGameStates(MixedStates(), envs)
    )
    student = make_student("1%", envs.num_actions)
    *_, last = distill(make_teacher(envs), student, envs, config, loss_fn=MultiGameLoss(ForwardKL(), envs))
    first = {
        game: float(Bright(6 if game == "Pong" else 4)(envs.reset()[rows]).std()) for game, rows in envs.rows.items()
    }
    assert all(first.values())
    assert last.new_states["Pong/kl"] < 0.02
    assert last.new_states["Breakout/kl"] < 0.02
    generator = torch.Generator().manual_seed(0)
    assert sample(student.with_outputs(envs.heads["Breakout"])(envs.reset()), generator).max() < 4


def test_the_example_in_the_document_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "multi_game.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, "multi_game.md", "exec"), names)
    assert names["r"].train["two/kl"] > 0.0
    assert names["of_first"].shape.num_actions == 6


def test_a_student_of_one_game_is_cut_out_of_the_shared_one(tmp_path: Path, envs: MultiGameEnvs) -> None:
    student = make_student("1%", 10, seed=1).eval()
    obs = envs.reset()
    student.fit_input_normalization(obs[:, -1])
    own = student.with_outputs((9, 6))
    assert own.shape == replace(student.shape, num_actions=2)
    torch.testing.assert_close(own(obs), student(obs)[:, [9, 6]])

    save_student(student, tmp_path, heads=envs.heads)
    card = read_student_card(tmp_path / "student.json")
    assert (card.format, card.heads) == (4, envs.heads)
    torch.testing.assert_close(load_student(tmp_path)(obs), student(obs))
    torch.testing.assert_close(load_student(tmp_path, game="Breakout")(obs), student(obs)[:, 6:])
    with pytest.raises(ValueError, match="plays Pong, Breakout, not Qbert; give one of them"):
        load_student(tmp_path, game="Qbert")
    module = Student.of(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(3)), 3, (4,))
    with pytest.raises(ValueError, match="no known last layer"):
        module.with_outputs((0,))
