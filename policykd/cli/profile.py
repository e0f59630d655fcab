"""`policykd profile`: measures what policies cost in each runtime."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from policykd.agents.teacher import TEACHER_HELP
from policykd.cli.evaluate import check_output_file
from policykd.evaluation.policies import find_run, infer_game, load_named_policy
from policykd.evaluation.profile import ProfileOptions, profile, profile_table
from policykd.evaluation.runtimes import RUNTIMES, RuntimeName
from policykd.io.typed import write_json
from policykd.runs.config import DebugArgs, Positive, SeedArgs, TrustArgs


@dataclass(frozen=True, kw_only=True)
class ProfileArgs(DebugArgs, TrustArgs, SeedArgs):
    """Measures parameters, multiply-accumulates, bytes, latency, throughput, memory and start-up of policies.

    Every installed runtime takes its turn: SB3's predict, torch, ONNX Runtime (float32 and int8), NumPy and C, all with
    one thread, on frames of the game. Give the teacher first: ratios are against it. See docs/profile.md.
    """

    policies: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(help=f"folders of runs, or teachers: {TEACHER_HELP}")
    ]
    game: str = ""
    """game to play; by default the game of the first policy that records one"""
    json: Path | None = None
    """file for all measurements; by default profile.json in the first run's folder, else in the current folder"""
    runtimes: tuple[RuntimeName, ...] = ()
    """runtimes to measure, by default all; those that are not installed are listed with the reason"""
    rounds: Positive = 9
    """turns of each policy in each runtime"""
    calls: Positive = 100
    """timed calls per turn"""
    starts: Positive = 3
    """fresh processes per policy and runtime; start-up is their median"""


def run(args: ProfileArgs) -> None:
    """Loads the policies, measures, prints and writes."""
    if not args.policies:
        raise ValueError("no policy: give the folder of a run, or a teacher such as bundled:ppo")
    # Measuring takes minutes: a place that cannot be written to is reported first.
    path = args.json or _default_file(args.policies)
    check_output_file(path)
    torch.set_num_threads(1)  # this process only prepares; each measurement runs in one of its own
    game = infer_game(args.policies, args.game)
    policies = [load_named_policy(ref, game, trust_pickle=args.trust_pickle) for ref in args.policies]
    options = ProfileOptions(
        runtimes=tuple(dict.fromkeys(args.runtimes)) or tuple(RUNTIMES),
        seed=args.seed,
        rounds=args.rounds,
        calls_per_round=args.calls,
        starts=args.starts,
    )
    found = profile(policies, game, options)
    print(profile_table(found))
    write_json(path, found)
    print(f"\n{path} has all measurements")


def _default_file(refs: tuple[str, ...]) -> Path:
    # Next to the results of the run that is profiled; teachers alone have no folder.
    runs = [run for run in map(find_run, refs) if run]
    if runs:
        return runs[0] / "profile.json"
    return Path(f"profile-{re.sub(r'[^A-Za-z0-9.-]+', '-', refs[0])}.json")
