"""The window, on SDL's screen that nobody sees: pictures as they are, keys, sizes, signals."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from policykd.io.signals import noting_signals
from policykd.viewer.window import _fitted, has_screen, show

pygame = pytest.importorskip("pygame")
FAST = {"title": "t", "pictures_a_second": 200.0}


@pytest.fixture(autouse=True)
def _unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


def pictures(num: int, then: dict[int, int] | None = None) -> Iterator[Image.Image]:
    """Yields noise, and presses the keys `then` says while a picture is made."""
    random = np.random.default_rng(0)
    for i in range(num):
        if then and i in then:
            pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=then[i]))
        yield Image.fromarray(random.integers(0, 256, (60, 40, 3), np.uint8))


def test_it_shows_every_picture_as_it_is() -> None:
    seen: list[np.ndarray] = []

    def watched() -> Iterator[Image.Image]:
        for picture in pictures(4):
            yield picture
            seen.append(pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1))

    assert show(watched(), **FAST) == 4  # type: ignore[arg-type]
    assert all((shown == np.asarray(drawn)).all() for shown, drawn in zip(seen, pictures(4), strict=True))
    assert not pygame.display.get_init()


def test_it_shows_them_at_the_speed_that_is_asked_for() -> None:
    began = time.monotonic()
    show(pictures(10), title="t", pictures_a_second=50.0)
    assert time.monotonic() - began >= 0.17


@pytest.mark.parametrize("key", [pygame.K_q, pygame.K_ESCAPE])
def test_q_and_escape_close_it(key: int) -> None:
    assert show(pictures(20, {5: key}), **FAST) == 6  # type: ignore[arg-type]


def test_the_space_bar_pauses_and_goes_on() -> None:
    shown = 0

    def counted() -> Iterator[Image.Image]:
        nonlocal shown
        for picture in pictures(8, {3: pygame.K_SPACE}):
            shown += 1
            yield picture

    def go_on() -> None:
        time.sleep(0.4)
        while_paused.append(shown)
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_SPACE))

    while_paused: list[int] = []
    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        assert show(counted(), **FAST) == 8  # type: ignore[arg-type]
    finally:
        thread.join()
    assert while_paused == [4]


def test_a_picture_keeps_its_shape_in_any_window() -> None:
    assert _fitted((40, 60), (40, 60)) == ((40, 60), (0, 0))
    assert _fitted((40, 60), (200, 120)) == ((80, 120), (60, 0))
    assert _fitted((40, 60), (20, 300)) == ((20, 30), (0, 135))


def test_a_signal_closes_it() -> None:
    def stopped() -> Iterator[Image.Image]:
        for i, picture in enumerate(pictures(100)):
            if i == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield picture

    with noting_signals(), pytest.raises(KeyboardInterrupt):
        show(stopped(), **FAST)  # type: ignore[arg-type]
    assert not pygame.display.get_init()


def test_a_driver_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "none-such")
    with pytest.raises(ValueError, match=r"no window can be opened here .*--out FILE"):
        show(pictures(1), **FAST)  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="there is always a screen")
@pytest.mark.parametrize(("variable", "expected"), [("DISPLAY", True), ("WAYLAND_DISPLAY", True), ("HOME", False)])
def test_where_there_is_a_screen(variable: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, ":0")
    assert has_screen() == expected
