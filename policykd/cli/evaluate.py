"""`policykd evaluate`: plays full episodes with a student, a teacher or at random, and prints their statistics."""

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from policykd.agents.policy import Policy
from policykd.agents.teacher import TEACHER_HELP, WEIGHTS_HELP
from policykd.envs.emulators import action_names
from policykd.envs.games import human_normalised_score
from policykd.evaluation.evaluate import PROTOCOLS, AtariOptions, ProtocolName, RandomPolicy, evaluate_on_atari
from policykd.evaluation.policies import RANDOM, infer_game, load_named_policy
from policykd.evaluation.results import ProtocolResult, summarise_episodes
from policykd.io.machine import prepare_device, versions
from policykd.io.typed import write_json
from policykd.runs.config import DebugArgs, MachineArgs, Positive, SeedArgs, TrustArgs


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(DebugArgs, TrustArgs, MachineArgs, SeedArgs):
    """Plays full episodes with a student, a teacher or at random, and prints their statistics.

    Greedy play without sticky actions or no-op starts repeats the same few games, so each protocol has a source of
    randomness, and the number of distinct returns is printed next to the mean.
    """

    policy: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(help=f"folder of a run, `random`, or a teacher: {TEACHER_HELP}")
    ]
    game: str = ""
    """game to play (Pong, PongNoFrameskip-v4 and ALE/Pong-v5 are the same); by default the policy's own"""
    teacher_weights: Annotated[str, tyro.conf.arg(help=WEIGHTS_HELP)] = "equal"
    episodes: Positive = 100
    """full episodes per protocol"""
    protocol: Literal["noop_sampled", "sticky_greedy", "both"] = "both"
    """no-op starts with sampled actions, sticky actions (0.25) with greedy play, or both"""
    num_envs: Positive = 16
    """games played at once"""
    json: Path | None = None
    """file for every episode and the statistics"""


@dataclass(frozen=True, kw_only=True)
class EvaluationFile:
    """Content of the file that --json names."""

    policy: str
    game: str
    seed: int
    num_envs: int
    protocols: dict[ProtocolName, ProtocolResult]
    command: str = field(default_factory=lambda: shlex.join(sys.argv))
    versions: dict[str, str] = field(default_factory=versions)


def run(args: EvaluateArgs) -> None:
    """Loads the policy, plays, prints."""
    # A full evaluation takes minutes: an output file that cannot be written is reported first.
    if args.json:
        check_output_file(args.json)
    device = prepare_device(args.device, args.threads)
    game = infer_game([args.policy], args.game)
    policy: Policy
    if args.policy == RANDOM:
        policy = RandomPolicy(len(action_names(game)))
    else:
        policy = load_named_policy(
            args.policy, game, weights=args.teacher_weights, trust_pickle=args.trust_pickle
        ).policy.to(device)
    # Two sources of randomness, because results under one of them may not hold under the other.
    protocols: tuple[ProtocolName, ...] = tuple(PROTOCOLS) if args.protocol == "both" else (args.protocol,)
    results: dict[ProtocolName, ProtocolResult] = {}
    options = AtariOptions(num_envs=args.num_envs)
    # Each line appears as soon as its games are finished.
    for protocol in protocols:
        games = evaluate_on_atari(policy, game, protocol, args.episodes, seed=args.seed, options=options)
        results[protocol] = summarise_episodes(games)
        print(f"{game}, {protocol}: {_describe(results[protocol], game)}", flush=True)
    if args.json:
        content = EvaluationFile(
            policy=args.policy, game=game, seed=args.seed, num_envs=args.num_envs, protocols=results
        )
        write_json(args.json, content)


def check_output_file(path: Path) -> None:
    """Raises ValueError, before any work is done, if the file of --json cannot be written."""
    if path.is_dir():
        raise ValueError(f"--json {path}: a folder; give a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"--json {path}: folder not found; create it first")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--json {path}: folder not writable; give a file in another")


def _describe(result: ProtocolResult, game: str) -> str:
    # The interquartile mean next to the mean: it is less moved by a few extraordinary games (Agarwal et al., 2021).
    low, high = result.interval
    iqm_low, iqm_high = result.iqm_interval
    parts = [
        f"mean {result.mean:.2f} [{low:.2f}, {high:.2f}]",
        f"IQM {result.iqm:.2f} [{iqm_low:.2f}, {iqm_high:.2f}]",
        f"std {result.std:.2f}",
        f"{result.num_distinct} different returns in {result.num_episodes} games",
    ]
    human = human_normalised_score(game, result.mean)
    if human is not None:
        parts.append(f"human-normalised {human:.2f}")
    if result.num_truncated:
        parts.append(f"{result.num_truncated} cut by the time limit")
    return ", ".join(parts)
