"""The window, on SDL's screen that nobody sees: pictures as they are, keys, sizes, signals."""

import signal
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from policykd.io.signals import handle_signals
from policykd.viewer.window import has_screen, show

pygame = pytest.importorskip("pygame")
FAST = {"title": "t", "pictures_per_second": 200.0}


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


def test_it_shows_them_no_faster_than_asked() -> None:
    start = time.monotonic()
    show(pictures(10), title="t", pictures_per_second=50.0)
    assert time.monotonic() - start >= 0.17


@pytest.mark.parametrize("key", [pygame.K_q, pygame.K_ESCAPE])
def test_q_and_escape_close_it(key: int) -> None:
    assert show(pictures(20, {5: key}), **FAST) == 6  # type: ignore[arg-type]


def test_the_space_bar_pauses_and_resumes() -> None:
    shown = 0

    def counted() -> Iterator[Image.Image]:
        nonlocal shown
        for picture in pictures(8, {3: pygame.K_SPACE}):
            shown += 1
            yield picture

    def resume() -> None:
        while shown < 4:
            time.sleep(0.05)
        time.sleep(0.4)
        while_paused.append(shown)
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_SPACE))

    while_paused: list[int] = []
    thread = threading.Thread(target=resume)
    thread.start()
    try:
        assert show(counted(), **FAST) == 8  # type: ignore[arg-type]
    finally:
        thread.join()
    assert while_paused == [4]


@pytest.mark.parametrize(("window", "corner"), [((200, 120), (60, 0)), ((20, 300), (0, 135))])
def test_a_picture_keeps_its_shape_in_any_window(window: tuple[int, int], corner: tuple[int, int]) -> None:
    """40 by 60 pixels, in the middle; the rest is background."""
    seen: list[np.ndarray] = []

    def resized() -> Iterator[Image.Image]:
        white = Image.new("RGB", (40, 60), "#ffffff")
        yield white
        pygame.display.set_mode(window, pygame.RESIZABLE)
        yield white
        seen.append(pygame.surfarray.array3d(pygame.display.get_surface()))

    assert show(resized(), **FAST) == 2  # type: ignore[arg-type]
    columns, rows = np.nonzero((seen[0] == 255).all(axis=2))
    assert (columns.min(), rows.min()) == corner
    assert (window[0] - 1 - columns.max(), window[1] - 1 - rows.max()) == corner


def test_ctrl_c_closes_it() -> None:
    def interrupted() -> Iterator[Image.Image]:
        for i, picture in enumerate(pictures(100)):
            if i == 3:
                signal.raise_signal(signal.SIGINT)
            yield picture

    with pytest.raises(KeyboardInterrupt), handle_signals():  # whatever the shell has set for SIGINT
        show(interrupted(), **FAST)  # type: ignore[arg-type]
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
