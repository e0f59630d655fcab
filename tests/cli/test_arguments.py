"""Short forms and schedules on a command line."""

import re
from dataclasses import dataclass

import pytest

from policykd.cli.arguments import expand_shorthand, parse_args
from policykd.legacy.auxiliary import BeyondLogits
from policykd.legacy.losses import AnyLoss, ForwardKL, SoftAndHard
from policykd.legacy.schedules import Cosine, Linear, Quantity, ReturnGap
from policykd.legacy.states import BlendedStates, DatasetStates, MixedStates, StudentStates, TeacherStates


@dataclass(frozen=True)
class Args:
    weight: Quantity = 1.0
    loss: AnyLoss = ForwardKL()  # noqa: RUF009
    beyond: BeyondLogits = BeyondLogits()  # noqa: RUF009
    states: MixedStates | StudentStates | TeacherStates | DatasetStates | BlendedStates = MixedStates()  # noqa: RUF009


def test_numbers_and_schedules() -> None:
    words = ["--weight", "linear:1:0", "--loss", "soft-and-hard", "--loss.hard", "cosine:1:0.1:0.5"]
    args = parse_args(Args, [*words, "--loss.temperature", "2", "--beyond.value", "gap:3"])
    assert args.weight == Linear(1.0, 0.0)
    assert args.loss == SoftAndHard(temperature=2.0, hard=Cosine(1.0, 0.1, 0.5))
    assert args.beyond == BeyondLogits(value=ReturnGap(3.0))
    assert parse_args(Args, []) == Args()


@pytest.mark.parametrize(
    ("words", "reasons"),
    [
        (["--weight", "linear:1"], ["--weight", "neither a number nor a schedule"]),
        (["--weight", "inf"], ["--weight", "finite numbers are needed"]),
        (["--loss", "huber"], ["--loss huber", "forward-kl, reverse-kl"]),
        (["--loss"], ["--loss : invalid", "give one of"]),
        (["--loss", "forward-kl", "--loss.temperature", "-1"], ["temperature must be positive"]),
        (["--beyond.value", "-1"], ["value is -1"]),
        (["--unknown", "1"], ["--unknown"]),
        (["--loss", "forward-kl", "--loss.hard", "1"], ["--loss.hard"]),
    ],
)
def test_what_cannot_be_is_one_line_with_its_flag(words: list[str], reasons: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(reasons[0])) as refused:
        parse_args(Args, words)
    said = str(refused.value)
    assert "\n" not in said
    assert not set(said) & set("│╭╮╰╯─")
    assert all(reason in said for reason in reasons), said


def test_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_args(Args, ["--help"])
    assert ended.value.code == 0
    assert "--weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--states", "teacher", "--states.epsilon", "0.05"], ["states:teacher-states", "--states.epsilon", "0.05"]),
        (["--states=blended:a/b"], ["states:blended-states", "--states.path", "a/b"]),
        (["--seed", "1"], ["--seed", "1"]),
        (
            ["--states", "student", "--loss=reverse-kl", "--seed", "1"],
            ["--seed", "1", "loss:reverse-kl", "states:student-states"],
        ),
        (
            ["states:mixed-states", "--states.epsilon=0.1", "loss:action-nll"],
            ["loss:action-nll", "states:mixed-states", "--states.epsilon=0.1"],
        ),
    ],
)
def test_short_forms_on_the_command_line(words: list[str], expected: list[str]) -> None:
    assert expand_shorthand(Args, words) == expected


@pytest.mark.parametrize("words", [["--states", "mixed:x"], ["--states", "dataset"], ["--states", "other"]])
def test_states_that_are_none_are_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="invalid; give one of mixed, student"):
        expand_shorthand(Args, words)


def test_options_alone_belong_to_the_default_loss() -> None:
    args = parse_args(Args, ["--loss.temperature", "2", "--states.epsilon", "0.1"])
    assert args.loss == ForwardKL(temperature=2.0)
    assert args.states == MixedStates(epsilon=0.1)
    repeated = parse_args(Args, ["--loss.hard", "0.5"], default=Args(loss=SoftAndHard(temperature=2.0)))
    assert repeated.loss == SoftAndHard(temperature=2.0, hard=0.5)
