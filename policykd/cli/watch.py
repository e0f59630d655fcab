"""`policykd watch`: shows policies playing, in a window or as an animation."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from pydantic import Field

from policykd.agents.student import Student
from policykd.agents.teacher import TEACHER_HELP
from policykd.cli.errors import needs_extra
from policykd.evaluation import policies
from policykd.evaluation.evaluate import sampling_temperature
from policykd.io.files import write_atomically
from policykd.runs.config import DebugArgs, NotNegative, Positive, SeedArgs, TrustArgs
from policykd.viewer import animation, colours, window

ANIMATION_FORMATS: dict[str, animation.AnimationFormat] = {".gif": "GIF", ".webp": "WEBP"}
DEFAULT_STEPS_IN_FILE = 300
MAX_SCALED_PICTURES = 6_000
"""pictures of an animation times scale squared: 1,500 of the usual size, 2 GB before they are encoded"""
Scale = Annotated[int, Field(ge=1, le=16)]
"""a WebP has at most 16,383 pixels along each side"""


@dataclass(frozen=True, kw_only=True)
class WatchArgs(DebugArgs, TrustArgs, SeedArgs):
    """Shows policies playing side by side on the same seed, with the probabilities of their actions.

    The space bar pauses the window; q and escape close it. Without a screen, or with --out, the first 20 seconds are
    written to an animation.
    """

    policy: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=f"folder of a run, or a teacher: {TEACHER_HELP}")]
    game: str = ""
    """game to play; by default the game of the run or teacher"""
    against: str = "teacher"
    """policy to show next to it: the run's own teacher, none, or another run or teacher"""
    out: Path | None = None
    """.gif or .webp file to write instead of opening a window; without a screen the default is watch.gif in the run's
    folder or the current one"""
    steps: NotNegative = 0
    """agent steps to play, 15 per second; 0 is unlimited in a window and 300 in a file"""
    every: Positive = 2
    """agent steps per picture of an animation: 2 halves the file, 1 moves more smoothly"""
    scale: Scale = 2
    """pixels per pixel of the game, along each side"""
    sticky: bool = False
    """play with sticky actions and greedily, instead of no-op starts and sampled actions"""


def run(args: WatchArgs) -> None:
    """Loads the policies and shows them."""
    if args.out and args.out.suffix.lower() not in ANIMATION_FORMATS:
        raise ValueError(f"--out {args.out}: give a name that ends in {' or '.join(ANIMATION_FORMATS)}")
    if args.out and not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out}: folder not found; create it first")
    # One observation at a time: more threads would cost more than they bring.
    torch.set_num_threads(1)
    game = policies.infer_game([args.policy], args.game)
    players = [_as_player(policy) for policy in _load_policies(args, game)]
    names = " and ".join(player.name for player in players)
    settings = animation.VideoSettings(
        game,
        seed=args.seed,
        num_steps=args.steps or sys.maxsize,
        steps_per_picture=1,
        protocol="sticky_greedy" if args.sticky else "noop_sampled",
        scale=args.scale,
    )
    # A window if there is a screen and SDL can reach it, else a file.
    reason = ""
    if args.out is None:
        reason = "no screen found"
        if window.has_screen():
            try:
                with needs_extra("watch"):
                    pictures = animation.render_video(players, settings)
                    window.show(pictures, title=f"{game}: {names}", pictures_per_second=animation.STEPS_PER_SECOND)
                return
            except window.NoWindow as error:
                reason = str(error).partition("; ")[0]
    # A file holds the whole film in memory first, so its length is checked before anything is played.
    num_steps = args.steps or DEFAULT_STEPS_IN_FILE
    settings = replace(settings, num_steps=num_steps, steps_per_picture=args.every)
    if args.every > num_steps:
        raise ValueError(f"--every must be at most the number of steps, {num_steps}")
    if num_steps / args.every * args.scale**2 > MAX_SCALED_PICTURES:
        raise ValueError("the pictures take more than 2 GB of memory; lower --steps or --scale, or raise --every")
    if reason:
        print(f"{reason}, so {num_steps / animation.STEPS_PER_SECOND:.0f} seconds of play are written to a file")
    # Next to the run that is watched, if it is one.
    out = args.out or (policies.find_run(args.policy) or Path()) / "watch.gif"
    pictures = animation.render_video(players, settings)
    content = animation.encode_animation(pictures, args.every, ANIMATION_FORMATS[out.suffix.lower()])
    write_atomically(out, content)
    print(f"{out}: {names} on {game}, {len(content) / 1e6:.1f} MB")


def _load_policies(args: WatchArgs, game: str) -> list[policies.NamedPolicy]:
    """Returns the policies to show, a teacher before a student."""
    # Left the teacher, right the student, whichever was named first.
    policy = policies.load_named_policy(args.policy, game, trust_pickle=args.trust_pickle)
    own_run = policies.find_run(args.policy)
    if args.against == "none" or (args.against == "teacher" and own_run is None):
        return [policy]
    if args.against == "teacher":
        assert own_run is not None
        return [policies.load_run_teacher(own_run, trust_pickle=args.trust_pickle), policy]
    other = policies.load_named_policy(args.against, game, trust_pickle=args.trust_pickle)
    return [policy, other] if isinstance(other.policy, Student) else [other, policy]


def _as_player(named: policies.NamedPolicy) -> animation.Player:
    colour = colours.STUDENT if isinstance(named.policy, Student) else colours.TEACHER
    return animation.Player(named.name, named.policy, sampling_temperature(named.policy), colour)
