"""Plays in a window, or into an animation: teacher and student side by side, with what they think of their actions."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from PIL import Image

from policykd.agents.student import Student
from policykd.agents.teacher import TEACHER_HELP
from policykd.cli.arguments import parse_args
from policykd.cli.command import exit_with_one_line, needs_extra
from policykd.evaluation.evaluate import ProtocolName
from policykd.evaluation.policies import Contender, game_of, load_contender, run_of, teacher_of
from policykd.io.files import write_atomically
from policykd.runs.folder import check_at_least, check_seed
from policykd.viewer.animation import STEPS_A_SECOND, Player, encode, film, film_bytes
from policykd.viewer.colours import STUDENT, TEACHER
from policykd.viewer.window import NoWindow, has_screen, show

FORMATS: dict[str, Literal["GIF", "WEBP"]] = {".gif": "GIF", ".webp": "WEBP"}
STEPS_OF_A_FILM = 300
MOST_BYTES, MOST_SCALE = 2_000_000_000, 16
"""of all pictures of an animation before they are encoded, and what a WebP's 16,383 pixels across allow"""


@dataclass(frozen=True)
class Args:
    """Plays in a window, or into an animation: teacher and student side by side, with what they think of their actions.

    Both play the same seed. In the window the space bar pauses; q and escape close it. Where none can be opened, or
    with --out, the first 20 seconds become an animation.
    """

    policy: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=f"folder of a run, or a teacher: {TEACHER_HELP}")]
    game: str = ""
    """what is played; a run says it itself"""
    against: str = "teacher"
    """who plays beside it: the run's own teacher, none, or another run or teacher"""
    out: Path | None = None
    """write an animation to this .gif or .webp file instead of opening a window; where none can be opened it is
    watch.gif, in the run's folder or here"""
    steps: int = 0
    """agent steps to play, 15 a second; 0 for no end in a window and 300 in a file"""
    every: int = 2
    """steps a picture of the animation: 2 halves the file, 1 moves more smoothly"""
    scale: int = 2
    """pixels that a pixel of the game takes along each side"""
    sticky: bool = False
    """sticky actions with greedy play, instead of no-op starts with sampled actions"""
    seed: int = 0
    """of the game and of sampled actions"""
    trust_pickle: bool = False
    """let SB3 itself load a teacher, which executes code in the file"""
    debug: bool = False
    """show the traceback of an error"""


def main(args: Args) -> None:
    """Loads both and lets them play."""
    check(args)
    torch.set_num_threads(1)
    game = game_of([args.policy], args.game)
    players = [as_player(c) for c in contenders(args, game)]
    if args.out is None and has_screen():
        why = why_not_shown(args, players, game)
        if not why:
            return
    else:
        why = "" if args.out else "there is no screen here"
    out = args.out or (run_of(args.policy) or Path()) / "watch.gif"
    num_steps = args.steps or STEPS_OF_A_FILM
    check_animation(args, players, game, num_steps)
    if why:
        print(f"{why}, so {num_steps / STEPS_A_SECOND:.0f} seconds of play are written to a file")
    pictures = played(args, players, game, num_steps, every=args.every)
    content = encode(pictures, every=args.every, format=FORMATS[out.suffix.lower()])
    write_atomically(out, content)
    print(f"{out}: {names(players)} on {game}, {len(content) / 1e6:.1f} MB")


def why_not_shown(args: Args, players: list[Player], game: str) -> str:
    """Plays in a window; returns why none can be opened, or nothing once it is over."""
    pictures = played(args, players, game, args.steps or sys.maxsize, every=1)
    try:
        with needs_extra("watch"):
            show(pictures, title=f"{game}: {names(players)}", pictures_a_second=STEPS_A_SECOND)
    except NoWindow as error:
        return str(error).partition("; ")[0]
    return ""


def played(args: Args, players: list[Player], game: str, num_steps: int, *, every: int) -> Iterator[Image.Image]:
    """Yields pictures of the game while it is played."""
    protocol: ProtocolName = "sticky_greedy" if args.sticky else "noop_sampled"
    return film(players, game, seed=args.seed, num_steps=num_steps, every=every, protocol=protocol, scale=args.scale)


def names(players: list[Player]) -> str:
    """Returns who plays."""
    return " and ".join(p.name for p in players)


def contenders(args: Args, game: str) -> list[Contender]:
    """Returns who plays, the teacher before the student."""
    asked, run = load_contender(args.policy, game, trust_pickle=args.trust_pickle), run_of(args.policy)
    if args.against == "none" or (args.against == "teacher" and run is None):
        return [asked]
    if args.against == "teacher":
        assert run is not None
        return [teacher_of(run, trust_pickle=args.trust_pickle), asked]
    other = load_contender(args.against, game, trust_pickle=args.trust_pickle)
    return [asked, other] if isinstance(other.policy, Student) else [other, asked]


def as_player(contender: Contender) -> Player:
    """Returns a contender in the colour of its kind."""
    colour = STUDENT if isinstance(contender.policy, Student) else TEACHER
    return Player(contender.name, contender.policy, contender.temperature, colour)


def check_animation(args: Args, players: list[Player], game: str, num_steps: int) -> None:
    """Raises ValueError for one that does not move, and for pictures that do not fit, before any of it is played."""
    if args.every > num_steps:
        raise ValueError(f"--every {args.every}: one picture of {num_steps} steps; it must be at most --steps")
    taken = film_bytes(players, game, num_steps=num_steps, every=args.every, scale=args.scale)
    if taken > MOST_BYTES:
        raise ValueError(
            f"{-(-num_steps // args.every):,} pictures take {taken / 1e9:,.1f} GB of memory, {MOST_BYTES / 1e9:g} are"
            " the most; lower --steps or --scale, or raise --every"
        )


def check(args: Args) -> None:
    """Raises ValueError for what cannot be played or written."""
    check_at_least(args, 0, "steps")
    check_seed(args.seed)
    check_at_least(args, 1, "every", "scale")
    if args.scale > MOST_SCALE:
        raise ValueError(f"--scale must be at most {MOST_SCALE}, not {args.scale}")
    if args.out and args.out.suffix.lower() not in FORMATS:
        raise ValueError(f"--out {args.out}: give a name that ends in {' or '.join(FORMATS)}")
    if args.out and not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out}: its folder is missing; make it first")


if __name__ == "__main__":
    exit_with_one_line(lambda: main(parse_args(Args, sys.argv[1:])))
