"""Films of policies: several side by side on the same seed, with their action probabilities."""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from policykd.agents.policy import Policy, device_of, greedy, log_policy, sample
from policykd.envs.atari import make_atari
from policykd.envs.emulators import action_names
from policykd.envs.games import canonical_name
from policykd.evaluation.evaluate import PROTOCOLS, ProtocolName
from policykd.io.files import write_atomically
from policykd.viewer.colours import TEACHER
from policykd.viewer.scoreboard import Moment, Scoreboard

STEPS_PER_SECOND = 15
"""agent steps: an Atari draws 60 frames per second, and an action lasts 4 of them"""

PROTOCOL_TITLES: dict[ProtocolName, str] = {
    "noop_sampled": "no-op starts, sampled actions",
    "sticky_greedy": "sticky actions, greedy play",
}

AnimationFormat = Literal["WEBP", "GIF"]


@dataclass(frozen=True)
class Player:
    """A policy with its name and colour in a film; `temperature` turns its outputs into action probabilities."""

    name: str
    policy: Policy
    temperature: float = 1.0
    colour: str = TEACHER


@dataclass(frozen=True)
class VideoSettings:
    """Content and size of a film."""

    game: str
    seed: int = 0
    """seed of no-op starts, sticky and sampled actions, the same for every player"""
    num_steps: int = 300
    """agent steps, `STEPS_PER_SECOND` of them per second"""
    steps_per_picture: int = 2
    protocol: ProtocolName = "sticky_greedy"
    scale: int = 2
    """pixels per pixel of the emulator, along each side"""


def play(player: Player, game: str, *, seed: int, protocol: ProtocolName) -> Iterator[Moment]:
    """Yields every agent step of a policy, game after game, without end.

    Raises:
        ValueError: unknown game.
        FloatingPointError: the policy's outputs are not finite.
    """
    rules = PROTOCOLS[protocol]
    device = device_of(player.policy, default="cpu")
    generator = torch.Generator().manual_seed(seed)
    finished: tuple[float, ...] = ()
    episodic_return = 0.0
    envs = make_atari(game, 1, seed, noop_max=rules.noop_max, repeat_action_probability=rules.repeat_action_probability)
    with closing(envs):
        obs = envs.reset()
        while True:
            with torch.inference_mode():
                outputs_BA = player.policy(obs.to(device)).cpu()
                probabilities_BA = log_policy(outputs_BA, player.temperature).exp()
            if not probabilities_BA.isfinite().all():
                raise FloatingPointError(f"{player.name}: outputs that are not finite; the policy is broken")
            action_B = greedy(outputs_BA) if rules.deterministic else sample(probabilities_BA.log(), generator)
            # The moment is shown before its action: screen, probabilities and return belong to the same step.
            yield Moment(envs.screens()[0], probabilities_BA[0].numpy(), int(action_B), episodic_return, finished)
            step = envs.step(action_B)
            obs = step.obs
            episodic_return += float(step.rewards_B)
            if step.episodes:
                finished = (*finished, step.episodes[0].episodic_return)
                episodic_return = 0.0


def render_video(players: Sequence[Player], settings: VideoSettings) -> Iterator[Image.Image]:
    """Yields RGB pictures of policies that play the same seed side by side, each in a game of its own.

    Raises the errors of `play`.
    """
    draw = Scoreboard(
        [player.name for player in players],
        [player.colour for player in players],
        action_names(settings.game),
        settings.scale,
    )
    title = f"{canonical_name(settings.game)}   seed {settings.seed}   {PROTOCOL_TITLES[settings.protocol]}"
    games = [play(player, settings.game, seed=settings.seed, protocol=settings.protocol) for player in players]
    for i, moments in enumerate(islice(zip(*games, strict=True), settings.num_steps)):
        if i % settings.steps_per_picture == 0:
            yield draw(moments, f"{title}   {i / STEPS_PER_SECOND:.1f} s")


def encode_animation(
    pictures: Iterable[Image.Image], steps_per_picture: int, format: AnimationFormat = "WEBP"
) -> bytes:
    """Returns an animation that loops forever at the speed of the game.

    WebP is lossless and takes a third of the bytes; GIF is reduced to 64 colours and opens everywhere.

    Raises:
        ValueError: no pictures.
    """
    frames = list(pictures)
    if not frames:
        raise ValueError("an animation needs at least one picture; play for more steps")
    if format == "GIF":
        frames = _quantize(frames)
        options: dict[str, int] = {"optimize": False}
    else:
        # In lossless files "quality" is the effort: 50 with method 2 comes close to the smallest size.
        options = {"lossless": True, "quality": 50, "method": 2}
    durations = _durations(len(frames), steps_per_picture, tick=10 if format == "GIF" else 1)
    buffer = io.BytesIO()
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:], duration=durations, loop=0, **options)
    return buffer.getvalue()


def _durations(num_pictures: int, steps_per_picture: int, *, tick: int) -> list[int]:
    """Returns each picture's duration in milliseconds: multiples of the format's `tick` whose sum never drifts."""
    # Differences of rounded times, since rounded differences would add up.
    seconds_per_picture = steps_per_picture / STEPS_PER_SECOND
    ends = [round(i * seconds_per_picture * 1000 / tick) for i in range(num_pictures + 1)]
    return [tick * (end - begin) for begin, end in pairwise(ends)]


def play_to_gif(policy: Policy, game: str, path: Path, *, seed: int = 0, num_steps: int = 600) -> None:
    """Writes up to `num_steps` agent steps of one sticky, greedy game as a GIF of the emulator's screen alone."""
    steps_per_picture = 2
    screens: list[Image.Image] = []
    for i, moment in enumerate(play(Player("", policy), game, seed=seed, protocol="sticky_greedy")):
        if i == num_steps or moment.finished:
            break
        if i % steps_per_picture == 0:
            screens.append(Image.fromarray(moment.screen))
    write_atomically(path, encode_animation(screens, steps_per_picture, "GIF"))


def _quantize(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Returns pictures that share a palette of 64 colours, so that GIF stores only the pixels that change."""
    # The palette is fitted to eight pictures from the whole film.
    samples = pictures[:: max(1, len(pictures) // 8)]
    sheet = Image.new("RGB", (samples[0].width, sum(picture.height for picture in samples)))
    for i, picture in enumerate(samples):
        sheet.paste(picture, (0, i * picture.height))
    palette = sheet.quantize(64)
    return [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
