"""What a run writes down: TensorBoard under SB3's tags, one JSON line a round, SB3's evaluations.npz.

What was learned and how long it took are two files, metrics.jsonl and timings.jsonl: an interrupted run writes the
first bit for bit as it would have been without, and the second as it was.
"""

import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from policykd.io.files import BadFile, write_atomically
from policykd.legacy.trainer import Round

METRICS, TIMINGS = "metrics.jsonl", "timings.jsonl"
EVALUATIONS = ("timesteps", "results", "ep_lengths", "num_updates")
SECONDS = ("collect_seconds", "label_seconds", "fit_seconds", "seconds")
"""of a `Round`: what is not the same in the next run"""


class Records:
    """The curves of one run, in its folder. The x axis of TensorBoard is gradient updates."""

    def __init__(self, folder: Path, num_rounds_kept: int) -> None:
        """Opens the records, dropping what an interrupted run wrote after the last checkpoint."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.folder = folder
        self._rounds = _json_lines(folder / METRICS)[:num_rounds_kept]
        if len(self._rounds) < num_rounds_kept:
            raise BadFile(
                f"{folder / METRICS}: holds {len(self._rounds)} rounds, the checkpoint {num_rounds_kept}; start a new"
                " run under another --name"
            )
        self._timings = _json_lines(folder / TIMINGS)[:num_rounds_kept]
        last = self._rounds[-1]["num_updates"] if self._rounds else -1
        self._evaluations = _evaluations(folder / "evaluations.npz", last)
        with self._named_errors():
            self._board = SummaryWriter(str(folder), purge_step=last + 1)

    def add_round(self, r: Round, temperature: float) -> None:
        """Writes what a round measured and how long it took, and the temperature of the teacher's policy.

        A loss's own temperature, where it changes, is among what the round says of its schedules.
        """
        returns = [e.episodic_return for e in r.episodes]
        scalars = {
            "train/loss": r.loss,
            "train/kl": r.kl,
            "train/action_agreement": r.action_agreement,
            "train/learning_rate": r.learning_rate,
            "train/grad_norm": r.grad_norm,
            "train/n_updates": r.num_updates,
            "train/n_nonfinite_updates": r.num_nonfinite_updates,
            "train/temperature": temperature,
            "data/new_kl": r.new_kl,
            "data/new_action_agreement": r.new_action_agreement,
            "data/teacher_entropy": r.teacher_entropy,
            "data/student_fraction": r.student_fraction,
            "data/n_states": r.num_states,
            "data/n_nonfinite_states": r.num_nonfinite_states,
            "time/iterations": r.index + 1,
            "time/total_timesteps": r.num_states,
            "time/time_elapsed": r.seconds + sum(row["seconds"] for row in self._timings),
        }
        scalars |= {f"schedule/{name}": number for name, number in r.scheduled.items()}
        scalars |= {f"train/{name}_loss": number for name, number in r.terms.items()}
        maybe = {"data/teacher_disagreement": r.teacher_disagreement, "rollout/student_return": r.student_return}
        maybe |= {f"data/teacher_weight_{i}": weight for i, weight in enumerate(r.teacher_weights)}
        maybe |= {"data/state_weight": r.state_weight}
        scalars |= {tag: number for tag, number in maybe.items() if number is not None}
        if returns:
            scalars["rollout/ep_rew_mean"] = float(np.mean(returns))
            scalars["rollout/ep_len_mean"] = float(np.mean([e.length for e in r.episodes]))
        self._scalars(scalars, r.num_updates)
        row = {**asdict(r), "episodes": returns, "temperature": temperature}
        self._timings.append({"index": r.index, **{key: row.pop(key) for key in SECONDS}})
        self._rounds.append(row)
        write_atomically(self.folder / TIMINGS, _lines(self._timings))
        write_atomically(self.folder / METRICS, _lines(self._rounds))

    def has_evaluation(self, num_updates: int) -> bool:
        """Returns whether the student as it was after so many gradient steps has been evaluated."""
        return num_updates in self._evaluations["num_updates"]

    def returns_of(self, num_updates: int) -> list[float]:
        """Returns the episodic returns of the evaluation after so many gradient steps."""
        row = [int(n) for n in self._evaluations["num_updates"]].index(num_updates)
        return [float(r) for r in self._evaluations["results"][row]]

    def add_evaluation(
        self, returns: Sequence[float], lengths: Sequence[int], against: Mapping[str, float | None]
    ) -> None:
        """Writes an evaluation after the last round, also to `evaluations.npz`.

        That has SB3's arrays (timesteps, which are states here, results, ep_lengths), and `num_updates`.

        Args:
            returns: episodic; the same number every time.
            lengths: of the games, agent steps.
            against: more `eval/` curves, such as the teacher's mean; None is left out.
        """
        num_states, num_updates = self._rounds[-1]["num_states"], self._rounds[-1]["num_updates"]
        means = {"mean_reward": float(np.mean(returns)), "mean_ep_length": float(np.mean(lengths)), **against}
        self._scalars({f"eval/{k}": v for k, v in means.items() if v is not None}, num_updates)
        new = {"timesteps": num_states, "results": list(returns), "ep_lengths": list(lengths)}
        new["num_updates"] = num_updates
        self._evaluations = {k: [*rows, new[k]] for k, rows in self._evaluations.items()}
        buffer = io.BytesIO()
        np.savez(buffer, **{k: np.array(rows) for k, rows in self._evaluations.items()})  # type: ignore[arg-type]
        write_atomically(self.folder / "evaluations.npz", buffer.getvalue())

    def seconds(self) -> dict[str, float]:
        """Returns the wall seconds of all rounds, and by phase; fitting and the others overlap."""
        sums = {key: sum(row[key] for row in self._timings) for key in SECONDS}
        return {"rounds" if key == "seconds" else key.removesuffix("_seconds"): s for key, s in sums.items()}

    def close(self) -> None:
        """Flushes TensorBoard's file."""
        with self._named_errors():
            self._board.close()

    def _scalars(self, scalars: Mapping[str, float], step: int) -> None:
        with self._named_errors():
            for tag, value in scalars.items():
                self._board.add_scalar(tag, value, step)
            self._board.flush()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """TensorBoard does not say which file it could not write."""
        try:
            yield
        except OSError as error:
            reason = f"{error.strerror}; what was finished is saved, mend that and go on with --resume"
            raise OSError(error.errno, reason, str(self.folder / "events.out.tfevents")) from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except ValueError as error:
        raise BadFile(f"{path}: not what a run writes ({error}); start a new run under another --name") from error


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _evaluations(path: Path, num_updates: int) -> dict[str, list[Any]]:
    """Returns the rows of an `evaluations.npz` up to a number of updates."""
    if not path.is_file():
        return {key: [] for key in EVALUATIONS}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            kept = arrays["num_updates"] <= num_updates
            return {key: list(arrays[key][kept]) for key in EVALUATIONS}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BadFile(f"{path}: not the evaluations of a run ({error}); remove it and resume") from error
