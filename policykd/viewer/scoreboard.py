"""One picture of a film: each player's screen, what it thinks of its actions, and its return so far."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from policykd.viewer.colours import FAINT, INK, PANEL, PAPER

MARGIN, BAR, MOST_BARS, ROOMY = 16, 22, 9, 240
"""pixels around everything, pixels an action's bar takes, bars under each other before there are two columns, pixels
across from which on there is room for numbers beside bars"""


@dataclass(frozen=True)
class Moment:
    """One agent step (4 frames) of a game, before the action is taken."""

    screen: np.ndarray
    """RGB uint8 `(210, 160, 3)`; a few games have more rows"""
    probabilities_A: np.ndarray
    """of the policy, float32 `(num_actions,)`"""
    action: int
    """that is taken"""
    episodic_return: float
    """of the game so far"""
    finished: tuple[float, ...] = ()
    """episodic returns of the games before it"""


@dataclass(frozen=True)
class Scoreboard:
    """Draws the same moment of several players side by side."""

    names: Sequence[str]
    colours: Sequence[str]
    """of the players, as Pillow reads them"""
    actions: Sequence[str]
    """what the actions are called"""
    scale: int = 2
    """pixels a pixel of the emulator takes along each side"""

    def size(self, rows: int = 210, columns: int = 160) -> tuple[int, int]:
        """Returns the width and height of a picture, pixels, of a game whose screen has so many."""
        num_bars = min(len(self.actions), MOST_BARS)
        return (
            MARGIN + len(self.names) * (columns * self.scale + MARGIN),
            MARGIN + 36 + rows * self.scale + MARGIN + num_bars * BAR + MARGIN + 16 + MARGIN // 2,
        )

    def __call__(self, moments: Sequence[Moment], caption: str) -> Image.Image:
        """Returns an RGB picture; its size depends on the game, the number of players and the scale alone."""
        rows, columns, _ = moments[0].screen.shape
        width, height = columns * self.scale, rows * self.scale
        size = self.size(rows, columns)
        picture = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(picture)
        for i, moment in enumerate(moments):
            left, top = MARGIN + i * (width + MARGIN), MARGIN
            self._title(draw, (left, top), width, i, moment)
            screen = Image.fromarray(moment.screen).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(screen, (left, top + 36))
            self._bars(draw, (left, top + 36 + height + MARGIN), width, i, moment)
        draw.text((MARGIN, size[1] - MARGIN // 2), caption, FAINT, _font(13), "ls")
        return picture

    def _title(self, draw: ImageDraw.ImageDraw, at: tuple[int, int], width: int, i: int, moment: Moment) -> None:
        left, bottom = at[0], at[1] + 24
        score = f"{moment.episodic_return:+.0f}" if moment.episodic_return else "0"
        draw.text((left + width, bottom), score, INK, _font(26), "rs")
        room = width - draw.textlength(score, _font(26)) - 12
        if moment.finished and width >= ROOMY:
            before = f"game {len(moment.finished) + 1}, before {moment.finished[-1]:+.0f}"
            draw.text((left + room, bottom), before, FAINT, _font(13), "rs")
            room -= draw.textlength(before, _font(13)) + 12
        draw.text((left, bottom), _shortened(draw, self.names[i], room), self.colours[i], _font(20), "ls")

    def _bars(self, draw: ImageDraw.ImageDraw, at: tuple[int, int], width: int, i: int, moment: Moment) -> None:
        num_columns = -(-len(self.actions) // MOST_BARS)
        column = (width - MARGIN * (num_columns - 1)) // num_columns
        is_roomy = column >= ROOMY
        font, for_name, for_share = (_font(13), 96, 40) if is_roomy else (_font(10), 92, 0)
        for a, (name, share) in enumerate(zip(self.actions, moment.probabilities_A.tolist(), strict=True)):
            left = at[0] + a // MOST_BARS * (column + MARGIN)
            middle = at[1] + a % MOST_BARS * BAR + BAR // 2
            taken = a == moment.action
            begin, end = left + for_name, left + column - for_share
            draw.text((left, middle), name, INK if taken else FAINT, font, "lm")
            draw.rounded_rectangle((begin, middle - 6, end, middle + 6), 3, PANEL)
            if (filled := round(share * (end - begin))) > 0:
                shade = self.colours[i] if taken else _dimmed(self.colours[i])
                draw.rounded_rectangle((begin, middle - 6, begin + filled, middle + 6), min(3, filled // 2), shade)
            if is_roomy:
                draw.text((left + column, middle), f"{share:.0%}", INK if taken else FAINT, font, "rm")


def _shortened(draw: ImageDraw.ImageDraw, name: str, room: float) -> str:
    """Returns a name without its middle where it takes more than `room` pixels."""
    kept = len(name)
    shorter = name
    while kept > 2 and draw.textlength(shorter, _font(20)) > room:
        kept -= 1
        shorter = f"{name[: kept // 2]}...{name[len(name) - (kept - kept // 2) :]}"
    return shorter


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


@functools.cache
def _dimmed(colour: str) -> tuple[int, int, int]:
    """Returns a colour half way to the panel behind it."""
    front, back = (Image.new("RGB", (1, 1), c) for c in (colour, PANEL))
    red, green, blue = np.asarray(Image.blend(front, back, 0.5))[0, 0].tolist()
    return red, green, blue
