"""Run logging: TensorBoard under SB3's tags, one JSON line per round, SB3's evaluations.npz.

Metrics and times are two files. `metrics.jsonl` is bit for bit the same however often a run was interrupted;
`timings.jsonl` is not.
"""

import io
import json
import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import JsonValue
from pydantic_core import from_json

from policykd.evaluation.evaluate import Evaluation
from policykd.io.files import BadFile, write_atomically
from policykd.loop import Round

METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
EVALUATIONS = "evaluations.npz"
PHASES = ("collect", "label", "train", "rounds")
"""columns of `timings.jsonl`: seconds of each phase of a round, and of the whole round; the phases overlap"""

_ARRAYS = ("timesteps", "results", "ep_lengths", "num_updates")
"""SB3's three arrays (its timesteps are states here), and the gradient updates"""
_DATA_METRICS = ("teacher_entropy", "state_weight")
"""metrics of the new states that describe these states, not the student"""

LogLine = dict[str, JsonValue]


class RunLogger:
    """Writes the curves of one run into its folder. The x axis of TensorBoard is gradient updates."""

    def __init__(self, folder: Path, num_rounds: int) -> None:
        """Opens the logs in a run's folder, whose last checkpoint has `num_rounds` rounds.

        Raises:
            BadFile: the logs are damaged, or contain fewer rounds than the checkpoint.
        """
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.folder = folder
        # A run that was killed may have logged rounds after its last checkpoint; it computes those again.
        self._rounds = _read_lines(folder / METRICS)[:num_rounds]
        if len(self._rounds) < num_rounds:
            raise BadFile(
                f"{folder / METRICS}: contains {len(self._rounds)} rounds, the checkpoint {num_rounds}; start a new run"
                " under another --name"
            )
        self._timings = _read_lines(folder / TIMINGS)[:num_rounds]
        last = int(self._rounds[-1]["num_updates"]) if self._rounds else -1  # type: ignore[arg-type]
        self._evaluations = _read_evaluations(folder / EVALUATIONS, last)
        # TensorBoard's files cannot be cut: `purge_step` makes it ignore the points after the checkpoint.
        with self._named_errors():
            self._board = SummaryWriter(str(folder), purge_step=last + 1)

    def add_round(self, r: Round, temperature: float) -> None:
        """Writes the metrics and the times of a round; `temperature` is that of the teacher's policy."""
        seconds = (r.collected.collect_seconds, r.collected.label_seconds, r.train_seconds, r.seconds)
        self._timings.append({"index": r.index, **dict(zip(PHASES, seconds, strict=True))})
        self._rounds.append(metrics_row(r, temperature))
        curves = round_curves(r, temperature) | {"time/time_elapsed": self.seconds()["rounds"]}
        self._write_curves(curves, r.num_updates)
        # Metrics last: their number of rounds is what a resumed run compares with its checkpoint.
        write_atomically(self.folder / TIMINGS, _to_lines(self._timings))
        write_atomically(self.folder / METRICS, _to_lines(self._rounds))

    def has_evaluation(self, num_updates: int) -> bool:
        """Returns whether the student was evaluated after that many gradient updates."""
        return num_updates in self._evaluations["num_updates"]

    def evaluation_returns(self, num_updates: int) -> list[float]:
        """Returns the episodic returns of the periodic evaluation after that many gradient updates."""
        row = [int(n) for n in self._evaluations["num_updates"]].index(num_updates)
        return [float(r) for r in self._evaluations["results"][row]]

    def round_metric(self, num_rounds: int, name: str) -> float:
        """Returns a metric of the last of the first `num_rounds` rounds, NaN if the round does not have it."""
        return float(self._rounds[num_rounds - 1].get(name, math.nan))  # type: ignore[arg-type]

    def add_evaluation(self, evaluation: Evaluation, teacher_return: float | None) -> None:
        """Writes a periodic evaluation after the last round to TensorBoard and `evaluations.npz`."""
        num_updates = int(self._rounds[-1]["num_updates"])  # type: ignore[arg-type]
        mean = float(np.mean(evaluation.returns))
        curves = {"eval/mean_reward": mean, "eval/mean_ep_length": float(np.mean(evaluation.lengths))}
        if teacher_return is not None:
            curves |= {"eval/teacher_mean_reward": teacher_return, "eval/score_vs_teacher": mean - teacher_return}
        self._write_curves(curves, num_updates)
        # SB3's layout: one row per evaluation, its episodes along the second axis.
        new = (self._rounds[-1]["num_states"], list(evaluation.returns), list(evaluation.lengths), num_updates)
        for name, value in zip(_ARRAYS, new, strict=True):
            self._evaluations[name].append(value)
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {name: np.array(rows) for name, rows in self._evaluations.items()}
        np.savez(buffer, **arrays)
        write_atomically(self.folder / EVALUATIONS, buffer.getvalue())

    def seconds(self) -> dict[str, float]:
        """Returns the wall-clock seconds of all rounds, by phase."""
        numbers = {phase: [row[phase] for row in self._timings] for phase in PHASES}
        return {phase: float(np.sum(numbers[phase])) for phase in PHASES}  # type: ignore[arg-type]

    def close(self) -> None:
        """Flushes TensorBoard's file."""
        with self._named_errors():
            self._board.close()

    def _write_curves(self, curves: dict[str, float], step: int) -> None:
        with self._named_errors():
            for tag, value in curves.items():
                self._board.add_scalar(tag, value, step)
            self._board.flush()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Adds the file and the next step to TensorBoard's errors, which lack both."""
        try:
            yield
        except OSError as error:
            reason = f"{error.strerror}; what was finished is saved, fix that and resume with --resume"
            raise OSError(error.errno, reason, str(self.folder / "events.out.tfevents")) from error


