"""Runs of distillation inside reinforcement learning, with the real game and teacher."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from policykd.agents.student import Student, load_student
from policykd.cli.main import execute
from policykd.evaluation.evaluate import Evaluation
from policykd.evaluation.results import FinalEvaluation, PolicyResult, compare_with_teacher, summarise_episodes
from policykd.evaluation.teacher_check import TeacherCheck
from policykd.report import ReportOptions
from policykd.rl import training as training_module
from policykd.rl.training import Training
from policykd.runs import distill_rl_run as module
from policykd.runs import finish
from policykd.runs.distill_rl_run import DistillRLConfig, distill_rl_run
from policykd.runs.folder import load_results, load_run_config

SMALL: dict[str, Any] = {
    "game": "Pong",
    "student": "1%",
    "steps": 256,
    "num_envs": 2,
    "checkpoint_every": 128,
    "eval_every": 0,
    "eval_episodes": 1,
    "threads": 1,
    "device": "cpu",
}
OFFLINE: dict[str, Any] = {"method": "qdagger", "offline_steps": 100, "offline_updates": 10}
CHANCE = TeacherCheck("played", -20.7, (-21.0, -20.0), -20.7, (-0.5, 0.5), 8, 0, None, None)


def canned_evaluation(student: Student, *_: object, **__: object) -> FinalEvaluation:
    """Returns the results of one short episode each; full games take minutes, and have tests of their own."""
    episode = summarise_episodes(Evaluation((-21.0,), (800,)))
    row = PolicyResult(protocols={"noop_sampled": episode, "sticky_greedy": episode})
    return FinalEvaluation(teacher=row, student=row, random=row, comparison=compare_with_teacher(row, row, row, "Pong"))


def interrupted(*_: object, **__: object) -> NoReturn:
    raise KeyboardInterrupt


@pytest.fixture
def interrupt_at_128(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Interrupts every training once it has saved 128 steps; `undo()` ends that."""
    save = Training.save

    def save_and_stop(training: Training) -> None:
        save(training)
        if training.saved_steps >= 128:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "save", save_and_stop)
    monkeypatch.setattr(training_module, "MAX_SECONDS_BETWEEN_CHECKPOINTS", 1e9)
    return monkeypatch


def test_a_run_is_interrupted_resumed_and_reported(tmp_path: Path, interrupt_at_128: pytest.MonkeyPatch) -> None:
    config = DistillRLConfig(**SMALL, **OFFLINE, folder=tmp_path, resume=True)
    with pytest.raises(KeyboardInterrupt, match="128 steps are saved; resume with: policykd resume"):
        distill_rl_run(config)
    interrupt_at_128.undo()
    interrupt_at_128.setattr(finish, "final_evaluation", canned_evaluation)
    interrupt_at_128.setattr(finish, "play_to_gif", lambda *_, **__: None)
    interrupt_at_128.setattr(finish, "ReportOptions", partial(ReportOptions, seconds=1.0, num_states=64))
    result = distill_rl_run(config)

    run = tmp_path / "Pong" / "qdagger-1pct-seed0"
    assert load_student(run).shape.temperature == 0.01
    assert load_results(run) == result
    assert result.num_states_labelled == 256 + 100
    assert (result.num_updates or 0) > 10
    assert result.student.protocols["noop_sampled"].num_episodes == 1
    page = (run / "report.html").read_text()
    assert "KL divergence" in page
    assert "agent steps" in page
    curves = EventAccumulator(str(run)).Reload()
    assert [event.step for event in curves.Scalars("offline/teacher_kl")] == [0]
    assert distill_rl_run(config) == result  # a finished run returns its results
    with pytest.raises(ValueError, match="is finished, at 256 steps; for --steps 257 give another --name"):
        distill_rl_run(replace(config, steps=257))
    with pytest.raises(ValueError, match="is finished, with 1 episodes per protocol; policykd evaluate"):
        distill_rl_run(replace(config, eval_episodes=2))
    assert load_run_config(run).settings["eval_episodes"] == 1  # what was refused is not remembered
    with pytest.raises(ValueError, match=r"cannot resume with other settings .*learning_rate was 0\.0, is 0\.1"):
        distill_rl_run(replace(config, learning_rate=0.1))
    with pytest.raises(ValueError, match="holds a run already"):
        distill_rl_run(replace(config, resume=False))


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("n-distill", "qdagger")]


@pytest.mark.parametrize("method", ["ppd", *SLOW])
def test_a_resumed_run_ends_with_the_student_of_an_uninterrupted_one(
    method: Any, tmp_path: Path, interrupt_at_128: pytest.MonkeyPatch
) -> None:
    settings = OFFLINE if method == "qdagger" else {"method": method}
    config = DistillRLConfig(**SMALL, **settings, folder=tmp_path, name="resumed", resume=True)
    with pytest.raises(KeyboardInterrupt):
        distill_rl_run(config)
    interrupt_at_128.undo()
    interrupt_at_128.setattr(finish, "final_evaluation", interrupted)  # by then the student is saved
    weights: list[bytes] = []
    for name in ("resumed", "whole"):
        with pytest.raises(KeyboardInterrupt, match="256 steps are saved"):
            distill_rl_run(replace(config, name=name))
        weights.append((tmp_path / "Pong" / name / "student.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_student_that_diverges_is_not_saved(tmp_path: Path) -> None:
    config = DistillRLConfig(**SMALL, **OFFLINE, folder=tmp_path, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match="lower --learning-rate or --weight"):
        distill_rl_run(config)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--weight linear:1", "linear:1"),
        ("--weight nan", "nan"),
        ("--weight -1", "--weight must be at least 0, not -1"),
        ("--weight gap:-2", "--weight must be at least 0, not -2"),
        ("--reward-weight 0", "--reward-weight is not for --method ppd but for on-policy, n-distill, expected-entropy"),
        ("--method n-distill --reward-weight -1", "--reward-weight must be at least 0"),
        ("--method n-distill --reward-weight nan", "--reward-weight must be at least 0, not nan"),
        ("--method n-distill --entropy-weight 2", "--entropy-weight must be at least 0 and at most 1, not 2"),
        ("--method on-policy --entropy-weight 1", "--entropy-weight is not for --method on-policy"),
        ("--offline-updates 0", "--offline-updates is not for --method ppd but for qdagger; leave it out"),
        ("--temperature nan", "--temperature must be at least 0, not nan"),
        ("--learning-rate -1", "--learning-rate must be at least 0"),
        ("--seed 99999999999", "--seed must be at least 0 and at most 4294967295, not 99999999999"),
        ("--method qdagger --offline-steps 10", "--offline-steps 10 are too few"),
        ("--steps 0", "--steps must be at least 1"),
        ("--name ../x", "--name must be the name of a folder"),
        ("--stpes 1", "Unrecognized options: --stpes"),
    ],
)
def test_invalid_flags_are_refused_before_anything_is_written(flags: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        execute("distill-rl", ["--game", "Pong", "--folder", str(tmp_path / "runs"), *flags.split()])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_a_weight_that_follows_a_teacher_that_cannot_play_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "check_teacher", lambda *_, **__: CHANCE)
    config = DistillRLConfig(**SMALL, **OFFLINE, folder=tmp_path / "runs", allow_weak_teacher=True)
    with pytest.raises(ValueError, match=r"needs a teacher that beats a random policy, not -20\.7 against -20\.7"):
        distill_rl_run(config)
    assert not (tmp_path / "runs").exists()
