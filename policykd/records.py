"""What a run writes down: TensorBoard under SB3's tags, one JSON line a round, SB3's evaluations.npz."""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from policykd.agents.files import write_atomically
from policykd.distill import Round


class Records:
    """The curves of one run, in its folder. The x axis of TensorBoard is gradient updates."""

    def __init__(self, folder: Path, num_rounds_kept: int) -> None:
        """Opens the records, dropping what an interrupted run wrote after the last checkpoint."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.folder = folder
        self._rounds = _json_lines(folder / "metrics.jsonl")[:num_rounds_kept]
        last = self._rounds[-1]["num_updates"] if self._rounds else -1
        self._evaluations = _evaluations(
            folder / "evaluations.npz", self._rounds[-1]["num_states"] if self._rounds else 0
        )
        self._board = SummaryWriter(str(folder), purge_step=last + 1)

    def add_round(self, r: Round, temperature: float, evaluate_seconds: float = 0.0) -> None:
        """Writes what a round measured, the loss's temperature, and the time of an evaluation after it."""
        returns = [e.episodic_return for e in r.episodes]
        seconds = r.collect_seconds + r.label_seconds + r.fit_seconds
        scalars = {
            "train/loss": r.loss,
            "train/kl": r.kl,
            "train/action_agreement": r.action_agreement,
            "train/learning_rate": r.learning_rate,
            "train/grad_norm": r.grad_norm,
            "train/n_updates": r.num_updates,
            "train/temperature": temperature,
            "data/new_kl": r.new_kl,
            "data/new_action_agreement": r.new_action_agreement,
            "data/teacher_entropy": r.teacher_entropy,
            "data/student_fraction": r.student_fraction,
            "data/n_states": r.num_states,
            "time/iterations": r.index + 1,
            "time/total_timesteps": r.num_states,
            "time/time_elapsed": seconds + sum(row["seconds"] for row in self._rounds),
        }
        if returns:
            scalars["rollout/ep_rew_mean"] = float(np.mean(returns))
            scalars["rollout/ep_len_mean"] = float(np.mean([e.length for e in r.episodes]))
        self._scalars(scalars, r.num_updates)
        more = {"seconds": seconds, "evaluate_seconds": evaluate_seconds, "temperature": temperature}
        self._rounds.append({**asdict(r), "episodes": returns, **more})
        write_atomically(self.folder / "metrics.jsonl", _lines(self._rounds))

    def add_evaluation(
        self,
        num_updates: int,
        num_states: int,
        returns: Sequence[float],
        lengths: Sequence[int],
        against: Mapping[str, float | None],
    ) -> None:
        """Writes an evaluation on the way, also to `evaluations.npz` in SB3's format (timesteps, results, ep_lengths).

        Args:
            num_updates: gradient steps so far.
            num_states: labelled so far; SB3's `timesteps`.
            returns: episodic; the same number every time.
            lengths: of the games, agent steps.
            against: more `eval/` curves, such as the teacher's mean; None is left out.
        """
        means = {"mean_reward": float(np.mean(returns)), "mean_ep_length": float(np.mean(lengths)), **against}
        self._scalars({f"eval/{k}": v for k, v in means.items() if v is not None}, num_updates)
        new = {"timesteps": num_states, "results": list(returns), "ep_lengths": list(lengths)}
        self._evaluations = {k: [*rows, new[k]] for k, rows in self._evaluations.items()}
        buffer = io.BytesIO()
        np.savez(buffer, **{k: np.array(rows) for k, rows in self._evaluations.items()})  # type: ignore[arg-type]
        write_atomically(self.folder / "evaluations.npz", buffer.getvalue())

    def seconds(self) -> dict[str, float]:
        """Returns the run's wall seconds by phase, interrupted parts included."""
        return {
            phase: sum(row.get(f"{phase}_seconds", 0.0) for row in self._rounds)
            for phase in ("collect", "label", "fit", "evaluate")
        }

    def close(self) -> None:
        """Flushes TensorBoard's file."""
        self._board.close()

    def _scalars(self, scalars: Mapping[str, float], step: int) -> None:
        for tag, value in scalars.items():
            self._board.add_scalar(tag, value, step)
        self._board.flush()


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except ValueError as error:
        raise ValueError(f"{path}: not what a run writes ({error}); start a new run under another --name") from error


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _evaluations(path: Path, num_states: int) -> dict[str, list[Any]]:
    """Returns the rows of an `evaluations.npz` up to a number of states."""
    if not path.is_file():
        return {"timesteps": [], "results": [], "ep_lengths": []}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            kept = arrays["timesteps"] <= num_states
            return {key: list(arrays[key][kept]) for key in ("timesteps", "results", "ep_lengths")}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not SB3's evaluations ({error}); remove it and resume") from error
