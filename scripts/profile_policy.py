"""Measures what policies cost: parameters, arithmetic, bytes, latency, throughput, memory and start-up."""

import json
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from policykd.agents.teacher import TEACHER_HELP
from policykd.cli.arguments import parse_args
from policykd.cli.command import exit_with_one_line
from policykd.evaluation.policies import LoadOptions, infer_game, load_named_policy, run_folder
from policykd.evaluation.profile import profile, table
from policykd.evaluation.runtimes import RUNTIMES, RuntimeName
from policykd.io.files import write_atomically
from policykd.runs.folder import check_at_least, check_seed


@dataclass(frozen=True)
class Args:
    """Measures what policies cost: parameters, arithmetic, bytes, latency, throughput, memory and start-up.

    Every runtime that is installed takes its turn: SB3's predict, torch, ONNX Runtime (float32 and int8), NumPy, C; all
    with one thread, on frames of the game. Give the teacher first: ratios are against it. docs/profile.md has more.
    """

    policies: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(help=f"folders of runs, or teachers: {TEACHER_HELP}")
    ]
    game: str = ""
    """what they play; needed where none of them says it"""
    json: Path | None = None
    """where all that was measured goes; by default profile.json in the first run's folder, else here"""
    runtimes: tuple[RuntimeName, ...] = tuple(RUNTIMES)
    """what plays: sb3 (its predict), torch, onnx and int8 (ONNX Runtime), numpy, c; what is missing here is named"""
    rounds: int = 9
    """turns that each policy gets in each runtime"""
    calls: int = 100
    """timed in each turn"""
    starts: int = 3
    """fresh processes, of which the median start-up counts"""
    seed: int = 0
    """of the games whose frames are used"""
    trust_pickle: bool = False
    """let SB3 itself load a teacher, which executes code in the file"""
    debug: bool = False
    """show the traceback of an error"""


def main(args: Args) -> None:
    """Loads, measures, prints and writes."""
    if not args.policies:
        raise ValueError("which policy? give the folder of a run, or a teacher such as bundled:ppo")
    check_at_least(args, 1, "rounds", "calls", "starts")
    check_seed(args.seed)
    check_names_runtimes(args.runtimes)
    torch.set_num_threads(1)
    where = args.json or default_json(args.policies)
    if where.is_dir():
        raise ValueError(f"--json {where}: a folder; give a file in it")
    if not where.parent.is_dir():
        raise ValueError(f"--json {where}: its folder is missing; make it first")
    if not os.access(where.parent, os.W_OK):
        raise ValueError(f"--json {where}: its folder cannot be written; give a file in another")
    game = infer_game(args.policies, args.game)
    contenders = [load_named_policy(ref, game, LoadOptions(trust_pickle=args.trust_pickle)) for ref in args.policies]
    found = profile(
        contenders,
        game,
        runtimes=args.runtimes,
        seed=args.seed,
        rounds=args.rounds,
        calls_per_round=args.calls,
        starts=args.starts,
    )
    found["command"] = shlex.join(sys.argv)
    print(table(found))
    write_atomically(where, (json.dumps(found, indent=1) + "\n").encode())
    print(f"\n{where} has it all")


def check_names_runtimes(names: tuple[RuntimeName, ...]) -> None:
    """Raises ValueError for no runtime, and for one that is named twice."""
    if not names:
        raise ValueError(f"--runtimes: name at least one of {', '.join(RUNTIMES)}; leave it out for all of them")
    if twice := [name for name in RUNTIMES if names.count(name) > 1]:
        raise ValueError(f"--runtimes {' '.join(names)}: {twice[0]} is there twice; name each once")


def default_json(refs: tuple[str, ...]) -> Path:
    """Returns where a profile goes: into the first run's folder, or here, named after the teacher."""
    runs = [run for run in map(run_folder, refs) if run]
    return runs[0] / "profile.json" if runs else Path(f"profile-{re.sub(r'[^A-Za-z0-9.-]+', '-', refs[0])}.json")


if __name__ == "__main__":
    exit_with_one_line(lambda: main(parse_args(Args, sys.argv[1:])))
