"""One picture of a film: the screen, the action probabilities and the return of each player."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from policykd.viewer.colours import FAINT, INK, PANEL, PAPER

# Pixels.
MARGIN = 16
TITLE_HEIGHT = 36
BAR_HEIGHT = 22
CAPTION_HEIGHT = 24
MIN_WIDTH_FOR_NUMBERS = 240

MAX_BARS_PER_COLUMN = 9


@dataclass(frozen=True)
class Moment:
    """State of one player before it takes an action."""

    screen: np.ndarray
    """RGB, uint8 `(210, 160, 3)`; a few games have more rows"""
    probabilities_A: np.ndarray
    """the policy's action probabilities, float32 `(num_actions,)`"""
    action: int
    episodic_return: float
    """rewards of the current game so far"""
    finished: tuple[float, ...] = ()
    """episodic returns of the games before it"""


@dataclass(frozen=True)
class Scoreboard:
    """Draws the same moment of several players side by side."""

    names: Sequence[str]
    colours: Sequence[str]
    """one per player, as Pillow reads them"""
    actions: Sequence[str]
    scale: int = 2
    """pixels per pixel of the emulator, along each side"""

    def size(self, rows: int = 210, columns: int = 160) -> tuple[int, int]:
        """Returns the width and height of a picture in pixels, for a screen of `rows` by `columns`."""
        num_bars = min(len(self.actions), MAX_BARS_PER_COLUMN)
        width = MARGIN + len(self.names) * (columns * self.scale + MARGIN)
        height = MARGIN + TITLE_HEIGHT + rows * self.scale + MARGIN + num_bars * BAR_HEIGHT + MARGIN + CAPTION_HEIGHT
        return width, height

    def __call__(self, moments: Sequence[Moment], caption: str) -> Image.Image:
        """Returns an RGB picture; its size depends only on the game, the number of players and the scale."""
        rows, columns, _ = moments[0].screen.shape
        width = columns * self.scale
        height = rows * self.scale
        picture = Image.new("RGB", self.size(rows, columns), PAPER)
        draw = ImageDraw.Draw(picture)
        for player, moment in enumerate(moments):
            left = MARGIN + player * (width + MARGIN)
            top = MARGIN + TITLE_HEIGHT
            self._draw_title(draw, left, width, player, moment)
            screen = Image.fromarray(moment.screen).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(screen, (left, top))
            self._draw_bars(draw, (left, top + height + MARGIN), width, player, moment)
        draw.text((MARGIN, picture.height - MARGIN // 2), caption, FAINT, _font(13), "ls")
        return picture

    def _draw_title(self, draw: ImageDraw.ImageDraw, left: int, width: int, player: int, moment: Moment) -> None:
        # From the right: the return so far, the return of the previous game, then the name in what is left.
        baseline = MARGIN + 24
        score = f"{moment.episodic_return:+.0f}" if moment.episodic_return else "0"
        draw.text((left + width, baseline), score, INK, _font(26), "rs")
        room = width - draw.textlength(score, _font(26)) - 12
        if moment.finished and width >= MIN_WIDTH_FOR_NUMBERS:
            previous = f"game {len(moment.finished) + 1}, before {moment.finished[-1]:+.0f}"
            draw.text((left + room, baseline), previous, FAINT, _font(13), "rs")
            room -= draw.textlength(previous, _font(13)) + 12
        draw.text((left, baseline), _shorten(draw, self.names[player], room), self.colours[player], _font(20), "ls")

    def _draw_bars(
        self, draw: ImageDraw.ImageDraw, corner: tuple[int, int], width: int, player: int, moment: Moment
    ) -> None:
        # Games with all 18 actions take two columns, whose names need a smaller font and leave no room for numbers.
        num_columns = -(-len(self.actions) // MAX_BARS_PER_COLUMN)
        column_width = (width - MARGIN * (num_columns - 1)) // num_columns
        has_numbers = column_width >= MIN_WIDTH_FOR_NUMBERS
        font = _font(13) if has_numbers else _font(10)
        name_width = 96 if has_numbers else 92
        number_width = 40 if has_numbers else 0
        for a, (name, probability) in enumerate(zip(self.actions, moment.probabilities_A.tolist(), strict=True)):
            column, row = divmod(a, MAX_BARS_PER_COLUMN)
            left = corner[0] + column * (column_width + MARGIN)
            middle = corner[1] + row * BAR_HEIGHT + BAR_HEIGHT // 2
            # The action that is taken is drawn in the player's full colour, the others dimmed.
            is_taken = a == moment.action
            text_colour = INK if is_taken else FAINT
            bar_colour = self.colours[player] if is_taken else _dim(self.colours[player])
            start = left + name_width
            end = left + column_width - number_width
            draw.text((left, middle), name, text_colour, font, "lm")
            draw.rounded_rectangle((start, middle - 6, end, middle + 6), 3, PANEL)
            length = round(probability * (end - start))
            if length > 0:
                draw.rounded_rectangle((start, middle - 6, start + length, middle + 6), min(3, length // 2), bar_colour)
            if has_numbers:
                draw.text((left + column_width, middle), f"{probability:.0%}", text_colour, font, "rm")


def _shorten(draw: ImageDraw.ImageDraw, name: str, room: float) -> str:
    """Returns a name with its middle replaced by dots if it is wider than `room` pixels."""
    shorter = name
    kept = len(name)
    while kept > 2 and draw.textlength(shorter, _font(20)) > room:
        kept -= 1
        head = kept // 2
        shorter = f"{name[:head]}...{name[len(name) - (kept - head) :]}"
    return shorter


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


@functools.cache
def _dim(colour: str) -> tuple[int, int, int]:
    """Returns the colour half way to the panel behind it."""
    front = Image.new("RGB", (1, 1), colour)
    back = Image.new("RGB", (1, 1), PANEL)
    red, green, blue = np.asarray(Image.blend(front, back, 0.5))[0, 0].tolist()
    return red, green, blue
