"""scripts/watch.py on real Pong: in a window that nobody sees, and into files."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from policykd.agents.card import Provenance
from policykd.agents.student import make_student, save_student
from policykd.agents.teacher import load_teacher
from policykd.cli.command import BAD_FILE, USAGE

SCRIPT = Path(__file__).parents[1] / "scripts" / "watch.py"
Watch = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run of distillation leaves, with a student that has learned nothing."""
    teacher = load_teacher("bundled:ppo", game="Pong").record
    save_student(make_student("1%", 6), tmp_path / "small", Provenance(game="Pong", teacher=teacher))
    return tmp_path / "small"


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Watch:
    """Runs the command in this process, where there is no screen: exit code, output, errors."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)

    def watch(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["watch.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert isinstance(ended.value.code, int)
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return watch


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="there is always a screen")
def test_without_a_screen_teacher_and_student_go_into_the_runs_folder(run: Path, watch: Watch) -> None:
    code, out, err = watch(str(run), "--steps", "30")
    assert (code, err) == (0, "")
    assert "no screen found, so 2 seconds of play are written to a file" in out
    assert f"{run}/watch.gif: bundled:ppo and small on Pong" in out
    with Image.open(run / "watch.gif") as film:
        assert film.size == (2 * 320 + 3 * 16, 660)
        assert film.n_frames > 5  # type: ignore[attr-defined]
    assert sorted(p.name for p in run.iterdir()) == ["student.json", "student.safetensors", "watch.gif"]


def test_a_student_alone_into_a_named_file(run: Path, watch: Watch, tmp_path: Path) -> None:
    out = tmp_path / "film.webp"
    how = ["--against", "none", "--sticky", "--scale", "1", "--every", "1"]
    code, said, err = watch(str(run), "--out", str(out), "--steps", "6", *how)
    assert (code, err) == (0, "")
    assert "screen" not in said
    with Image.open(out) as film:
        assert (film.format, film.width) == ("WEBP", 160 + 2 * 16)


def test_two_teachers_beside_each_other(watch: Watch, tmp_path: Path) -> None:
    out = str(tmp_path / "film.gif")
    code, said, err = watch("bundled:ppo", "--against", "bundled:dqn", "--out", out, "--steps", "2")
    assert (code, err) == (0, "")
    assert "bundled:dqn and bundled:ppo on Pong" in said


def test_in_a_window(run: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    titles: list[str] = []
    monkeypatch.setattr(pygame.display, "set_caption", titles.append)
    code, out, err = watch(str(run), "--steps", "3")
    assert (code, out, err) == (0, "", "")
    assert titles == ["Pong: bundled:ppo and small"]
    assert not (run / "watch.gif").exists()


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="there is always a screen")
@pytest.mark.parametrize("driver", ["", "x11"])
def test_a_screen_that_is_gone_is_said_and_a_file_is_written(
    driver: str, run: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDL itself falls back to pictures that nobody sees."""
    pytest.importorskip("pygame")
    monkeypatch.setenv("DISPLAY", ":12345")
    if driver:
        monkeypatch.setenv("SDL_VIDEODRIVER", driver)
    code, out, _ = watch(str(run), "--steps", "2", "--against", "none", "--seed", "4294967295")
    assert code == 0
    assert re.search(r"^no window can be opened here \(.+\), so 0 seconds of play are written to a file$", out, re.M)
    assert (run / "watch.gif").is_file()


def test_a_window_without_its_package_is_one_line(run: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setitem(sys.modules, "pygame", None)
    code, _, err = watch(str(run), "--steps", "1")
    assert (code, len(err.splitlines())) == (USAGE, 1)
    assert "pip install 'policykd[watch]'" in err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["none-such"], USAGE, "none-such: no such file or folder"),
        (["RUN", "--out", "film.mp4"], USAGE, "--out film.mp4: give a name that ends in .gif or .webp"),
        (["RUN", "--out", "none-such/film.gif"], USAGE, "folder not found; create it first"),
        (
            ["RUN", "--out", "film.gif", "--steps", "100000"],
            USAGE,
            "50,000 pictures take 68.1 GB of memory, the maximum",
        ),
        (["RUN", "--scale", "17"], USAGE, "--scale must be at least 1 and at most 16, not 17"),
        (["RUN", "--every", "0"], USAGE, "--every must be at least 1, not 0"),
        (["RUN", "--every", "500", "--steps", "30"], USAGE, "--every 500: only one picture in 30 steps; lower it"),
        (["RUN", "--out", "film.gif", "--every", "301"], USAGE, "--every 301: only one picture in 300 steps"),
        (["RUN", "--seed", "99999999999999999999999"], USAGE, "--seed must be at least 0 and at most 4294967295"),
        (["RUN", "--game", "Breakout"], BAD_FILE, "it was made for another game"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], code: int, said: str, run: Path, watch: Watch) -> None:
    ended, _, err = watch(*[str(run) if word == "RUN" else word for word in arguments])
    assert (ended, len(err.splitlines())) == (code, 1)
    assert said in err


def test_another_archive_than_the_run_learned_from_is_refused(run: Path, watch: Watch) -> None:
    card = run / "student.json"
    card.write_text(card.read_text().replace("bundled:ppo", "bundled:dqn"))
    code, _, err = watch(str(run), "--steps", "2")
    assert code == BAD_FILE
    assert f"bundled:dqn: not the archive that {run} learned from any more; give --against REF or none" in err


def test_a_teacher_that_is_gone_is_named_with_the_way_out(run: Path, watch: Watch) -> None:
    card = run / "student.json"
    card.write_text(card.read_text().replace("bundled:ppo", "gone.zip"))
    code, _, err = watch(str(run), "--steps", "2")
    assert code == USAGE
    assert "its teacher is not found (gone.zip: no such file" in err
    assert "--against REF or none" in err
