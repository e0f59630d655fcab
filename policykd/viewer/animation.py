"""Films of policies at play: several side by side on the same seed, with what each thinks of its actions."""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from policykd.agents.policy import Policy, greedy, log_policy, sample
from policykd.envs.actions import action_names
from policykd.envs.atari import make_atari
from policykd.envs.games import canonical_name
from policykd.evaluation.evaluate import PROTOCOLS, ProtocolName
from policykd.io.files import write_atomically
from policykd.io.signals import check_interrupted
from policykd.viewer.colours import TEACHER
from policykd.viewer.scoreboard import Moment, Scoreboard

STEPS_A_SECOND = 15
"""agent steps: an Atari draws 60 frames a second, an action lasts 4 of them"""
PROTOCOL_TEXTS: dict[ProtocolName, str] = {
    "noop_sampled": "no-op starts, sampled actions",
    "sticky_greedy": "sticky actions, greedy play",
}


@dataclass(frozen=True)
class Player:
    """A policy under the name and in the colour that a film shows."""

    name: str
    policy: Policy
    temperature: float = 1.0
    """what its scores are divided by to get probabilities"""
    colour: str = TEACHER


def play(player: Player, game: str, *, seed: int, protocol: ProtocolName) -> Iterator[Moment]:
    """Yields a policy's play, step for step and game after game, without end.

    Raises:
        ValueError: an unknown game.
        FloatingPointError: scores that are not finite.
    """
    how = PROTOCOLS[protocol]
    noops, sticky = how.noop_max, how.repeat_action_probability
    generator, finished, brought = torch.Generator().manual_seed(seed), list[float](), 0.0
    policy, device = player.policy, _device_of(player.policy)
    with closing(make_atari(game, 1, seed, noop_max=noops, repeat_action_probability=sticky)) as envs:
        obs = envs.reset()
        while True:
            check_interrupted()
            with torch.inference_mode():
                scores_BA = policy(obs.to(device)).cpu()
                probabilities_BA = log_policy(scores_BA, player.temperature).exp()
            if not probabilities_BA.isfinite().all():
                raise FloatingPointError(f"{player.name}: scores that are not finite; the policy is broken")
            action_B = greedy(scores_BA) if how.deterministic else sample(probabilities_BA.log(), generator)
            yield Moment(envs.screens()[0], probabilities_BA[0].numpy(), int(action_B), brought, tuple(finished))
            step = envs.step(action_B)
            obs, brought = step.obs, brought + float(step.rewards_B)
            if step.episodes:
                finished, brought = [*finished, step.episodes[0].episodic_return], 0.0


def film(
    players: Sequence[Player],
    game: str,
    *,
    seed: int = 0,
    num_steps: int = 300,
    every: int = 1,
    protocol: ProtocolName = "sticky_greedy",
    scale: int = 2,
) -> Iterator[Image.Image]:
    """Yields RGB pictures of policies that play the same seed side by side; what one does never moves another's game.

    Args:
        players: from left to right.
        game: what they play.
        seed: of no-op starts, sticky and sampled actions.
        num_steps: agent steps, of which `STEPS_A_SECOND` are a second.
        every: steps a picture.
        protocol: under which rules.
        scale: pixels a pixel of the emulator takes along each side.

    Raises:
        ValueError: an unknown game.
        FloatingPointError: scores that are not finite.
    """
    draw = _scoreboard(players, game, scale)
    title = f"{canonical_name(game)}   seed {seed}   {PROTOCOL_TEXTS[protocol]}"
    playing = [play(player, game, seed=seed, protocol=protocol) for player in players]
    moments_of_all = zip(*playing, strict=True)
    for i, moments in enumerate(islice(moments_of_all, num_steps)):
        if i % every == 0:
            yield draw(moments, f"{title}   {i / STEPS_A_SECOND:.1f} s")


