"""Short forms and schedules on a command line."""

import re

import pytest

from policykd.cli.arguments import expand_shorthand, parse_args
from policykd.losses import AuxiliaryLossWeights, ForwardKL, SoftAndHard, TwoSidedKL
from policykd.runs.config import DistillRunConfig
from policykd.schedules import Cosine, Linear, ReturnGap
from policykd.states import MixedStates


def parse(*words: str, default: DistillRunConfig | None = None) -> DistillRunConfig:
    return parse_args(DistillRunConfig, ["--game", "Pong", *words], default=default)


def test_numbers_and_schedules() -> None:
    words = ["--min-state-weight", "linear:1:0", "--loss", "soft-and-hard", "--loss.hard", "cosine:1:0.1:0.5"]
    args = parse(*words, "--loss.temperature", "2", "--auxiliary.value", "gap:3")
    assert args.min_state_weight == Linear(1.0, 0.0)
    assert args.loss == SoftAndHard(temperature=2.0, hard=Cosine(1.0, 0.1, 0.5))
    assert args.auxiliary == AuxiliaryLossWeights(value=ReturnGap(3.0))
    assert parse() == DistillRunConfig(game="Pong")


@pytest.mark.parametrize(
    ("words", "reasons"),
    [
        (["--min-state-weight", "linear:1"], ["--min-state-weight", "neither a number nor a schedule"]),
        (["--min-state-weight", "inf"], ["--min-state-weight", "must be finite"]),
        (["--loss", "huber"], ["--loss huber", "forward-kl, reverse-kl"]),
        (["--loss", "logit-mse", "--loss.temperature", "linear:1:2"], ["linear:1:2: give a number, not a schedule"]),
        (["--loss"], ["--loss : invalid", "give one of"]),
        (["--loss", "forward-kl", "--loss.temperature", "-1"], ["temperature must be"]),
        (["--auxiliary.value", "-1"], ["value must be at least 0"]),
        (["--unknown", "1"], ["--unknown"]),
        (["--seed", "-1"], ["--seed must be at least 0 and at most 4294967295, not -1"]),
        (["--num-envs", "0"], ["--num-envs must be at least 1, not 0"]),
        (
            ["--loss", "forward-kl", "--loss.hard", "1"],
            ["--loss.hard: unknown; --loss forward-kl has"],
        ),
        (["--states.held-out", "1"], ["--states.held-out: unknown; --states mixed has --states.epsilon"]),
    ],
)
def test_an_invalid_flag_is_one_line(words: list[str], reasons: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(reasons[0])) as refused:
        parse(*words)
    said = str(refused.value)
    assert "\n" not in said
    assert not set(said) & set("│╭╮╰╯─")
    assert all(reason in said for reason in reasons), said


def test_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    assert "--min-state-weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--states", "teacher", "--states.epsilon", "0.05"], ["states:teacher-states", "--states.epsilon", "0.05"]),
        (["--states=blended:a/b"], ["states:blended-states", "--states.path", "a/b"]),
        (["--seed", "1"], ["--seed", "1"]),
        (["--name", "states", "--folder", "loss.1"], ["--name", "states", "--folder", "loss.1"]),
        (
            ["--loss", "two-sided-kl", "--loss.teacher_temperature", "2"],
            ["loss:two-sided-kl", "--loss.teacher_temperature", "2"],
        ),
        (["states:mixed-states", "loss:action-nll"], ["loss:action-nll", "states:mixed-states"]),
        (
            ["--states", "student", "--loss=reverse-kl", "--seed", "1"],
            ["--seed", "1", "loss:reverse-kl", "states:student-states"],
        ),
    ],
)
def test_short_forms_on_the_command_line(words: list[str], expected: list[str]) -> None:
    assert expand_shorthand(DistillRunConfig, words) == expected


@pytest.mark.parametrize("given", ["dataset", "dataset:"])
def test_states_without_their_path_are_refused(given: str) -> None:
    with pytest.raises(ValueError, match="--states dataset: no path; give --states dataset:PATH"):
        expand_shorthand(DistillRunConfig, ["--states", given])


@pytest.mark.parametrize("words", [["--states", "mixed:x"], ["--states", "other"]])
def test_invalid_states_are_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="invalid; give one of mixed, student"):
        expand_shorthand(DistillRunConfig, words)


def test_underscores_in_the_name_of_an_option_are_dashes() -> None:
    args = parse("--loss", "two-sided-kl", "--loss.teacher_temperature", "2", "--name", "states")
    assert (args.loss, args.name) == (TwoSidedKL(teacher_temperature=2.0), "states")


def test_options_alone_belong_to_the_default_loss() -> None:
    args = parse("--loss.temperature", "2", "--states.epsilon", "0.1")
    assert args.loss == ForwardKL(temperature=2.0)
    assert args.states == MixedStates(epsilon=0.1)
    default = DistillRunConfig(game="Pong", loss=SoftAndHard(temperature=2.0), rounds=3)
    repeated = parse("--loss.hard", "0.5", default=default)
    assert repeated.rounds == 3
    assert repeated.loss == SoftAndHard(temperature=2.0, hard=0.5)
