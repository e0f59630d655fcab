"""Frames drawn band by band are those that OpenCV draws whole; the table of colours is ALE's."""

from pathlib import Path

import ale_py
import cv2
import numpy as np
import pytest
from ale_py import roms

from policykd.envs.screens import Screens, palette

COLOURS = bytes.fromhex(
    "78 d8 a2 ff 9a"  # sei; cld; ldx #255; txs
    "a9 02 85 00 85 02 85 02 85 02 a9 00 85 00 85 01 a0 00"  # frame: three lines of VSYNC; ldy #0
    "84 09" + "ea" * 10 + "98 49 80 85 09"  # line: COLUBK is y, then y ^ 128
    "85 02 c8 d0 ea 4c 05 f0"  # the next line; the next frame
)
"""a program for the console that shows every colour at once"""


def whole(pair: np.ndarray, height: int) -> np.ndarray:
    rgb = palette(height)[pair].max(axis=0)
    return np.asarray(cv2.resize(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), (84, 84), interpolation=cv2.INTER_AREA))


@pytest.mark.parametrize("height", [210, 220, 250])
def test_changes_anywhere_give_the_frame_that_is_drawn_whole(height: int) -> None:
    generator = np.random.default_rng(height)
    frames = np.zeros((3, 84, 84), np.uint8)
    screens = Screens(frames, height)
    shown = 2 * generator.integers(128, size=(3, 2, height, 160), dtype=np.uint8)
    screens.next[:] = shown
    screens.draw()
    for _ in range(40):
        for game in range(3):
            if generator.random() < 0.2:
                screens.keep(game)
                continue
            for _ in range(generator.integers(12)):
                row, column = generator.integers(height), generator.integers(160)
                box = shown[game, generator.integers(2), row : row + generator.integers(1, 40), column : column + 8]
                box[:] = 2 * generator.integers(128, size=box.shape)
            screens.next[game] = shown[game]
        screens.draw()
        for game in range(3):
            np.testing.assert_array_equal(screens.drawn[game], shown[game])
            np.testing.assert_array_equal(frames[game], whole(shown[game], height))
    np.testing.assert_array_equal(screens.rgb()[1], palette(height)[shown[1]].max(axis=0))


def test_all_128_colours_are_those_of_the_emulator(tmp_path: Path) -> None:
    rom = tmp_path / "seaquest.bin"  # ALE knows games by their names
    content = COLOURS.ljust(4096, b"\0")
    rom.write_bytes(content[:-4] + b"\x00\xf0\x00\xf0")
    ale = ale_py.ALEInterface()
    ale.loadROM(rom)
    ale.act(0)
    screen = ale.getScreen()
    assert np.unique(screen).tolist() == list(range(0, 256, 2))
    np.testing.assert_array_equal(palette(210)[screen], ale.getScreenRGB())


@pytest.mark.parametrize("game", ["pong", "air_raid", "pacman", "journey_escape"])
def test_games_of_every_height_have_their_colours(game: str) -> None:
    ale = ale_py.ALEInterface()
    path = roms.get_rom_path(game)
    assert path
    ale.loadROM(path)
    for k in range(20):
        for _ in range(5):
            ale.act(k % 3)
        np.testing.assert_array_equal(palette(ale.getScreenDims()[0])[ale.getScreen()], ale.getScreenRGB())
