"""A resumable training: when it saves and evaluates, and what an interruption leaves."""

import signal
from pathlib import Path

import pytest
from stable_baselines3 import A2C
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from policykd.envs.gymnasium_envs import GymnasiumEnvs
from policykd.envs.sb3_vec_env import SB3VecEnv
from policykd.evaluation.evaluate import Evaluation
from policykd.io.signals import handle_signals
from policykd.rl import training as module
from policykd.rl.training import Training, TrainingArgs

NEVER = 10**9


class Evaluations:
    """Counts evaluations; the first `num_signals` of them receive a SIGTERM."""

    def __init__(self, num_signals: int = 0) -> None:
        self.count = 0
        self.num_signals = num_signals

    def __call__(self) -> Evaluation:
        if self.num_signals:
            self.num_signals -= 1
            signal.raise_signal(signal.SIGTERM)
        self.count += 1
        return Evaluation((1.0, 2.0), (10, 20))


def make(run: Path, evaluate: Evaluations, steps: int, *, checkpoint_every: int = NEVER) -> Training:
    envs = GymnasiumEnvs("CartPole-v1", 2, seed=0)
    model = A2C("MlpPolicy", SB3VecEnv(envs, clip_rewards=False), seed=0, device="cpu")
    args = TrainingArgs(steps=steps, checkpoint_every=checkpoint_every, eval_every=300)
    return Training(model, envs, run, args, evaluate)


def test_an_interrupted_evaluation_is_repeated_and_its_training_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """C04: the training is saved before the evaluation."""
    interrupted = make(tmp_path, Evaluations(num_signals=1), steps=700)
    message = pytest.raises(KeyboardInterrupt, match="300 steps are saved; resume with: ")
    with handle_signals(), message, interrupted.resume_hint():
        interrupted.train()
    evaluations = Evaluations()
    resumed = make(tmp_path, evaluations, steps=700)
    assert resumed.is_resumed
    assert "300 of 700 steps" in capsys.readouterr().out
    with resumed.resume_hint():
        resumed.train()
    assert (resumed.saved_steps, evaluations.count) == (700, 2)
    assert resumed.wall_seconds > interrupted.wall_seconds > 0

    # Lengthened, it does not count the interval from its new start.
    lengthened = make(tmp_path, evaluations, steps=1000)
    with lengthened.resume_hint():
        lengthened.train()
    assert evaluations.count == 3
    curves = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in curves.Scalars("eval/mean_reward")] == [300, 600, 900]
    assert "train/value_loss" in curves.Tags()["scalars"]


def test_a_slow_training_is_saved_every_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    saved: list[int] = []
    training = make(tmp_path, Evaluations(), steps=30)
    monkeypatch.setattr(module, "save_training", lambda model, *_, **__: saved.append(model.num_timesteps))
    training.train()
    assert saved == [0, 10, 20, 30]
