"""A resumable SB3 training in a run's folder: TensorBoard curves, checkpoints, periodic evaluations."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from torch.utils.tensorboard import SummaryWriter

from policykd.envs.vector import VectorEnv
from policykd.evaluation.evaluate import Evaluation
from policykd.rl.sb3_checkpoints import restore_training, save_training
from policykd.runs.config import NotNegative, Positive
from policykd.runs.folder import CHECKPOINTS, resume_command
from policykd.storage.generations import has_generations

MAX_SECONDS_BETWEEN_CHECKPOINTS = 60.0
"""bounds the work that an interrupted training repeats, however slow the machine is"""


@dataclass(frozen=True, kw_only=True)
class TrainingArgs:
    """Length of a training, and what is done in between."""

    steps: Positive = 1_000_000
    """agent steps (4 frames each) over all environments; learning rate and other schedules follow it"""
    checkpoint_every: Positive = 50_000
    """agent steps between checkpoints; one per minute is written in any case"""
    eval_every: NotNegative = 250_000
    """agent steps between periodic evaluations (16 episodes, no-op starts, sampled actions); 0 for none"""


class Training(BaseCallback):
    """Trains a model up to a number of steps, and saves and evaluates it between rollouts."""

    def __init__(
        self,
        model: BaseAlgorithm,
        envs: VectorEnv,
        run: Path,
        args: TrainingArgs,
        evaluate: Callable[[], Evaluation],
        first_curve_step: int = 1,
    ) -> None:
        """Restores a new model and its environments from the checkpoints in the folder `run`, if there are any.

        `evaluate` plays the episodes of a periodic evaluation; a new run's curves start at x = `first_curve_step`.

        Raises:
            BadFile: the checkpoints are damaged.
        """
        super().__init__()
        self.model = model
        self.envs = envs
        self.run = run
        self.args = args
        self.evaluate = evaluate
        self.wall_seconds = 0.0
        """duration of the training up to the last checkpoint"""
        # Everything below must see the state from which the training continues.
        self.is_resumed = has_generations(run / CHECKPOINTS)
        if self.is_resumed:
            self.wall_seconds = restore_training(model, envs, run / CHECKPOINTS)
            first_curve_step = model.num_timesteps + 1
        self.saved_steps = model.num_timesteps
        self._saved_at = time.perf_counter()
        # SB3 cannot purge the curves that an interrupted run logged after its last checkpoint, SummaryWriter can.
        board = TensorBoardOutputFormat(str(run))
        board.writer = SummaryWriter(str(run), purge_step=first_curve_step)
        model.set_logger(Logger(str(run), [board]))
        print(f"{run}: {model.num_timesteps:,} of {args.steps:,} steps; curves: tensorboard --logdir {run}", flush=True)

    def train(self) -> None:
        """Trains the remaining steps and saves the result."""
        # The time that building and restoring took does not count.
        self._saved_at = time.perf_counter()
        self.model.learn(max(0, self.args.steps - self.model.num_timesteps), self, reset_num_timesteps=False)
        self.save()

    def save(self) -> None:
        """Writes a checkpoint and prints a line about it."""
        steps = self.model.num_timesteps
        seconds = time.perf_counter() - self._saved_at
        self.wall_seconds += seconds
        self._saved_at += seconds
        save_training(self.model, self.envs, self.run / CHECKPOINTS, wall_seconds=self.wall_seconds)
        returns = [episode["r"] for episode in self.model.ep_info_buffer or []]
        score = f"mean {np.mean(returns):.2f} of the last {len(returns)} episodes" if returns else "no episode yet"
        speed = (steps - self.saved_steps) / seconds
        print(f"{steps:>11,} steps: {score}, {speed:.0f} steps/s; saved", flush=True)
        self.saved_steps = steps

    @contextmanager
    def resume_hint(self) -> Iterator[None]:
        """Closes the curves at the end; a KeyboardInterrupt inside reports how to resume."""
        try:
            yield
        except KeyboardInterrupt:
            resume = resume_command(self.run)
            raise KeyboardInterrupt(f"{self.saved_steps:,} steps are saved; resume with: {resume}") from None
        finally:
            self.model.logger.close()

    def _on_training_start(self) -> None:
        # An attribute of the model, so that checkpoints hold it and a resumed run evaluates at the same steps.
        model: Any = self.model
        model.evaluated_at = getattr(model, "evaluated_at", model.num_timesteps)

    def _on_rollout_start(self) -> None:
        model: Any = self.model
        steps = model.num_timesteps
        interval = self.args.eval_every
        # A multiple of the interval has been passed since the last evaluation, here or before an interruption.
        is_evaluation_due = interval and steps // interval > model.evaluated_at // interval
        is_checkpoint_due = (
            steps - self.saved_steps >= self.args.checkpoint_every
            or time.perf_counter() - self._saved_at > MAX_SECONDS_BETWEEN_CHECKPOINTS
        )
        # Saved before the evaluation too: an interrupted evaluation is repeated, the training is not.
        if is_evaluation_due or is_checkpoint_due:
            self.save()
        if is_evaluation_due:
            # As SB3's EvalCallback logs it.
            episodes = self.evaluate()
            model.logger.record("eval/mean_reward", episodes.mean_return)
            model.logger.record("eval/mean_ep_length", float(np.mean(episodes.lengths)))
            model.logger.dump(steps)
            print(f"{steps:>11,} steps: {len(episodes.returns)} episodes, mean {episodes.mean_return:.2f}", flush=True)
            model.evaluated_at = steps

    def _on_step(self) -> bool:
        return True
