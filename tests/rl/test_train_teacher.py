"""A teacher is trained, interrupted, resumed and used; what it cannot be trained with is refused."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stable_baselines3 import DQN

from policykd.agents.card import Card
from policykd.agents.teacher import load_teacher
from policykd.cli.main import execute
from policykd.envs.atari import AtariEnvs, make_atari
from policykd.envs.sb3_vec_env import SB3VecEnv
from policykd.evaluation.evaluate import Evaluation
from policykd.evaluation.results import FinishedGames
from policykd.rl import train_teacher as module
from policykd.rl.frame_buffer import FrameReplayBuffer
from policykd.rl.train_teacher import TrainTeacherConfig, make_model, train_teacher
from policykd.rl.training import Training

SMALL: dict[str, Any] = {
    "game": "Pong",
    "steps": 192,
    "num_envs": 2,
    "hyperparams": ("n_steps:32", "n_epochs:1", "batch_size:32"),
    "checkpoint_every": 64,
    "eval_every": 0,
    "eval_episodes": 1,
    "threads": 1,
    "device": "cpu",
}


@pytest.fixture
def canned_games(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full games take a minute; those of a card have a test of their own."""
    monkeypatch.setattr(FinishedGames, "play", lambda *_, **__: Evaluation((-21.0,), (800,)))


@pytest.mark.usefixtures("canned_games")
def test_a_teacher_is_trained_interrupted_resumed_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainTeacherConfig(**SMALL, centre=True, folder=tmp_path, name="resumed", resume=True)
    save = Training.save

    def save_and_stop(training: Training) -> None:
        save(training)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Training, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt, match="64 steps are saved; resume with: policykd resume"):
            train_teacher(config)
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        train_teacher(replace(config, seed=1))
    cards = [train_teacher(replace(config, name=name)) for name in ("resumed", "whole")]

    resumed, whole = (
        load_teacher(tmp_path / "Pong" / card / "ppo-Pong.zip", game="Pong") for card in ("resumed", "whole")
    )
    obs = torch.randint(256, (8, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert (resumed(obs) == whole(obs)).all()
    assert resumed.card == cards[0]
    assert isinstance(resumed.card, Card)
    assert (resumed.card.agent_steps, resumed.card.algorithm, resumed.card.sha256) == (192, "PPO", resumed.sha256)
    assert resumed.card.protocols["noop_sampled"].returns == (-21.0,)
    assert resumed.card.settings["hyperparams"] == ["n_steps:32", "n_epochs:1", "batch_size:32"]
    assert (resumed.card.wall_seconds or 0) > 0


@pytest.mark.usefixtures("canned_games")
def test_sticky_actions_are_those_of_the_environments_and_in_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def make_and_note(*args: Any, **kwargs: Any) -> AtariEnvs:
        asked.append(kwargs.get("repeat_action_probability", 0.0))
        return make_atari(*args, **kwargs)

    monkeypatch.setattr(module, "make_atari", make_and_note)
    config = TrainTeacherConfig(**{**SMALL, "steps": 64}, sticky=0.25, folder=tmp_path)
    assert train_teacher(config).settings["sticky"] == 0.25
    assert asked == [0.25]


def test_a_replay_buffer_is_filled_by_the_teacher_that_training_starts_from() -> None:
    config = TrainTeacherConfig(game="Pong", algo="dqn", hyperparams=("learning_starts:20", "buffer_size:100"))
    envs = SB3VecEnv(make_atari("Pong", 2, 0), clip_rewards=True)
    model = make_model(config, envs, torch.device("cpu"))
    assert isinstance(model, DQN)
    assert isinstance(model.replay_buffer, FrameReplayBuffer)
    assert model.gradient_steps == 2  # one per four steps of any environment
    module._explore_with(load_teacher("bundled", game="Pong"), model)
    assert (model.num_timesteps, model.replay_buffer.num_added) == (20, 10)
    model.learn(8, reset_num_timesteps=False)
    assert model.num_timesteps == 28


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--game Pomg", "did you mean Pong"),
        ("--game Pong --sticky 1.5", "--sticky must be at least 0 and at most 1"),
        ("--game Pong --steps 0", "--steps must be at least 1"),
        ("--game Pong --hyperparams learning_rate:fast", "write NAME:NUMBER"),
        ("--game Pong --hyperparams learning_rat:1e-4", "--hyperparams: unknown to ppo"),
        ("--game Pong --hyperparams batch_size:0", "--hyperparams: unknown to ppo, or an invalid value"),
        ("--game Pong --algo dqn --hyperparams buffer_size:16", "too small for 8 environments"),
        ("--game Pong --name ../x", "--name must be the name of a folder"),
        ("--game Pong --stpes 9", "--stpes"),
        ("--game Breakout --start-from bundled", "no bundled teacher for Breakout"),
    ],
)
def test_invalid_flags_are_refused_before_anything_is_written(flags: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        execute("train-teacher", ["--folder", str(tmp_path / "runs"), *flags.split()])
    assert message in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_the_commands_name_the_extra_that_they_need() -> None:
    code = "import sys; sys.modules['stable_baselines3'] = None; from policykd.cli.main import run_command; run_command"
    for command in ("train-teacher", "distill-rl"):
        done = subprocess.run(
            [sys.executable, "-c", f"{code}('{command}')"], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "pip install 'policykd[sb3]'" in done.stderr