def metrics_row(r: Round, temperature: float) -> LogLine:
    """Returns a round as a line of `metrics.jsonl`: everything but the times.

    The loss function's metrics keep their names (`kl`); on new states they are prefixed (`new_kl`).
    """
    return {
        **r.train,
        **_new_state_metrics(r),
        **r.collected.metrics,
        "index": r.index,
        "num_states": r.num_states,
        "num_updates": r.num_updates,
        "learning_rate": r.learning_rate,
        "temperature": temperature,
        "student_fraction": r.collected.student_fraction,
        "student_return": r.student_return,
        "episodes": [episode.episodic_return for episode in r.collected.episodes],
        "num_nonfinite_states": r.collected.num_nonfinite,
        "schedules": dict(r.schedules),
    }


def round_curves(r: Round, temperature: float) -> dict[str, float]:
    """Returns a round as TensorBoard curves, by tag (docs/metrics.md)."""
    train = {name: value for name, value in r.train.items() if name not in ("num_skipped", *_DATA_METRICS)}
    curves = {f"train/{name}": value for name, value in train.items()}
    curves |= {f"data/{name}": value for name, value in (_new_state_metrics(r) | r.collected.metrics).items()}
    curves |= {f"schedule/{name}": value for name, value in r.schedules.items()}
    # SB3's tags where SB3 has the quantity, so that both kinds of runs share their charts.
    curves |= {
        "train/learning_rate": r.learning_rate,
        "train/temperature": temperature,
        "train/n_updates": r.num_updates,
        "train/n_nonfinite_updates": r.train["num_skipped"],
        "data/student_fraction": r.collected.student_fraction,
        "data/n_states": r.num_states,
        "data/n_nonfinite_states": r.collected.num_nonfinite,
        "time/iterations": r.index + 1,
        "time/total_timesteps": r.num_states,
    }
    # No point, rather than 0, in a round in which no episode ended.
    if r.student_return is not None:
        curves["rollout/student_return"] = r.student_return
    if episodes := r.collected.episodes:
        curves["rollout/ep_rew_mean"] = float(np.mean([episode.episodic_return for episode in episodes]))
        curves["rollout/ep_len_mean"] = float(np.mean([episode.length for episode in episodes]))
    return curves


def _new_state_metrics(r: Round) -> dict[str, float]:
    """Returns the metrics on the new states: those that measure the student are prefixed."""
    return {name if name in _DATA_METRICS else f"new_{name}": value for name, value in r.new_states.items()}


def _read_lines(path: Path) -> list[LogLine]:
    try:
        return [from_json(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except ValueError as error:
        raise BadFile(f"{path}: damaged ({error}); start a new run under another --name") from error


def _to_lines(rows: Sequence[LogLine]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _read_evaluations(path: Path, num_updates: int) -> dict[str, list[Any]]:
    """Returns the rows of `evaluations.npz` up to a number of updates."""
    if not path.is_file():
        return {name: [] for name in _ARRAYS}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            kept = arrays["num_updates"] <= num_updates
            return {name: list(arrays[name][kept]) for name in _ARRAYS}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BadFile(f"{path}: damaged ({error}); remove it and resume") from error
