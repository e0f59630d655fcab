"""`policykd watch` on real Pong: in a window that nobody sees, and into files."""

import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from policykd.agents.card import Provenance
from policykd.agents.student import make_student, save_student
from policykd.agents.teacher import load_teacher
from policykd.cli.main import execute
from policykd.io.files import BadFile

needs_no_screen = pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="there is always a screen")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a student that has learned nothing."""
    teacher = load_teacher("bundled:ppo", game="Pong").record
    save_student(make_student("1%", 6), tmp_path / "small", Provenance(game="Pong", teacher=teacher))
    return tmp_path / "small"


@pytest.fixture(autouse=True)
def _no_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)


@needs_no_screen
def test_without_a_screen_both_policies_go_into_the_runs_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    execute("watch", [str(run), "--steps", "30"])
    out = capsys.readouterr().out
    assert "no screen found, so 2 seconds of play are written to a file" in out
    assert f"{run}/watch.gif: bundled:ppo and small on Pong" in out
    with Image.open(run / "watch.gif") as film:
        assert film.size == (2 * 320 + 3 * 16, 660)
        assert film.n_frames > 5  # type: ignore[attr-defined]
    assert sorted(p.name for p in run.iterdir()) == ["student.json", "student.safetensors", "watch.gif"]


def test_a_student_alone_into_a_named_file(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "film.webp"
    how = ["--against", "none", "--sticky", "--scale", "1", "--every", "1"]
    execute("watch", [str(run), "--out", str(out), "--steps", "6", *how])
    with Image.open(out) as film:
        assert (film.format, film.width) == ("WEBP", 160 + 2 * 16)


def test_two_teachers_next_to_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "film.gif")
    execute("watch", ["bundled:ppo", "--against", "bundled:dqn", "--out", out, "--steps", "2"])
    assert "bundled:dqn and bundled:ppo on Pong" in capsys.readouterr().out


def test_in_a_window(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    titles: list[str] = []
    monkeypatch.setattr(pygame.display, "set_caption", titles.append)
    execute("watch", [str(run), "--steps", "3"])
    assert titles == ["Pong: bundled:ppo and small"]
    assert not (run / "watch.gif").exists()


@needs_no_screen
@pytest.mark.parametrize("driver", ["", "x11"])
def test_an_unreachable_screen_is_reported_and_a_file_is_written(
    driver: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SDL itself falls back to pictures that nobody sees."""
    pytest.importorskip("pygame")
    monkeypatch.setenv("DISPLAY", ":12345")
    if driver:
        monkeypatch.setenv("SDL_VIDEODRIVER", driver)
    execute("watch", [str(run), "--steps", "2", "--against", "none", "--seed", "4294967295"])
    reported = r"^no window can be opened here \(.+\), so 0 seconds of play are written to a file$"
    assert re.search(reported, capsys.readouterr().out, re.M)
    assert (run / "watch.gif").is_file()


def test_a_missing_package_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(SystemExit) as ended:
        execute("watch", [str(run), "--steps", "1"])
    assert ended.value.code == 2
    assert re.fullmatch(r"[^\n]*pip install 'policykd\[watch\]'[^\n]*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["none-such"], "none-such: file or folder not found"),
        (["RUN", "--out", "film.mp4"], "--out film.mp4: give a name that ends in .gif or .webp"),
        (["RUN", "--out", "none-such/film.gif"], "folder not found; create it first"),
        (["RUN", "--out", "film.gif", "--steps", "100000"], "the pictures take more than 2 GB of memory"),
        (["RUN", "--scale", "17"], "--scale must be at least 1 and at most 16, not 17"),
        (["RUN", "--every", "0"], "--every must be at least 1, not 0"),
        (["RUN", "--every", "500", "--steps", "30"], "--every must be at most the number of steps, 30"),
        (["RUN", "--out", "film.gif", "--every", "301"], "--every must be at most the number of steps, 300"),
        (["RUN", "--seed", "99999999999999999999999"], "--seed must be at least 0 and at most 4294967295"),
        (["RUN", "--game", "Breakout"], "another game"),
    ],
)
def test_an_invalid_argument_is_one_line(words: list[str], reason: str, run: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as raised:
        execute("watch", [str(run) if word == "RUN" else word for word in words])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("kind", "ref"), [(BadFile, "bundled:dqn"), (ValueError, "gone.zip")])
def test_another_teacher_or_none_is_refused_with_the_way_out(kind: type[Exception], ref: str, run: Path) -> None:
    card = run / "student.json"
    card.write_text(card.read_text().replace("bundled:ppo", ref))
    with pytest.raises(kind, match=rf"{ref}.*--against REF or none"):
        execute("watch", [str(run), "--steps", "2"])