def film_bytes(players: Sequence[Player], game: str, *, num_steps: int, every: int = 1, scale: int = 2) -> int:
    """Returns how much memory the pictures of a film take before they are encoded."""
    width, height = _scoreboard(players, game, scale).size()
    return -(-num_steps // every) * width * height * 3


def _scoreboard(players: Sequence[Player], game: str, scale: int) -> Scoreboard:
    return Scoreboard([p.name for p in players], [p.colour for p in players], action_names(game), scale)


def encode(pictures: Iterable[Image.Image], *, every: int = 1, format: Literal["WEBP", "GIF"] = "WEBP") -> bytes:
    """Returns an animation that loops for ever at the game's own speed, from pictures of `every` steps each.

    Raises:
        ValueError: no picture.
    """
    films = list(pictures)
    if not films:
        raise ValueError("a film needs at least one picture; let it play for more steps")
    first, *others = _in_few_colours(films) if format == "GIF" else films
    buffer = io.BytesIO()
    how = {"lossless": True, "quality": 50, "method": 2} if format == "WEBP" else {"optimize": False}
    durations = _milliseconds(len(films), every, tick=10 if format == "GIF" else 1)
    first.save(buffer, format, save_all=True, append_images=others, duration=durations, loop=0, **how)
    return buffer.getvalue()


def _milliseconds(num_pictures: int, every: int, *, tick: int) -> list[int]:
    """Returns how long each picture is shown, whole ticks of the format that never drift from the game's speed."""
    ends = [round(i * every * 1000 / STEPS_A_SECOND / tick) for i in range(num_pictures + 1)]
    return [tick * (end - begin) for begin, end in pairwise(ends)]


def cut_to(webp: bytes, most_bytes: int) -> tuple[bytes, float]:
    """Returns an animated WebP without its end, as much of it as fits but its first picture at least, and its seconds.

    Nothing is encoded again: a picture in the file depends on those before it alone. A file is `RIFF`, its size and
    `WEBP`, then chunks: a name, a size, content, and a byte more where the size is odd (RFC 9649, section 2.3).
    """
    kept, milliseconds, at = bytearray(webp[:12]), 0, 12
    while at < len(webp):
        end = at + 8 + (size := int.from_bytes(webp[at + 4 : at + 8], "little")) + size % 2
        if webp[at : at + 4] == b"ANMF":  # 12 bytes of corner and size, then 3 of duration
            if milliseconds and len(kept) + end - at > most_bytes:
                break
            milliseconds += int.from_bytes(webp[at + 20 : at + 23], "little")
        kept += webp[at:end]
        at = end
    kept[4:8] = (len(kept) - 8).to_bytes(4, "little")
    return bytes(kept), milliseconds / 1000


def play_to_gif(policy: Policy, game: str, path: Path, *, seed: int = 0, num_steps: int = 600, every: int = 2) -> None:
    """Writes the first `num_steps` agent steps (15 a second) of one sticky, greedy game, the emulator's screen alone.

    Every `every`th is a picture.
    """
    screens = list[Image.Image]()
    for i, moment in enumerate(play(Player("", policy), game, seed=seed, protocol="sticky_greedy")):
        if i == num_steps or moment.finished:
            break
        if i % every == 0:
            screens.append(Image.fromarray(moment.screen))
    write_atomically(path, encode(screens, every=every, format="GIF"))


def _in_few_colours(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Returns pictures that share a palette, so that what stands still is not written again."""
    chosen = pictures[:: max(1, len(pictures) // 8)]
    sheet = Image.new("RGB", (chosen[0].width, sum(p.height for p in chosen)))
    for i, picture in enumerate(chosen):
        sheet.paste(picture, (0, i * picture.height))
    palette, reduced = sheet.quantize(64), list[Image.Image]()
    for picture in pictures:
        check_interrupted()
        reduced.append(picture.quantize(palette=palette, dither=Image.Dither.NONE))
    return reduced


def _device_of(policy: Policy) -> torch.device:
    policy = getattr(policy, "net", policy)
    return next((p.device for p in getattr(policy, "parameters", list)()), torch.device("cpu"))
