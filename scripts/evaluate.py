"""Plays whole games with a student, a teacher or at random, and prints honest statistics."""

import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from policykd.agents.ensemble import WEIGHTS_HELP, load_teachers
from policykd.agents.policy import Policy
from policykd.agents.student import load_student
from policykd.agents.teacher import TEACHER_HELP
from policykd.cli.arguments import parse_args
from policykd.cli.command import DeviceName, exit_with_one_line, prepare_device, versions
from policykd.envs.atari import make_atari
from policykd.envs.games import canonical_name, human_normalised_score
from policykd.evaluation.evaluate import PROTOCOLS, AtariOptions, RandomPolicy, evaluate_on_atari
from policykd.evaluation.results import judgement
from policykd.evaluation.teacher_check import check_fits
from policykd.io.files import write_atomically
from policykd.runs.folder import check_at_least, check_seed


@dataclass(frozen=True)
class Args:
    """Plays whole games with a student, a teacher or at random, and prints honest statistics.

    Greedy play without sticky actions or no-op starts repeats the same few games for ever, so each protocol has a
    source of chance, and the number of different returns is printed with the mean.
    """

    policy: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(help=f"folder of a run, `random`, or a teacher: {TEACHER_HELP}")
    ]
    game: str
    """Pong, PongNoFrameskip-v4 and ALE/Pong-v5 all mean the same game."""
    teacher_weights: Annotated[str, tyro.conf.arg(help=WEIGHTS_HELP)] = "equal"
    episodes: int = 100
    """whole games under each protocol."""
    protocol: Literal["noop_sampled", "sticky_greedy", "both"] = "both"
    """no-op starts with sampled actions, sticky actions (0.25) with greedy play, or both."""
    num_envs: int = 16
    """games played at once."""
    device: DeviceName = "auto"
    """where to compute: cuda, then mps, then cpu, whichever is there first."""
    threads: int = 0
    """CPU threads; 0 takes what torch finds."""
    seed: int = 0
    """of starts, sticky and sampled actions."""
    trust_pickle: bool = False
    """let SB3 itself load a teacher, which executes code in the file"""
    json: Path | None = None
    """also write every game and the statistics to this file."""
    debug: bool = False
    """show the traceback of an error"""


def main(args: Args) -> None:
    """Loads, plays, prints."""
    check_at_least(args, 1, "episodes", "num_envs")
    check_seed(args.seed)
    if args.json and not (os.path.isdir(args.json.parent) and os.access(args.json.parent, os.W_OK)):
        raise ValueError(f"--json {args.json}: its folder is missing or cannot be written; make it first")
    device = prepare_device(args.device, args.threads)
    game = canonical_name(args.game)
    policy, _ = load_policy(args, game, device)
    protocols = {}
    for protocol in PROTOCOLS if args.protocol == "both" else (args.protocol,):
        games = evaluate_on_atari(
            policy,
            game,
            protocol,
            args.episodes,
            seed=args.seed,
            options=AtariOptions(num_envs=args.num_envs),
        )
        protocols[protocol] = row = judgement(games)
        (low, high), (iqm_low, iqm_high) = row["interval"], row["iqm_interval"]
        human = human_normalised_score(game, row["mean"])
        print(
            f"{game}, {protocol}: mean {row['mean']:.2f} [{low:.2f}, {high:.2f}], IQM {row['iqm']:.2f} [{iqm_low:.2f},"
            f" {iqm_high:.2f}], std {row['std']:.2f}, {row['num_distinct']} different returns in {row['num_episodes']}"
            " games"
            f"{'' if human is None else f', human-normalised {human:.2f}'}"
            f"{f', {games.num_truncated} cut by the time limit' if games.num_truncated else ''}",
            flush=True,
        )
    if args.json:
        about = {"policy": args.policy, "game": game, "seed": args.seed, "num_envs": args.num_envs}
        content = {**about, "protocols": protocols, "command": shlex.join(sys.argv), "versions": versions()}
        write_atomically(args.json, (json.dumps(content, indent=1) + "\n").encode())


def load_policy(args: Args, game: str, device: object) -> tuple[Policy, float]:
    """Returns a policy that fits the game and the temperature of its scores."""
    envs, ref = make_atari(game, 1, 0), args.policy
    if ref == "random":
        return RandomPolicy(envs.num_actions), 1.0
    if ref.endswith("student.json") or (Path(ref) / "student.json").is_file():
        student = load_student(ref).to(str(device))
        policy: Policy = student
        temperature = 1.0
    else:
        teacher = load_teachers(ref, args.teacher_weights, game=game, trust_pickle=args.trust_pickle).to(str(device))
        policy, temperature = teacher, teacher.temperature
    check_fits(policy, envs, ref, game)
    return policy, temperature


if __name__ == "__main__":
    exit_with_one_line(lambda: main(parse_args(Args, sys.argv[1:])))
