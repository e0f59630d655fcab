"""A window that shows pictures at the speed of the game."""

import os
import sys
import time
from collections.abc import Iterable

from PIL import Image

from policykd.io.signals import check_interrupted
from policykd.viewer.colours import PAPER

UNSEEN = {"offscreen", "dummy"}
"""drivers that SDL falls back to where it reaches no screen; they draw windows that nobody sees"""


class NoWindow(ValueError):  # noqa: N818
    """No window can be opened here, whatever the environment says."""


def has_screen() -> bool:
    """Returns whether there is a screen to open a window on, as far as the environment says."""
    if sys.platform in ("darwin", "win32"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"))


def show(pictures: Iterable[Image.Image], *, title: str, pictures_a_second: float) -> int:
    """Shows pictures until there are no more or the window is closed; needs the package pygame-ce.

    The space bar pauses and goes on; q, escape and the window's own button close it. A picture that comes late is shown
    at once, none is left out.

    Returns:
        How many were shown.

    Raises:
        NoWindow: not even the first picture can be shown.
        ValueError: the window is lost later.
        KeyboardInterrupt: a signal has come.
    """
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    import pygame

    num_shown, due = 0, time.monotonic()
    try:
        pygame.display.init()
        if (driver := pygame.display.get_driver()) in UNSEEN - set(os.environ.get("SDL_VIDEODRIVER", "").split(",")):
            raise pygame.error(f"SDL reaches no screen and draws {driver}")
        for picture in pictures:
            if num_shown == 0:
                pygame.display.set_caption(title)
                pygame.display.set_mode(picture.size, pygame.RESIZABLE)
            window = pygame.display.get_surface()  # another one where the window has another size
            assert window is not None
            size, corner = _fitted(picture.size, window.get_size())
            drawn = pygame.image.frombytes(picture.tobytes(), picture.size, "RGB")
            window.fill(PAPER)
            window.blit(pygame.transform.smoothscale(drawn, size) if size != picture.size else drawn, corner)
            pygame.display.flip()
            num_shown += 1
            due = max(due + 1.0 / pictures_a_second, time.monotonic() - 0.1)
            if _closed_before(due):
                break
        return num_shown
    except pygame.error as error:
        if num_shown == 0:
            raise NoWindow(f"no window can be opened here ({error}); give --out FILE for an animation") from error
        raise ValueError(f"the window is lost ({error}); give --out FILE for an animation") from error
    finally:
        pygame.display.quit()


def _fitted(size: tuple[int, int], room: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the largest size of the same shape that fits into a room, and the corner that puts it in the middle."""
    scale = min(room[0] / size[0], room[1] / size[1])
    width, height = max(1, round(scale * size[0])), max(1, round(scale * size[1]))
    return (width, height), ((room[0] - width) // 2, (room[1] - height) // 2)


def _closed_before(due: float) -> bool:
    """Waits until a picture's time is over, longer while paused; returns whether the window was closed."""
    import pygame

    paused = False
    while True:
        check_interrupted()
        for event in pygame.event.get():
            key = event.key if event.type == pygame.KEYDOWN else None
            if event.type == pygame.QUIT or key in (pygame.K_q, pygame.K_ESCAPE):
                return True
            if key == pygame.K_SPACE:
                paused = not paused
        left = due - time.monotonic()
        if left <= 0.0 and not paused:
            return False
        time.sleep(0.02 if paused else min(left, 0.02))
