"""`policykd`: every subcommand's help, lazy imports, errors of `policykd distill` before anything is written."""

import re
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from policykd.agents.teacher import load_teacher
from policykd.cli.errors import BAD_FILE, USAGE
from policykd.cli.main import COMMANDS, execute, load_command, main, run_command
from policykd.io.machine import prepare_device

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


def fails(words: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Returns exit code and standard error of `policykd distill`, in this process."""
    with pytest.raises(SystemExit) as ended:
        run_command("distill", words)
    assert isinstance(ended.value.code, int)
    return ended.value.code, capfd.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        execute(name, ["--help"])
    output = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"usage: policykd {name}" in output
    assert load_command(name)[0] is not None


def test_the_help_of_distill_documents_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        execute("distill", ["--help"])
    output = capsys.readouterr().out
    for word in ("--game", "--student", "DAgger", "KL(teacher", "{auto,cuda,mps,cpu}", "--config", "policykd resume"):
        assert word in output


def test_policykd_lists_its_commands_without_importing_torch() -> None:
    code = (
        "import sys; from policykd.cli.main import main; sys.argv = ['policykd', '--help']\n"
        "try: main()\nfinally: print({'torch', 'tyro', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert done.stdout.endswith("set()\n")


@pytest.mark.parametrize(("word", "reason"), [("distil", "did you mean distill?"), ("--game", "unknown command")])
def test_an_unknown_command_is_one_line(
    word: str, reason: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["policykd", word])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capfd.readouterr().err
    assert (ended.value.code, error.count("\n")) == (USAGE, 1)
    assert reason in error


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_a_wrapper_of_its_command(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(script.read_text().splitlines()) <= 8
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    assert "usage: policykd " in capsys.readouterr().out


def test_policykd_is_also_a_module() -> None:
    assert find_spec("policykd.__main__")


ERRORS = {
    "unknown game": ("--game Pomg", "did you mean Pong"),
    "no game": ("", "--game"),
    "no teacher": ("--game Breakout --teacher bundled", "bundled"),
    "missing archive": ("--game Pong --teacher nowhere.zip", "nowhere.zip: "),
    "an unknown algorithm": ("--game Pong --teacher hub:dqm", "give one of ppo, a2c, dqn, qrdqn"),
    "states from nowhere": ("--game Pong --states dataset:nowhere", "nowhere: "),
    "unknown states": ("--game Pong --states replay", "give one of mixed, student, teacher, dataset:PATH"),
    "truncated archive": ("--game Pong --teacher {cut}", "truncated"),
    "foreign archive": ("--game Pong --teacher {foreign}", "data"),
    "another game": ("--game Breakout --teacher {plain}", "another game"),
    "negative temperature": ("--game Pong loss:forward-kl --loss.temperature -1", "temperature must be"),
    "an unknown loss": ("--game Pong --loss huber", "--loss huber: invalid; give one of forward-kl"),
    "a schedule that ends at 0": ("--game Pong --loss.temperature linear:1:0", "temperature must be"),
    "too much noise": ("--game Pong --states student --states.epsilon 7", "epsilon must be in [0, 1]"),
    "weights for too many": (
        "--game Pong --teacher bundled:ppo+bundled:dqn --teacher-weights 1,2,3",
        "3 teacher weights for 2 teachers",
    ),
    "fewer than no rounds": ("--game Pong --rounds -1", "rounds must be at least 0"),
    "a name that is a path": ("--game Pong --name ../x", "--name must be the name of a folder"),
    "a missing config": ("--config nowhere.json", "nowhere.json: No such file"),
    "a device that is not available": ("--game Pong --device cuda", "use --device cpu"),
}
FOREIGN_CONTENT = {"truncated archive", "foreign archive", "another game", "a missing config"}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_line_and_leaves_nothing(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "cuda" in ERRORS[case][0] and torch.cuda.is_available():
        pytest.skip("it is available")
    monkeypatch.setenv("COLUMNS", "200")
    bundled = load_teacher(game="Pong").path
    files = {name: tmp_path / f"{name}.zip" for name in ("cut", "foreign", "plain")}
    files["cut"].write_bytes(bundled.read_bytes()[:1_000_000])
    shutil.make_archive(str(tmp_path / "foreign"), "zip", ROOT / "docs")
    shutil.copy(bundled, files["plain"])
    words, reason = ERRORS[case]
    runs = tmp_path / "runs"
    code, error = fails(["--folder", str(runs), *words.format(**files).split()], capfd)
    assert code == (BAD_FILE if case in FOREIGN_CONTENT else USAGE), error
    assert len(error.strip().splitlines()) == 1
    assert reason in error
    assert not runs.exists()


def test_a_folder_that_is_not_writable_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    code, error = fails(["--game", "Pong", "--folder", str(tmp_path / "file")], capfd)
    assert (code, error.count("\n")) == (4, 1)
    assert re.search(rf"{tmp_path}/file.*Not a directory", error)


def test_a_device_that_torch_does_not_have_is_named() -> None:
    name: Any = "gpu"
    with pytest.raises(ValueError, match="--device gpu: not available"):
        prepare_device(name, 0)


def test_help_describes_policies_and_seeds_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        execute("evaluate", ["--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "teacher: teacher:" not in words
    assert "random seed (default: 0)" in words
