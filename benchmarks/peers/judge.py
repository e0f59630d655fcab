"""Judges snapshots by whole games: no-op starts, sampled actions; few games for all, more near the threshold."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import tyro
from snapshots import load_tensors_of

from policykd.agents.student import SIZES, Shape, Student
from policykd.evaluation.evaluate import TemperedPolicy, evaluate_on_atari


@dataclass(frozen=True)
class Args:
    """Which runs, and what counts as as good as the teacher."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of snapshots"""
    threshold: float = 18.09
    """the teacher's score minus one: 18.09 for PPO, 17.75 for DQN"""
    temperature: float = 1.0
    """divides the scores where actions are drawn: 1 for PPO, 0.01 for Q-values"""
    games: int = 8
    confirm: int = 32
    """games in all where the first ones come near the threshold"""
    margin: float = 1.5
    every: int = 1
    """judges each nth snapshot only, counted from the first to be judged"""
    oldest_first: bool = False
    """judges from the first snapshot on and stops at the one that stands at the threshold"""


def main(args: Args) -> None:
    """Judges what has not been judged yet and prints each curve."""
    torch.set_num_threads(1)
    for run in args.runs:
        judge(run, args)
        show(run, args.threshold)


def judge(run: Path, args: Args) -> None:
    """Plays the games of the snapshots that have none yet, the newest first, and writes each down at once."""
    path = run / "scores.json"
    scores = json.loads(path.read_text()) if path.is_file() else {}
    rows = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    for row in (rows if args.oldest_first else rows[::-1])[:: args.every]:
        if row["file"] in scores:
            continue
        student = student_of(run / row["file"])
        returns = play(student, args.games, args.temperature, seed=1)
        if mean(returns) >= args.threshold - args.margin:
            returns += play(student, args.confirm - args.games, args.temperature, seed=2)
        scores[row["file"]] = returns
        path.write_text(json.dumps(scores))
        print(f"{run.name} {row['file']}: {mean(returns):.2f} of {len(returns)}", flush=True)
        if args.oldest_first and len(returns) >= 30 and mean(returns) >= args.threshold:
            return


def student_of(path: Path) -> Student:
    """Returns a snapshot as a student that plays."""
    tensors, scaling = load_tensors_of(path)
    widths, units = SIZES["7%"]
    student = Student(Shape(widths, (units,), 6, (4, 84, 84)))
    with torch.no_grad():
        for parameter, value in zip(student.net.parameters(), tensors, strict=True):
            parameter.copy_(value)
        for buffer, number in zip(student.net.buffers(), scaling, strict=True):
            buffer.fill_(number)
    return student.eval()


@torch.inference_mode()
def play(student: Student, games: int, temperature: float, *, seed: int) -> list[float]:
    """Returns the episodic returns of so many games."""
    policy = TemperedPolicy(student, temperature)
    return list(evaluate_on_atari(policy, "Pong", "noop_sampled", games, seed=seed).returns)


def show(run: Path, threshold: float) -> None:
    """Prints the curve and the first snapshot that stands at the threshold."""
    rows = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    scores = json.loads((run / "scores.json").read_text())
    judged = [(row, scores[row["file"]]) for row in rows if row["file"] in scores]
    for row, returns in judged:
        print(_line(run, row, returns))
    there = [(row, returns) for row, returns in judged if len(returns) >= 30 and mean(returns) >= threshold]
    best = max(judged, key=lambda pair: mean(pair[1]))
    print(f"reached {threshold}: {_line(run, *there[0])}" if there else f"not reached; best: {_line(run, *best)}")


def _line(run: Path, row: dict[str, Any], returns: list[float]) -> str:
    cost = f"{row['cpu_seconds']:7.0f} s CPU {row['wall_seconds']:7.0f} s wall {row['steps']:9,} steps"
    return f"{run.name:16} {cost} {row['updates']:8,} updates: {mean(returns):7.2f} of {len(returns)} games"


if __name__ == "__main__":
    main(tyro.cli(Args))
