"""Configs of runs: checks, and JSON that reads back."""

import json
from pathlib import Path
from typing import Any

import pytest

from policykd.io.files import BadFile
from policykd.losses import AuxiliaryLossWeights, JensenShannon, SoftAndHard, TwoSidedKL
from policykd.runs.config import DistillRunConfig, changed_settings, check_config, from_settings, to_settings
from policykd.schedules import Cosine, Exponential, Linear, ReturnGap
from policykd.states import BlendedStates, DatasetStates, StudentStates, TeacherStates

UNUSUAL = DistillRunConfig(
    game="Pong",
    folder=Path("else/where"),
    teacher_weights="0.7,0.3",
    learning_rate=Cosine(0.1234567890123, 0.0),
    loss=TwoSidedKL(temperature=Exponential(4.0, 1.0, 0.5)),
    states=BlendedStates(path=Path("a/b"), student=Linear(0.0, 1.0)),
    auxiliary=AuxiliaryLossWeights(shift=ReturnGap(3.0)),
    temperature=0.1,
    overlap=False,
)


def own_loss(student: object, batch: object) -> None:
    """A loss function, which only the loop takes."""


def test_a_folder_may_be_text() -> None:
    text: Any = "else/where"
    assert DistillRunConfig(game="Pong", folder=text).folder == Path("else/where")


@pytest.mark.parametrize("config", [UNUSUAL, DistillRunConfig(game="Pong")])
def test_a_config_is_json_that_reads_back(config: DistillRunConfig) -> None:
    settings = json.loads(json.dumps(to_settings(config)))
    assert from_settings(DistillRunConfig, settings, "config.json") == config
    assert list(changed_settings(to_settings(config), settings)) == []


def test_settings_are_spelled_as_on_the_command_line() -> None:
    settings = to_settings(UNUSUAL)
    assert settings["loss"] == {"kind": "TwoSidedKL", "temperature": "exponential:4:1:0.5", "teacher_temperature": None}
    assert settings["folder"] == "else/where"


def test_every_changed_setting_is_named() -> None:
    other = DistillRunConfig(game="Pong", loss=TwoSidedKL(temperature=2.0), seed=1)
    changes = {name: (before, now) for name, before, now in changed_settings(to_settings(UNUSUAL), to_settings(other))}
    assert changes["loss.temperature"] == ("exponential:4:1:0.5", 2.0)
    assert changes["seed"] == (0, 1)
    assert {"states", "overlap", "auxiliary.shift"} <= changes.keys()
    assert "batch_size" not in changes


@pytest.mark.parametrize(
    ("settings", "budget", "rounds"),
    [
        ({}, "standard", 4),
        ({"rounds": 10}, "none", 10),  # exactly as many as are asked for
        ({"budget": "quick"}, "quick", 4),
        ({"budget": "quick", "rounds": 2}, "quick", 2),
        ({"budget": "none"}, "none", 16),
        ({"game": "Pong,Breakout"}, "none", 16),
        ({"states": DatasetStates(Path("x"))}, "none", 16),
        ({"loss": SoftAndHard(hard=ReturnGap(0.5)), "states": StudentStates()}, "none", 16),
    ],
)
def test_the_budget_follows_from_the_other_settings(settings: dict[str, Any], budget: str, rounds: int) -> None:
    named: dict[str, Any] = {"game": "Pong"} | settings
    config = DistillRunConfig(**named)
    assert (config.budget, config.rounds) == (budget, rounds)
    assert from_settings(DistillRunConfig, to_settings(config), "config.json") == config
    check_config(config)


def test_a_function_of_ones_own_is_refused() -> None:
    with pytest.raises(ValueError, match="is not one of the schedules"):
        to_settings(DistillRunConfig(game="Pong", learning_rate=lambda progress: 0.1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"game": 3},
        {"game": "Pong", "rounds": "many"},
        {"game": "Pong", "loss": {"kind": "Nothing"}},
        {"game": "Pong", "loss": "forward-kl"},
        {"game": "Pong", "loss": {"kind": "ForwardKL", "temperature": "linear:1"}},
        {"game": "Pong", "rounds_kept": 1},
        {"game": "Pong", "loss": {"kind": "JensenShannon", "teacher_share": 2}},
        {},
    ],
)
def test_invalid_settings_are_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadFile, match=r"^run/config\.json: invalid settings \(.*\); written by another") as caught:
        from_settings(DistillRunConfig, wrong, "run/config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rounds": -1}, "^--rounds must be at least 0, not -1"),
        ({"seed": 2**32}, "--seed must be at least 0 and at most 4294967295"),
        ({"name": "../x"}, "--name must be the name of a folder"),
        ({"learning_rate": float("nan")}, "--learning-rate must be at least 0, not nan"),
        ({"states_per_round": 100}, "--states-per-round 100 is not a multiple of --num-envs 16"),
        ({"rounds": 10**9}, "GB of memory"),
        ({"batch_size": 0}, "^--batch-size must be at least 1"),
        ({"temperature": -1.0}, "^--temperature must be at least"),
        ({"state_weighting": "gap", "min_state_weight": 2.0}, r"--min-state-weight must be in \[0, 1\], not 2"),
        ({"loss": own_loss}, "own_loss.* is not one of those that can be written as text: ForwardKL"),
        ({"learning_rate": lambda progress: 0.1}, "is not one of the schedules"),
        ({"min_state_weight": 0.5}, "needs --state-weighting"),
        (
            {"loss": SoftAndHard(hard=ReturnGap(0.5)), "eval_every": 0, "states": TeacherStates()},
            "--eval-every: a schedule that follows",
        ),
        ({"states": DatasetStates(Path("x")), "num_envs": 8}, "--num-envs: --states dataset:PATH collects no states"),
        ({"states": DatasetStates(Path("x")), "replay_window_rounds": 1}, "--replay-window-rounds: --states dataset"),
    ],
)
def test_a_config_that_no_run_can_have_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_config(DistillRunConfig(**{"game": "Pong", **changes}))


def test_a_schedule_may_follow_the_return_of_a_student_that_acts_alone() -> None:
    loss = SoftAndHard(hard=ReturnGap(0.5))
    check_config(DistillRunConfig(game="Pong", loss=loss, states=StudentStates(), eval_every=0))
    check_config(DistillRunConfig(game="Pong", loss=loss))
    check_config(DistillRunConfig(game="Pong", loss=JensenShannon()))
