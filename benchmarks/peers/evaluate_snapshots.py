"""Evaluates snapshots on full episodes: no-op starts, sampled actions; few games each, more near the threshold."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
import tyro
from snapshots import CurvePoint, load_snapshot, read_curve

from policykd.agents.student import Student, make_student
from policykd.evaluation.evaluate import TemperedPolicy, evaluate_on_atari

MIN_GAMES = 30
"""games that a snapshot must have to count as good as the teacher"""


@dataclass(frozen=True)
class Args:
    """Evaluates the snapshots of runs, and finds the first that is as good as the teacher."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of snapshots"""
    threshold: float = 18.09
    """the teacher's mean return minus one: 18.09 for PPO, 17.75 for DQN"""
    temperature: float = 1.0
    """divides the outputs before actions are drawn: 1 for PPO, 0.01 for Q-values"""
    games: int = 8
    """games per snapshot"""
    confirm: int = 32
    """games in all if the first ones come near the threshold"""
    margin: float = 1.5
    """points below the threshold that count as near"""
    every: int = 1
    """evaluate each nth snapshot only, counted from the first to be evaluated"""
    oldest_first: bool = False
    """evaluate from the first snapshot on, and stop at the first that reaches the threshold"""


def main(args: Args) -> None:
    """Evaluates what has not been evaluated yet and prints each curve."""
    torch.set_num_threads(1)
    for run in args.runs:
        evaluate_run(run, args)
        print_curve(run, args.threshold)


def evaluate_run(run: Path, args: Args) -> None:
    """Plays the games of the snapshots that have none yet, the newest first, and writes each result at once."""
    path = run / "returns.json"
    returns = read_returns(run)
    points = read_curve(run)
    for point in (points if args.oldest_first else points[::-1])[:: args.every]:
        if point.file in returns:
            continue
        student = load_student_snapshot(run / point.file)
        found = play(student, args.games, args.temperature, seed=1)
        if mean(found) >= args.threshold - args.margin and args.confirm > args.games:
            found += play(student, args.confirm - args.games, args.temperature, seed=2)
        returns[point.file] = found
        path.write_text(json.dumps(returns))
        print(f"{run.name} {point.file}: {mean(found):.2f} of {len(found)}", flush=True)
        if args.oldest_first and reaches(found, args.threshold):
            return


def read_returns(run: Path) -> dict[str, list[float]]:
    """Returns the episodic returns so far, by snapshot."""
    path = run / "returns.json"
    returns: dict[str, list[float]] = json.loads(path.read_text()) if path.is_file() else {}
    return returns


def reaches(returns: list[float], threshold: float) -> bool:
    """Returns whether enough games have a mean return above the threshold."""
    return len(returns) >= MIN_GAMES and mean(returns) >= threshold


@torch.no_grad()
def load_student_snapshot(path: Path) -> Student:
    """Returns a snapshot as a student, in evaluation mode."""
    snapshot = load_snapshot(path)
    student = make_student("7%", 6)
    for parameter, value in zip(student.net.parameters(), snapshot.tensors, strict=True):
        parameter.copy_(value)
    for buffer, number in zip(student.net.buffers(), snapshot.scaling, strict=True):
        buffer.fill_(number)
    return student.eval()


def play(student: Student, games: int, temperature: float, *, seed: int) -> list[float]:
    """Returns the episodic returns of a number of games."""
    policy = TemperedPolicy(student, temperature)
    return list(evaluate_on_atari(policy, "Pong", "noop_sampled", games, seed=seed).returns)


def print_curve(run: Path, threshold: float) -> None:
    """Prints the curve and the first snapshot that reaches the threshold."""
    returns = read_returns(run)
    evaluated = [(point, returns[point.file]) for point in read_curve(run) if point.file in returns]
    for point, found in evaluated:
        print(_line(run, point, found))
    good = [(point, found) for point, found in evaluated if reaches(found, threshold)]
    if good:
        print(f"reached {threshold}: {_line(run, *good[0])}")
    else:
        print(f"not reached; best: {_line(run, *max(evaluated, key=lambda pair: mean(pair[1])))}")


def _line(run: Path, point: CurvePoint, returns: list[float]) -> str:
    cost = f"{point.cpu_seconds:7.0f} s CPU {point.wall_seconds:7.0f} s wall {point.steps:9,} steps"
    return f"{run.name:16} {cost} {point.updates:8,} updates: {mean(returns):7.2f} of {len(returns)} games"


if __name__ == "__main__":
    main(tyro.cli(Args))
