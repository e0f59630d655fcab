"""A window that shows pictures at the speed of the game."""

import os
import sys
import time
from collections.abc import Iterable

from PIL import Image

from policykd.viewer.colours import PAPER

# SDL falls back to these drivers if it finds no screen; they draw windows that nobody sees.
INVISIBLE_DRIVERS = {"offscreen", "dummy"}


class NoWindow(ValueError):  # noqa: N818
    """No window can be opened, whatever the environment promises."""


def has_screen() -> bool:
    """Returns whether the environment names a screen to open a window on."""
    if sys.platform in ("darwin", "win32"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"))


def show(pictures: Iterable[Image.Image], *, title: str, pictures_per_second: float) -> int:
    """Shows pictures until they end or the window is closed, and returns how many were shown.

    The space bar pauses and resumes; q, escape and the window's close button close it. A late picture is shown at
    once; none is skipped. Needs the package pygame-ce.

    Raises:
        NoWindow: not even the first picture can be shown.
        ValueError: the window is lost later.
    """
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    import pygame

    num_shown = 0
    try:
        pygame.display.init()
        driver = pygame.display.get_driver()
        requested = os.environ.get("SDL_VIDEODRIVER", "").split(",")
        if driver in INVISIBLE_DRIVERS.difference(requested):
            raise pygame.error(f"SDL finds no screen and draws {driver}")
        clock = pygame.time.Clock()
        for picture in pictures:
            if num_shown == 0:
                pygame.display.set_caption(title)
                pygame.display.set_mode(picture.size, pygame.RESIZABLE)
            # SDL replaces the surface when the window is resized, so ask for it each time.
            window = pygame.display.get_surface()
            assert window is not None
            image = pygame.image.frombytes(picture.tobytes(), picture.size, "RGB")
            # The largest rectangle of the picture's shape that fits into the window, in its centre.
            place = image.get_rect().fit(window.get_rect())
            if place.size != picture.size:
                image = pygame.transform.smoothscale(image, place.size)
            window.fill(PAPER)
            window.blit(image, place)
            pygame.display.flip()
            num_shown += 1
            # Waits for what is left of the picture's time; one that comes late is shown at once.
            clock.tick(pictures_per_second)
            if _is_closed():
                break
        return num_shown
    except pygame.error as error:
        if num_shown == 0:
            raise NoWindow(f"no window can be opened here ({error}); give --out FILE for an animation") from error
        raise ValueError(f"the window is lost ({error}); give --out FILE for an animation") from error
    finally:
        pygame.display.quit()


def _is_closed() -> bool:
    """Handles key presses, waits while paused, and returns whether the window was closed."""
    import pygame

    is_paused = False
    while True:
        for event in pygame.event.get():
            key = event.key if event.type == pygame.KEYDOWN else None
            if event.type == pygame.QUIT or key in (pygame.K_q, pygame.K_ESCAPE):
                return True
            if key == pygame.K_SPACE:
                is_paused = not is_paused
        if not is_paused:
            return False
        time.sleep(0.02)
